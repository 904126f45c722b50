"""The corpora of `benchmarks.quality`: seeded splits as Parquet files, in one directory per corpus."""

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

DEV = 1000
# Approximate, for English text in BERT's word pieces.
_CHARACTERS_PER_TOKEN = 4.6
# Share of the training questions that have a context of 1,500 tokens. Each costs as much as six with one paragraph.
_LONG_SHARE = 0.05
# Number of questions with long contexts, by part and tokens of the context: to choose thresholds on, to measure on, and
# to train longer windows with (`benchmarks.windows`). Each costs a pass over its whole context.
_LONG_QUESTIONS = {("dev", 1500): 100, ("test", 1500): 200, ("test", 6000): 50, ("train", 1500): 400}


def prepare(data: Path, corpora: Path) -> None:
    """Create the corpora that do not exist.

    Args:
        data: directory with 20news-train, 20news-test, imdb-train and hyperpartisan-train.parquet (`text`, `label`),
            squad-1.1-articles.parquet and squad-2.0-articles.parquet (`id`, `title`, `question`, `context`, `answers`,
            `answer_start`), and gum-train, gum-dev, wnut17-train and wnut17-dev.parquet (`text`, `tokens`, `starts`,
            `tags`).
    """
    if not (corpora / "20news/test.parquet").exists():
        table = pq.read_table(data / "20news-train.parquet")
        order = np.random.default_rng(0).permutation(table.num_rows)
        parts = {"train": table.take(order[DEV:]), "dev": table.take(order[:DEV])}
        _write(corpora / "20news", {**parts, "test": pq.read_table(data / "20news-test.parquet")})
    if not (corpora / "imdb/test.parquet").exists():
        table = pq.read_table(data / "imdb-train.parquet")
        _, first = np.unique(np.array(table["text"].to_pylist()).astype(str), return_index=True)
        table = table.take(np.sort(first))  # without duplicates, which could be in both training and test
        order = np.random.default_rng(0).permutation(table.num_rows)
        parts = {"train": order[:5000], "test": order[5000:10000], "dev": order[10000 : 10000 + DEV]}
        unlabelled = table.take(order[10000 + DEV :]).select(["text"])
        _write(corpora / "imdb", {**{name: table.take(rows) for name, rows in parts.items()}, "unlabelled": unlabelled})
    if not (corpora / "hyperpartisan-4/test.parquet").exists():
        _five_folds(pq.read_table(data / "hyperpartisan-train.parquet"), corpora)
    for version, name in (("1.1", "squad"), ("2.0", "squad2")):
        if not (corpora / name / "train.parquet").exists():
            _write(corpora / name, _questions(data, version))
    for name, held_out in (("gum", 12), ("wnut17", 500)):
        if not (corpora / name / "test.parquet").exists():
            table = pq.read_table(data / f"{name}-train.parquet")
            order = np.random.default_rng(0).permutation(table.num_rows)
            parts = {"train": table.take(order[held_out:]), "dev": table.take(order[:held_out])}
            _write(corpora / name, {**parts, "test": pq.read_table(data / f"{name}-dev.parquet")})


def _five_folds(table: pa.Table, corpora: Path) -> None:
    table = table.take(np.random.default_rng(0).permutation(table.num_rows))
    labels, fold = np.array(table["label"].to_pylist()), np.zeros(table.num_rows, int)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        fold[rows] = np.arange(len(rows)) % 5
    for number in range(5):
        parts = {"train": table.filter(pa.array(fold != number)), "test": table.filter(pa.array(fold == number))}
        _write(corpora / f"hyperpartisan-{number}", parts)


def _questions(data: Path, version: str) -> dict[str, pa.Table]:
    """SQuAD's development questions, split by article into training, development and test.

    Both versions are split in the same way, because their articles overlap. In 1.1, all questions can be answered. One
    in twenty of its training questions has 1,500 tokens of the article as context, the others have their paragraph.
    Long contexts for development (1,500 tokens), test (1,500 and 6,000) and training (1,500) are separate tables.
    Questions of 2.0 always have their paragraph: one without an answer there may have one elsewhere in the article.
    """
    rows = pq.read_table(data / f"squad-{version}-articles.parquet").to_pylist()
    titles = sorted(set(pq.read_table(data / "squad-1.1-articles.parquet", columns=["title"])["title"].to_pylist()))
    order = np.random.default_rng(0).permutation(len(titles))
    part_of = {titles[i]: "test" if n < 7 else "dev" if n < 10 else "train" for n, i in enumerate(order)}
    articles: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if row["context"] not in articles[row["title"]]:
            articles[row["title"]].append(row["context"])
    parts: dict[str, list[dict[str, Any]]] = {"train": [], "dev": [], "test": []}
    for row in rows:
        parts[part_of[row["title"]]].append(row)
    rng = np.random.default_rng(1)
    if version == "2.0":
        return {name: _table([_within(row, [row["context"]]) for row in found]) for name, found in parts.items()}
    joined = {
        tokens: {title: _joined(paragraphs, tokens) for title, paragraphs in articles.items()}
        for tokens in {tokens for _, tokens in _LONG_QUESTIONS}
    }

    def long(row: dict[str, Any], tokens: int) -> dict[str, Any]:
        (holding,) = (each for each in joined[tokens][row["title"]] if row["context"] in each)
        return _within(row, holding)

    tables = {name: _table([_within(row, [row["context"]]) for row in parts[name]]) for name in ("dev", "test")}
    mixed = rng.random(len(parts["train"])) < _LONG_SHARE
    tables["train"] = _table(
        [long(row, 1500) if is_long else _within(row, [row["context"]]) for row, is_long in zip(parts["train"], mixed)]
    )
    for (name, tokens), questions in _LONG_QUESTIONS.items():
        chosen = rng.permutation(len(parts[name]))[:questions]
        tables[f"{name}-{tokens}"] = _table([long(parts[name][i], tokens) for i in sorted(chosen)])
    return tables


def _joined(paragraphs: Sequence[str], tokens: int) -> list[list[str]]:
    """Split an article into pieces of about this many tokens, each a list of consecutive paragraphs."""
    pieces: list[list[str]] = [[]]
    for paragraph in paragraphs:
        if sum(map(len, pieces[-1])) + len(paragraph) / 2 > tokens * _CHARACTERS_PER_TOKEN:
            pieces.append([])
        pieces[-1].append(paragraph)
    return pieces


def _within(row: dict[str, Any], paragraphs: Sequence[str]) -> dict[str, Any]:
    """A question with a context of several paragraphs, one of them its own.

    Only one occurrence of each answer in the question's paragraph is known, so all occurrences there count as correct.
    The row is marked as ambiguous if there are several.
    """
    own = paragraphs.index(row["context"])
    shift = sum(len(paragraph) + 1 for paragraph in paragraphs[:own])
    occurrences = sorted(
        {
            (match.start() + shift, answer)
            for answer in set(row["answers"])
            for match in re.finditer(rf"(?<!\w){re.escape(answer)}(?!\w)", row["context"])
        }
        | {(start + shift, answer) for answer, start in zip(row["answers"], row["answer_start"])}
    )
    return {
        "id": row["id"],
        "question": row["question"],
        "context": "\n".join(paragraphs),
        "answers": [answer for _, answer in occurrences],
        "answer_start": [start for start, _ in occurrences],
        "ambiguous": len(occurrences) > len(set(row["answers"])),
    }


def _table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    types = {"answers": pa.list_(pa.string()), "answer_start": pa.list_(pa.int64())}
    names = ("id", "question", "context", "answers", "answer_start", "ambiguous")
    return pa.table({name: pa.array([row[name] for row in rows], types.get(name)) for name in names})


def _write(directory: Path, parts: dict[str, pa.Table]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, table in parts.items():
        pq.write_table(table, directory / f"{name}.parquet")
