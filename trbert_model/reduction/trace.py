"""How many tokens the layers computed."""

import torch
from torch import Tensor

from ..varlen import sequence_of
from .state import TokenState

# Rows of `Trace.counts`.
ENTERING, PRESENT, COMPUTED, ATTENDED = range(4)


class Trace:
    """How many tokens of each sequence each layer computed in a forward pass.

    Args:
        state: at the beginning of the pass.
        layers: number of layers of the model.
        tokens: also count the layers that computed each token.

    Attributes:
        counts: int64 (4, sequences, layers), at the end of the pass. ENTERING: tokens before the layer's reduction,
            halted ones included, 0 for sequences that have left; PRESENT: after it; COMPUTED: those that went through
            the layer, 0 for sequences that skipped it; ATTENDED: those that these attended to.
        gated: the layers whose gates were asked.
        token_layers: int16 (total tokens,), the number of layers that computed each token; None if not counted.
    """

    def __init__(self, state: TokenState, layers: int, *, tokens: bool):
        self._nothing = torch.zeros_like(state.sequences)
        self._columns = [[self._nothing] * layers for _ in range(4)]
        self.gated: list[int] = []
        self.token_layers = torch.zeros_like(state.token_indices, dtype=torch.int16) if tokens else None

    def enters(self, state: TokenState) -> None:
        self._count(ENTERING, state, state.lengths)

    def reduced(self, state: TokenState) -> None:
        self._count(PRESENT, state, state.lengths)

    def computes(self, state: TokenState, ran: Tensor | None) -> None:
        """ran: bool (sequences,), those that do not skip the layer. Default: all."""
        computed, attended = state.cu_seqlens.diff().long(), state.lengths
        if ran is not None:
            computed, attended = computed * ran, attended * ran
        self._count(COMPUTED, state, computed)
        self._count(ATTENDED, state, attended)
        if self.token_layers is not None:
            tokens = state.token_indices
            if ran is not None:
                tokens = tokens[ran[sequence_of(state.cu_seqlens, len(tokens))]]
            self.token_layers[tokens] += 1

    @property
    def counts(self) -> Tensor:
        return torch.stack([torch.stack(columns, 1) for columns in self._columns])

    def present(self, layer: int) -> Tensor:
        """The tokens of each sequence after a layer's reduction, int64 (sequences,)."""
        return self._columns[PRESENT][layer]

    def _count(self, row: int, state: TokenState, values: Tensor) -> None:
        everyone = len(values) == len(self._nothing)
        self._columns[row][state.layer] = values if everyone else self._nothing.index_copy(0, state.sequences, values)
