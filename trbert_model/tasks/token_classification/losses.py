"""Training losses of token classification."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...losses import SaliencyGuided

IGNORED = -100  # label of tokens that the loss leaves out, as in transformers


class WordLosses(SaliencyGuided):
    """Cross-entropy of words, each by its first token: the mean over an example's words.

    The guide is the saliency: a dropped token answers with the state it has then, and the saliency is how much this
    changes the loss, to the first order.

    Batches have:
        labels: int64 (total tokens,), the tag of each word at its first token, IGNORED at all other tokens and at words
            without a label.
        answers: bool (total tokens,), whether a token is a word's first.
        example: int64 (windows,).
        teacher: float32 (total tokens, labels).
    """

    def labelled(self, output: Any, batch: dict[str, Tensor], repeats: int = 1) -> Tensor:
        labels = batch["labels"].repeat(repeats)
        losses = F.cross_entropy(output.logits.float(), labels, ignore_index=IGNORED, reduction="none")
        return _means(losses, labels != IGNORED, batch, repeats)

    def distilled(self, output: Any, batch: dict[str, Tensor], repeats: int = 1) -> Tensor:
        answers = batch["answers"].repeat(repeats)
        shares = batch["teacher"].softmax(-1).repeat(repeats, 1)
        return _means(F.cross_entropy(output.logits.float(), shares, reduction="none"), answers, batch, repeats)

    def signals(self, output: Any) -> Tensor:
        return output.logits

    def rows(self, lengths: Tensor) -> Tensor:
        return lengths.long()

    def completed(self, batch: dict[str, Tensor], signals: Tensor) -> dict[str, Tensor]:
        return batch


def _means(losses: Tensor, counted: Tensor, batch: dict[str, Tensor], repeats: int) -> Tensor:
    """The mean of each example's losses that count, (repeats · examples,); 0 for an example without any."""
    windows, examples = batch["example"], int(batch["example"].max()) + 1
    example = windows.repeat_interleave(batch["cu_seqlens"].diff().long())
    example = torch.cat([example + examples * repeat for repeat in range(repeats)])[counted]
    sums = torch.zeros(examples * repeats, device=losses.device).index_add(0, example, losses[counted])
    return sums / example.bincount(minlength=examples * repeats).clamp(min=1)
