"""Policies that need nothing but the candidates: see `SelectionPolicy`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..varlen import top_tokens
from .state import Candidates


class ThresholdPolicy:
    """Tokens go on whose keep probability is at least the reduction's threshold."""

    def __init__(self, thresholds: Sequence[float]):
        self.thresholds = list(thresholds)

    def __call__(self, candidates: Candidates) -> Tensor:
        return torch.sigmoid(candidates.logits) >= self.thresholds[candidates.reduction]


class TopTokensPolicy:
    """The highest-ranked tokens go on, so many of each sequence.

    Args:
        counts: int64 (sequences, reductions), fixed tokens among them.
        scores: what ranks the tokens that the batch began with, (reductions, total tokens); default: the keep logits.
    """

    def __init__(self, counts: Tensor, scores: Tensor | None = None):
        self.counts, self.scores = counts, scores

    def __call__(self, candidates: Candidates) -> Tensor:
        reduction = candidates.reduction
        scores = candidates.logits.detach() if self.scores is None else self.scores[reduction][candidates.places]
        ranked = scores.masked_fill(candidates.fixed, torch.inf)
        return top_tokens(ranked, candidates.cu_seqlens, self.counts[:, reduction])


def keep_all(candidates: Candidates) -> Tensor:
    """Every token goes on."""
    return torch.ones_like(candidates.fixed)
