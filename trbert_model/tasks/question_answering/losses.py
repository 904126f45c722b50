"""Training losses of question answering."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...losses import log_sums, mean_entropy, nearness
from ...varlen import first_tokens


class AnswerLosses:
    """Losses of start and end, each with one softmax over the windows of an example, as in decoding.

    Batches have:
        scored: bool (total tokens,), the positions in the softmax.
        start_targets, end_targets: bool (total tokens,), the correct positions. There may be several: of an answer that
            several windows contain, or, if there is no answer, every window's first token.
        example: int64 (windows,).
        teacher: float32 (total tokens, 2).
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
        """Score tokens by their distance to a correct answer: 1 at its ends, e times less every `NEAR` tokens.

        The paper's saliency is not used: the tokens that a dense model's loss depends on are not those needed to answer
        (docs/experiments.md, "What the selectors of questions imitate").
        """
        right = batch["start_targets"] | batch["end_targets"]
        right[first_tokens(batch["cu_seqlens"])] = False  # a first token is the target for no answer
        return nearness(right, batch["cu_seqlens"], self.NEAR).expand(len(layers), -1)

    def keep_targets(self, batch: dict[str, Tensor], layers: Sequence[int], counts: Tensor) -> Tensor:
        # Independent of the counts: a window without an answer has nothing to keep, and logits that express this are
        # comparable across windows.
        return self.guide(batch, layers)

    def imitation(self, logits: Tensor, targets: Tensor, example: Tensor) -> Tensor:
        """Cross-entropy plus a ranking penalty (docs/experiments.md, "What the selectors of questions imitate").

        Cross-entropy makes the logits of different questions comparable. The penalty pushes the logits of an example's
        other tokens below those at the ends of its answer.
        """
        ends = targets == 1.0
        pairs = (example[ends, None] == example) & ~ends
        below = F.softplus(logits - logits[ends, None])
        return mean_entropy(logits, targets) + torch.where(pairs, below, 0.0).sum() / pairs.sum().clamp(min=1)

    def completed(self, batch: dict[str, Tensor], signals: Tensor) -> dict[str, Tensor]:
        return batch

    @staticmethod
    def _log_softmax(logits: Tensor, batch: dict[str, Tensor], repeats: int) -> tuple[Tensor, Tensor, int]:
        """Log-probabilities within each example, (repeats · tokens,), each token's example, and number of examples."""
        windows, lengths = batch["example"], batch["cu_seqlens"].diff().long()
        count = int(windows.max()) + 1
        example = windows.repeat_interleave(lengths)
        example = torch.cat([example + count * repeat for repeat in range(repeats)])
        scored = batch["scored"].repeat(repeats)
        sums = log_sums(logits.float()[scored], example[scored], count * repeats)
        return logits.float() - sums[example], example, count * repeats
