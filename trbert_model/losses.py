"""The tasks' losses in training: of each example of a batch, to its labels and to the dense model's outputs.

An example is one window for classification and several of one question's windows for question answering, which share
one softmax. `repeats` is how often the batch was repeated (`TokenState.repeated`); losses come in the same
order, the whole batch after the whole batch.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class TaskLosses(Protocol):
    """What an objective needs to know of a task.

    guided_by_saliency: whether its guide is the dense model's saliency (`teacher.guide`), `batch["guide"]`.
    """

    guided_by_saliency: ClassVar[bool]

    def labelled(self, output: Any, batch: dict[str, Tensor], repeats: int = 1) -> Tensor:
        """The loss to the labels, (repeats · examples,)."""

    def distilled(self, output: Any, batch: dict[str, Tensor], repeats: int = 1) -> Tensor:
        """The loss to what the dense model says, `batch["teacher"]`, (repeats · examples,)."""

    def signals(self, output: Any) -> Tensor:
        """What of the dense model's output is a later `batch["teacher"]`, (rows, columns)."""

    def rows(self, lengths: Tensor) -> Tensor:
        """How many of these rows belong to windows of these lengths, int64 (windows,)."""

    def guide(self, batch: dict[str, Tensor], layers: Sequence[int]) -> Tensor:
        """What ranks the tokens that are to go on into each of these layers, (layers, total tokens)."""

    def keep_targets(self, batch: dict[str, Tensor], layers: Sequence[int], counts: Tensor) -> Tensor:
        """The keep probabilities that selectors in front of these layers imitate, (layers, total tokens), where
        `counts`, int64 (windows, layers), are the tokens of each window that are to go on."""

    def imitation(self, logits: Tensor, targets: Tensor, example: Tensor) -> Tensor:
        """The loss, (), of keep logits of some tokens to their keep targets; example: int64, the same shape."""

    def completed(self, batch: dict[str, Tensor], signals: Tensor) -> dict[str, Tensor]:
        """The batch with what the dense model says, such rows, in the place of what nobody knows to be right."""


def mean_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    entropies = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return entropies.sum() / max(len(entropies), 1)  # there may be nothing left to judge


def log_sums(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """Log of the sum of exponentials of each group's values, (groups,); a group without any has none: -inf."""
    highest = torch.full((groups,), -torch.inf, device=values.device).scatter_reduce(0, group, values.detach(), "amax")
    shift = torch.where(highest.isfinite(), highest, torch.zeros_like(highest))
    sums = torch.zeros(groups, device=values.device).index_add(0, group, (values - shift[group]).exp())
    return sums.log() + shift
