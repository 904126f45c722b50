"""The policy of reinforcement: selections drawn at random."""

import torch
from torch import Tensor

from ..varlen import sequence_sums, top_tokens
from .state import Candidates


class SamplingPolicy:
    """Keeps each token with its probability; for one forward pass.

    Args:
        cuts: what is taken off the keep logits, (sequences, reductions); -inf keeps every token.
        guided: the sequences whose tokens the guide chooses instead, bool (sequences,).
        guide: (reductions, total tokens), needed where a sequence is guided.
        at_random: False keeps what is more likely kept than not.
    """

    def __init__(self, cuts: Tensor, guided: Tensor | None = None, guide: Tensor | None = None, at_random: bool = True):
        self.cuts, self.guided, self.guide, self.at_random = cuts, guided, guide, at_random
        self._spreads: list[Tensor] = []

    def spreads(self) -> Tensor:
        """The standard deviations of the keep logits that were judged, (reductions,)."""
        return torch.stack(self._spreads)

    def __call__(self, candidates: Candidates) -> Tensor:
        reduction, sequence, logits = candidates.reduction, candidates.sequence, candidates.logits.detach()
        judged = logits[~candidates.fixed]
        self._spreads.append(judged.std(correction=0) if len(judged) else judged.new_zeros(()))
        probability = torch.sigmoid(logits - self.cuts[:, reduction][sequence]).masked_fill(candidates.fixed, 1.0)
        keep = torch.rand_like(probability) < probability if self.at_random else probability >= 0.5
        if self.guide is None or self.guided is None:
            return keep
        counts = sequence_sums(probability, candidates.cu_seqlens).round().long()
        scores = self.guide[reduction][candidates.places].masked_fill(candidates.fixed, torch.inf)
        return torch.where(self.guided[sequence], top_tokens(scores, candidates.cu_seqlens, counts), keep)
