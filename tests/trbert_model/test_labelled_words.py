"""Labelled words and spans in the forms in which people have them, and what they are measured by."""

import json
import logging

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.conftest import TAGS, tagging_task, tiny_tagger, tiny_tokenizer
from tests.trbert_model.test_roberta import TOKENIZERS
from trbert_model import InputError
from trbert_model.options import LabelledColumns
from trbert_model.tasks.base import DocumentResults
from trbert_model.tasks.token_classification.labelled import LabelledWords, RawWords
from trbert_model.tasks.token_classification.losses import IGNORED, WordLosses
from trbert_model.tasks.token_classification.task import Tagging
from trbert_model.tasks.token_classification.words import NO_WORD, encode, encode_words
from trbert_model.training.teacher import teacher_signals

TOKENIZERS = {"WordPiece": tiny_tokenizer(), **TOKENIZERS}
COLUMNS = LabelledColumns()
TEXT = "the café\r\nnews, 中bank"
WORDS = ["the", "café", "news", ",", "中", "bank"]
STARTS = [0, 4, 10, 14, 16, 17]
NAMES = ["O", "B-PER", "I-PER", "I-PER", "B-LOC", "O"]


def written(directory, rows, names=None, column="tags"):
    """A file of these rows, with names for the class ids, as `datasets` writes them."""
    table = pa.Table.from_pylist(rows)
    if names:
        feature = {"feature": {"names": names, "_type": "ClassLabel"}, "_type": "Sequence"}
        info = json.dumps({"info": {"features": {column: feature}}})
        table = table.replace_schema_metadata({"huggingface": info})
    pq.write_table(table, directory / "words.parquet")
    return str(directory / "words.parquet")


IDS = [TAGS.index(name) for name in NAMES]
SPANS = [(4, 15, "PER"), (16, 17, "LOC")]
FORMS = {
    "placed": ({"tokens": WORDS, "text": TEXT, "starts": STARTS, "tags": NAMES}, None),
    "words": ({"tokens": WORDS, "tags": NAMES}, None),
    "hugging face": ({"id": 3, "tokens": WORDS, "ner_tags": IDS}, TAGS),
    "indices": ({"tokens": WORDS, "tags": IDS}, None),
    "spans": ({"text": TEXT, "spans": [dict(zip(("start", "end", "label"), span)) for span in SPANS]}, None),
    "results": (
        {"text": TEXT, "entities": [dict(zip(("start_char", "end_char", "label"), s)) | {"score": 0.5} for s in SPANS]},
        None,
    ),
    "unsorted": (
        {"text": TEXT, "entities": [dict(zip(("start_offset", "end_offset", "type"), s)) for s in SPANS[::-1]]},
        None,
    ),
}


@pytest.mark.parametrize(("row", "names"), FORMS.values(), ids=FORMS)
def test_all_forms_are_the_same_tags(tmp_path, row, names):
    path = written(tmp_path, [row], names, "ner_tags")
    corpus = LabelledWords.read(path, tagging_task(), COLUMNS)
    assert [TAGS[tag] for tag in corpus.tags[0]] == NAMES
    (document,) = corpus.documents
    text = TEXT if "text" in row else " ".join(WORDS)
    assert [text[start:end] for start, end in zip(document.starts, document.ends)] == WORDS
    learnt = RawWords.read(path, COLUMNS).names()
    if row.get("tags") == IDS:
        assert learnt == [str(i) for i in sorted(set(IDS))]
    else:
        assert sorted(learnt) == sorted(TAGS)


def test_columns_have_other_names_too(tmp_path):
    path = written(tmp_path, [{"forms": WORDS, "upos": ["DET", "NOUN"] * 3}])
    raw = RawWords.read(path, LabelledColumns(tokens_column="forms", tags_column="upos"))
    assert raw.names() == ["DET", "NOUN"]
    with pytest.raises(InputError, match=r"none of the columns \['tokens', .*; its columns are \['forms', 'upos'\]"):
        RawWords.read(path, COLUMNS)
    needs = (
        r"it needs columns 'tokens' and 'tags' \(or 'ner_tags'\), or 'text' and 'spans' .* it has \['text', 'tags'\]"
    )
    with pytest.raises(InputError, match=needs):
        RawWords.read(written(tmp_path, [{"text": "a", "tags": ["O"]}]), COLUMNS)
    path = written(tmp_path, [{"body": TEXT, "found": [{"start": 0, "end": 3, "label": 7}]}])
    raw = RawWords.read(path, LabelledColumns(text_column="body", spans_column="found"))
    assert raw.names() == ["O", "B-7", "I-7"]


WRONG = {
    "fewer tags": ({"tokens": WORDS, "tags": NAMES[1:]}, "it has 6 tokens and 5 tags"),
    "no tags": ({"tokens": WORDS, "tags": None}, "it has 6 tokens and no tags"),
    "a null token": ({"tokens": ["a", None], "tags": ["O", "O"]}, "a list of strings, without nulls"),
    "no tokens": ({"tokens": None, "tags": ["O"]}, "a list of strings, without nulls"),
    "a null tag": ({"tokens": ["a", "b"], "tags": ["O", None]}, "the tag None is neither"),
    "a float": ({"tokens": ["a"], "tags": [0.5]}, "the tag 0.5 is neither"),
    "fewer starts": ({"tokens": ["a", "b"], "tags": ["O", "O"], "text": "a b", "starts": [0]}, "2 tokens and 1 starts"),
    "elsewhere": ({"tokens": ["a", "b"], "tags": ["O", "O"], "text": "a b", "starts": [0, 1]}, "'b', is not at 1"),
    "backwards": ({"tokens": ["a", "a"], "tags": ["O", "O"], "text": "a a", "starts": [2, 0]}, "'a', is not at 0"),
    "twice": ({"tokens": ["aa", "a"], "tags": ["O", "O"], "text": "aa", "starts": [0, 1]}, "is not at 1"),
    "beyond": ({"text": "news", "spans": [{"start": 2, "end": 5, "label": "X"}]}, "2 to 5 .X. is empty or outside"),
    "before": ({"text": "news", "spans": [{"start": -2, "end": 2, "label": "X"}]}, "-2 to 2 .X. is empty or outside"),
    "empty": ({"text": "news", "spans": [{"start": 2, "end": 2, "label": "X"}]}, "2 to 2 .X. is empty or outside"),
    "overlap": (
        {"text": "news", "spans": [{"start": 1, "end": 4, "label": "X"}, {"start": 0, "end": 2, "label": "Y"}]},
        "the spans of Y and X overlap, at 1 to 2",
    ),
    "no label": ({"text": "news", "spans": [{"start": 1, "end": 4}]}, "needs a start, an end and a label"),
    "no span": ({"text": "news", "spans": ["X"]}, "must be a struct with start, end and label"),
    "no text": ({"text": None, "spans": []}, "it has no 'text', as 1 rows"),
    "no list": ({"text": "news", "spans": None}, "an empty list says that a text has none"),
}


@pytest.mark.parametrize(("row", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_row_is_named(tmp_path, row, message):
    good = {"text": "", "spans": []} if "spans" in row else {"tokens": [], "tags": [], "text": "", "starts": []}
    good = {name: good[name] for name in row}
    path = written(tmp_path, [good, row])
    with pytest.raises(InputError, match=rf"words\.parquet, row 1: .*{message}") as refused:
        RawWords.read(path, COLUMNS)
    assert "\n" not in str(refused.value)


def test_classes_and_tags_that_the_model_does_not_have_are_named(tmp_path):
    path = written(tmp_path, [{"tokens": ["a"], "tags": [3]}], ["O", "B-x"])
    with pytest.raises(InputError, match=r"row 0: there is no class 3 in \['O', 'B-x'\]"):
        RawWords.read(path, COLUMNS)
    for row in ({"tokens": ["a"], "tags": ["B-ORG"]}, {"tokens": ["a"], "tags": [9]}):
        with pytest.raises(InputError, match=r"tags \['(B-ORG|9)'\] are none of the model's: \['O', 'B-PER'"):
            LabelledWords.read(written(tmp_path, [row]), tagging_task(), COLUMNS)
    path = written(tmp_path, [{"text": "a", "spans": [{"start": 0, "end": 1, "label": "ORG"}]}])
    with pytest.raises(InputError, match=r"the label 'ORG' is none of the model's"):
        LabelledWords.read(path, tagging_task(), COLUMNS)
    with pytest.raises(InputError, match="fewer than two different tags"):
        RawWords.read(written(tmp_path, [{"tokens": ["a"], "tags": ["O"]}]), COLUMNS).names()


def test_tags_to_ignore_count_nowhere(tmp_path):
    path = written(tmp_path, [{"tokens": WORDS, "tags": [IGNORED, 1, IGNORED, 2, 0, 0]}])
    corpus = LabelledWords.read(path, tagging_task(), COLUMNS)
    assert corpus.tags[0].tolist() == [IGNORED, 1, IGNORED, 2, 0, 0]
    assert RawWords.read(path, COLUMNS).names() == ["0", "1", "2"]
    measured = corpus.measure(results_of([[0, 1, 0, 2, 0, 3]]))
    assert measured == {"f1": 2 / 3, "precision": 1 / 2, "recall": 1.0, "accuracy": 3 / 4}


def test_spans_within_words_count_as_the_words(tmp_path, caplog):
    row = {"text": "the banks of news", "spans": [{"start": 4, "end": 8, "label": "LOC"}]}
    row["spans"] += [{"start": 10, "end": 14, "label": "PER"}, {"start": 14, "end": 17, "label": "LOC"}]
    with caplog.at_level(logging.WARNING):
        corpus = LabelledWords.read(written(tmp_path, [row]), tagging_task(), COLUMNS)
    assert [TAGS[tag] for tag in corpus.tags[0]] == ["O", "B-LOC", "B-PER", "I-PER"]
    assert "3 spans do not begin and end with words" in caplog.text
    bare = LabelledWords.read(written(tmp_path, [row]), tagging_task(tags=("O", "PER", "LOC")), COLUMNS)
    assert bare.tags[0].tolist() == [0, 2, 1, 1]
    assert bare.metric == "accuracy"


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_corpuss_words_have_the_tokens_of_the_text_as_it_is_scored(tokenizer):
    """Unless a word would have no token of its own."""
    task = tagging_task(64, tokenizer)
    text = "the good-news\nof banks. cannot"
    words = ["the", "good", "-", "news", "of", "banks", ".", "can", "not"]
    spans, at = [], 0
    for word in words:
        at = text.index(word, at)
        spans.append((at, at + len(word)))
        at += len(word)
    whole = encode(task.tokenizer, text)
    encoded, kept = encode_words(task.tokenizer, text, spans[:7])
    assert kept.tolist() == list(range(7))
    assert np.array_equal(encoded.ids, whole.ids)
    assert [(start, end) for start, end in zip(encoded.starts, encoded.ends)] == spans[:7]
    assert set(encoded.words[encoded.heads[-1] + 1 :]) == {NO_WORD}, "'cannot' is no word here"
    encoded, kept = encode_words(task.tokenizer, text, spans)
    assert kept.tolist() == list(range(9))
    assert encoded.words[encoded.heads].tolist() == list(range(9))
    invisible = [*spans[:2], (spans[2][0], spans[2][0]), *spans[2:]]
    encoded, kept = encode_words(task.tokenizer, text, invisible)
    assert kept.tolist() == [0, 1, *range(3, 10)]


def test_a_word_without_a_token_is_left_out_with_its_tag(tmp_path):
    path = written(tmp_path, [{"tokens": ["the", "\u200b", "", "news"], "tags": ["O", "B-PER", "B-PER", "B-LOC"]}])
    corpus = LabelledWords.read(path, tagging_task(), COLUMNS)
    assert [TAGS[tag] for tag in corpus.tags[0]] == ["O", "B-LOC"]
    path = written(tmp_path, [{"tokens": WORDS, "tags": NAMES}, {"tokens": [], "tags": []}])
    empty = LabelledWords.read(path, tagging_task(), COLUMNS)
    assert [len(tags) for tags in empty.tags] == [6, 0]
    assert empty.dataset().collate([[0], [1]])["labels"].shape == (10,)


def results_of(tags) -> DocumentResults:
    none = np.zeros(len(tags))
    outputs = [Tagging(np.array(each, np.int32), np.ones(len(each), np.float32)) for each in tags]
    return DocumentResults(outputs, none, none, none, none, none, none)


def test_metrics_are_of_all_entities_and_words_of_the_corpus(tmp_path):
    rows = [{"tokens": ["a"] * len(tags), "tags": tags} for tags in ([1, 2, 0], [0, 0], [3, 1, 0, 0], [0])]
    corpus = LabelledWords.read(written(tmp_path, rows), tagging_task(), COLUMNS)
    results = results_of([[1, 2, 0], [0, 0], [3, 0, 0, 1], [3]])
    assert corpus.metric == "f1"
    assert corpus.scores(results)[np.arange(3)].value == pytest.approx(4 / 6)
    assert corpus.measure(results) == pytest.approx({"precision": 2 / 4, "recall": 2 / 3, "f1": 4 / 7, "accuracy": 0.7})
    speech = LabelledWords.read(written(tmp_path, rows), tagging_task(tags=tuple("ABCD")), COLUMNS)
    assert speech.metric == "accuracy"
    assert speech.measure(results) == {"accuracy": pytest.approx(0.7)}


@pytest.fixture
def corpus(tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for count in (70, 4, 12):
        tokens = rng.choice(["the", "good", "banks", "中", "é", "\u200b"], count).tolist()
        rows.append({"tokens": tokens, "tags": rng.integers(0, 5, count).tolist()})
    return LabelledWords.read(written(tmp_path, rows), tagging_task(), COLUMNS)


def test_windows_are_examples_with_the_tags_of_their_words(corpus):
    dataset = corpus.dataset()
    assert len(dataset) == len(dataset.windows) > 4
    seen: list[set[int]] = [set() for _ in corpus.documents]
    for number, first, end in zip(range(3), dataset.first_window, dataset.first_window[1:]):
        for index in range(first, end):
            batch = dataset.collate([dataset[index]])
            window = dataset.windows[index]
            at = batch["answers"].nonzero().squeeze(1).numpy()
            words = np.arange(window.first_word, window.first_word + len(at))
            assert (
                batch["labels"][at].tolist()
                == corpus.tags[number][words].tolist()
                == [tag for tag in dataset.target(index) if tag != IGNORED]
            )
            assert (batch["labels"][~batch["answers"]] == IGNORED).all()
            assert batch["extra_words"].tolist() == window.words.tolist()
            seen[number] |= set(words.tolist())
    assert seen == [set(range(len(tags))) for tags in corpus.tags]


def test_losses_are_means_over_the_words_of_each_window(corpus):
    model, dataset, losses = tiny_tagger(), corpus.dataset(), WordLosses()
    dataset.teacher = teacher_signals(model, dataset)
    dataset.labels[1][:] = IGNORED
    batch = dataset.collate([[0], [1], [4]])
    inputs = {name: batch[name] for name in ("input_ids", "cu_seqlens")}
    with torch.no_grad():
        output = model(**inputs, reduce=False)
    torch.testing.assert_close(batch["teacher"], output.logits)
    expected = []
    bounds = batch["cu_seqlens"].tolist()
    for start, end in zip(bounds, bounds[1:]):
        rows = [i for i in range(start, end) if batch["labels"][i] != IGNORED]
        each = [-output.logits[i].log_softmax(-1)[batch["labels"][i]] for i in rows]
        expected.append(torch.stack(each).mean() if each else torch.tensor(0.0))
    found = losses.labelled(output, batch)
    torch.testing.assert_close(found, torch.stack(expected))
    output.logits = torch.cat([output.logits] * 2)
    torch.testing.assert_close(losses.labelled(output, batch, 2), torch.cat([found, found]))
    least = losses.distilled(output, batch, 2)
    assert least.shape == (6,)
    answers = batch["answers"].nonzero().squeeze(1)
    output.logits[answers[0]] += torch.tensor([1.0, 0, 0, 0, 0])
    others = torch.ones(6, dtype=torch.bool)
    others[0] = False
    more = losses.distilled(output, batch, 2)
    assert more[0] > least[0]
    assert torch.equal(more[others], least[others])
    output.logits[(~batch["answers"]).nonzero().squeeze(1)] += torch.randn(5)
    assert torch.equal(losses.distilled(output, batch, 2), more), "only words count"


def test_the_guide_is_the_saliency_of_the_words(corpus):
    dataset = corpus.dataset()
    signals = teacher_signals(tiny_tagger(), dataset)
    tokens = sum(len(window.input_ids) for window in dataset.windows)
    assert signals.guide.shape == (3, tokens)
    assert signals.targets.shape == (tokens, 5)
    assert (signals.guide >= 0).all()
    assert (signals.guide > 0).float().mean() > 0.5
