"""Texts → token ids → windows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import classification_task, tiny_tokenizer
from trbert_model import ConfigurationError
from trbert_model.tasks.classification.labellings import softmax

TOKENIZER = tiny_tokenizer()


@given(length=st.integers(0, 300), stride=st.integers(0, 12))
def test_windows_cover_every_token_and_weigh_it_once(length, stride):
    task = classification_task(16, stride=stride)
    tokens = np.arange(100, 100 + length, dtype=np.int32)
    windows = list(task.windows(tokens))
    assert all(len(window.input_ids) <= 16 for window in windows)
    assert all(window.input_ids[0] == 2 for window in windows)
    assert all(window.input_ids[-1] == 3 for window in windows)
    bodies = [window.input_ids[1:-1] for window in windows]
    assert np.array_equal(
        np.concatenate([body[-window.new_tokens :] for body, window in zip(bodies, windows)])[:length], tokens
    )
    assert sum(window.new_tokens for window in windows) == max(length, 1)
    for before, after in zip(bodies, bodies[1:]):
        assert np.array_equal(before[len(before) - stride :], after[:stride])


def test_truncation_is_one_window_of_the_beginning():
    task = classification_task(16, overflow="truncate", stride=0)
    (tokens,) = task.tokenize(["good " * 100])
    assert len(tokens) == 14
    (window,) = task.windows(tokens)
    assert len(window.input_ids) == 16


def test_the_tokenizers_own_truncation_and_padding_are_switched_off():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(8)
    tokenizer.backend_tokenizer.enable_padding(length=8)
    short, long = classification_task(32, tokenizer).tokenize(["good", "good " * 100])
    assert (len(short), len(long)) == (1, 100)


@pytest.mark.parametrize("overflow", ["windows", "truncate"])
def test_long_texts_in_pieces_have_the_same_tokens(monkeypatch, overflow):
    task = classification_task(32, overflow=overflow)
    text = "the good news, \u00a0 the 中中 baddest game\n\tof é é bank . ." * 20
    (whole,) = task.tokenize([text])
    for size in (40, 41, 57, 200):
        monkeypatch.setattr("trbert_model.tasks.text.PIECE_CHARACTERS", size)
        (pieces,) = task.tokenize([text])
        if overflow == "windows" or size == 200:
            assert np.array_equal(pieces, whole)


def test_a_text_without_white_space_is_one_piece(monkeypatch):
    monkeypatch.setattr("trbert_model.tasks.text.PIECE_CHARACTERS", 10)
    task = classification_task(32)
    (tokens,) = task.tokenize(["中" * 100])
    assert len(tokens) == 100


def test_options_out_of_range_are_refused():
    with pytest.raises(ConfigurationError, match="overflow 'cut'"):
        classification_task(32, overflow="cut")
    with pytest.raises(ConfigurationError, match="stride 30 must be less than the 30"):
        classification_task(32, stride=30)


def test_softmax_survives_large_logits():
    np.testing.assert_allclose(softmax(np.array([[1000.0, 0.0], [0.0, 0.0]])), [[1, 0], [0.5, 0.5]])


def test_many_texts_are_tokenised_some_at_a_time_and_alike(monkeypatch):
    task = classification_task()
    texts = [f"good news {'of a game ' * (i % 5)}" for i in range(25)]
    whole = task.tokenize(texts)
    monkeypatch.setattr("trbert_model.tasks.text._TEXTS_AT_A_TIME", 4)
    for a, b in zip(task.tokenize(texts), whole, strict=True):
        assert np.array_equal(a, b)
