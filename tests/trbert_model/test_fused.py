"""Layers as inference computes them: equal to transformers' own, whatever else is in the batch."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.activations import ACT2FN

from tests.conftest import TINY, tiny_classifier
from tests.trbert_model.test_modeling import varlen
from trbert_model.backbones.fused import (
    PACKED_LEAST,
    PACKED_UNIT,
    SEGMENT_ROWS,
    FusedLinear,
    arrange,
    packs_weights,
    padded_length,
)
from trbert_model.modeling import fuse_for_inference

needs_bfloat16 = pytest.mark.skipif(
    not packs_weights(torch.device("cpu"), torch.bfloat16), reason="oneDNN has no bfloat16 products on this CPU"
)
BOTH = [torch.float32, pytest.param(torch.bfloat16, marks=needs_bfloat16)]


def fused_classifier(dtype: torch.dtype, seed: int = 0, **changes):
    """The plain model and the fused one, with selectors in fp32 as an engine has them."""
    plain = tiny_classifier(seed, **changes).eval().to(dtype)
    for selector in plain.bert.encoder.selectors:
        selector.float()
    fused = copy.deepcopy(plain)
    fuse_for_inference(fused)
    return plain, fused


def cu_seqlens_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


lengths_of_sequences = st.lists(st.integers(1, 300), min_size=1, max_size=60)


@settings(deadline=None)
@given(lengths_of_sequences, st.booleans())
def test_a_layout_holds_every_token_once_and_only_its_own_sequence_beside_it(lengths, packed):
    cu_seqlens = cu_seqlens_of(lengths)
    layout = arrange(cu_seqlens, torch.float32, packed=packed)
    tokens, bounds = sum(lengths), cu_seqlens.tolist()
    assert layout.source[layout.rows].tolist() == list(range(tokens))
    sequence_of = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    end, seen = 0, []
    for segment in layout.segments:
        assert segment.start == end
        end += segment.rows
        row = segment.start
        assert segment.keys is None
        for start, count, length, mask, key_start, keys in segment.classes:
            assert (start, key_start, keys) == (row, row - segment.start, length)
            row += count * length
            inside = torch.ones(count, length, dtype=torch.bool) if mask is None else mask[:, 0, 0] == 0
            for i in range(count):
                source = layout.source[start + i * length : start + (i + 1) * length]
                (sequence,) = set(sequence_of[source].tolist())  # padding, too, is its own
                seen.append(sequence)
                mine = list(range(bounds[sequence], bounds[sequence + 1]))
                assert source[inside[i]].tolist() == mine
                assert length == padded_length(torch.tensor(len(mine)).numpy())
        assert row <= end
        if packed:
            assert PACKED_LEAST <= segment.rows <= SEGMENT_ROWS
            assert segment.rows % PACKED_UNIT == 0
    assert end == len(layout.source)
    assert sorted(seen) == list(range(len(lengths)))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 200)), min_size=1, max_size=60), st.booleans())
def test_keys_of_a_layout_are_a_sequences_own_and_its_halted_tokens(lengths, packed):
    cu_seqlens, halted = (cu_seqlens_of(each) for each in zip(*lengths))
    layout = arrange(cu_seqlens, torch.float32, packed=packed, halted=halted)
    number, halted_bounds, seen = torch.arange(sum(own for own, _ in lengths)), halted.tolist(), 0
    sequence_of = torch.repeat_interleave(torch.arange(len(lengths)), cu_seqlens.diff())
    for segment in layout.segments:
        source = layout.source[segment.start : segment.start + segment.rows]
        names = torch.cat([source, -1 - segment.halted]) if segment.halted is not None else source
        keys_from = names if segment.keys is None else names[segment.keys]
        assert not packed or (len(keys_from) % PACKED_UNIT == 0 and len(keys_from) >= PACKED_LEAST)
        for _, count, _, mask, key_start, keys in segment.classes:
            mine = keys_from[key_start : key_start + count * keys].unflatten(0, (count, keys))
            inside = torch.ones(count, keys, dtype=torch.bool) if mask is None else mask[:, 0, 0] == 0
            for row, real in zip(mine, inside):
                sequence = int(sequence_of[row[0]])
                own = number[sequence_of == sequence].tolist()
                others = [-1 - token for token in range(halted_bounds[sequence], halted_bounds[sequence + 1])]
                assert row[real].tolist() == own + others
                assert set(row[~real].tolist()) <= {own[0]}  # padding is its own first row
                seen += 1
    assert seen == len(lengths)


@needs_bfloat16
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_new", "relu"])
@pytest.mark.parametrize("residual", [False, True])
def test_packed_products_equal_plain_ones(activation, residual):
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 96).bfloat16()
    values, other = torch.randn(384, 64).bfloat16(), torch.randn(384, 96).bfloat16() if residual else None
    function = None if activation is None or residual else ACT2FN[activation]
    plain, packed = (FusedLinear(linear, activation=function, packed=packed) for packed in (False, True))
    torch.testing.assert_close(packed(values, other), plain(values, other), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("layers", [[0, 2], [1], []])
def test_a_fused_model_equals_the_plain_one(dtype, layers):
    torch.manual_seed(0)
    plain, fused = fused_classifier(dtype, reduction_layers=layers)
    sequences = [torch.randint(5, TINY["vocab_size"], (int(n),)) for n in torch.randint(1, 33, (200,))]
    with torch.inference_mode():
        expected, output = (varlen(m, sequences, output_hidden_states=True, reduce=False) for m in (plain, fused))
    atol = 1e-6 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(output.logits, expected.logits, atol=atol, rtol=0)
    for a, b in zip(output.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(a, b, atol=50 * atol if dtype == torch.float32 else 0.1, rtol=0)


@pytest.mark.parametrize("dtype", BOTH)
@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 32), min_size=1, max_size=40), seed=st.integers(0, 3), threads=st.integers(1, 2))
def test_neighbours_batches_and_threads_change_nothing(dtype, lengths, seed, threads):
    """Logits within 1e-5 and the same tokens, of each sequence alone and among others."""
    model = fused_classifier(dtype, seed, reduction_layers=[0, 2])[1]
    generator = torch.Generator().manual_seed(seed)
    sequences = [torch.randint(5, TINY["vocab_size"], (n,), generator=generator) for n in lengths]
    try:
        with torch.inference_mode():
            alone = [varlen(model, [sequence]) for sequence in sequences]
            torch.set_num_threads(threads)
            together = varlen(model, sequences)
    finally:
        torch.set_num_threads(1)
    torch.testing.assert_close(together.logits, torch.cat([each.logits for each in alone]), atol=1e-5, rtol=0)
    for i, kept in enumerate(together.kept_tokens):
        assert kept.tolist() == [int(each.kept_tokens[i]) for each in alone]


def test_what_is_not_finite_stays_in_its_sequence():
    """A document with infinite states does not reach its neighbours, not even through padding."""
    fused = fused_classifier(torch.float32, reduction_layers=[])[1]
    sequences = [torch.full((n,), 7) for n in (3, 5, 9, 17)]
    bad = torch.full((5,), 6)
    fused.bert.embeddings.word_embeddings.weight.data[6] = torch.inf
    with torch.inference_mode():
        expected = varlen(fused, sequences).logits
        output = varlen(fused, [bad, *sequences]).logits
    assert expected.isfinite().all()
    assert not output[0].isfinite().any()
    torch.testing.assert_close(output[1:], expected, atol=1e-6, rtol=0)
