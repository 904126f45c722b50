"""The tasks' losses in training: of each example of a batch, to its labels and to the dense model's outputs.

An example is one window for classification and several of one question's windows for question answering, which share
one softmax. `repeats` is how often the batch was repeated (`TRBertModel.forward`'s `samples`); losses come in the same
order, the whole batch after the whole batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .varlen import first_tokens, top_tokens


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


# The label of a document that has none.
UNLABELLED = -1


@dataclass
class ClassificationLosses:
    """Cross-entropy; batches have `labels`, int64 (windows,), and `teacher`, float32 (windows, labels + hidden): the
    dense model's logits and what its classifier sees.

    features: how much it counts in `distilled` that the classifier sees what the dense model's sees: the squared
    distance over the squared length. The logits of a few labels say little about a document, these say all that the
    dense model makes of it.
    """

    guided_by_saliency: ClassVar[bool] = True
    num_labels: int
    features: float = 0.0

    def labelled(self, output: Any, batch: dict[str, Tensor], repeats: int = 1) -> Tensor:
        return F.cross_entropy(output.logits, batch["labels"].repeat(repeats), reduction="none")

    def distilled(self, output: Any, batch: dict[str, Tensor], repeats: int = 1) -> Tensor:
        logits, features = batch["teacher"].tensor_split([self.num_labels], dim=1)
        loss = -(logits.softmax(-1).repeat(repeats, 1) * output.logits.log_softmax(-1)).sum(-1)
        if not self.features:
            return loss
        distance = (output.pooler_output.float() - features.repeat(repeats, 1)).square().sum(-1)
        return loss + self.features * distance / features.square().sum(-1).clamp(min=1e-6).repeat(repeats)

    def signals(self, output: Any) -> Tensor:
        return torch.cat([output.logits.float(), output.pooler_output.float()], dim=1)

    def rows(self, lengths: Tensor) -> Tensor:
        return torch.ones_like(lengths, dtype=torch.int64)

    def guide(self, batch: dict[str, Tensor], layers: Sequence[int]) -> Tensor:
        return batch["guide"][list(layers)]

    def keep_targets(self, batch: dict[str, Tensor], layers: Sequence[int], counts: Tensor) -> Tensor:
        ranked = zip(self.guide(batch, layers), counts.T)
        return torch.stack([top_tokens(scores, batch["cu_seqlens"], count) for scores, count in ranked]).float()

    def imitation(self, logits: Tensor, targets: Tensor, example: Tensor) -> Tensor:
        return _mean_entropy(logits, targets)

    def completed(self, batch: dict[str, Tensor], signals: Tensor) -> dict[str, Tensor]:
        labels = batch["labels"]
        return {**batch, "labels": torch.where(labels == UNLABELLED, signals[:, : self.num_labels].argmax(-1), labels)}


class AnswerLosses:
    """Start and end each by one softmax over all scored positions of an example's windows, as answers are decoded.

    Batches have `scored`, `start_targets` and `end_targets`, bool (total tokens,): the positions that take part, and
    those that are right, of which there may be several (an answer that several windows hold; every window's first
    token, where there is no answer); `example`, int64 (windows,); and `teacher`, float32 (total tokens, 2).
    """

    guided_by_saliency: ClassVar[bool] = False
    NEAR = 12.0

    def labelled(self, output: Any, batch: dict[str, Tensor], repeats: int = 1) -> Tensor:
        losses = []
        for logits, name in ((output.start_logits, "start_targets"), (output.end_logits, "end_targets")):
            log_probability, example, examples = self._log_softmax(logits, batch, repeats)
            right = batch[name].repeat(repeats)
            losses.append(-_log_sums(log_probability[right], example[right], examples))
        return (losses[0] + losses[1]) / 2

    def distilled(self, output: Any, batch: dict[str, Tensor], repeats: int = 1) -> Tensor:
        total: Tensor | float = 0.0
        for column, logits in enumerate((output.start_logits, output.end_logits)):
            log_probability, example, examples = self._log_softmax(logits, batch, repeats)
            teacher, _, _ = self._log_softmax(batch["teacher"][:, column].repeat(repeats), batch, repeats)
            scored = batch["scored"].repeat(repeats)
            cross = -(teacher.exp() * log_probability)[scored]
            total = total + torch.zeros(examples, device=cross.device).index_add(0, example[scored], cross) / 2
        return torch.as_tensor(total)

    def signals(self, output: Any) -> Tensor:
        return torch.stack([output.start_logits, output.end_logits], dim=1)

    def rows(self, lengths: Tensor) -> Tensor:
        return lengths.long()

    def guide(self, batch: dict[str, Tensor], layers: Sequence[int]) -> Tensor:
        """How near a token is to a right answer: 1 at its ends, and e times less every `NEAR` tokens.

        Not the paper's saliency, for what a dense model's loss depends on is not what it takes to answer: one that has
        not learnt to reduce keeps, at 2× and tokens chosen with the right labels, 32 of 73 F1 by saliency, and all of
        it with the question and the answer's neighbours (217 of SQuAD's paragraphs).
        """
        right = batch["start_targets"] | batch["end_targets"]
        right[first_tokens(batch["cu_seqlens"])] = False  # no answer: nothing is near it
        distance = torch.zeros(len(right), device=right.device).masked_fill(~right, -torch.inf)
        bounds = batch["cu_seqlens"].tolist()
        for start, end in zip(bounds, bounds[1:]):
            there, place = distance[start:end], torch.arange(end - start, device=right.device) / self.NEAR
            before = (there + place).cummax(0).values - place
            after = (there - place).flip(0).cummax(0).values.flip(0) + place
            distance[start:end] = torch.maximum(before, after)
        return distance.exp().expand(len(layers), -1)

    def keep_targets(self, batch: dict[str, Tensor], layers: Sequence[int], counts: Tensor) -> Tensor:
        # Whatever the counts: a window without an answer has nothing to keep, and logits that say so can be compared
        # between windows.
        return self.guide(batch, layers)

    def imitation(self, logits: Tensor, targets: Tensor, example: Tensor) -> Tensor:
        """Cross-entropy, by which logits of different questions can be compared, and how often another token of an
        example is above one at an end of its answer. (Of 866 questions about held-out paragraphs of SQuAD, a selector
        on the embeddings that keeps half of all tokens keeps the whole answer for 88 of 100, by cross-entropy alone for
        84, by the order alone for 86.)
        """
        ends = targets == 1.0
        pairs = (example[ends, None] == example) & ~ends
        below = F.softplus(logits - logits[ends, None])
        return _mean_entropy(logits, targets) + torch.where(pairs, below, 0.0).sum() / pairs.sum().clamp(min=1)

    def completed(self, batch: dict[str, Tensor], signals: Tensor) -> dict[str, Tensor]:
        return batch

    @staticmethod
    def _log_softmax(logits: Tensor, batch: dict[str, Tensor], repeats: int) -> tuple[Tensor, Tensor, int]:
        """Log-probabilities within each example, (repeats · tokens,), each token's example, and how many there are."""
        windows, lengths = batch["example"], batch["cu_seqlens"].diff().long()
        count = int(windows.max()) + 1
        example = windows.repeat_interleave(lengths)
        example = torch.cat([example + count * repeat for repeat in range(repeats)])
        scored = batch["scored"].repeat(repeats)
        sums = _log_sums(logits.float()[scored], example[scored], count * repeats)
        return logits.float() - sums[example], example, count * repeats


def _mean_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    entropies = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return entropies.sum() / max(len(entropies), 1)  # there may be nothing left to judge


def _log_sums(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """Log of the sum of exponentials of each group's values, (groups,); a group without any has none: -inf."""
    highest = torch.full((groups,), -torch.inf, device=values.device).scatter_reduce(0, group, values.detach(), "amax")
    shift = torch.where(highest.isfinite(), highest, torch.zeros_like(highest))
    sums = torch.zeros(groups, device=values.device).index_add(0, group, (values - shift[group]).exp())
    return sums.log() + shift
