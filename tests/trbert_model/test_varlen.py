"""Varlen batches and attention over them."""

import pytest
import torch
import torch.nn.functional as F

from trbert_model import InputError, VarlenBatch
from trbert_model.varlen import first_tokens, varlen_attention


def test_sequences_lie_end_to_end():
    batch = VarlenBatch.from_sequences([[5, 6, 7], [8], [9, 10]], token_type_ids=[[0, 0, 1], [0], [1, 1]])
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 9, 10]
    assert batch.token_type_ids.tolist() == [0, 0, 1, 0, 1, 1]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.max_seqlen == 3
    assert first_tokens(batch.cu_seqlens).tolist() == [0, 3, 4]


def test_padded_input_keeps_its_columns_as_positions():
    ids = torch.tensor([[5, 6, 0], [0, 7, 8]])
    batch, indices = VarlenBatch.from_padded(ids, (ids > 0).long(), None, positions=3)
    assert batch.input_ids.tolist() == [5, 6, 7, 8]
    assert batch.position_ids.tolist() == [0, 1, 1, 2]
    assert indices.tolist() == [0, 1, 4, 5]


@pytest.mark.parametrize("requires_grad", [False, True])
def test_attention_equals_masked_attention_over_the_whole_batch(requires_grad):
    torch.manual_seed(0)
    lengths = [3, 1, 8, 5]
    query, key, value = (torch.randn(1, 4, sum(lengths), 8, requires_grad=requires_grad) for _ in range(3))
    cu_seqlens = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    same_sequence = owner[:, None] == owner[None, :]
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=same_sequence, scale=0.3).transpose(1, 2)
    output, _ = varlen_attention(None, query, key, value, None, cu_seqlens=cu_seqlens, max_seqlen=8, scaling=0.3)
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=0)
    if requires_grad:
        output.sum().backward()
        assert all(tensor.grad is not None for tensor in (query, key, value))


def test_gradients_of_bfloat16_are_those_of_float32():
    torch.manual_seed(0)
    cu_seqlens = torch.tensor([0, 3, 40, 41], dtype=torch.int32)
    upstream = torch.randn(1, 41, 4, 8).bfloat16()
    rounded = [torch.randn(1, 4, 41, 8).bfloat16().requires_grad_() for _ in range(3)]
    exact = [tensor.detach().float().requires_grad_() for tensor in rounded]
    for inputs in (rounded, exact):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inputs is rounded):
            output, _ = varlen_attention(None, *inputs, None, cu_seqlens=cu_seqlens, max_seqlen=37)
        assert output.dtype == inputs[0].dtype
        output.backward(upstream.to(output.dtype))
    for tensor, other in zip(rounded, exact):
        torch.testing.assert_close(tensor.grad, other.grad.bfloat16(), atol=0, rtol=0)


def test_padded_tensors_are_refused():
    query = torch.randn(2, 4, 6, 8)
    with pytest.raises(InputError, match="packed first"):
        varlen_attention(None, query, query, query, None, cu_seqlens=torch.tensor([0, 6]), max_seqlen=6)
