"""Questions over contexts: windows, offsets into texts of every kind, one softmax over all windows, SQuAD's metrics."""

import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import question_task, tiny_tokenizer
from trbert_model import ConfigurationError
from trbert_model.tasks.question_answering.metrics import exact_match, f1, normalized
from trbert_model.tasks.question_answering.task import QuestionAnsweringTask
from trbert_model.tasks.text import whole_characters

TOKENIZER = tiny_tokenizer()
NFC = "the café news. née É."
TEXTS = {
    "composed": NFC,
    "decomposed": unicodedata.normalize("NFD", NFC),
    "emoji": "good 👨‍👩‍👧 news ❤️ of 👍🏽 a game",
    "chinese": "the 中中 bank 中 good 中文",
    "line ends": "the good\r\nnews\r\n\r\nof a game",
    "right to left": "news שָׁלוֹם good مَرحبا bank",
    "zero width": "good\u200bnews\ufeff of\u00a0a\u2009game",
    "ligatures": "ﬁne news İstanbul ß good",
}


def task(**options) -> QuestionAnsweringTask:
    return question_task(**{"max_positions": 24, **options})


def logits_for(windows, first: int, last: int, height: float = 20.0):
    """Logits that point at context tokens first and last in every window that has them."""
    found = []
    for window in windows:
        start, end = np.zeros(len(window.input_ids)), np.zeros(len(window.input_ids))
        for logits, token in ((start, first), (end, last)):
            if window.first <= token < window.first + window.count:
                logits[window.passage + token - window.first] = height
        found.append((start, end))
    return found


@pytest.mark.parametrize("text", [pytest.param(text, id=name) for name, text in TEXTS.items()])
def test_answers_are_pieces_of_the_context_as_it_came(text):
    """Every token alone and every pair of tokens: whole characters, in order, nothing beside them."""
    answering = task(max_positions=64)
    (question,) = answering.encode(["good news"], [text])
    windows = list(answering.windows(question))
    count = len(question.context.ids)
    assert count > 3
    for first in range(count):
        for last in range(first, min(first + 3, count)):
            answer = answering.combine(question, windows, logits_for(windows, first, last))
            span = answer.spans[0]
            assert question.context.starts[first] == span.start < span.end <= len(text)
            found = text[span.start : span.end]
            assert not found[0].isspace()
            rest = text[span.end :]
            assert not rest or not unicodedata.combining(rest[0]), "a mark was cut off its letter"
            assert answer.best(threshold=0.0) == span


def test_an_accent_that_is_held_apart_stays_with_its_letter():
    text = unicodedata.normalize("NFD", "a café")
    assert whole_characters(text, len(text) - 1) == len(text)
    assert whole_characters("ab", 1) == 1
    assert whole_characters("❤️x", 1) == 2


@settings(max_examples=60, deadline=None)
@given(words=st.integers(0, 120), question=st.integers(1, 10), stride=st.integers(0, 8))
def test_windows_cover_every_token_and_count_it_once(words, question, stride):
    answering = task(max_positions=28, stride=stride)
    (encoded,) = answering.encode(["good " * question], ["the " * words])
    windows = list(answering.windows(encoded))
    assert [w.first + w.count for w in windows][-1] == words
    assert sum(w.new_tokens for w in windows) == max(words, 1)
    for window in windows:
        assert len(window.input_ids) <= 28
        body = window.input_ids[window.passage : window.passage + window.count]
        assert np.array_equal(body, encoded.context.ids[window.first : window.first + window.count])
        assert window.token_type_ids.tolist() == [0] * window.passage + [1] * (window.count + 1)
        assert window.input_ids[window.passage - 1] == window.input_ids[-1] == TOKENIZER.sep_token_id


def test_questions_about_one_context_share_its_tokens():
    encoded = task().encode(["good", "bad", "fine"], ["the news", "a game", "the news"])
    assert encoded[0].context is encoded[2].context
    assert encoded[0].context is not encoded[1].context


def test_a_long_context_in_pieces_has_the_same_tokens_and_offsets(monkeypatch):
    text = "the good news, \u00a0 the 中中 baddest game\n\tof é é bank . ." * 20
    (whole,) = task().encode(["good"], [text])
    for size in (40, 57):
        monkeypatch.setattr("trbert_model.tasks.text.PIECE_CHARACTERS", size)
        (in_pieces,) = task().encode(["good"], [text])
        for name in ("ids", "starts", "ends"):
            assert np.array_equal(getattr(in_pieces.context, name), getattr(whole.context, name))


def test_a_question_that_leaves_no_room_is_refused():
    answering = task()
    (long,) = answering.encode(["good " * 20], ["the news"])
    assert answering.room(long) == 0
    with pytest.raises(ConfigurationError, match="a question of 20 tokens leaves 0 of 24 positions"):
        list(answering.windows(long))
    with pytest.raises(ConfigurationError, match="stride"):
        list(task(stride=30).windows(answering.encode(["good"], ["the news"])[0]))
    for wrong in ({"stride": -1}, {"n_best": 0}, {"max_answer_tokens": 0}):
        with pytest.raises(ConfigurationError):
            task(**wrong)


def test_scores_share_one_softmax_over_all_windows():
    """Against probabilities of every span, from the definition."""
    answering = task(stride=3, n_best=500, max_answer_tokens=4)
    text = "the good news of a game and the bad bank and fine sport of the news a good game the bank"
    (question,) = answering.encode(["good game"], [text])
    windows = list(answering.windows(question))
    assert len(windows) > 1
    rng = np.random.default_rng(0)
    logits = [(rng.normal(size=len(w.input_ids)), rng.normal(size=len(w.input_ids))) for w in windows]
    scored = [np.r_[0, w.passage : w.passage + w.count] for w in windows]
    sums = [sum(np.exp(pair[side][rows]).sum() for pair, rows in zip(logits, scored)) for side in (0, 1)]
    expected: dict[tuple[int, int], float] = {}
    for window, (start, end) in zip(windows, logits):
        for first in range(window.count):
            for last in range(first, min(first + 4, window.count)):
                probability = np.exp(start[window.passage + first]) / sums[0]
                probability *= np.exp(end[window.passage + last]) / sums[1]
                span = (
                    int(question.context.starts[window.first + first]),
                    int(question.context.ends[window.first + last]),
                )
                expected[span] = expected.get(span, 0.0) + probability
    null = np.prod([sum(np.exp(pair[side][0]) for pair in logits) / sums[side] for side in (0, 1)])
    answer = answering.combine(question, windows, logits)
    found = {(span.start, span.end): span.score for span in answer.spans}
    assert set(found) == set(expected)
    for span, score in expected.items():
        assert found[span] == pytest.approx(score, rel=1e-6)
    assert answer.null_score == pytest.approx(null, rel=1e-6)
    assert [span.score for span in answer.spans] == sorted(found.values(), reverse=True)


def test_an_answer_in_the_overlap_counts_once_with_both_windows():
    answering = task(stride=8)
    text = " ".join(["the", "good", "news", "of", "a", "game"] * 6)
    (question,) = answering.encode(["good"], [text])
    windows = list(answering.windows(question))
    twice = windows[1].first + 2
    assert windows[0].first <= twice < windows[0].first + windows[0].count
    answer = answering.combine(question, windows, logits_for(windows, twice, twice))
    assert answer.spans[0].start == question.context.starts[twice]
    assert answer.spans[0].score == pytest.approx(0.5, abs=1e-3), "half the starts and half the ends, twice"


def test_no_answer_is_decided_by_the_threshold():
    answering = task()
    (question,) = answering.encode(["good"], ["the news of a game"])
    windows = list(answering.windows(question))
    logits = logits_for(windows, 1, 2)
    for start, end in logits:
        start[0] = end[0] = 21.0
    answer = answering.combine(question, windows, logits)
    assert answer.best(threshold=None) is not None
    assert answer.best(threshold=0.0) is None
    assert answer.best(threshold=0.9) is not None


def test_an_empty_context_has_no_answer():
    answering = task()
    (question,) = answering.encode(["good"], [""])
    windows = list(answering.windows(question))
    answer = answering.combine(question, windows, logits_for(windows, 0, 0))
    assert (answer.spans, answer.null_score) == ((), 1.0)
    assert answer.best(None) is None


@pytest.mark.parametrize(
    ("prediction", "answers", "em", "overlap"),
    [
        ("The Eiffel Tower!", ["eiffel tower"], 1, 1),
        ("tower", ["Eiffel Tower", "the tower of Paris"], 0, 2 / 3),
        ("", [], 1, 1),
        ("something", [], 0, 0),
        ("", ["something"], 0, 0),
        ("a b b c", ["b b d"], 0, 2 * (2 / 3) * (2 / 3) / (4 / 3)),
    ],
)
def test_the_metrics_are_squads(prediction, answers, em, overlap):
    assert exact_match(prediction, answers) == em
    assert f1(prediction, answers) == pytest.approx(overlap)


def test_normalisation_drops_case_articles_and_punctuation():
    assert normalized(" The  U.S.A. and an apple, a DAY ") == "usa and apple day"
