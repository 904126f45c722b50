"""The exits of one forward pass: who leaves, after how many layers, and with which answer."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..reduction.state import TokenState
from ..varlen import sequence_of, sequence_sums
from .policies import Asked, ExitPolicy, uncertainty

if TYPE_CHECKING:
    from ..configuration import TRBertConfig


@dataclass(frozen=True)
class Words:
    """The words of a varlen batch, for exits that judge words.

    Attributes:
        place: int64 (total tokens,), for each token its word's place in a row of all words, where sequences are so far
            apart that no window reaches from one to the next; -1 for tokens of no word.
        first: bool (total tokens,), whether a token is its word's first, which answers for it.
        places: length of that row.
    """

    place: Tensor
    first: Tensor
    places: int

    @classmethod
    def of(cls, words: Tensor | None, cu_seqlens: Tensor, tokens: int, window: int) -> "Words":
        """Args:
        words: int64 (tokens,), the index of each token's word in its sequence, -1 for tokens of no word. Default: every
            token but a sequence's first and last is a word.
        """
        sequence = sequence_of(cu_seqlens, tokens)
        if words is None:
            position = torch.arange(tokens, device=cu_seqlens.device) - cu_seqlens[sequence]
            last = cu_seqlens[sequence + 1] - cu_seqlens[sequence] - 1
            words = torch.where((position > 0) & (position < last), position - 1, -1).long()
        counts = torch.zeros(len(cu_seqlens) - 1, dtype=torch.int64, device=words.device)
        counts = counts.scatter_reduce(0, sequence, words + 1, "amax")
        offsets = F.pad((counts + window // 2).cumsum(0), (1, 0))
        inside = words >= 0
        place = torch.where(inside, offsets[sequence] + words, -1)
        before = F.pad(place[:-1], (1, 0), value=-1)
        return cls(place, inside & (place != before), int(offsets[-1]) + 1)


class ExitPass:
    """The exits of one forward pass.

    Args:
        heads: the modules of the exits, in their order.
        words: for heads that read words.
        remember: keep the states of tokens that leave.

    Attributes:
        answers: fp32 (sequences, labels), or for words (total tokens, labels), of those that left.
        layers: int64 (sequences,) or (total tokens,), after how many layers each one left; 0 for the others.
        asked: int64 (sequences, exits), number of rows that each exit computed.
        logits: of each exit, on request, for all units of the batch, in the form of `answers`.
        judged: of each exit with its logits, bool (sequences,) or (total tokens,), the units that it judged. The others
            had left, were dropped, or skipped the layer, and have no logits.
        uncertainties: of each exit, on request, fp32 (sequences,), those of sequences that leave as a whole.
    """

    def __init__(
        self,
        config: "TRBertConfig",
        heads: nn.ModuleList,
        policy: ExitPolicy,
        state: TokenState,
        words: Words | None,
        *,
        remember: bool,
        record: bool,
    ):
        options = config.exit_options
        assert options is not None
        self.config = config
        self.options, self.heads, self.policy, self.words = options, heads, policy, words
        self.remember, self.record = remember, record
        self.indices = {layer: i for i, layer in enumerate(options.layers)}
        self.depth = config.num_hidden_layers
        device, sequences = state.hidden.device, len(state.sequences)
        units = sequences if words is None else len(state.token_indices)
        self.answers = torch.zeros(units, config.num_labels, device=device)
        self.layers = torch.zeros(units, dtype=torch.int64, device=device)
        self.asked = torch.zeros(sequences, len(options.layers), dtype=torch.int64, device=device)
        self.logits: list[Tensor] = []
        self.judged: list[Tensor] = []
        self.uncertainties: list[Tensor] = []
        self._left = torch.zeros(sequences, dtype=torch.int64, device=device)  # sequences that left as a whole
        self._sequence = sequence_of(state.cu_seqlens, len(state.token_indices))

    def mean_layers(self) -> Tensor:
        """After how many layers each sequence left, or on average each of its words, fp32 (sequences,)."""
        if self.words is None or not self.options.halts:
            return torch.where(self._left > 0, self._left, self.depth).float()
        layers = torch.where(self.layers > 0, self.layers, self.depth).float()
        sequence, layers = self._sequence[self.words.first], layers[self.words.first]
        sums = torch.zeros(len(self.asked), 2, device=layers.device)
        sums.index_add_(0, sequence, torch.stack([layers, torch.ones_like(layers)], 1))
        return torch.where(sums[:, 1] > 0, sums[:, 0] / sums[:, 1], float(self.depth))

    def recorded(self) -> list[tuple[Tensor, Tensor]]:
        """`logits` and `judged` of each exit, but not of one that answers for all."""
        pairs = list(zip(self.logits, self.judged))
        return pairs[:-1] if self.options.answers_all else pairs

    def keeps_before_norm(self, layer: int) -> bool:
        """Whether the states before the last normalisation of this layer are needed."""
        return self._asks(layer) and self.options.halts and self.options.kept == "before_norm"

    def _asks(self, layer: int) -> bool:
        if layer not in self.indices:
            return False
        answers_all = self.options.answers_all and layer == self.depth - 1
        return self.record or answers_all or self.policy.asks(self.indices[layer])

    def after(self, state: TokenState, before_norm: Tensor | None, ran: Tensor | None) -> TokenState:
        """Ask the exit after the layer before `state.layer`, if there is one.

        Args:
            before_norm: if `keeps_before_norm`, the rows of the layer's output before its last normalisation.
            ran: bool (sequences,), those that did not skip the layer. Exits of skipped layers are not asked, except the
                one that answers for all. Default: all.
        """
        layer = state.layer - 1
        if not self._asks(layer):
            return state
        index = self.indices[layer]
        if self.words is None:
            return self._sequences(state, index, ran)
        return self._words(state, index, before_norm)

    def _record(self, units: Tensor, logits: Tensor) -> None:
        self.logits.append(self.answers.new_zeros(self.answers.shape).index_copy(0, units, logits))
        self.judged.append(torch.zeros_like(self.layers, dtype=torch.bool).index_fill(0, units, True))

    def _sequences(self, state: TokenState, index: int, ran: Tensor | None) -> TokenState:
        logits = self.heads[index](state)
        uncertain = uncertainty(logits)
        last = self.options.answers_all and state.layer == self.depth
        if self.record:
            judged = torch.ones_like(state.sequences, dtype=torch.bool) if ran is None or last else ran
            self._record(state.sequences[judged], logits[judged])
            self._record_uncertainty(state.sequences, uncertain)
        rows = torch.ones_like(state.sequences) if self.options.head == "first" else state.cu_seqlens.diff().long()
        leaves = self.policy.leaves(Asked(index, uncertain, state.sequences, logits))
        if ran is not None and not last:
            leaves, rows = leaves & ran, rows * ran
        self.asked[:, index] = self.asked[:, index].index_copy(0, state.sequences, rows)
        if last:
            leaves = torch.ones_like(leaves)
        left = state.sequences[leaves]
        self.answers = self.answers.index_copy(0, left, logits[leaves])
        self.layers[left] = self._left[left] = state.layer
        return state.of_sequences(~leaves, remember=self.remember)

    def _words(self, state: TokenState, index: int, before_norm: Tensor | None) -> TokenState:
        words = self.words
        assert words is not None
        chosen = words.first[state.token_indices]
        tokens, states = state.token_indices[chosen], state.states_of(chosen.nonzero().squeeze(1))
        sequence = sequence_of(state.cu_seqlens, len(chosen))[chosen]
        present, halted = len(tokens), state.halted
        if halted is not None:
            also = words.first[halted.token_indices]
            tokens = torch.cat([tokens, halted.token_indices[also]])
            states = torch.cat([states, halted.hidden.index_select(0, also.nonzero().squeeze(1))])
            sequence = torch.cat([sequence, sequence_of(halted.cu_seqlens, len(also))[also]])
        logits = self.heads[index](states)
        counts = torch.zeros_like(state.sequences).index_add(0, sequence, torch.ones_like(sequence))
        self.asked[:, index] = self.asked[:, index].index_copy(0, state.sequences, counts)
        if self.record:
            self._record(tokens, logits)
        uncertain = uncertainty(logits)
        if not self.options.halts:
            return self._together(state, index, tokens, sequence, counts, logits, uncertain)

        # Words that have left the network no longer count, halted ones do.
        row = uncertain.new_full((words.places,), -torch.inf).index_copy(0, words.place[tokens], uncertain)
        if self.options.window > 1:
            row = F.max_pool1d(row[None, None], self.options.window, 1, self.options.window // 2).flatten()
        place = words.place[state.token_indices]
        own = torch.where(place >= 0, row[place], torch.inf)
        answering, active = tokens[:present], chosen
        leaves = self.policy.leaves(Asked(index, own[active], answering, logits[:present]))
        exits = torch.zeros(words.places, dtype=torch.bool, device=own.device)
        exits[words.place[answering]] = leaves
        halt = (place >= 0) & exits[place]
        if self.options.pieces == "first":
            halt &= active
        left = answering[leaves]
        self.answers = self.answers.index_copy(0, left, logits[:present][leaves])
        self.layers[left] = state.layer
        remaining = sequence_sums((active & ~halt).long(), state.cu_seqlens)
        if state.layer == self.depth:
            return state  # nobody computes them any further
        # A sequence is done when all its words are.
        return state.halting(halt, before_norm).of_sequences(remaining > 0, remember=self.remember)

    def _together(
        self,
        state: TokenState,
        index: int,
        tokens: Tensor,
        sequence: Tensor,
        counts: Tensor,
        logits: Tensor,
        uncertain: Tensor,
    ) -> TokenState:
        """SENTEE: all words of a sequence leave together."""
        pooled = torch.zeros(len(state.sequences), device=uncertain.device)
        if self.options.pool == "mean":
            pooled = pooled.index_add(0, sequence, uncertain) / counts.clamp(min=1)
        else:
            pooled = pooled.scatter_reduce(0, sequence, uncertain, "amax")
        if self.record:
            self._record_uncertainty(state.sequences, pooled)
        leaves = self.policy.leaves(Asked(index, pooled, state.sequences, None))
        left = tokens[leaves[sequence]]
        self.answers = self.answers.index_copy(0, left, logits[leaves[sequence]])
        self.layers[left] = state.layer
        self._left[state.sequences[leaves]] = state.layer
        return state.of_sequences(~leaves, remember=self.remember)

    def _record_uncertainty(self, sequences: Tensor, uncertain: Tensor) -> None:
        self.uncertainties.append(uncertain.new_ones(len(self.asked)).index_copy(0, sequences, uncertain))
