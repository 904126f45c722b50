"""A transformer layer as inference computes it: fused products, and sequences of similar length together.

On CPUs a batch is laid out by `arrange`: sequences by rising length, each padded to its length class, so that one call
computes the attention of a whole class. Where oneDNN is fast in bfloat16, its weights are packed once, and products run
on few fixed numbers of rows: oneDNN prepares itself for each number that it has not seen, and results can depend on it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import GELUActivation

from ..varlen import varlen_attention

if TYPE_CHECKING:
    from ..reduction.state import TokenState

# A segment of whole sequences, of about this many rows, goes through a layer before the next one: larger ones leave the
# caches. Where weights are packed its rows are a multiple, and not few: oneDNN's results differ between small numbers.
SEGMENT_ROWS, PACKED_UNIT, PACKED_LEAST = 1024, 128, 384


class LengthClass(NamedTuple):
    """Sequences that attention computes together, rows `start` to `start + sequences * length` of the layout.

    Attributes:
        mask: (sequences, 1, 1, keys), 0 for tokens and -inf for padding; None if there is no padding.
        key_start, keys: the rows of the keys in the segment are `key_start` to `key_start + sequences * keys`.
    """

    start: int
    sequences: int
    length: int
    mask: Tensor | None
    key_start: int
    keys: int


class Segment(NamedTuple):
    """Rows of the layout that go through a layer together: their sequences, then rows that nobody reads.

    Attributes:
        halted: int64, the halted tokens of these sequences, which are attended to, too; None if there are none.
        keys: int64, the rows of the keys, among the segment's own and then its halted tokens. None: its own.
    """

    start: int
    rows: int
    classes: list[LengthClass]
    halted: Tensor | None = None
    keys: Tensor | None = None


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


def arrange(cu_seqlens: Tensor, dtype: torch.dtype, *, packed: bool, halted: Tensor | None = None) -> Layout:
    """Lay out a varlen batch on a CPU.

    A sequence's class depends on its own lengths only, so that a result never depends on the batch.

    Args:
        cu_seqlens: int32 (sequences + 1,).
        dtype: of the layers.
        packed: whether segments have the numbers of rows that packed weights need.
        halted: int32 (sequences + 1,), the `cu_seqlens` of halted tokens, which are keys only.
    """
    bounds = cu_seqlens.numpy().astype(np.int64)
    halted_bounds = np.zeros_like(bounds) if halted is None else halted.numpy().astype(np.int64)
    lengths, keys = np.diff(bounds), np.diff(bounds + halted_bounds)
    padded, padded_keys = padded_length(lengths), padded_length(keys)
    # Of a class those without padding first: they need no mask.
    order = np.lexsort((keys != padded_keys, padded_keys, padded))
    starts, segments, first, end = np.zeros_like(lengths), list[Segment](), 0, 0
    for last in range(1, len(order) + 1):
        members = order[first:last]
        size = int(padded[members].sum())
        if last < len(order) and size + padded[order[last]] <= SEGMENT_ROWS:
            continue
        starts[members] = end + np.cumsum(padded[members]) - padded[members]
        count = _row_count(size, packed=packed)
        halted_rows, key_rows = None, None
        if halted is not None and (own := (keys - lengths)[members]).any():
            halted_rows = torch.from_numpy(_ranges(halted_bounds[members], own))
            among = count + np.cumsum(own) - own
            key_rows = torch.from_numpy(_key_rows(lengths[members], keys[members], among, packed=packed))
        classes = list(_classes(members, lengths, keys, end, dtype))
        segments.append(Segment(end, count, classes, halted_rows, key_rows))
        first, end = last, end + count
    rows = _ranges(starts, lengths)
    source = np.zeros(end, dtype=np.int64)
    source[_ranges(starts, padded)] = np.repeat(bounds[:-1], padded)
    source[rows] = np.arange(len(rows))
    return Layout(torch.from_numpy(rows), torch.from_numpy(source), segments, packed)


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The numbers from each start on, `lengths` of them, end to end."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - ends + lengths, lengths) + np.arange(lengths.sum())


def _row_count(rows: int, *, packed: bool) -> int:
    """The number of rows to compute for this many; packed: see `arrange`."""
    return max(PACKED_LEAST, -(-rows // PACKED_UNIT) * PACKED_UNIT) if packed else rows


def _key_rows(lengths: np.ndarray, keys: np.ndarray, halted: np.ndarray, *, packed: bool) -> np.ndarray:
    """The rows of the keys of a segment's sequences; halted: the row of each one's first halted token.

    Padding repeats the sequence's own first row: not even infinite neighbours reach it through the mask.
    """
    padded, padded_keys = padded_length(lengths), padded_length(keys)
    starts = np.repeat(np.cumsum(padded) - padded, padded_keys)
    number = _ranges(np.zeros_like(keys), padded_keys)
    own, all_keys, of_halted = (np.repeat(each, padded_keys) for each in (lengths, keys, halted - lengths))
    rows = np.where(number < own, starts + number, np.where(number < all_keys, of_halted + number, starts))
    return np.concatenate([rows, np.zeros(_row_count(len(rows), packed=packed) - len(rows), np.int64)])


def _classes(
    members: np.ndarray, lengths: np.ndarray, keys: np.ndarray, start: int, dtype: torch.dtype
) -> Iterator[LengthClass]:
    """The classes of a segment's sequences, which are in order; start: the segment's first row."""
    lengths, keys, key_start = lengths[members], keys[members], 0
    padded, padded_keys = padded_length(lengths), padded_length(keys)
    kinds = np.stack([padded, padded_keys, keys != padded_keys])
    for part in np.split(np.arange(len(members)), np.flatnonzero((kinds[:, 1:] != kinds[:, :-1]).any(0)) + 1):
        length, key_length, has_padding = (int(kind) for kind in kinds[:, part[0]])
        mask = None
        if has_padding:
            inside = torch.arange(key_length) < torch.from_numpy(keys[part])[:, None]
            mask = torch.zeros(inside.shape, dtype=dtype).masked_fill(~inside, -torch.inf)[:, None, None, :]
        yield LengthClass(start, len(part), length, mask, key_start, key_length)
        start += len(part) * length
        key_start += len(part) * key_length


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
        biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
        self.bias: Tensor | None = nn.Buffer(torch.cat(biases)) if biases else None

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


def _as_it_is(values: Tensor) -> Tensor:
    return values


class FusedLayer(nn.Module, ABC):
    """A layer for inference; packed: let oneDNN lay out the weights for itself (`packs_weights`)."""

    def __init__(self, *, packed: bool):
        super().__init__()
        self.packed = packed

    @abstractmethod
    def forward(self, state: "TokenState", *, normalised: bool = True) -> Tensor:
        """(rows, hidden) → (rows, hidden): the rows of a layout, or without one the tokens of a varlen batch.

        Args:
            normalised: False leaves out the last normalisation, `Backbone.output_norm`.
        """


class FusedBertLayer(FusedLayer):
    """A BERT layer for inference.

    Args:
        layer: transformers' `BertLayer`.
        packed: see `FusedLayer`.
        halts: whether tokens can be halted, which takes keys and values by themselves.
    """

    def __init__(self, layer: Any, *, packed: bool, halts: bool = False):
        super().__init__(packed=packed)
        attention, output = layer.attention.self, layer.attention.output
        self.heads: int = attention.num_attention_heads
        self.scaling: float = attention.scaling
        together = [[attention.query], [attention.key, attention.value]]
        if not halts:
            together = [[each for linears in together for each in linears]]
        self.projections = nn.ModuleList(FusedLinear(*linears, packed=packed) for linears in together)
        self.out = FusedLinear(output.dense, packed=packed)
        self.attention_norm = output.LayerNorm
        intermediate = layer.intermediate
        self.up = FusedLinear(intermediate.dense, activation=intermediate.intermediate_act_fn, packed=packed)
        self.down = FusedLinear(layer.output.dense, packed=packed)
        self.output_norm = layer.output.LayerNorm

    def forward(self, state: "TokenState", *, normalised: bool = True) -> Tensor:
        norm = self.output_norm if normalised else _as_it_is
        hidden, halted = state.hidden, None if state.halted is None else state.halted.hidden
        if state.layout is None:
            return norm(self._feed_forward(self._attention(state), hidden))
        output = torch.empty_like(hidden)
        for segment in state.layout.segments:
            rows = slice(segment.start, segment.start + segment.rows)
            output[rows] = norm(self._segment(hidden[rows], segment, halted))
        return output

    def _attention(self, state: "TokenState") -> Tensor:
        query, key, value = self._projected(state.hidden)
        keys: dict[str, Any] = {}
        if state.halted is not None:
            halted_key, halted_value = self._split(self.projections[-1](state.halted.hidden), 2)
            order = torch.cat([state.token_indices, state.halted.token_indices]).argsort()
            key, value = torch.cat([key, halted_key])[order], torch.cat([value, halted_value])[order]
            keys = {"key_cu_seqlens": state.cu_seqlens + state.halted.cu_seqlens, "max_keys": state.max_keys}
        query, key, value = (part.transpose(0, 1).unsqueeze(0) for part in (query, key, value))
        context, _ = varlen_attention(
            self,
            *(query, key, value, None),
            cu_seqlens=state.cu_seqlens,
            max_seqlen=state.max_seqlen,
            scaling=self.scaling,
            **keys,
        )
        return context.flatten(2).squeeze(0)

    def _segment(self, hidden: Tensor, segment: Segment, halted: Tensor | None) -> Tensor:
        context, sources = torch.zeros_like(hidden), hidden
        if segment.keys is not None:
            assert halted is not None
            assert segment.halted is not None
            sources = torch.cat([hidden, halted.index_select(0, segment.halted)]).index_select(0, segment.keys)
        projected = self._projected(hidden, sources)
        for start, count, length, mask, key_start, keys in segment.classes:
            rows = slice(start - segment.start, start - segment.start + count * length)
            key_rows = slice(key_start, key_start + count * keys)
            query, key, value = (
                part[own].unflatten(0, (count, -1)).transpose(1, 2)
                for part, own in zip(projected, (rows, key_rows, key_rows))
            )
            mask = mask if mask is None else mask.expand(count, 1, length, keys)
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.scaling)
            context[rows] = attended.transpose(1, 2).flatten(0, 1).flatten(1)
        return self._feed_forward(context, hidden)

    def _projected(self, hidden: Tensor, sources: Tensor | None = None) -> tuple[Tensor, ...]:
        """Queries of `hidden`, and keys and values of `sources`: (rows, heads, head size) each.

        Args:
            sources: default: `hidden`. Others are only for layers that halt.
        """
        if len(self.projections) == 1:
            return self._split(self.projections[0](hidden), 3)
        query, key_value = self.projections
        return *self._split(query(hidden), 1), *self._split(key_value(hidden if sources is None else sources), 2)

    def _split(self, projected: Tensor, parts: int) -> tuple[Tensor, ...]:
        """(rows, parts * hidden) → (rows, heads, head size) each."""
        return projected.unflatten(-1, (parts, self.heads, -1)).unbind(1)

    def _feed_forward(self, context: Tensor, hidden: Tensor) -> Tensor:
        hidden = self.attention_norm(self.out(context, residual=hidden))
        return self.down(self.up(hidden), residual=hidden)
