"""Policies of early exits: what leaves at an exit, and what skips a layer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from .options import NO_SKIPPING


@dataclass(frozen=True)
class Asked:
    """The units that an exit judges: sequences, or words if single words are halted.

    Attributes:
        exit: the index of the exit.
        uncertainty: fp32 (units,), from 0 to 1.
        units: int64 (units,), each one's index in the batch: of its sequence, or of its word's first token.
        logits: fp32 (units, labels); None for sequences whose words are judged together.
    """

    exit: int
    uncertainty: Tensor
    units: Tensor
    logits: Tensor | None


class ExitPolicy(Protocol):
    """Decides who leaves at an exit, and which sequences skip a layer."""

    def asks(self, exit: int) -> bool:
        """Whether anything can leave at an exit; if not, it is not computed."""

    def leaves(self, asked: Asked, /) -> Tensor:
        """The units that leave, bool (units,)."""

    def asks_gate(self, layer: int) -> bool:
        """Whether a layer can be skipped; if not, its gate is not computed."""

    def skips(self, layer: int, probability: Tensor, sequences: Tensor, /) -> Tensor:
        """The sequences that skip a layer, bool (sequences,).

        In training also fp32 (sequences,): the weight, from 0 to 1, of the layer's input in a mean of its input and its
        output.

        Args:
            probability: fp32 (sequences,), of the layer's gate.
            sequences: int64 (sequences,), their indices in the batch.
        """


class ExitThresholds:
    """Leaves below an exit's threshold of uncertainty, and skips from the gates' threshold on.

    Args:
        exits: one per exit; nothing leaves at 0. DeeBERT's are in nats: divide them by the logarithm of the number of
            labels.
        gate: nothing is skipped at 1.
    """

    def __init__(self, exits: Sequence[float] = (), gate: float = NO_SKIPPING):
        self.exits, self.gate = tuple(exits), gate

    def asks(self, exit: int) -> bool:
        return bool(self.exits) and self.exits[exit] > 0

    def leaves(self, asked: Asked) -> Tensor:
        return asked.uncertainty < (self.exits[asked.exit] if self.exits else 0.0)

    def asks_gate(self, layer: int) -> bool:
        return self.gate < NO_SKIPPING

    def skips(self, layer: int, probability: Tensor, sequences: Tensor) -> Tensor:
        return probability >= self.gate


NO_EXITS = ExitThresholds()


def uncertainty(logits: Tensor) -> Tensor:
    """Entropy over that of a uniform prediction, fp32 (…, labels) → (…,).

    Without overflow, unlike DeeBERT's and TOKEE's code, where logits far apart give NaN and never leave.
    """
    logs = F.log_softmax(logits.float(), dim=-1)
    entropy = -(logs.exp() * logs).sum(-1)
    return entropy / math.log(max(logits.shape[-1], 2))
