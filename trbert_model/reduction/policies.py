"""Deterministic selection policies, see `SelectionPolicy`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..varlen import top_tokens
from .state import Candidates


class ThresholdPolicy:
    """Keeps tokens whose keep probability is at least the reduction's threshold."""

    def __init__(self, thresholds: Sequence[float]):
        self.thresholds = list(thresholds)

    def __call__(self, candidates: Candidates) -> Tensor:
        return torch.sigmoid(candidates.logits) >= self.thresholds[candidates.reduction]


class TopTokensPolicy:
    """Keeps a given number of tokens of each sequence, those with the highest scores.

    Args:
        counts: int64 (sequences, reductions), number of tokens to keep, fixed tokens included.
        scores: (reductions, total tokens), for all tokens of the batch before any reduction. Default: the keep logits.
    """

    def __init__(self, counts: Tensor, scores: Tensor | None = None):
        self.counts, self.scores = counts, scores

    def __call__(self, candidates: Candidates) -> Tensor:
        reduction = candidates.reduction
        scores = candidates.logits.detach() if self.scores is None else self.scores[reduction][candidates.token_indices]
        ranked = scores.masked_fill(candidates.fixed, torch.inf)
        return top_tokens(ranked, candidates.cu_seqlens, self.counts[:, reduction])


def keep_all(candidates: Candidates) -> Tensor:
    """Keep every token."""
    return torch.ones_like(candidates.fixed)
