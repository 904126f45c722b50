"""Varlen batches: sequences concatenated without padding, and attention over them.

As in torch and flash-attention, `cu_seqlens` is an int32 tensor of shape (sequences + 1,) that starts with 0 and ends
with the total number of tokens. Sequence i is rows `cu_seqlens[i]:cu_seqlens[i + 1]` of every (total tokens, ...)
tensor.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from .errors import InputError

if TYPE_CHECKING:
    from .backbones.local_attention import LocalAttention

ATTENTION_NAME = "trbert_varlen"
HALF_PRECISION = (torch.bfloat16, torch.float16)


@dataclass
class VarlenBatch:
    """Sequences concatenated without padding.

    Attributes:
        input_ids, token_type_ids, position_ids: int64 (total tokens,).
        cu_seqlens: int32 (sequences + 1,).
        max_seqlen: tokens of the longest sequence.
    """

    input_ids: Tensor
    token_type_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int

    @classmethod
    def from_sequences(cls, sequences: Sequence, token_type_ids: Sequence | None = None, device=None) -> "VarlenBatch":
        """Concatenate token id sequences (lists, arrays or 1-d tensors) on `device`.

        Raises:
            InputError: an empty batch or sequence.
        """
        if len(sequences) == 0:
            raise InputError("an empty batch: there is no sequence to compute on")
        ids = [torch.as_tensor(sequence, dtype=torch.int64) for sequence in sequences]
        lengths = torch.tensor([len(sequence) for sequence in ids])
        if int(lengths.min()) == 0:
            raise InputError(f"sequence {int(lengths.argmin())} of the batch has no tokens")
        if token_type_ids is None:
            types = torch.zeros(int(lengths.sum()), dtype=torch.int64)
        else:
            types = torch.cat([torch.as_tensor(sequence, dtype=torch.int64) for sequence in token_type_ids])
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        positions = torch.cat([torch.arange(length) for length in lengths.tolist()])
        return cls(
            input_ids=torch.cat(ids).to(device),
            token_type_ids=types.to(device),
            position_ids=positions.to(device),
            cu_seqlens=cu_seqlens.to(device),
            max_seqlen=int(lengths.max()),
        )

    @classmethod
    def from_padded(
        cls, input_ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None, positions: int
    ) -> tuple["VarlenBatch", Tensor]:
        """Pack (batch, length) tensors without their masked positions.

        A token's position is its column; in tensors that are wider than `positions`, its number in the sequence.

        Returns:
            The batch, and the indices of its tokens in the flattened padded tensor, int64 (total tokens,).

        Raises:
            InputError: an empty batch or sequence, or a mask of another shape.
        """
        if input_ids.numel() == 0:
            raise InputError(f"an empty batch: input_ids has shape {tuple(input_ids.shape)}")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if mask.shape != input_ids.shape:
            raise InputError(
                f"attention_mask has shape {tuple(mask.shape)}, input_ids {tuple(input_ids.shape)}: they must be equal"
            )
        mask = mask.bool()
        lengths = mask.sum(1)
        if int(lengths.min()) == 0:
            raise InputError(f"sequence {int(lengths.argmin())} of the batch has no tokens: its mask is all 0")
        indices = mask.flatten().nonzero().squeeze(1)
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        fits = input_ids.shape[1] <= positions
        batch = cls(
            input_ids=input_ids.flatten()[indices],
            token_type_ids=types.flatten()[indices],
            position_ids=indices % input_ids.shape[1] if fits else positions_in(cu_seqlens, len(indices)),
            cu_seqlens=cu_seqlens,
            max_seqlen=int(lengths.max()),
        )
        return batch, indices


def truncated(mask: Tensor, positions: int) -> Tensor:
    """The mask of padded sequences, (batch, length), cut to `positions` tokens each.

    Like a tokenizer's truncation: a sequence's last token, which is [SEP], stays.
    """
    count = mask.long().cumsum(1)
    return mask.bool() & ((count < positions) | (count == count[:, -1:]))


def model_inputs(sequences: Sequence, token_type_ids: Sequence | None = None) -> dict[str, Tensor]:
    """Token id sequences as one varlen batch, in a dict of model arguments."""
    batch = VarlenBatch.from_sequences(sequences, token_type_ids)
    return {
        "input_ids": batch.input_ids,
        "token_type_ids": batch.token_type_ids,
        "position_ids": batch.position_ids,
        "cu_seqlens": batch.cu_seqlens,
    }


def first_tokens(cu_seqlens: Tensor) -> Tensor:
    """The index of each sequence's first token, int64 (sequences,)."""
    return cu_seqlens.narrow(0, 0, cu_seqlens.shape[0] - 1).long()


def sequence_of(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """The index of each token's sequence, int64 (tokens,)."""
    indices = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens.narrow(0, 1, len(cu_seqlens) - 1), indices, right=True)


def positions_in(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Each token's position in its sequence, from 0, int64 (tokens,)."""
    first = first_tokens(cu_seqlens).index_select(0, sequence_of(cu_seqlens, tokens))
    return torch.arange(tokens, device=cu_seqlens.device) - first


def sequence_sums(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The sum of each sequence's values, (tokens, ...) → (sequences, ...)."""
    sums = torch.zeros(len(cu_seqlens) - 1, *values.shape[1:], dtype=values.dtype, device=values.device)
    return sums.index_add(0, sequence_of(cu_seqlens, len(values)), values)


def top_tokens(scores: Tensor, cu_seqlens: Tensor, counts: Tensor) -> Tensor:
    """Mask of the `counts[i]` highest-scored tokens of each sequence i, always with its first token, bool (tokens,)."""
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    scores = scores.clone()
    scores[first_tokens(cu_seqlens)] = torch.inf
    bounds = cu_seqlens.tolist()
    for start, end, count in zip(bounds, bounds[1:], counts.tolist()):
        chosen[start + scores[start:end].topk(min(count, end - start)).indices] = True
    return chosen


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seqlens: Tensor,
    max_seqlen: int,
    key_cu_seqlens: Tensor | None = None,
    max_keys: int | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    local: "LocalAttention | None" = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention within each sequence of a varlen batch, as a transformers attention function.

    Half precision on CUDA without dropout uses torch's varlen kernel. Everything else uses torch's SDPA, one sequence
    at a time, without padding.

    Args:
        query, key, value: (1, heads, total tokens, head size).
        key_cu_seqlens, max_keys: of the keys and values, where they are more than the queries; `max_keys` may be more
            than the longest sequence has.
        sliding_window: set by transformers' layers that attend only to tokens at nearby positions.
        local: computes such a layer.

    Returns:
        (1, total tokens, heads, head size), and None for the attention weights.

    Raises:
        InputError: an attention mask, a padded batch, or a sliding window without `local`.
    """
    if attention_mask is not None or query.shape[0] != 1:
        raise InputError(
            "varlen attention takes one unpadded batch without a mask; padded tensors must be packed first"
        )
    if query.requires_grad and query.device.type == "cpu" and query.dtype in HALF_PRECISION:
        # On CPUs the kernel's gradient is 2 to 5 times as fast in fp32, and a training step a fifth.
        with torch.autocast("cpu", enabled=False):
            output, _ = varlen_attention(
                module,
                *(query.float(), key.float(), value.float(), None),
                cu_seqlens=cu_seqlens,
                max_seqlen=max_seqlen,
                key_cu_seqlens=key_cu_seqlens,
                max_keys=max_keys,
                scaling=scaling,
                dropout=dropout,
                sliding_window=sliding_window,
                local=local,
            )
        return output.to(query.dtype), None
    if local is not None:
        return local(query, key, value, scaling, dropout), None
    if sliding_window is not None:
        raise InputError("a layer with a sliding window needs the batch's windows (Backbone.geometry)")
    if key_cu_seqlens is None or max_keys is None:
        key_cu_seqlens, max_keys = cu_seqlens, max_seqlen
    if query.is_cuda and query.dtype in HALF_PRECISION and dropout == 0.0:
        lengths = (cu_seqlens, key_cu_seqlens, max_seqlen, max_keys)
        return flash_varlen(query, key, value, lengths, scaling), None
    return sequence_attention(query, key, value, cu_seqlens, key_cu_seqlens, scaling, dropout), None


def sequence_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    key_cu_seqlens: Tensor,
    scaling: float | None,
    dropout: float = 0.0,
) -> Tensor:
    """Run torch's SDPA on one sequence at a time; same shapes as `varlen_attention`."""
    shape = (1, query.shape[2], query.shape[1], query.shape[3])
    output = None if query.requires_grad else query.new_empty(shape)
    bounds = cu_seqlens.tolist()
    pieces = []
    # Split once: each slice would have a gradient as large as the whole batch.
    sizes = [end - start for start, end in zip(bounds, bounds[1:])]
    key_sizes = sizes if key_cu_seqlens is cu_seqlens else key_cu_seqlens.diff().tolist()
    parts = zip(query.split(sizes, 2), key.split(key_sizes, 2), value.split(key_sizes, 2))
    for start, end, (q, k, v) in zip(bounds, bounds[1:], parts):
        piece = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling).transpose(1, 2)
        if output is None:
            pieces.append(piece)
        else:
            output[:, start:end] = piece
    return torch.cat(pieces, dim=1) if output is None else output


def flash_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[Tensor, Tensor, int, int],
    scaling: float | None,
    window: tuple[int, int] = (-1, -1),
) -> Tensor:
    """Run torch's flash-attention varlen kernel; same shapes as `varlen_attention`.

    Args:
        lengths: `cu_seqlens` of queries and of keys, and the longest sequence's tokens of each.
        window: number of tokens before and after each token to attend to; -1 for all.
    """
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    # num_splits=1: otherwise the number of splits depends on the longest sequence, and a document's result on the rest
    # of the batch (torch documents bitwise batch invariance for 1).
    output = varlen_attn(q, k, v, *lengths, scale=scaling, window_size=window, num_splits=1)
    assert isinstance(output, Tensor)  # no auxiliary output was requested
    return output.unsqueeze(0)


AttentionInterface.register(ATTENTION_NAME, varlen_attention)
