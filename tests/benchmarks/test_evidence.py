"""The parts of the evidence benchmark that need no model: splits by article, sentences, and what a selection covers."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.evidence import (
    DEV_ARTICLES,
    JOBS,
    LABEL,
    WINDOW,
    SentenceRanking,
    best_sentences,
    covered,
    cut,
    first_tokens,
    prepare,
    sentences,
)
from tests.conftest import tiny_tokenizer
from trbert_model.tasks.text import BareTokenizer

TOKENIZER = BareTokenizer.of(tiny_tokenizer())
FILLER = "the news of a game and the bank . " * 100
CONTEXT = f"{FILLER}\nthe good sport of the bank.\n{FILLER}"
EVIDENCE = "good sport"


def table(articles: list[str], **columns) -> pa.Table:
    start = CONTEXT.index(EVIDENCE)
    rows = [
        {"id": f"{article}-{i}", "article": article, "question": "good sport?", "context": CONTEXT}
        | {"answers": [EVIDENCE] if i else [], "answer_start": [start] if i else [], "label": "ab"[i % 2]}
        for article in articles
        for i in range(3)
    ]
    return pa.Table.from_pylist(rows)


def test_no_article_is_in_two_parts(tmp_path):
    names = [f"a{i}" for i in range(DEV_ARTICLES + 10)]
    pq.write_table(table(names), tmp_path / "evidence-inference-train.parquet")
    pq.write_table(table(["v1", "v2"]), tmp_path / "evidence-inference-validation.parquet")
    prepare(tmp_path, tmp_path / "corpora", None)
    for job in JOBS:
        parts = {
            part: pq.read_table(tmp_path / "corpora" / job / f"{part}.parquet") for part in ("train", "dev", "test")
        }
        articles = {part: set(found["article"].to_pylist()) for part, found in parts.items()}
        assert {part: len(found) for part, found in articles.items()} == {"train": 10, "dev": DEV_ARTICLES, "test": 2}
        assert articles["train"] | articles["dev"] == set(names)
        assert parts["test"].num_rows == (6 if job == LABEL else 4), "a question without evidence has no span"


def test_sentences_are_all_of_a_text_but_its_spaces():
    text = "One, two.  Three? four\n\n five!"
    assert [text[start:end] for start, end in sentences(text)] == ["One, two.", "Three?", "four", "five!"]
    assert sentences("  ") == []


def test_a_selection_fits_a_window_and_covers_what_it_holds():
    rows = table(["a"])
    ranking = SentenceRanking([CONTEXT])
    start, end = ranking("good sport?", CONTEXT)[0]
    assert CONTEXT[start:end] == "the good sport of the bank."
    for select, share in ((first_tokens(TOKENIZER), 0.0), (best_sentences(TOKENIZER, ranking), 1.0)):
        shorter = cut(rows, select)
        assert "answer_start" not in shorter.column_names
        ids = TOKENIZER.backend_tokenizer.encode(shorter["context"][0].as_py(), add_special_tokens=False).ids
        assert WINDOW - 20 < len(ids) + 3 + 3 <= WINDOW
        evidence, every = covered(rows, select, TOKENIZER)
        assert evidence == share
        assert every == pytest.approx(len(ids) / 1821, rel=0.02)


def test_sentences_are_in_the_order_of_the_text():
    chosen = best_sentences(TOKENIZER, SentenceRanking([CONTEXT]))("good sport?", CONTEXT)
    assert (np.diff([start for start, _ in chosen]) > 0).all()
