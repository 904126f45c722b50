"""Attention within windows: each token attends to the tokens at most `reach` positions before or after it.

The positions are those before any reduction, so reductions leave gaps, and a window holds fewer tokens than positions.
The tokens of a sequence are in the order of their positions, so whatever a token attends to is also at most `reach`
tokens away. Blocks of `block_size` queries therefore attend to their own tokens and those of the blocks beside them,
with a mask by position, at a cost that is linear in the number of tokens.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..varlen import first_tokens, flash_varlen, positions_in, sequence_of


class LocalAttention(Protocol):
    """The windows of a varlen batch."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float) -> Tensor:
        """(1, heads, tokens, head size) each → (1, tokens, heads, head size)."""


def block_size(reach: int) -> int:
    """Number of queries in a block: at least `reach`, and enough for efficient matrix products."""
    return max(reach, 64)


class Group(NamedTuple):
    """Consecutive sequences of one length that attention computes together.

    Attributes:
        masks: one of (sequences, 1, length, length), or None to attend to everything; or, for a single long sequence,
            the three of `position_masks`. 0 where a token attends, -inf elsewhere.
    """

    sequences: int
    length: int
    masks: tuple[Any, ...]


def position_masks(positions: Tensor, reach: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The masks by position of one sequence, positions: (tokens,).

    Returns:
        For less than three blocks one mask, (1, 1, tokens, tokens). Otherwise those of the first block, with the block
        after it as keys; of the blocks between, (blocks, 1, block, 3 · block); and of the rest, of up to two blocks,
        with the block before it as keys.
    """
    block, between = block_size(reach), len(positions) // block_size(reach) - 2
    if between < 1:
        return (_near(positions[None], positions[None], reach, dtype),)
    start = (between + 1) * block
    return (
        _near(positions[None, :block], positions[None, : 2 * block], reach, dtype),
        _near(
            positions[block:start].unflatten(0, (between, block)),
            positions[: start + block].unfold(0, 3 * block, block),
            reach,
            dtype,
        ),
        _near(positions[None, start:], positions[None, start - block :], reach, dtype),
    )


def _near(queries: Tensor, keys: Tensor, reach: int, dtype: torch.dtype) -> Tensor:
    """(sequences, queries) and (sequences, keys) → mask (sequences, 1, queries, keys)."""
    far = (queries[:, :, None] - keys[:, None, :]).abs() > reach
    return torch.zeros(far.shape, dtype=dtype, device=far.device).masked_fill_(far, -torch.inf).unsqueeze(1)


@dataclass(frozen=True)
class GroupedAttention:
    """Attention one group of sequences after the other, without a copy of their keys and values: for CPUs.

    Attributes:
        groups: of all rows in order. Rows after the last group attend to nothing; their result is 0.
    """

    groups: list[Group]

    @classmethod
    def local(cls, positions: Tensor, cu_seqlens: Tensor, reach: int, dtype: torch.dtype) -> "GroupedAttention":
        """Attention within windows, one sequence of a varlen batch at a time; positions: (tokens,)."""
        sequences = positions.split(cu_seqlens.diff().tolist())
        return cls([Group(1, len(part), position_masks(part, reach, dtype)) for part in sequences])

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float) -> Tensor:
        sizes = [group.sequences * group.length for group in self.groups]
        rest = query.shape[2] - sum(sizes)
        sizes = [*sizes, rest] if rest else sizes
        # Split once: each slice would have a gradient as large as the whole batch.
        parts = zip(self.groups, query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2))
        outputs = [_attended(group, q, k, v, scaling, dropout) for group, q, k, v in parts]
        if rest:
            outputs.append(query.new_zeros(1, rest, query.shape[1], query.shape[3]))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _attended(group: Group, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float) -> Tensor:
    """Attention of one group, (1, heads, rows, head size) each → (1, rows, heads, head size)."""

    def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        mask = mask if mask is None else mask.to(query.dtype)
        output = F.scaled_dot_product_attention(query, key, value, mask, dropout_p=dropout, scale=scaling)
        return output.transpose(1, 2).flatten(0, 1).unsqueeze(0)

    if len(group.masks) == 1:
        shape = (group.sequences, group.length)
        q, k, v = (part.squeeze(0).unflatten(1, shape).transpose(0, 1) for part in (query, key, value))
        return attention(q, k, v, group.masks[0])
    first, middle, last = group.masks
    block, between = first.shape[2], middle.shape[0]
    start = (between + 1) * block
    blocks = query[0, :, block:start].unflatten(1, (between, block)).transpose(0, 1)
    # Overlapping views of (between, heads, 3 · block, head size), not copies.
    keys, values = (
        part[0, :, : start + block].unfold(1, 3 * block, block).permute(1, 0, 3, 2) for part in (key, value)
    )
    outputs = [
        attention(query[:, :, :block], key[:, :, : 2 * block], value[:, :, : 2 * block], first),
        attention(blocks, keys, values, middle),
        attention(query[:, :, start:], key[:, :, start - block :], value[:, :, start - block :], last),
    ]
    return torch.cat(outputs, dim=1)


@dataclass(frozen=True)
class BlockAttention:
    """Attention of all blocks of a batch in one call, on copies of their keys and values: for GPUs.

    Attributes:
        queries: int64 (blocks · block,), the token of each row; some token for rows that are padding.
        keys: int64 (blocks, 3 · block), the tokens of the block and those beside it, all of the block's sequence.
        mask: bool (blocks, 1, block, 3 · block).
        rows: int64 (tokens,), the row of each token.
    """

    queries: Tensor
    keys: Tensor
    mask: Tensor
    rows: Tensor

    @classmethod
    def of(cls, positions: Tensor, cu_seqlens: Tensor, reach: int) -> "BlockAttention":
        """Lay out a varlen batch, each sequence from the beginning of a block. Makes no device-to-host copy."""
        block, tokens, device = block_size(reach), len(positions), positions.device
        blocks = tokens // block + len(cu_seqlens) - 1  # as many as there can be: their number is on the device
        sequence, every = sequence_of(cu_seqlens, tokens), torch.arange(tokens, device=device)
        sequence_blocks = (cu_seqlens.diff().long() + block - 1) // block
        first_rows = (sequence_blocks.cumsum(0) - sequence_blocks) * block
        rows = every + (first_rows - first_tokens(cu_seqlens)).index_select(0, sequence)
        queries = torch.zeros(blocks * block, dtype=torch.int64, device=device).index_copy(0, rows, every)
        used = torch.zeros_like(queries, dtype=torch.bool).index_fill(0, rows, True)
        own = queries.unflatten(0, (blocks, block)).select(1, 0).unsqueeze(1)  # each block's first token
        around = torch.arange(-block, 2 * block, device=device)
        around = around + block * torch.arange(blocks, device=device).unsqueeze(1)
        inside = around.clamp(0, blocks * block - 1)
        keys = queries.take(inside)
        there = used.take(inside) & (around == inside) & (sequence.take(keys) == sequence.take(own))
        # Tokens of other sequences are masked, but a mask does not stop values that are not finite.
        keys = torch.where(there, keys, own)
        distances = positions.take(queries).view(blocks, block, 1) - positions.take(keys).unsqueeze(1)
        # Padding rows attend to everything: the result of a row that attends to nothing is not finite.
        mask = (distances.abs() <= reach) & there.unsqueeze(1) | used.logical_not().view(blocks, block, 1)
        return cls(queries, keys, mask.unsqueeze(1), rows)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float) -> Tensor:
        blocks = self.keys.shape[0]

        def gathered(states: Tensor, tokens: Tensor) -> Tensor:
            return states.squeeze(0).index_select(1, tokens.flatten()).unflatten(1, (blocks, -1)).transpose(0, 1)

        q, k, v = gathered(query, self.queries), gathered(key, self.keys), gathered(value, self.keys)
        output = F.scaled_dot_product_attention(q, k, v, self.mask, dropout_p=dropout, scale=scaling)
        return output.transpose(1, 2).flatten(0, 1).index_select(0, self.rows).unsqueeze(0)


@dataclass(frozen=True)
class FlashWindows:
    """Windows in torch's flash-attention kernel, which counts tokens: for sequences without gaps, in half precision."""

    cu_seqlens: Tensor
    max_seqlen: int
    reach: int

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float) -> Tensor:
        if dropout:  # which the kernel does not compute
            positions = positions_in(self.cu_seqlens, query.shape[2])
            blocks = BlockAttention.of(positions, self.cu_seqlens, self.reach)
            return blocks(query, key, value, scaling, dropout)
        lengths = (self.cu_seqlens, self.cu_seqlens, self.max_seqlen, self.max_seqlen)
        return flash_varlen(query, key, value, lengths, scaling, (self.reach, self.reach))
