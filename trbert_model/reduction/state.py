"""The tokens between two layers, and the inputs and outputs of selection policies."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backbones.fused import Layout, arrange
from ..varlen import first_tokens, sequence_of
from .question import QuestionMatch


@dataclass
class Candidates:
    """The tokens at the input of a reduction, for a policy to judge.

    Attributes:
        reduction: the index of the reduction.
        hidden: (tokens, hidden).
        logits: fp32 (tokens,), the selector's keep logits.
        fixed: bool (tokens,), tokens that are kept regardless of the policy.
        token_indices: int64 (tokens,), each token's index in the batch before any reduction.
        positions: int64 (tokens,), each token's position in its sequence before any reduction.
        cu_seqlens: int32 (sequences + 1,), of these tokens.
        match: their match with the question, for question-aware selectors.
    """

    reduction: int
    hidden: Tensor
    logits: Tensor
    fixed: Tensor
    token_indices: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    match: QuestionMatch | None

    @property
    def lengths(self) -> Tensor:
        """Number of tokens of each sequence, int64 (sequences,)."""
        return self.cu_seqlens.diff().long()

    @property
    def sequence(self) -> Tensor:
        """The index of each token's sequence, int64 (tokens,)."""
        return sequence_of(self.cu_seqlens, len(self.token_indices))


@dataclass
class Selection(Candidates):
    """The candidates of a reduction and its decision.

    Attributes:
        keep: bool (tokens,), the tokens that were kept, fixed ones included.
    """

    keep: Tensor


class SelectionPolicy(Protocol):
    """Decides at each reduction which tokens to keep."""

    def __call__(self, candidates: Candidates, /) -> Tensor:
        """The tokens to keep, bool (tokens,). The values of fixed tokens are ignored."""


@dataclass(frozen=True)
class Halted:
    """Tokens that are computed no further, but still attended to (TOKEE), by sequence and in batch order.

    Attributes:
        kept: (tokens, hidden), the states that they keep.
        hidden: (tokens, hidden), the same at the input of the layer: with the normalisation of the one before, if the
            states were kept without.
        token_indices: int64 (tokens,), as in `Candidates`.
        cu_seqlens: int32 (sequences + 1,); a sequence may have none.
    """

    kept: Tensor
    hidden: Tensor
    token_indices: Tensor
    cu_seqlens: Tensor


@dataclass(frozen=True)
class TokenState:
    """A varlen batch at the input of a layer.

    Attributes:
        layer: the layer's index.
        hidden: (tokens, hidden), or the rows of `layout`; see `states`.
        token_indices, positions, cu_seqlens: as in `Candidates`; halted tokens are not among them.
        max_seqlen: tokens of the longest sequence.
        max_keys: the same with halted tokens, or more.
        all_positions: int64 (total tokens,), the positions of all tokens of the batch.
        sequences: int64 (sequences,), the index in the batch of each sequence that has not left.
        match: of all tokens in the batch before any reduction.
        dropped: `token_indices` and states of the dropped tokens, one pair per reduction that dropped any.
        layout: the rows that the tokens lie in, for fused layers on CPUs.
        halted: None if no token is halted.
        complete: no token has left.
        geometry: from `Backbone.geometry`, for these tokens; None until a layer needs it.
    """

    layer: int
    hidden: Tensor
    token_indices: Tensor
    positions: Tensor
    all_positions: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    max_keys: int
    sequences: Tensor
    match: QuestionMatch | None = None
    dropped: tuple[tuple[Tensor, Tensor], ...] = ()
    layout: Layout | None = None
    halted: Halted | None = None
    complete: bool = True
    geometry: Any = None

    def arranged(self, *, packed: bool) -> "TokenState":
        """The state with its tokens in a layout; packed: see `arrange`."""
        layout = arrange(self.cu_seqlens, self.hidden.dtype, packed=packed)
        return dataclasses.replace(self, hidden=self.hidden.index_select(0, layout.source), layout=layout)

    @property
    def states(self) -> Tensor:
        """The tokens' states in batch order, (tokens, hidden)."""
        return self.hidden if self.layout is None else self.hidden.index_select(0, self.layout.rows)

    def states_of(self, tokens: Tensor) -> Tensor:
        """The states of some of the tokens, int64 (some,), in batch order: (some, hidden)."""
        return self.hidden.index_select(0, tokens if self.layout is None else self.layout.rows[tokens])

    @property
    def lengths(self) -> Tensor:
        """Number of tokens of each sequence, halted ones included, int64 (sequences,)."""
        lengths = self.cu_seqlens.diff().long()
        return lengths if self.halted is None else lengths + self.halted.cu_seqlens.diff()

    def after(self, hidden: Tensor, halted_hidden: Tensor | None = None) -> "TokenState":
        """The state at the input of the next layer.

        Args:
            hidden: the output of this layer.
            halted_hidden: the halted tokens' states at its end.
        """
        halted = self.halted
        if halted is not None and halted_hidden is not None:
            halted = dataclasses.replace(halted, hidden=halted_hidden)
        return dataclasses.replace(self, layer=self.layer + 1, hidden=hidden, halted=halted)

    def kept(self, keep: Tensor, *, remember: bool, halted: Tensor | None = None) -> "TokenState":
        """The state with some of the tokens only. Makes one device-to-host copy, of the new lengths.

        Args:
            keep: bool (tokens,), at least one token of each sequence.
            remember: add the dropped tokens to `dropped`.
            halted: bool (halted tokens,), the halted tokens to keep, if there are any.
        """
        group, dropped = self.halted, self.dropped
        if group is not None and halted is not None:
            if remember:
                left = (~halted).nonzero().squeeze(1)
                dropped = (*dropped, (group.token_indices[left], group.hidden.index_select(0, left)))
            group = _part_of(group, halted)
        return dataclasses.replace(self, dropped=dropped)._part(keep, remember=remember, halted=group)

    def of_sequences(self, stay: Tensor, *, remember: bool) -> "TokenState":
        """The state without the sequences that leave.

        Args:
            stay: bool (sequences,).
            remember: add the tokens of those that leave to `dropped`.
        """
        keep = stay[sequence_of(self.cu_seqlens, len(self.token_indices))]
        if self.halted is None:
            return self._part(keep, remember=remember)
        halted = stay[sequence_of(self.halted.cu_seqlens, len(self.halted.token_indices))]
        return self.kept(keep, remember=remember, halted=halted)

    def halting(self, halt: Tensor, kept: Tensor | None = None) -> "TokenState":
        """The state with some of the tokens halted.

        Args:
            halt: bool (tokens,), not the first token of a sequence.
            kept: the states to keep, in the rows of `hidden`. Default: `hidden` itself.
        """
        moved = halt.nonzero().squeeze(1)
        if not len(moved):
            return self
        hidden = self.states_of(moved)
        states = hidden if kept is None else dataclasses.replace(self, hidden=kept).states_of(moved)
        group = Halted(states, hidden, self.token_indices[moved], _counted(halt, self.cu_seqlens))
        if self.halted is not None:
            group = _merged(self.halted, group)
        return self._part(~halt, remember=False, halted=group)

    def _part(self, keep: Tensor, *, remember: bool, halted: Halted | None = None) -> "TokenState":
        """The state with these tokens, bool (tokens,), and halted tokens; sequences without any of `keep` leave it."""
        cu_seqlens, sequences = _counted(keep, self.cu_seqlens), self.sequences
        bounds = cu_seqlens.tolist()
        leaving = len(self.token_indices) - bounds[-1]
        if not leaving and halted is self.halted:
            return self
        stay = torch.nonzero_static(keep, size=bounds[-1]).squeeze(1)  # nonzero would make another copy
        rows = stay if self.layout is None else self.layout.rows[stay]
        dropped = self.dropped
        if remember:
            leave = torch.nonzero_static(~keep, size=leaving).squeeze(1)
            dropped = (*dropped, (self.token_indices[leave], self.states_of(leave)))
        lengths = [end - start for start, end in zip(bounds, bounds[1:])]
        if 0 in lengths:
            chosen = torch.tensor([i for i, length in enumerate(lengths) if length], device=keep.device).long()
            sequences = sequences[chosen]
            cu_seqlens = _summed(cu_seqlens.diff()[chosen])
            if halted is not None:
                halted = dataclasses.replace(halted, cu_seqlens=_summed(halted.cu_seqlens.diff()[chosen]))
        layout = None
        if self.layout is not None:
            keys = None if halted is None else halted.cu_seqlens
            layout = arrange(cu_seqlens, self.hidden.dtype, packed=self.layout.packed, halted=keys)
            rows = rows[layout.source]
        return dataclasses.replace(
            self,
            hidden=self.hidden.index_select(0, rows),
            layout=layout,
            token_indices=self.token_indices[stay],
            positions=self.positions[stay],
            cu_seqlens=cu_seqlens,
            max_seqlen=max(lengths),
            sequences=sequences,
            dropped=dropped,
            halted=halted,
            complete=False,
            geometry=None,
        )

    def repeated(self, times: int) -> "TokenState":
        """The batch concatenated with itself, `times` copies in all; no token may have been dropped."""
        tokens = len(self.token_indices)
        assert not self.dropped
        assert self.layout is None
        assert self.halted is None
        return dataclasses.replace(
            self,
            hidden=self.hidden.repeat(times, 1),
            token_indices=torch.arange(times * tokens, device=self.token_indices.device),
            positions=self.positions.repeat(times),
            all_positions=self.all_positions.repeat(times),
            cu_seqlens=_summed(self.cu_seqlens.diff().repeat(times)),
            sequences=torch.arange(times * len(self.sequences), device=self.sequences.device),
            match=self.match and self.match.repeated(times),
            geometry=None,
        )

    def first_states(self) -> Tensor:
        """The state of each sequence's first token, (sequences, hidden)."""
        return self.states_of(first_tokens(self.cu_seqlens))

    def all_states(self) -> Tensor:
        """The last state of every token, also of those that left, in batch order, (total tokens, hidden)."""
        groups = [*self.dropped, (self.token_indices, self.states)]
        if self.halted is not None:
            groups.append((self.halted.token_indices, self.halted.hidden))
        if len(groups) == 1:
            return self.states
        order = torch.cat([token_indices for token_indices, _ in groups])
        return torch.cat([states for _, states in groups]).index_select(0, order.argsort())


def _summed(lengths: Tensor) -> Tensor:
    return F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def _counted(chosen: Tensor, cu_seqlens: Tensor) -> Tensor:
    """`cu_seqlens` of the chosen tokens, bool (tokens,)."""
    return F.pad(chosen.cumsum(0), (1, 0))[cu_seqlens.long()].to(torch.int32)


def _part_of(group: Halted, keep: Tensor) -> Halted:
    rows, cu_seqlens = keep.nonzero().squeeze(1), _counted(keep, group.cu_seqlens)
    kept, hidden = group.kept.index_select(0, rows), group.hidden.index_select(0, rows)
    return Halted(kept, hidden, group.token_indices[rows], cu_seqlens)


def _merged(first: Halted, second: Halted) -> Halted:
    indices = torch.cat([first.token_indices, second.token_indices])
    order = indices.argsort()
    return Halted(
        kept=torch.cat([first.kept, second.kept]).index_select(0, order),
        hidden=torch.cat([first.hidden, second.hidden]).index_select(0, order),
        token_indices=indices[order],
        cu_seqlens=first.cu_seqlens + second.cu_seqlens,
    )
