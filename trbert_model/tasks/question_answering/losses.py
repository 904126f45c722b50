"""What question answering minimises in training."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...losses import log_sums, mean_entropy
from ...varlen import first_tokens


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
            losses.append(-log_sums(log_probability[right], example[right], examples))
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

        Not the paper's saliency: what a dense model's loss depends on is not what it takes to answer
        (docs/experiments.md, "What the selectors of questions imitate").
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
        """Cross-entropy, which makes logits of different questions comparable, plus a penalty for each token of an
        example that is above one at an end of its answer (docs/experiments.md, "What the selectors of questions
        imitate").
        """
        ends = targets == 1.0
        pairs = (example[ends, None] == example) & ~ends
        below = F.softplus(logits - logits[ends, None])
        return mean_entropy(logits, targets) + torch.where(pairs, below, 0.0).sum() / pairs.sum().clamp(min=1)

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
        sums = log_sums(logits.float()[scored], example[scored], count * repeats)
        return logits.float() - sums[example], example, count * repeats
