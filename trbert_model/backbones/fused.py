"""A transformer layer as inference computes it: fused products, and sequences of similar length together.

On CPUs a batch is laid out by `arrange`: sequences by rising length, each padded to its length class, so that one call
computes the attention of a whole class. Where oneDNN is fast in bfloat16, its weights are packed once, and products run
on few fixed numbers of rows: oneDNN prepares itself for each number that it has not seen, and results can depend on it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import GELUActivation

from ..varlen import varlen_attention

# A segment of whole sequences, of about this many rows, goes through a layer before the next one: larger ones leave the
# caches. Where weights are packed its rows are a multiple, and not few: oneDNN's results differ between small numbers.
SEGMENT_ROWS, PACKED_UNIT, PACKED_LEAST = 1024, 128, 384


class LengthClass(NamedTuple):
    """Sequences that attention computes together, rows `start` to `start + sequences * length` of the layout.

    Attributes:
        mask: (sequences, 1, 1, length), 0 for tokens and -inf for padding; None if there is no padding.
    """

    start: int
    sequences: int
    length: int
    mask: Tensor | None


class Segment(NamedTuple):
    """Rows of the layout that go through a layer together: their sequences, then rows that nobody reads."""

    start: int
    rows: int
    classes: list[LengthClass]


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a varlen batch are while its layers are computed.

    Attributes:
        rows: int64 (tokens,), each token's row.
        source: int64 (all rows,), the token that each row begins with: a padding row with its sequence's first.
        segments: in the order of their rows, of which they leave none out.
        packed: see `arrange`.
    """

    rows: Tensor
    source: Tensor
    segments: list[Segment]
    packed: bool


def padded_length(length: np.ndarray) -> np.ndarray:
    """The length class of sequences: a multiple of 8 up to 64 tokens, of 16 above."""
    return np.where(length <= 64, -(-length // 8) * 8, -(-length // 16) * 16)


def arrange(cu_seqlens: Tensor, dtype: torch.dtype, *, packed: bool) -> Layout:
    """Lay out a varlen batch on a CPU.

    A sequence's class depends on its own length only, so that a result never depends on the batch.

    Args:
        cu_seqlens: int32 (sequences + 1,).
        dtype: of the layers.
        packed: whether segments have the numbers of rows that packed weights need.
    """
    bounds = cu_seqlens.numpy().astype(np.int64)
    lengths = np.diff(bounds)
    padded = padded_length(lengths)
    order = np.lexsort((lengths != padded, padded))  # of a class those without padding first: they need no mask
    starts, segments, first, end = np.zeros_like(lengths), list[Segment](), 0, 0
    for last in range(1, len(order) + 1):
        members = order[first:last]
        size = int(padded[members].sum())
        if last < len(order) and size + padded[order[last]] <= SEGMENT_ROWS:
            continue
        starts[members] = end + np.cumsum(padded[members]) - padded[members]
        classes = list(_classes(members, lengths, padded, end, dtype))
        size = max(PACKED_LEAST, -(-size // PACKED_UNIT) * PACKED_UNIT) if packed else size
        segments.append(Segment(end, size, classes))
        first, end = last, end + size
    rows = _ranges(starts, lengths)
    source = np.zeros(end, dtype=np.int64)
    source[_ranges(starts, padded)] = np.repeat(bounds[:-1], padded)
    source[rows] = np.arange(len(rows))
    return Layout(torch.from_numpy(rows), torch.from_numpy(source), segments, packed)


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The numbers from each start on, `lengths` of them, end to end."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - ends + lengths, lengths) + np.arange(ends[-1])


def _classes(
    members: np.ndarray, lengths: np.ndarray, padded: np.ndarray, start: int, dtype: torch.dtype
) -> Iterator[LengthClass]:
    """The classes of a segment's sequences, which are in order."""
    keys = np.stack([padded[members], lengths[members] != padded[members]])
    for part in np.split(np.arange(len(members)), np.flatnonzero((keys[:, 1:] != keys[:, :-1]).any(0)) + 1):
        length, has_padding = int(keys[0, part[0]]), bool(keys[1, part[0]])
        mask = None
        if has_padding:
            inside = torch.arange(length) < torch.from_numpy(lengths[members[part]])[:, None]
            mask = torch.zeros(inside.shape, dtype=dtype).masked_fill(~inside, -torch.inf)[:, None, None, :]
        yield LengthClass(start, len(part), length, mask)
        start += len(part) * length


def packs_weights(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether linears on this device are computed by oneDNN with packed weights."""
    able = device.type == "cpu" and dtype == torch.bfloat16 and torch.backends.mkldnn.is_available()
    return able and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class FusedLinear(nn.Module):
    """A linear and its activation, or the sum with a residual.

    Args:
        linears: transformers' modules; of several, their outputs side by side.
        packed: let oneDNN lay out the weights for itself (`packs_weights`).
    """

    def __init__(self, *linears: Any, activation: Callable[[Tensor], Tensor] | None = None, packed: bool):
        super().__init__()
        weight = torch.cat([linear.weight.detach() for linear in linears])
        self.packed, self.activation = packed, activation
        self.weight = nn.Buffer(torch.ops.mkldnn._reorder_linear_weight(weight, SEGMENT_ROWS) if packed else weight)
        self.bias = nn.Buffer(torch.cat([linear.bias.detach() for linear in linears]))

    def forward(self, values: Tensor, residual: Tensor | None = None) -> Tensor:
        """(rows, in), and (rows, out) to add → (rows, out)."""
        if self.packed and residual is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(values, residual, self.weight, self.bias, "add")
        if self.packed and (self.activation is None or isinstance(self.activation, GELUActivation)):
            operation = "none" if self.activation is None else "gelu"
            return torch.ops.mkldnn._linear_pointwise(values, self.weight, self.bias, operation, [], "none")
        if self.packed:
            output = torch.ops.mkldnn._linear_pointwise(values, self.weight, self.bias, "none", [], "")
        else:
            output = F.linear(values, self.weight, self.bias)
        output = output if self.activation is None else self.activation(output)
        return output if residual is None else output + residual


class FusedLayer(nn.Module):
    """A BERT layer for inference.

    Args:
        layer: transformers' `BertLayer`.
        packed: let oneDNN lay out the weights for itself (`packs_weights`).
    """

    def __init__(self, layer: Any, *, packed: bool):
        super().__init__()
        attention, output = layer.attention.self, layer.attention.output
        self.heads: int = attention.num_attention_heads
        self.scaling: float = attention.scaling
        self.packed = packed
        self.qkv = FusedLinear(attention.query, attention.key, attention.value, packed=packed)
        self.out = FusedLinear(output.dense, packed=packed)
        self.attention_norm = output.LayerNorm
        intermediate = layer.intermediate
        self.up = FusedLinear(intermediate.dense, activation=intermediate.intermediate_act_fn, packed=packed)
        self.down = FusedLinear(layer.output.dense, packed=packed)
        self.output_norm = layer.output.LayerNorm

    def forward(self, hidden: Tensor, cu_seqlens: Tensor, max_seqlen: int, layout: Layout | None = None) -> Tensor:
        """(rows, hidden) → (rows, hidden): the rows of a layout, or without one the tokens of a varlen batch."""
        if layout is None:
            query, key, value = (part.transpose(0, 1).unsqueeze(0) for part in self._split(self.qkv(hidden)))
            context, _ = varlen_attention(
                self, query, key, value, None, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, scaling=self.scaling
            )
            return self._feed_forward(context.flatten(2).squeeze(0), hidden)
        output = torch.empty_like(hidden)
        for segment in layout.segments:
            rows = slice(segment.start, segment.start + segment.rows)
            output[rows] = self._segment(hidden[rows], segment)
        return output

    def _segment(self, hidden: Tensor, segment: Segment) -> Tensor:
        qkv, context = self.qkv(hidden), torch.zeros_like(hidden)
        for start, count, length, mask in segment.classes:
            rows = slice(start - segment.start, start - segment.start + count * length)
            query, key, value = (part.unflatten(0, (count, length)).transpose(1, 2) for part in self._split(qkv[rows]))
            mask = mask if mask is None else mask.expand(count, 1, length, length)
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.scaling)
            context[rows] = attended.transpose(1, 2).flatten(0, 1).flatten(1)
        return self._feed_forward(context, hidden)

    def _split(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """(rows, 3 * hidden) → query, key and value, (rows, heads, head size) each."""
        return qkv.unflatten(-1, (3, self.heads, -1)).unbind(1)

    def _feed_forward(self, context: Tensor, hidden: Tensor) -> Tensor:
        hidden = self.attention_norm(self.out(context, residual=hidden))
        return self.output_norm(self.down(self.up(hidden), residual=hidden))
