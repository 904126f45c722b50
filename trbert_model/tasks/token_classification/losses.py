"""Training losses of token classification."""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...losses import SaliencyGuided

if TYPE_CHECKING:
    from ...exits.passing import ExitPass

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
        return _means(word_losses(output.logits, labels), labels != IGNORED, batch, repeats)

    def distilled(self, output: Any, batch: dict[str, Tensor], repeats: int = 1) -> Tensor:
        answers, teacher = batch["answers"].repeat(repeats), batch["teacher"].repeat(repeats, 1)
        return _means(_to_logits(output.logits, teacher), answers, batch, repeats)

    def of_exits(self, exits: "ExitPass", batch: dict[str, Tensor], *, distilled: bool) -> Tensor:
        counted = batch["answers"] if distilled else batch["labels"] != IGNORED
        means = []
        for logits, judged in exits.recorded():
            losses = _to_logits(logits, batch["teacher"]) if distilled else word_losses(logits, batch["labels"])
            means.append(_means(losses, counted & judged, batch, 1).mean())
        return torch.stack(means)

    def signals(self, output: Any) -> Tensor:
        return output.logits

    def rows(self, lengths: Tensor) -> Tensor:
        return lengths.long()

    def completed(self, batch: dict[str, Tensor], signals: Tensor) -> dict[str, Tensor]:
        return batch


def word_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of each word at its first token, (total tokens,), 0 elsewhere; labels: as in the batches."""
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="none")


def _to_logits(logits: Tensor, teacher: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), teacher.softmax(-1), reduction="none")


def _means(losses: Tensor, counted: Tensor, batch: dict[str, Tensor], repeats: int) -> Tensor:
    """The mean of each example's losses that count, (repeats · examples,); 0 for an example without any."""
    windows, examples = batch["example"], int(batch["example"].max()) + 1
    example = windows.repeat_interleave(batch["cu_seqlens"].diff().long())
    example = torch.cat([example + examples * repeat for repeat in range(repeats)])[counted]
    sums = torch.zeros(examples * repeats, device=losses.device).index_add(0, example, losses[counted])
    return sums / example.bincount(minlength=examples * repeats).clamp(min=1)
