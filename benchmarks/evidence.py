"""Whole trial articles beside truncated ones: Evidence Inference's labels, and the evidence for them.

    python -m benchmarks.evidence --data DIRECTORY --work build/evidence

Two jobs over questions about articles of some 6,000 tokens: the label (classification of the question with the
article), and the evidence span (question answering). Each is done by

- the dense model over the whole article,
- a dense model over the first 512 tokens, the question among them,
- a dense model over the 512 tokens of the sentences that TF-IDF finds nearest to the question,
- the model that drops tokens over the whole article, at several speeds. Its thresholds come from other articles.

The models for 512 tokens of the label's job are trained on such texts; those of the span's job are its dense model.
The table also has the share of the gold evidence's tokens that all layers computed, beside that share of all tokens:
in models of 512 tokens, of the tokens that the model saw.

Trainings resume, and what exists in --work is used again. With --articles and --epochs, it only tries itself out.
"""

import argparse
import dataclasses
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.common import machine, save
from benchmarks.measure import measure
from benchmarks.quality.outcomes import outcome_of, scores_in
from benchmarks.quality.runs import NONE
from benchmarks.quality.tables import summary
from benchmarks.quality.workshop import Workshop, write_json
from trbert_model.calibration.measure import cutoffs_for, keep_logits, kept_fractions_for, thresholds_of
from trbert_model.checkpoints.loading import load_model
from trbert_model.engine import Engine, EngineOptions
from trbert_model.explanation import Recording
from trbert_model.labelled import LabelledCorpus
from trbert_model.reduction.policies import ThresholdPolicy
from trbert_model.reduction.state import SelectionPolicy
from trbert_model.tasks.base import DocumentResults
from trbert_model.tasks.question_answering.task import EncodedContext
from trbert_model.tasks.text import BareTokenizer
from trbert_model.training import train

LABEL, SPAN = JOBS = ("evidence_label", "evidence_span")
SPEEDUPS = (2.0, 4.0, 8.0)
DEV_ARTICLES = 40
WINDOW = 512
MAX_ANSWER_TOKENS = 100  # of a piece of evidence
BLOCK = 8  # questions per turn
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\s*\n\s*")
_WORD = re.compile(r"\w+")


# --- corpora --------------------------------------------------------------------------------------------------------


def prepare(data: Path, corpora: Path, articles: int | None) -> None:
    """Create the corpora of both jobs that do not exist: train and dev of different articles, and test.

    Args:
        data: directory with evidence-inference-train.parquet and evidence-inference-validation.parquet (`id`,
            `article`, `question`, `context`, `answers`, `answer_start`, `label`).
        articles: number of articles in each part. Default: all.
    """
    if all((corpora / job / "test.parquet").exists() for job in JOBS):
        return
    table = pq.read_table(data / "evidence-inference-train.parquet")
    names = sorted(set(table["article"].to_pylist()))
    order = [names[i] for i in np.random.default_rng(0).permutation(len(names))]
    parts = {
        "train": _of(table, order[DEV_ARTICLES:][:articles]),
        "dev": _of(table, order[:DEV_ARTICLES][:articles]),
    }
    test = pq.read_table(data / "evidence-inference-validation.parquet")
    assert not set(names) & set(test["article"].to_pylist()), "an article is in both training and validation"
    parts["test"] = _of(test, sorted(set(test["article"].to_pylist()))[:articles])
    for job in JOBS:
        (corpora / job).mkdir(parents=True, exist_ok=True)
        for part, rows in parts.items():
            answered = pa.array([bool(answers) for answers in rows["answers"].to_pylist()])
            pq.write_table(rows if job == LABEL else rows.filter(answered), corpora / job / f"{part}.parquet")


def _of(table: pa.Table, articles: Sequence[str]) -> pa.Table:
    chosen = set(articles)
    return table.filter(pa.array([article in chosen for article in table["article"].to_pylist()]))


# --- 512 tokens of an article ---------------------------------------------------------------------------------------


class SentenceRanking:
    """Ranks an article's sentences by the cosine of their TF-IDF vectors with the question's."""

    def __init__(self, contexts: Sequence[str]):
        found: Counter[str] = Counter()
        count = 0
        for context in dict.fromkeys(contexts):
            for start, end in sentences(context):
                found.update(set(_words(context[start:end])))
                count += 1
        self.weights = {word: math.log((1 + count) / (1 + n)) + 1 for word, n in found.items()}
        self.rare = math.log(1 + count) + 1

    def __call__(self, question: str, context: str) -> list[tuple[int, int]]:
        """Sentences, as first and end characters, best first."""
        asked = self._vector(question)
        spans = sentences(context)
        scores = []
        for start, end in spans:
            vector = self._vector(context[start:end])
            scores.append(sum(weight * asked.get(word, 0.0) for word, weight in vector.items()))
        return [spans[i] for i in np.argsort(-np.array(scores), kind="stable")]

    def _vector(self, text: str) -> dict[str, float]:
        counts = Counter(_words(text))
        vector = {word: n * self.weights.get(word, self.rare) for word, n in counts.items()}
        norm = math.sqrt(sum(weight**2 for weight in vector.values())) or 1.0
        return {word: weight / norm for word, weight in vector.items()}


def sentences(text: str) -> list[tuple[int, int]]:
    """First and end characters of a text's sentences, without the white space between them."""
    spans, start = [], 0
    for gap in [*_SENTENCE.finditer(text), None]:
        end = gap.start() if gap else len(text)
        if text[start:end].strip():
            spans.append((start, end))
        start = gap.end() if gap else end
    return spans


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


Selection = Callable[[str, str], list[tuple[int, int]]]  # question, context → pieces of the context, in its order


def first_tokens(tokenizer: BareTokenizer) -> Selection:
    """The beginning of a context that fits into a window with the question."""

    def select(question: str, context: str) -> list[tuple[int, int]]:
        encoded = EncodedContext.of(context, tokenizer)
        room = WINDOW - 3 - len(EncodedContext.of(question, tokenizer).ids)
        return [(0, int(encoded.ends[min(room, len(encoded.ends)) - 1]))]

    return select


def best_sentences(tokenizer: BareTokenizer, ranking: SentenceRanking) -> Selection:
    """The sentences nearest to the question that fit into a window with it."""

    def select(question: str, context: str) -> list[tuple[int, int]]:
        encoded = EncodedContext.of(context, tokenizer)
        room = WINDOW - 3 - len(EncodedContext.of(question, tokenizer).ids)
        chosen = []
        for start, end in ranking(question, context):
            tokens = encoded.tokens(start, end)
            if tokens is not None and tokens[1] + 1 - tokens[0] <= room:
                room -= tokens[1] + 1 - tokens[0]
                chosen.append((start, end))
        return sorted(chosen)

    return select


def cut(table: pa.Table, select: Selection) -> pa.Table:
    """The questions with only the selected pieces of their contexts, and without the evidence's places."""
    rows = []
    for row in table.to_pylist():
        pieces = select(row["question"], row["context"])
        rows.append({**row, "context": " ".join(row["context"][start:end] for start, end in pieces)})
    return pa.Table.from_pylist(rows, table.schema).drop_columns(["answer_start"])


def covered(table: pa.Table, select: Selection, tokenizer: BareTokenizer) -> tuple[float, float]:
    """The shares of the evidence's tokens and of all tokens that the selected pieces hold."""
    evidence, every = _Share(), _Share()
    for row in table.to_pylist():
        context = EncodedContext.of(row["context"], tokenizer)
        kept = _tokens(context, select(row["question"], row["context"]))
        evidence.add(kept, _tokens(context, _places(row)))
        every.add(kept, np.ones(len(kept), bool))
    return evidence.share, every.share


class _Share:
    """The share of some tokens that are kept."""

    def __init__(self) -> None:
        self.kept = self.all = 0

    def add(self, kept: np.ndarray, counted: np.ndarray) -> None:
        self.kept += int((kept & counted).sum())
        self.all += int(counted.sum())

    @property
    def share(self) -> float:
        return self.kept / max(self.all, 1)


def _places(row: dict[str, Any]) -> list[tuple[int, int]]:
    return [(start, start + len(text)) for text, start in zip(row["answers"], row["answer_start"])]


def _tokens(context: EncodedContext, pieces: Sequence[tuple[int, int]]) -> np.ndarray:
    """Which tokens of a context are in these pieces of it, bool (tokens,)."""
    mask = np.zeros(len(context.ids), bool)
    for start, end in pieces:
        if (span := context.tokens(start, end)) is not None:
            mask[span[0] : span[1] + 1] = True
    return mask


# --- models ---------------------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """The models and corpora of one job.

    Attributes:
        epochs: factor for the recipe's epochs.
    """

    workshop: Workshop
    job: str
    epochs: float

    def table(self, part: str) -> pa.Table:
        return pq.read_table(self.workshop.file(self.job, part))

    def dense(self) -> Path:
        """The dense model over whole articles."""
        return self._trained("dense", self.workshop.backbone, **_DENSE)

    def reduced(self) -> Path:
        """The model that drops tokens, from the dense one."""
        return self._trained("reduced", self.dense(), fine_tune_epochs=0.0)

    def short(self, name: str, select: Selection) -> Path:
        """The dense model over 512 tokens of each article."""
        if self.job == SPAN:
            return self.dense()
        for part in ("train", "dev"):
            path = self.workshop.file(f"{self.job}-{name}", part)
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                pq.write_table(cut(self.table(part), select), path)
        plain: dict[str, Any] = {"evidence": False, "window_pooling": "mean", "example_windows": None}
        train_file = str(self.workshop.file(f"{self.job}-{name}", "train"))
        return self._trained(name, self.workshop.backbone, **_DENSE, **plain, train=train_file)

    def _trained(self, name: str, backbone: str | Path, **changes: Any) -> Path:
        output = self.workshop.work / "models" / f"{self.job}-{name}"
        if not (output / "training.json").exists():
            config = self.workshop.config(self.job, backbone, output, evaluated=False, **changes)
            stages = ("fine_tune_epochs", "imitation_epochs", "joint_epochs")
            train(dataclasses.replace(config, **{stage: self.epochs * getattr(config, stage) for stage in stages}))
        return output

    def engine(self, directory: Path, *, reduce: bool) -> Engine:
        model, tokenizer = load_model(directory)
        options = EngineOptions(
            reduce=reduce, dtype=self.workshop.dtype, device="cpu", max_answer_tokens=MAX_ANSWER_TOKENS
        )
        return Engine(model, tokenizer, options)

    def policies(self, directory: Path) -> dict[float, SelectionPolicy]:
        """Thresholds for each speed, from the keep probabilities on the development articles.

        They are not chosen by the metric: a hundred questions do not tell points apart.
        """
        engine = self.engine(directory, reduce=True)
        corpus = self.workshop.read(self.job, "dev", engine)
        windows = np.array([len(window.input_ids) for window in corpus.dataset().windows])
        documents = corpus.documents[::2]  # some 400,000 tokens
        first = keep_logits(engine, documents)
        policies: dict[float, SelectionPolicy] = {}
        for speedup in SPEEDUPS:
            fractions = kept_fractions_for(speedup, engine.config, windows)
            policies[speedup] = ThresholdPolicy(thresholds_of(cutoffs_for(engine, documents, fractions, first)))
        return policies


_DENSE: dict[str, Any] = {**NONE, "speedup": None, "speed_range": None, "joint_imitation": 0.0}


# --- measurements ---------------------------------------------------------------------------------------------------


def compare(bench: Bench) -> dict[str, Any]:
    """Measure all systems of a job on the test articles."""
    test = bench.table("test")
    rows = test.to_pylist()
    whole = bench.engine(bench.dense(), reduce=False)
    tokenizer = whole.task.tokenizer  # type: ignore[attr-defined]
    ranking = SentenceRanking(bench.table("train")["context"].to_pylist())
    selections = {"first 512": first_tokens(tokenizer), "TF-IDF's 512": best_sentences(tokenizer, ranking)}
    reduced_directory = bench.reduced()
    policies = bench.policies(reduced_directory)
    reduced = bench.engine(reduced_directory, reduce=True)

    corpora: dict[str, LabelledCorpus] = {"whole": bench.workshop.read(bench.job, "test", whole)}
    documents = corpora["whole"].documents
    systems: dict[str, Any] = {"whole": lambda some: whole.score([documents[i] for i in some])}
    kept: dict[str, tuple[float, float]] = {"whole": (1.0, 1.0)}
    for (name, select), short in zip(selections.items(), ("first", "tfidf")):
        engine = bench.engine(bench.short(short, select), reduce=False)
        corpora[name] = read_cut(bench, test, select, engine, short)
        kept[name] = covered(test, select, tokenizer)

        def run(some: list[int], engine=engine, corpus=corpora[name], ranks=short == "tfidf") -> DocumentResults:
            if ranks:  # a part of its price; all systems' texts are tokenised before
                for i in some:
                    ranking(rows[i]["question"], rows[i]["context"])
            return engine.score([corpus.documents[i] for i in some])

        systems[name] = run
    for speedup, policy in policies.items():
        name = f"reduced {speedup:g}×"
        corpora[name] = corpora["whole"]
        systems[name] = lambda some, policy=policy: reduced.score([documents[i] for i in some], policy)
        kept[name] = survivors(reduced, policy, documents, rows)
    unreduced = bench.engine(reduced_directory, reduce=False)
    corpora["reduction off"] = corpora["whole"]
    systems["reduction off"] = lambda some: unreduced.score([documents[i] for i in some])
    kept["reduction off"] = (1.0, 1.0)

    seconds, parts, _ = measure(systems, list(range(len(rows))), BLOCK, lambda: 0.0)
    results = {name: DocumentResults.concatenate(parts[name]) for name in systems}
    outcomes = {name: outcome_of(corpora[name], results[name]) for name in systems}
    table: dict[str, Any] = {}
    for name, found in results.items():
        evidence, every = kept[name]
        table[name] = {
            "metrics": {metric: scores_in(outcomes[name], metric).value for metric in outcomes[name]["scores"]},
            "seconds": seconds[name],
            "tokens": int(found.num_tokens.sum()),
            "flops": float(found.flops.sum()),
            "flops_speedup": float(results["whole"].flops.sum() / found.flops.sum()),
            "evidence_kept": evidence,
            "tokens_kept": every,
            "beside": {
                other: summary(outcomes[other], outcomes[name])
                for other in ("whole", "first 512", "TF-IDF's 512")
                if other != name
            },
        }
        if bench.job == LABEL:
            table[name]["metrics"]["macro_f1"] = 100 * macro_f1(corpora[name], found)
    return {"questions": len(rows), "articles": len(set(test["article"].to_pylist())), "systems": table}


def read_cut(bench: Bench, table: pa.Table, select: Selection, engine: Engine, name: str) -> LabelledCorpus:
    """The test questions about the selected pieces of their articles."""
    path = bench.workshop.file(f"{bench.job}-{name}", "test")
    path.parent.mkdir(parents=True, exist_ok=True)
    if bench.job == LABEL:
        pq.write_table(cut(table, select), path)
        return engine.task.read_corpus(str(path), bench.workshop.config(bench.job, bench.workshop.backbone, path))
    # The evidence may not be in the pieces, and is scored by its text, so it needs no place.
    full = bench.workshop.read(bench.job, "test", engine)
    texts = cut(table, select)
    encoded = engine.task.encode_rows(list(zip(texts["question"].to_pylist(), texts["context"].to_pylist())))[0]
    return dataclasses.replace(full, documents=encoded)  # type: ignore[type-var]


def survivors(
    engine: Engine, policy: SelectionPolicy, documents: Sequence[Any], rows: Sequence[dict[str, Any]]
) -> tuple[float, float]:
    """The shares of the evidence's tokens and of all the articles' tokens that all layers computed."""
    evidence, every = _Share(), _Share()
    tokenizer = engine.task.tokenizer  # type: ignore[attr-defined]
    for document, row in zip(documents, rows):
        recording = Recording({0})
        engine.score([document], policy, recording=recording)
        context = EncodedContext.of(row["context"], tokenizer)
        asked = len(document.ids)
        layers = np.zeros(asked + len(context.ids), int)
        for window, computed in recording.windows[0]:
            tokens = engine.task.window_tokens(document, window)
            np.maximum.at(layers, tokens[tokens >= 0], computed[tokens >= 0])
        kept = layers[asked:] == engine.config.num_hidden_layers
        evidence.add(kept, _tokens(context, _places(row)))
        every.add(kept, np.ones(len(kept), bool))
    return evidence.share, every.share


def macro_f1(corpus: Any, results: DocumentResults) -> float:
    """The mean over the labels of each one's F1."""
    predicted, right = results.outputs.argmax(1), corpus.targets
    scores = []
    for label in np.unique(right):
        both = ((predicted == label) & (right == label)).sum()
        scores.append(2 * both / ((predicted == label).sum() + (right == label).sum()))
    return float(np.mean(scores))


def markdown(result: dict[str, Any]) -> str:
    lines = []
    for job, measured in result["jobs"].items():
        second = "macro F1" if job == LABEL else "exact match"
        first = "accuracy" if job == LABEL else "F1"
        lines += [
            f"**{job.split('_')[1]}**, {measured['questions']} questions about {measured['articles']} articles",
            "",
            f"| system | {first} | {second} | seconds | FLOPs | evidence kept | tokens kept | beside whole (95%) "
            "| beside first 512 | beside TF-IDF's |",
            "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for name, row in measured["systems"].items():
            metrics = row["metrics"]
            main, other = ("accuracy", "macro_f1") if job == LABEL else ("f1", "exact_match")
            cells = [name, f"{metrics[main]:.2f}", f"{metrics[other]:.2f}", f"{row['seconds']:.1f}"]
            cells.append(f"{row['flops_speedup']:.2f}×")
            cells += [f"{100 * row['evidence_kept']:.1f}%", f"{100 * row['tokens_kept']:.1f}%"]
            for against in ("whole", "first 512", "TF-IDF's 512"):
                found = row["beside"].get(against)
                cells.append(
                    f"{found['difference']:+.2f} ({found['interval'][0]:+.2f} to {found['interval'][1]:+.2f})"
                    if found
                    else "–"
                )
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    where = result["machine"]
    lines.append(
        f"{where['cores']} cores of {where['cpu']}, {result['dtype']}, torch {where['torch']} with "
        f"{result['threads']} threads, {where['date']}."
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory with the corpora, see prepare")
    parser.add_argument("--work", type=Path, default=Path("build/evidence"), help="corpora, models and outcomes")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=JOBS, help="default: both")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="to measure in")
    parser.add_argument("--articles", type=int, help="articles of each part, to try the command out (default: all)")
    parser.add_argument("--epochs", type=float, default=1.0, help="factor for the recipes' epochs, to try it out")
    parser.add_argument("--save", action=argparse.BooleanOptionalAction, default=True, help="into benchmarks/results")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    prepare(arguments.data, arguments.work / "corpora", arguments.articles)
    workshop = Workshop(arguments.work, arguments.dtype)
    result: dict[str, Any] = {
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "dtype": arguments.dtype,
        "jobs": {},
    }
    for job in arguments.jobs:
        path = arguments.work / "outcomes" / arguments.dtype / f"{job}.json"
        if not path.exists():
            write_json(path, compare(Bench(workshop, job, arguments.epochs)))
        result["jobs"][job] = json.loads(path.read_text())
    if arguments.save:
        save("evidence", result, markdown(result))
    else:
        print(markdown(result))


if __name__ == "__main__":
    main()
