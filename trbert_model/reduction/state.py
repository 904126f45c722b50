"""The tokens between two layers, what a policy sees of them, and what it decided."""

import dataclasses
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..varlen import first_tokens, sequence_of
from .question import QuestionMatch


@dataclass
class Candidates:
    """The tokens that enter a reduction, for a policy to judge.

    reduction: its index; hidden: (tokens, hidden); logits: the selector's keep logits, fp32 (tokens,); fixed: bool
    (tokens,), the ones that go on whatever a policy says, which it need not judge; places: int64 (tokens,), where in
    the batch each token was when it began; positions: int64 (tokens,), where in its sequence; cu_seqlens: int32
    (sequences + 1,), of the tokens that enter; match: theirs with the question, for selectors that know it.
    """

    reduction: int
    hidden: Tensor
    logits: Tensor
    fixed: Tensor
    places: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    match: QuestionMatch | None

    @property
    def lengths(self) -> Tensor:
        """Tokens of each sequence, int64 (sequences,)."""
        return self.cu_seqlens.diff().long()

    @property
    def sequence(self) -> Tensor:
        """The sequence that each token belongs to, int64 (tokens,)."""
        return sequence_of(self.cu_seqlens, len(self.places))


@dataclass
class Selection(Candidates):
    """What a reduction saw, and what it did: keep, bool (tokens,), with the fixed tokens."""

    keep: Tensor


class SelectionPolicy(Protocol):
    """Decides at each reduction which tokens go on."""

    def __call__(self, candidates: Candidates, /) -> Tensor:
        """bool (tokens,); what it says of fixed tokens does not count."""


@dataclass(frozen=True)
class TokenState:
    """A varlen batch in front of a layer.

    layer: the layer's index; hidden: (tokens, hidden); places, positions, cu_seqlens: as in `Candidates`; max_seqlen:
    tokens of the longest sequence; match: of all tokens that the batch began with; left: places and states of the
    tokens that have left, one pair a reduction.
    """

    layer: int
    hidden: Tensor
    places: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    match: QuestionMatch | None = None
    left: tuple[tuple[Tensor, Tensor], ...] = ()

    def after(self, hidden: Tensor) -> "TokenState":
        """In front of the next layer, with what this one made of the tokens."""
        return dataclasses.replace(self, layer=self.layer + 1, hidden=hidden)

    def kept(self, keep: Tensor, *, remember: bool) -> "TokenState":
        """With these tokens only, bool (tokens,), at least one of each sequence; `remember` the states of the others.

        One device-to-host copy, of the new lengths.
        """
        cu_seqlens = F.pad(keep.cumsum(0), (1, 0))[self.cu_seqlens.long()].to(torch.int32)
        bounds = cu_seqlens.tolist()
        max_seqlen = max(end - start for start, end in zip(bounds, bounds[1:]))
        leaving = len(self.places) - bounds[-1]
        if not leaving:
            return self
        stay = torch.nonzero_static(keep, size=bounds[-1]).squeeze(1)  # nonzero would be another copy
        left = self.left
        if remember:
            leave = torch.nonzero_static(~keep, size=leaving).squeeze(1)
            left = (*left, (self.places[leave], self.hidden[leave]))
        return dataclasses.replace(
            self,
            hidden=self.hidden[stay],
            places=self.places[stay],
            positions=self.positions[stay],
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            left=left,
        )

    def repeated(self, times: int) -> "TokenState":
        """A batch of which no token has left, laid end to end with itself."""
        tokens = len(self.places)
        assert not self.left
        return dataclasses.replace(
            self,
            hidden=self.hidden.repeat(times, 1),
            places=torch.arange(times * tokens, device=self.places.device),
            positions=self.positions.repeat(times),
            cu_seqlens=F.pad(self.cu_seqlens.diff().repeat(times).cumsum(0), (1, 0)).to(torch.int32),
            match=self.match and self.match.repeated(times),
        )

    def first_states(self) -> Tensor:
        """Each sequence's first token's, (sequences, hidden)."""
        return self.hidden.index_select(0, first_tokens(self.cu_seqlens))

    def all_states(self) -> Tensor:
        """Of every token that the batch began with the last state it had, (total tokens, hidden)."""
        if not self.left:
            return self.hidden
        order = torch.cat([*(places for places, _ in self.left), self.places])
        return torch.cat([*(states for _, states in self.left), self.hidden])[order.argsort()]
