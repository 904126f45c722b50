"""The tokens between two layers, and the inputs and outputs of selection policies."""

import dataclasses
from dataclasses import dataclass
from typing import Protocol

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
class TokenState:
    """A varlen batch at the input of a layer.

    Attributes:
        layer: the layer's index.
        hidden: (tokens, hidden), or the rows of `layout`; see `states`.
        token_indices, positions, cu_seqlens: as in `Candidates`.
        max_seqlen: tokens of the longest sequence.
        match: of all tokens in the batch before any reduction.
        dropped: `token_indices` and states of the dropped tokens, one pair per reduction that dropped any.
        layout: the rows that the tokens lie in, for fused layers on CPUs.
    """

    layer: int
    hidden: Tensor
    token_indices: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    match: QuestionMatch | None = None
    dropped: tuple[tuple[Tensor, Tensor], ...] = ()
    layout: Layout | None = None

    def arranged(self, *, packed: bool) -> "TokenState":
        """The state with its tokens in a layout; packed: see `arrange`."""
        layout = arrange(self.cu_seqlens, self.hidden.dtype, packed=packed)
        return dataclasses.replace(self, hidden=self.hidden[layout.source], layout=layout)

    @property
    def states(self) -> Tensor:
        """The tokens' states in batch order, (tokens, hidden)."""
        return self.hidden if self.layout is None else self.hidden[self.layout.rows]

    def after(self, hidden: Tensor) -> "TokenState":
        """The state at the input of the next layer; hidden: the output of this one."""
        return dataclasses.replace(self, layer=self.layer + 1, hidden=hidden)

    def kept(self, keep: Tensor, *, remember: bool) -> "TokenState":
        """The state with some of the tokens only. Makes one device-to-host copy, of the new lengths.

        Args:
            keep: bool (tokens,), at least one token of each sequence.
            remember: add the dropped tokens to `dropped`.
        """
        cu_seqlens = F.pad(keep.cumsum(0), (1, 0))[self.cu_seqlens.long()].to(torch.int32)
        bounds = cu_seqlens.tolist()
        max_seqlen = max(end - start for start, end in zip(bounds, bounds[1:]))
        leaving = len(self.token_indices) - bounds[-1]
        if not leaving:
            return self
        stay = torch.nonzero_static(keep, size=bounds[-1]).squeeze(1)  # nonzero would make another copy
        rows = stay if self.layout is None else self.layout.rows[stay]
        dropped, layout = self.dropped, self.layout
        if remember:
            leave = torch.nonzero_static(~keep, size=leaving).squeeze(1)
            left = leave if layout is None else layout.rows[leave]
            dropped = (*dropped, (self.token_indices[leave], self.hidden[left]))
        if layout is not None:
            layout = arrange(cu_seqlens, self.hidden.dtype, packed=layout.packed)
            rows = rows[layout.source]
        return dataclasses.replace(
            self,
            hidden=self.hidden[rows],
            layout=layout,
            token_indices=self.token_indices[stay],
            positions=self.positions[stay],
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            dropped=dropped,
        )

    def repeated(self, times: int) -> "TokenState":
        """The batch concatenated with itself, `times` copies in all; no token may have been dropped."""
        tokens = len(self.token_indices)
        assert not self.dropped
        assert self.layout is None
        return dataclasses.replace(
            self,
            hidden=self.hidden.repeat(times, 1),
            token_indices=torch.arange(times * tokens, device=self.token_indices.device),
            positions=self.positions.repeat(times),
            cu_seqlens=F.pad(self.cu_seqlens.diff().repeat(times).cumsum(0), (1, 0)).to(torch.int32),
            match=self.match and self.match.repeated(times),
        )

    def first_states(self) -> Tensor:
        """The state of each sequence's first token, (sequences, hidden)."""
        first = first_tokens(self.cu_seqlens)
        return self.hidden.index_select(0, first if self.layout is None else self.layout.rows[first])

    def all_states(self) -> Tensor:
        """The last state of every token, dropped ones included, in batch order, (total tokens, hidden)."""
        if not self.dropped:
            return self.states
        order = torch.cat([*(token_indices for token_indices, _ in self.dropped), self.token_indices])
        return torch.cat([*(states for _, states in self.dropped), self.states])[order.argsort()]
