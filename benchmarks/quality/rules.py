"""Simple rules to choose tokens, to compare the selectors with."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trbert_model.reduction.state import Candidates, SelectionPolicy


def first_tokens_policy(fractions: Sequence[float]) -> SelectionPolicy:
    """Keep the first tokens of each document, the same fractions of each."""
    return _ranked(fractions, lambda positions: -positions)


def random_tokens_policy(fractions: Sequence[float]) -> SelectionPolicy:
    """Keep random tokens, the same fractions of each document."""
    return _ranked(fractions, lambda positions: torch.rand(len(positions)))


def _ranked(fractions: Sequence[float], rank: Callable[[Tensor], Tensor]) -> SelectionPolicy:
    """Keep the highest-ranked tokens; fractions: of the document's tokens, one per reduction."""

    def policy(candidates: Candidates) -> Tensor:
        reduction = candidates.reduction
        share = fractions[reduction] / (fractions[reduction - 1] if reduction else 1.0)
        keep = torch.zeros_like(candidates.fixed)
        bounds = candidates.cu_seqlens.tolist()
        for start, end in zip(bounds, bounds[1:]):
            count = max(round((end - start) * share), 1)
            keep[start + rank(torch.arange(end - start).float()).topk(count).indices] = True
        return keep

    return policy
