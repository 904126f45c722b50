"""Tags of words: windows, exact characters in texts of every kind, and seqeval's entities."""

import dataclasses
import itertools
import unicodedata

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import trbert_model
from tests.conftest import TAGS, tagging_task, tiny_tagger, tiny_tokenizer
from tests.trbert_model.test_question_answering import TEXTS
from tests.trbert_model.test_roberta import TOKENIZERS
from trbert_model import ConfigurationError, Explanation, TRBertConfig
from trbert_model.engine import Engine, EngineOptions
from trbert_model.reduction.policies import keep_all
from trbert_model.tasks.token_classification.metrics import entity_counts, entity_scores
from trbert_model.tasks.token_classification.tags import TagSet
from trbert_model.tasks.token_classification.task import Tagging
from trbert_model.tasks.token_classification.words import NO_WORD, EncodedText, encode

TOKENIZERS = {"WordPiece": tiny_tokenizer(), **TOKENIZERS}
any_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
TEXTS = TEXTS | {"marks": "e\u0301 a\u0308good \u0301news", "spaces": "\r\n the  good\t\tnews \n\n", "one": "中"}

words_of_tokens = st.lists(st.integers(1, 40), max_size=60)  # how many tokens each word has


def document(sizes: list[int], gaps: bool = False) -> EncodedText:
    """A document of words of so many tokens, perhaps with a token of white space before each."""
    words = [each for word, size in enumerate(sizes) for each in ([NO_WORD] if gaps else []) + [word] * size]
    starts = np.arange(len(sizes), dtype=np.int32) * 2
    return EncodedText(np.arange(5, 5 + len(words), dtype=np.int32), np.array(words, np.int32), starts, starts + 1)


@settings(max_examples=80, deadline=None)
@given(words_of_tokens, st.booleans(), st.integers(3, 40), st.data())
def test_every_word_is_answered_once_by_the_window_with_the_most_context(sizes, gaps, positions, data):
    stride = data.draw(st.none() | st.integers(0, positions - 3))
    task, text = tagging_task(positions, stride=stride), document(sizes, gaps)
    windows = list(task.windows(text))
    # Each window answers with its own number.
    outputs = [
        (np.full(len(window.input_ids), number), np.full(len(window.input_ids), 0.5, np.float32))
        for number, window in enumerate(windows)
    ]
    answers = task.combine(text, windows, outputs)
    seen: dict[int, list[tuple[int, int]]] = {}
    for number, window in enumerate(windows):
        assert len(window.input_ids) <= positions
        body = slice(window.first, window.first + len(window.input_ids) - 2)
        assert np.array_equal(window.input_ids[1:-1], text.ids[body])
        for i, head in enumerate(window.heads.tolist()):
            context = min(head, len(window.input_ids) - 1 - head)
            seen.setdefault(window.first_word + i, []).append((context, number))
            assert text.heads[window.first_word + i] == window.first + head - 1
    assert sorted(seen) == list(range(len(sizes)))
    for word, places in seen.items():
        most = max(context for context, _ in places)
        assert answers.tags[word] in [number for context, number in places if context == most]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=60), st.booleans(), st.integers(8, 40))
def test_windows_begin_with_words_and_number_them(sizes, gaps, positions):
    task, text = tagging_task(positions), document(sizes, gaps)
    windows = list(task.windows(text))
    extra = task.extra_inputs(windows)["words"]
    assert extra.dtype == np.int64
    assert np.array_equal(extra, np.concatenate([window.words for window in windows]))
    for window in windows:
        own = text.words[window.first : window.first + len(window.input_ids) - 2]
        assert window.words.dtype == np.int32
        assert window.words[0] == window.words[-1] == NO_WORD
        numbers = {word: i for i, word in enumerate(dict.fromkeys(own[own != NO_WORD].tolist()))}
        assert window.words[1:-1].tolist() == [numbers.get(word, NO_WORD) for word in own.tolist()]
        before = text.words[window.first - 1] if window.first else NO_WORD
        assert own[0] == NO_WORD or own[0] != before, "a word is split where a window begins"


def test_a_stride_that_leaves_nothing_is_refused_and_truncation_is_one_window():
    with pytest.raises(ConfigurationError, match="stride 30 must be less than the 30 tokens"):
        tagging_task(32, stride=30)
    task = tagging_task(12, overflow="truncate")
    (text,), _ = task.encode_rows([("the good news of a game " * 10,)])
    (window,) = task.windows(text)
    assert len(window.input_ids) == 12
    assert len(text.ids) == 10


@any_tokenizer
@pytest.mark.parametrize("text", [pytest.param(text, id=name) for name, text in TEXTS.items()])
def test_words_are_whole_characters_without_white_space(text, tokenizer):
    """In order, not overlapping, and nothing that can be seen is left out."""
    task = tagging_task(64, tokenizer)
    (encoded,), failures = task.encode_rows([(text,)])
    assert not failures
    spans = list(zip(encoded.starts.tolist(), encoded.ends.tolist()))
    assert sorted(set(encoded.words.tolist()) - {NO_WORD}) == list(range(len(spans)))
    for (start, end), (following, _) in itertools.pairwise([*spans, (len(text), 0)]):
        assert start < end <= following
        assert not text[start].isspace()
        assert not text[end - 1].isspace()
        assert end == len(text) or not unicodedata.combining(text[end]), "a mark was cut off its letter"
        assert all(c.isspace() or unicodedata.category(c) in ("Cf", "Mn") for c in text[end:following])
    # As any entity of one word, and as one entity of all.
    tags = np.full(len(spans), TAGS.index("B-PER"), np.int32)
    for inside in ("B-PER", "I-PER"):
        tags[1:] = TAGS.index(inside)
        columns = task.result_columns([Tagging(tags, np.ones(len(spans), np.float32))], [encoded])
        found = [(each["start_char"], each["end_char"]) for each in columns["entities"][0].as_py()]
        assert found == (spans if inside == "B-PER" else [(spans[0][0], spans[-1][1])])


@any_tokenizer
def test_a_long_text_in_pieces_has_the_same_words(monkeypatch, tokenizer):
    text = "the good news, \u00a0 the 中中 baddest game\n\tof é e\u0301 bank . ." * 20
    whole = encode(tagging_task(64, tokenizer).tokenizer, text)
    for size in (40, 57):
        monkeypatch.setattr("trbert_model.tasks.text.PIECE_CHARACTERS", size)
        in_pieces = encode(tagging_task(64, tokenizer).tokenizer, text)
        for name in ("ids", "words", "starts", "ends"):
            assert np.array_equal(getattr(in_pieces, name), getattr(whole, name)), name
    first = encode(tagging_task(64, tokenizer).tokenizer, text, most=30)
    assert np.array_equal(first.ids, whole.ids[:30])
    assert np.array_equal(first.words, whole.words[:30])


def test_documents_survive_the_way_to_the_actors():
    task = tagging_task()
    documents = task.encode(["the good news", "", "banks and\r\ngames"])
    column = pa.chunked_array([task.to_column(documents[:2]), task.to_column(documents[1:]).slice(1)])
    for one, other in zip(documents, task.from_column(column), strict=True):
        for name in ("ids", "words", "starts", "ends"):
            assert np.array_equal(getattr(one, name), getattr(other, name))
    assert task.problem(documents[1]) == ("no_tokens", "the tokenizer finds no token in the text")


# Sequences at random, with what seqeval 1.2.2's get_entities found in them.
SEQEVAL = [
    ("B-Y B-X I-Y B-X S-X S-X S-X E-Y", "Y00 X11 Y22 X33 X44 X55 X66 Y77"),
    ("I-X B-X S-X O E-Y E-Y O S-X", "X00 X11 X22 Y44 Y55 X77"),
    ("I-Y I-X B-X E-X O O O S-Y", "Y00 X11 X23 Y77"),
    ("O E-Y I-X E-Y O S-Y I-X S-X", "Y11 X22 Y33 Y55 X66 X77"),
    ("S-X S-Y I-X E-X I-X I-X S-X I-Y", "X00 Y11 X23 X45 X66 Y77"),
    ("O E-Y S-Y B-X B-Y I-Y B-X E-X", "Y11 Y22 X33 Y45 X67"),
]


@pytest.mark.parametrize(("tags", "expected"), SEQEVAL)
def test_entities_are_seqevals(tags, expected):
    names = ("O", *(f"{prefix}-{kind}" for prefix in "BIES" for kind in "XY"))
    found = TagSet(names).entities(np.array([names.index(tag) for tag in tags.split()]))
    assert " ".join(f"{kind}{first}{last}" for kind, first, last in found) == expected


@pytest.mark.parametrize(
    ("names", "tags", "expected", "prefixes"),
    [
        ("O PER LOC", "O PER PER LOC O LOC", "PER12 LOC33 LOC55", False),
        ("NOUN VERB", "NOUN NOUN VERB NOUN", "NOUN01 VERB22 NOUN33", False),
        ("O I-X I-Y", "I-X I-X I-Y O I-Y", "X01 Y22 Y44", True),
        ("B M E S", "B M E S B E", "_02 _33 _45", True),
        ("B-X L-X U-X O I-X", "U-X B-X I-X L-X L-X", "X00 X13 X44", True),
        ("B-X-Y I-X-Y O", "B-X-Y I-X-Y O", "X-Y01", True),
        ("N V O B", "B B O N", "B01 N33", False),
    ],
)
def test_other_tag_sets(names, tags, expected, prefixes):
    tag_set = TagSet(tuple(names.split()))
    found = tag_set.entities(np.array([tag_set.names.index(tag) for tag in tags.split()]))
    assert " ".join(f"{kind}{first}{last}" for kind, first, last in found) == expected
    assert tag_set.has_prefixes == prefixes


def test_entity_scores_are_of_summed_counts():
    counts = entity_counts([("X", 0, 1), ("Y", 3, 3)], [("X", 0, 1), ("X", 3, 3), ("Y", 5, 5)])
    assert counts.tolist() == [1, 2, 3]
    both = np.stack([counts, entity_counts([("X", 0, 0)], [("X", 0, 0)])])
    found = {name: scores.value for name, scores in entity_scores(both).items()}
    assert found == pytest.approx({"precision": 2 / 3, "recall": 1 / 2, "f1": 4 / 7})
    assert all(scores.value == 0.0 for scores in entity_scores(0 * both).values())


@pytest.mark.parametrize("tags", [False, True])
def test_entities_have_the_mean_score_of_their_words_and_tags_their_own(tags):
    text, task = "the good news, 中 bank", tagging_task()
    task = dataclasses.replace(task, options=dataclasses.replace(task.options, tags=tags))
    documents = task.encode([text, "game"])
    tagging = Tagging(np.array([1, 2, 0, 0, 3, -1], np.int32), np.array([0.5, 0.75, 0.9, 0.9, 0.25, 0], np.float32))
    unread = Tagging(np.array([-1], np.int32), np.zeros(1, np.float32))
    columns = task.result_columns([tagging, unread], documents)
    kind, (name,) = "tag" if tags else "label", task.result_names
    found, nothing = columns[name].to_pylist()
    assert nothing == []
    words = [(each[kind], text[each["start_char"] : each["end_char"]], round(each["score"], 4)) for each in found]
    if tags:
        assert words == [("B-PER", "the", 0.5), ("I-PER", "good", 0.75), ("O", "news", 0.9), ("O", ",", 0.9),
                         ("B-LOC", "中", 0.25)]  # fmt: skip
        assert task.counts(columns) == {"B-PER": 1, "I-PER": 1, "O": 2, "B-LOC": 1}
    else:
        assert words == [("PER", "the good", 0.625), ("LOC", "中", 0.25)]
        assert task.counts(columns) == {"PER": 1, "LOC": 1}
    fields = [(kind, pa.string()), ("start_char", pa.int32()), ("end_char", pa.int32()), ("score", pa.float32())]
    assert columns[name].type == pa.list_(pa.struct(fields))
    assert task.result_columns([], [])[name].type == columns[name].type


def test_a_dropped_token_answers_from_the_state_it_left_with():
    model = tiny_tagger()
    ids = torch.randint(5, 20, (20,), generator=torch.Generator().manual_seed(1))
    output = model(ids, cu_seqlens=torch.tensor([0, 20]), output_hidden_states=True, output_selections=True)
    assert int(output.kept_tokens[0]) < 20
    for selection in output.selections:
        dropped = selection.token_indices[~selection.keep]
        logits = model.classifier(selection.hidden[~selection.keep])
        torch.testing.assert_close(output.logits[dropped], logits)
    alive = selection.token_indices[selection.keep]
    torch.testing.assert_close(output.logits[alive], model.classifier(output.hidden_states[-1]))


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(0, 90), min_size=1, max_size=6), st.sampled_from([40, 10_000]))
def test_a_documents_tags_do_not_depend_on_its_batch(lengths, budget):
    texts = [" ".join(["the", "good", "banks", "of", "é", "中"][(i * i) % 6] for i in range(1 + n)) for n in lengths]
    engine = Engine(tiny_tagger(), tiny_tokenizer(), EngineOptions(device="cpu", max_tokens_per_batch=budget))
    together = engine.score_columns(texts)
    for text, tagging in zip(texts, together.outputs):
        (alone,) = engine.score_columns([text]).outputs
        assert np.array_equal(alone.tags, tagging.tags)
        np.testing.assert_allclose(alone.scores, tagging.scores, atol=1e-5)
    dense = engine.score_columns(texts, policy=keep_all)
    assert (dense.flops >= together.flops).all()


def test_explanations_show_entities():
    engine = Engine(tiny_tagger(), tiny_tokenizer(), EngineOptions(device="cpu"))
    text = "the good news\r\nof a 中 bank, <b> " * 8
    explanation = trbert_model.explain(engine, text)
    (told,) = explanation.texts
    found = explanation.outcome["entities"]
    assert told.entities == [(each["start_char"], each["end_char"], each["label"]) for each in found]
    assert len(found) > 3
    runs = told.runs()
    assert "".join(run.text for run in runs) == text
    assert [run.label for run in runs if run.label] == [each["label"] for each in found]
    marked = {i for start, end, _ in told.entities for i in range(start, end)}
    at = 0
    for run in runs:
        assert {i in marked for i in range(at, at + len(run.text))} == {run.in_answer}
        at += len(run.text)
    printed = explanation.to_text()
    first = " ".join(text[found[0]["start_char"] : found[0]["end_char"]].split())
    assert f"found         {first} ({found[0]['label']})" in printed
    counts = {label: sum(each["label"] == label for each in found) for label in ("PER", "LOC")}
    assert all(f"{label} {count}" in printed.split("\n")[0] for label, count in counts.items() if count)
    assert explanation.to_html().count('<small class="label">') == len(found)
    assert Explanation.from_dict(dataclasses.asdict(explanation)) == explanation


def test_labels_without_names_are_refused():
    task = type(tagging_task())
    with pytest.raises(ConfigurationError, match="must give each label from 0 to 1 a name"):
        task.check(TRBertConfig(id2label={1: "O", 2: "B-x"}))
