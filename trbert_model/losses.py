"""The tasks' training losses: per example of a batch, against its labels and against the dense model's outputs.

An example is one window for classification by the mean. For classification by log-sum-exp and for question answering
it is several windows of one document, which share one softmax. If the batch was repeated (`TokenState.repeated`),
`repeats` is the number of copies, and the losses are in the same order: all examples of the first copy, then those of
the second, and so on.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import ConfigurationError
from .varlen import top_tokens

if TYPE_CHECKING:
    from .exits.passing import ExitPass


class TaskLosses(Protocol):
    """The losses that a training objective needs from a task."""

    @property
    def guided_by_saliency(self) -> bool:
        """Whether the guide is of the dense model (`teacher.guide` or `attention_guide`), in `batch["guide"]`."""

    def labelled(self, output: Any, batch: dict[str, Tensor], repeats: int = 1) -> Tensor:
        """The loss against the labels, (repeats · examples,)."""

    def distilled(self, output: Any, batch: dict[str, Tensor], repeats: int = 1) -> Tensor:
        """The loss against the dense model's outputs, `batch["teacher"]`, (repeats · examples,)."""

    def signals(self, output: Any) -> Tensor:
        """The part of the dense model's output to use as `batch["teacher"]`, (rows, columns)."""

    def rows(self, lengths: Tensor) -> Tensor:
        """The number of rows in `signals` per window, int64 (windows,); lengths: tokens of each window."""

    def guide(self, batch: dict[str, Tensor], layers: Sequence[int]) -> Tensor:
        """Scores that rank the tokens to keep at the input of each of these layers, (layers, total tokens)."""

    def keep_targets(self, batch: dict[str, Tensor], layers: Sequence[int], counts: Tensor) -> Tensor:
        """The keep probabilities that the selectors before these layers imitate, (layers, total tokens).

        Args:
            counts: int64 (windows, layers), number of tokens of each window to keep.
        """

    def imitation(self, logits: Tensor, targets: Tensor, example: Tensor) -> Tensor:
        """The loss, (), of the keep logits of some tokens, (tokens,), against their keep targets, (tokens,).

        Args:
            example: int64 (tokens,), the index of each token's example.
        """

    def completed(self, batch: dict[str, Tensor], signals: Tensor) -> dict[str, Tensor]:
        """The batch with missing labels replaced by the dense model's; signals: as from `signals`."""


class ExitLosses(TaskLosses, Protocol):
    """The losses of a task whose models can have exits (`Task.exit_heads`)."""

    def of_exits(self, exits: "ExitPass", batch: dict[str, Tensor], *, distilled: bool) -> Tensor:
        """The mean loss of each exit over what it judged, (exits,).

        Without that of an exit that answers for all, which is the model's classifier.

        Args:
            exits: of a pass that recorded the logits.
            distilled: against the dense model's outputs, not the labels.
        """


class SaliencyGuided:
    """The part of `TaskLosses` about selectors, for tasks whose guide is the dense model's saliency."""

    @property
    def guided_by_saliency(self) -> bool:
        return True

    def guide(self, batch: dict[str, Tensor], layers: Sequence[int]) -> Tensor:
        known = len(batch["guide"])
        if above := [layer for layer in layers if layer >= known]:
            raise ConfigurationError(
                f"reduction layers {above}: the guide judges layers below {known} of this model; do without it "
                "(guide_rate 0, imitation_epochs 0, joint_imitation 0)"
            )
        return batch["guide"][list(layers)]

    def keep_targets(self, batch: dict[str, Tensor], layers: Sequence[int], counts: Tensor) -> Tensor:
        ranked = zip(self.guide(batch, layers), counts.T)
        return torch.stack([top_tokens(scores, batch["cu_seqlens"], count) for scores, count in ranked]).float()

    def imitation(self, logits: Tensor, targets: Tensor, example: Tensor) -> Tensor:
        return mean_entropy(logits, targets)


def mean_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    entropies = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return entropies.sum() / max(len(entropies), 1)  # there may be no tokens to judge


def nearness(right: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    """The nearness of each token to a right one of its window: 1 there, e times less every `scale` tokens.

    Args:
        right: bool (total tokens,).
    """
    distance = torch.zeros(len(right), device=right.device).masked_fill(~right, -torch.inf)
    bounds = cu_seqlens.tolist()
    for start, end in zip(bounds, bounds[1:]):
        peaks, ramp = distance[start:end], torch.arange(end - start, device=right.device) / scale
        before = (peaks + ramp).cummax(0).values - ramp
        after = (peaks - ramp).flip(0).cummax(0).values.flip(0) + ramp
        distance[start:end] = torch.maximum(before, after)
    return distance.exp()


def log_sums(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """The log-sum-exp of each group's values, (groups,); -inf for a group without values."""
    highest = torch.full((groups,), -torch.inf, device=values.device).scatter_reduce(0, group, values.detach(), "amax")
    shift = torch.where(highest.isfinite(), highest, torch.zeros_like(highest))
    sums = torch.zeros(groups, device=values.device).index_add(0, group, (values - shift[group]).exp())
    return sums.log() + shift
