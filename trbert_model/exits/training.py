"""Exit policies of training: layers mixed by their gates, and words halted by plan."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..varlen import sequence_of
from .passing import Words
from .policies import Asked


class MixingGates:
    """Mixes the output of each layer with its input, by the gate's probability (SmartBERT). Nothing leaves.

    An instance is for one forward pass.

    Args:
        hard: skip a layer, or do not, as inference does at `threshold`; the gradient is that of the mixture.

    Attributes:
        probabilities: of each layer's gate, (sequences,).
    """

    def __init__(self, *, hard: bool, threshold: float = 0.5):
        self.hard, self.threshold = hard, threshold
        self.probabilities: list[Tensor] = []

    def asks(self, exit: int) -> bool:
        return False

    def leaves(self, asked: Asked) -> Tensor:
        return torch.zeros_like(asked.uncertainty, dtype=torch.bool)

    def asks_gate(self, layer: int) -> bool:
        return True

    def skips(self, layer: int, probability: Tensor, sequences: Tensor) -> Tensor:
        self.probabilities.append(probability)
        if not self.hard:
            return probability
        return (probability >= self.threshold).float() + probability - probability.detach()


class PlannedExits:
    """Lets each word leave at an exit that was chosen before.

    Args:
        plan: int64 (total tokens,), as `planned_exits` returns it.
    """

    def __init__(self, plan: Tensor):
        self.plan = plan

    def asks(self, exit: int) -> bool:
        return True

    def leaves(self, asked: Asked) -> Tensor:
        return self.plan[asked.units] <= asked.exit

    def asks_gate(self, layer: int) -> bool:
        return False

    def skips(self, layer: int, probability: Tensor, sequences: Tensor) -> Tensor:
        return torch.zeros_like(probability, dtype=torch.bool)


def planned_exits(
    uncertainties: Tensor, words: Tensor, cu_seqlens: Tensor, windows: Tensor, thresholds: Tensor
) -> Tensor:
    """The index of the exit at which each word leaves, if halting changes no uncertainty.

    Args:
        uncertainties: fp32 (total tokens, exits), of each word at its first token.
        words: int64 (total tokens,), as in `TRBertModel.forward`.
        windows: int64 (sequences,), `ExitOptions.window` of each sequence.
        thresholds: fp32 (sequences, exits).

    Returns:
        int64 (total tokens,), at each word's first token; the number of exits for words that stay and other tokens.
    """
    tokens, exits = uncertainties.shape
    place = Words.of(words, cu_seqlens, tokens, int(windows.max()))
    first = place.first.nonzero().squeeze(1)
    places, sequence = place.place[first], sequence_of(cu_seqlens, tokens)[first]
    row = uncertainties.new_full((exits, place.places), -torch.inf)
    row[:, places] = uncertainties[first].T
    pooled = uncertainties.new_empty(exits, len(first))
    for window in windows.unique().tolist():
        own = windows[sequence] == window
        pooled[:, own] = F.max_pool1d(row[None], window, 1, window // 2)[0][:, places[own]]
    leaves = pooled < thresholds[sequence].T
    plan = torch.full_like(words, exits)
    plan[first] = torch.where(leaves.any(0), leaves.int().argmax(0), exits)
    return plan
