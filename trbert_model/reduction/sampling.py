"""The selection policy of reinforcement learning: random selections."""

import torch
from torch import Tensor

from ..varlen import sequence_sums, top_tokens
from .state import Candidates


class SamplingPolicy:
    """Keeps each token at random with its keep probability. An instance is for one forward pass.

    Args:
        cutoffs: (sequences, reductions), subtracted from the keep logits; -inf keeps every token.
        guided: bool (sequences,), sequences that keep the tokens with the highest guide scores instead, as many as the
            keep probabilities add up to.
        guide: (reductions, total tokens), required if a sequence is guided.
        at_random: False keeps the tokens whose keep probability is at least 0.5.
    """

    def __init__(
        self, cutoffs: Tensor, guided: Tensor | None = None, guide: Tensor | None = None, at_random: bool = True
    ):
        self.cutoffs, self.guided, self.guide, self.at_random = cutoffs, guided, guide, at_random
        self._spreads: list[Tensor] = []

    def spreads(self) -> Tensor:
        """The standard deviation of the keep logits of tokens that are not fixed, per reduction, (reductions,)."""
        return torch.stack(self._spreads)

    def __call__(self, candidates: Candidates) -> Tensor:
        reduction, sequence, logits = candidates.reduction, candidates.sequence, candidates.logits.detach()
        judged = logits[~candidates.fixed]
        self._spreads.append(judged.std(correction=0) if len(judged) else judged.new_zeros(()))
        probability = torch.sigmoid(logits - self.cutoffs[:, reduction][sequence]).masked_fill(candidates.fixed, 1.0)
        keep = torch.rand_like(probability) < probability if self.at_random else probability >= 0.5
        if self.guide is None or self.guided is None:
            return keep
        counts = sequence_sums(probability, candidates.cu_seqlens).round().long()
        scores = self.guide[reduction][candidates.token_indices].masked_fill(candidates.fixed, torch.inf)
        return torch.where(self.guided[sequence], top_tokens(scores, candidates.cu_seqlens, counts), keep)
