"""Texts on which the tokenizer fails: their rows are quarantined, all others scored."""

import asyncio
import shutil

import numpy as np
import pyarrow as pa
import pytest
from tokenizers import Regex, normalizers

from pipeline.encode import read_shards, shard_groups
from pipeline.ledger import DEATHS_BEFORE_CARE, Care
from pipeline.predict import TRBertPredictor
from pipeline.rows import from_ipc
from tests.conftest import classification_task, question_task, tiny_tokenizer
from tests.pipeline.stages import encode_options, only_shard, write_shard
from tests.pipeline.test_ledger import FixedLedger
from trbert_model.errors import TokenizerError

PANICS = "good " + "x" * 50
SAID = "PanicException: Onig: Regex search error: retry-limit-in-match over"


def panicking_tokenizer():
    """Its regular expression takes exponential time, which Oniguruma ends and its Rust wrapper panics at."""
    tokenizer = tiny_tokenizer()
    endless = normalizers.Replace(Regex("(x+x+)+y"), "")
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([endless, normalizers.BertNormalizer()])
    return tokenizer


@pytest.fixture(scope="module", params=["model_directory", "answering_model"])
def either_model(request, tmp_path_factory):
    """A model of either task whose tokenizer panics, and whether it answers."""
    directory = tmp_path_factory.mktemp("panics") / "model"
    shutil.copytree(request.getfixturevalue(request.param), directory)
    panicking_tokenizer().save_pretrained(directory)
    return directory, request.param == "answering_model"


def columns_of(answers):
    """Rows 1 and 4 panic; in questions 4 does in its context, which 5 has too."""
    texts = ["good", PANICS, "bad", None, PANICS, "fine"]
    if not answers:
        return {"text": texts}
    return {"question": [*texts[:4], "good", "fine"], "context": ["the news"] * 4 + [PANICS] * 2}


@pytest.mark.parametrize("deaths", [0, DEATHS_BEFORE_CARE])
def test_a_text_that_the_tokenizer_panics_on_is_quarantined(either_model, tmp_path, deaths):
    model, answers = either_model
    columns = columns_of(answers)
    write_shard(tmp_path / "a.parquet", {"id": list("abcdef"), **columns})
    options = encode_options(tmp_path, model, text_columns=tuple(columns))
    batch = pa.Table.from_pylist(shard_groups([(only_shard(tmp_path), frozenset())]))
    (split,) = read_shards(batch, options, FixedLedger(Care(deaths)))
    assert split["error"].to_pylist() == [None]
    documents, rejected = from_ipc(split["payload"][0]), from_ipc(split["rejected"][0])
    bad = {1, 3, 4, 5} if answers else {1, 3, 4}
    assert documents["row"].to_pylist() == sorted(set(range(6)) - bad)
    assert [(each["row"], each["id"], each["reason"], each["detail"]) for each in rejected.to_pylist()] == [
        (n, "abcdef"[n], "tokenizer_failed", SAID)
        if n != 3
        else (3, "d", "null", f"the {'question' if answers else 'text'} is null")
        for n in sorted(bad)
    ]


def test_in_a_notebook_its_row_says_so(either_model):
    model, answers = either_model
    rows = TRBertPredictor(str(model), device="cpu")(pa.table(columns_of(answers))).to_pylist()
    failed = "tokenizer_failed"
    assert [row["error"] for row in rows] == [None, failed, None, "null", failed, failed if answers else None]
    result = "null_score" if answers else "label"
    assert [row[result] is None for row in rows] == [row["error"] is not None for row in rows]


def failing(task, name, error, at):
    """A task whose method raises where it is given one of the texts."""
    method = getattr(task, name)

    def fail(some):
        if at is None or any(text in at for text in ([some] if isinstance(some, str) else some)):
            raise error
        return method(some)

    setattr(task, name, fail)
    return task


@pytest.mark.parametrize("error", [ValueError("no such\ntoken"), type("PanicException", (BaseException,), {})("oh")])
def test_other_texts_have_the_documents_that_they_have_without_it(error):
    rows = [("good",), ("the bad news",), ("fine",)]
    task = classification_task()
    expected, failures = task.encode_rows(rows)
    assert failures == {}
    documents, failures = failing(task, "tokenize", error, {"the bad news"}).encode_rows(rows)
    assert failures == {1: f"{type(error).__name__}: {' '.join(str(error).split())}"}
    assert [document.tolist() for document in documents] == [expected[0].tolist(), [], expected[2].tolist()]
    assert task.problem(documents[1]) is not None, "a failed row never goes on as a document"


def test_contexts_are_shared_beside_one_that_fails():
    rows = [("good", "the news"), ("fine", "a game"), ("bad", "the news"), ("oh", "the news")]
    task = question_task()
    failing(task, "_encode_context", ValueError("context"), {"a game"})
    failing(task, "_encode_questions", ValueError("question"), {"oh"})
    documents, failures = task.encode_rows(rows)
    assert failures == {1: "ValueError: context", 3: "ValueError: question"}
    assert documents[0].context is documents[2].context
    assert np.array_equal(documents[0].ids, task.encode(["good"], ["the news"])[0].ids)


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), SystemExit(3), GeneratorExit(), asyncio.CancelledError(), MemoryError()], ids=repr
)
def test_what_is_no_texts_fault_passes(error):
    task = failing(classification_task(), "tokenize", error, {"bad"})
    with pytest.raises(type(error)):
        task.encode_rows([("good",), ("bad",)])


def test_a_tokenizer_that_fails_on_every_text_quarantines_none():
    error = type("PanicException", (BaseException,), {})("poisoned")
    task = failing(classification_task(), "tokenize", error, None)
    with pytest.raises(TokenizerError, match="the tokenizer fails on every text: PanicException: poisoned"):
        task.encode_rows([("good",), ("bad",)])
