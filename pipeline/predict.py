"""Scoring of encoded splits by model actors, and the same model as a class for `Dataset.map_batches`."""

import dataclasses
import itertools
import json
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import ray

from trbert_model.calibration.table import CONFIDENCE, OperatingPoint
from trbert_model.engine.options import EngineOptions
from trbert_model.errors import ModelChangedError, TRBertError
from trbert_model.explanation import Recording
from trbert_model.tasks.base import DocumentResults, Task
from trbert_model.terminal import get_logger

from .choice import pick, thresholds_version
from .commit import VERSION
from .config import EXIT_LAYER, THRESHOLDS_VERSION, text_columns
from .encode import TOKENIZER_FAILED, as_binary, check_text, killed_row, printed, rejected_table
from .errors import PipelineError, UsageError
from .highlights import explain_samples, first_rejects
from .ledger import NO_LEDGER, SCORING, WHOLE, Entry, LedgerClient, Stop, UnderWay, process_name
from .model import ModelSource, fetch_model
from .report import SplitStats
from .rows import error_table, from_ipc, split_table, stopped_table, to_ipc

logger = get_logger(__name__)

_MOST_SECONDS_BETWEEN_LOADS = 30.0


@dataclass(frozen=True)
class ActorSplit:
    """The actor that scored a split, when (seconds since the epoch), and how many seconds its model took to load.

    `point` is the operating point, numbered as in `Job.points`; None without `finish_by`.
    """

    actor: str
    loaded_seconds: float
    start: float
    end: float
    point: int | None = None


def result_columns(
    task: Task, results: DocumentResults, documents: Iterable[Any], *, exits: bool
) -> dict[str, pa.Array]:
    """Convert the model's results into columns, in their order.

    Args:
        exits: whether the model has exits.

    Returns:
        The task's own columns, then num_tokens (int64), num_windows (int32), kept_tokens (list<int32>, one per
        reduction), and for models with exits exit_layer (float32).
    """
    columns = task.result_columns(results.outputs, documents)
    columns["num_tokens"] = pa.array(results.num_tokens, pa.int64())
    columns["num_windows"] = pa.array(results.num_windows.astype(np.int32), pa.int32())
    columns["kept_tokens"] = pa.array(results.kept_tokens.astype(np.int32).tolist(), pa.list_(pa.int32()))
    if exits:
        columns[EXIT_LAYER] = pa.array(results.exit_layers, pa.float32())
    return columns


class TRBertPredictor:
    """A class for `Dataset.map_batches` that adds the result columns of the model's task to each batch.

        ray.data.read_parquet(…).map_batches(
            TRBertPredictor, fn_constructor_kwargs={"model": "…"}, batch_size=64, compute=ActorPoolStrategy(size=1))

    Takes and returns numpy dictionaries, pandas frames or pyarrow tables (record batches become tables). Every row is
    returned: if a text cannot be scored (null, empty or not text), the results are null and `error` says why; otherwise
    `error` is null. None, NaN, NaT and pd.NA are null.

    The types of the result columns do not depend on a batch's rows, so that the blocks of a dataset fit together.
    Pandas frames get columns of `pd.ArrowDtype`. In a numpy dictionary the results are numpy arrays (floats, and
    objects with None for null); in Ray's actors they are pyarrow arrays, because Ray Data would infer the type of a
    numpy array from its values.

    Args:
        model: directory or URI of a TR-BERT model.
        text_column: the column with the documents, for classification and token classification.
        question_column: the column with the questions, for models that read them; default: question.
        context_column: the column with the contexts, for question answering.
        threads: torch threads; default: torch's own.
        speedup, max_drop, max_drop_confidence: take the thresholds from the model's calibration table, as jobs/score.py
            does.
        digest: the digest that the model must have; a scoring run passes it to its actors.
        prefix: what the names of the result columns begin with.
        options: the arguments of `trbert_model.engine.EngineOptions`, including the task's (`probabilities`, `spans`,
            `tags`, …).

    Raises:
        UsageError: there is no such model, it reads no questions but `question_column` is given, its calibration table
            does not fit, a batch lacks a column with texts, or one of its columns is named like a result column.
        StorageError: the model cannot be read.
    """

    def __init__(
        self,
        model: str,
        text_column: str = "text",
        question_column: str | None = None,
        context_column: str = "context",
        threads: int | None = None,
        speedup: float | None = None,
        max_drop: float | None = None,
        max_drop_confidence: float = CONFIDENCE,
        digest: str | None = None,
        prefix: str = "",
        **options: Any,
    ):
        # The driver imports this module too, and needs neither torch nor the model's code, whose import takes seconds.
        import torch

        from trbert_model.checkpoints.loading import load_checkpoint
        from trbert_model.engine import Engine

        started = time.perf_counter()
        if threads:
            torch.set_num_threads(threads)
        directory = fetch_model(model)
        loaded = load_checkpoint(directory, digest)
        self.engine = Engine(loaded.model, loaded.tokenizer, EngineOptions(**options))
        self._exits = self.engine.config.exits is not None
        self._policies: tuple[Any, Any] = (None, None)  # the engine's own
        if speedup is not None or max_drop is not None:
            known = ModelSource(model, directory, loaded.digest, self.engine.config.usable_positions, self.engine.task)
            self.expectation = pick(
                known, self.engine.dtype, speedup=speedup, max_drop=max_drop, confidence=max_drop_confidence
            )
            self._policies = self.engine.policies(self.expectation.point.thresholds)
            logger.info("%s", self.expectation)
        self.task = self.engine.task
        self.text_columns = text_columns(self.task, text_column, question_column, context_column)
        self.prefix = prefix
        self.loaded_seconds = time.perf_counter() - started

    def __call__(self, batch: Any) -> Any:
        if isinstance(batch, pa.RecordBatch):
            batch = pa.Table.from_batches([batch])
        if isinstance(batch, pa.Table):
            self._check_columns(batch.column_names)
            table = batch
            for name, column in self._results_of([_cells(batch[name]) for name in self.text_columns]).items():
                table = table.append_column(name, column)
            return table
        self._check_columns(list(batch))
        columns = self._results_of([list(batch[name]) for name in self.text_columns])
        if isinstance(batch, pd.DataFrame):
            return batch.assign(**{name: pd.arrays.ArrowExtensionArray(column) for name, column in columns.items()})
        in_actor = ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None
        return {**batch, **(columns if in_actor else {name: _as_numpy(column) for name, column in columns.items()})}

    def _check_columns(self, names: list[Any]) -> None:
        for name in self.text_columns:
            if names.count(name) != 1:
                count = f"{names.count(name)} columns" if name in names else "no column"
                raise UsageError(f"{count} {name!r} in the batch; its columns are {names}")
        results = [*self.task.result_names, "num_tokens", "num_windows", "kept_tokens", "error"]
        results += [EXIT_LAYER] if self._exits else []
        if taken := sorted({self.prefix + name for name in results} & set(names)):
            raise UsageError(
                f"columns {taken} of the batch are named like columns of the results; rename them or pass prefix="
            )

    def _results_of(self, columns: list[list[Any]]) -> dict[str, pa.Array]:
        """`_score` on cells as users have them, with the prefixed names."""
        texts = [
            [None if pd.api.types.is_scalar(cell) and pd.isna(cell) else cell for cell in cells] for cells in columns
        ]
        return {self.prefix + name: column for name, column in self._score(texts).items()}

    def _score(self, columns: list[list[Any]]) -> dict[str, pa.Array]:
        """Score columns of values, some of which may not be text; returns the result columns and `error`."""
        rows, errors = [], []
        for values in zip(*columns):
            checked = [check_text(value, name) for value, name in zip(values, self.text_columns)]
            reasons = [reason for _, reason, _ in checked if reason]
            errors.append(reasons[0] if reasons else None)
            rows.append(tuple("" if text is None else text for text, _, _ in checked))
        documents, failures = self.task.encode_rows(rows)
        for index, document in enumerate(documents):
            if errors[index] is None and index in failures:
                errors[index] = TOKENIZER_FAILED
            elif errors[index] is None and (problem := self.task.problem(document)):
                errors[index] = problem[0]
        good = [index for index, error in enumerate(errors) if error is None]
        documents = [documents[index] for index in good]
        scored = self.engine.score(documents, *self._policies)
        results = result_columns(self.task, scored, documents, exits=self._exits)
        positions = np.full(len(rows), -1)
        positions[good] = np.arange(len(good))
        indices = pa.array(positions, mask=positions < 0)
        spread = {name: column.take(indices) for name, column in results.items()}
        return {**spread, "error": pa.array(errors, pa.string())}


def _by_length(results: DocumentResults) -> dict[str, list[int]]:
    """Documents, their tokens, and those kept by each reduction, by the least power of two of their tokens."""
    bounds = 2 ** np.ceil(np.log2(np.maximum(results.num_tokens, 1))).astype(np.int64)
    counts = np.column_stack([np.ones_like(bounds), results.num_tokens, results.kept_tokens])
    return {str(bound): counts[bounds == bound].sum(axis=0).tolist() for bound in np.unique(bounds)}


def _by_exit_layer(results: DocumentResults) -> dict[str, int]:
    """Documents by the layer after which they left, rounded."""
    layers, counts = np.unique(np.rint(results.exit_layers).astype(int), return_counts=True)
    return dict(zip(map(str, layers.tolist()), counts.tolist()))


def _cells(column: pa.ChunkedArray) -> list[Any]:
    """The cells of a batch's column: texts as bytes, because they may not be UTF-8, and its type for all others."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
    cells: list[Any] = []
    for chunk in column.chunks:
        if (texts := as_binary(chunk)) is None:
            return [None if null else kind for null in column.is_null(nan_is_null=True).to_pylist()]
        cells += texts.to_pylist()
    return cells


def _as_numpy(column: pa.Array) -> np.ndarray:
    """Convert a result column to numpy: nulls become NaN in floating-point columns, and None in all others."""
    if pa.types.is_floating(column.type):
        return column.to_numpy(zero_copy_only=False)
    values = np.empty(len(column), object)
    values[:] = column.to_pylist()
    return values


class _StoppedError(Exception):
    """The run stops now, without finishing the split."""


class SplitPredictor(TRBertPredictor):
    """Ray Data stage that scores encoded splits. A split that fails is returned with `error`."""

    def __init__(
        self,
        passed_columns: list[str],
        id_column: str | None,
        ledger: LedgerClient = NO_LEDGER,
        stop_interval: float = 1.0,
        alive_interval: float = 30.0,
        points: Sequence[OperatingPoint] = (),
        **options: Any,
    ):
        """Load the model.

        Args:
            passed_columns: columns to copy from the input to the results.
            id_column: the one of them that names the documents.
            ledger: where work, deaths and failed loads are recorded.
            stop_interval: seconds between checks whether to stop.
            alive_interval: seconds between the actor's reports that it is alive.
            points: operating points; for each split the ledger says which. Default: always that of the options.
            options: the arguments of TRBertPredictor.
        """
        self.passed_columns, self.id_column, self.ledger = passed_columns, id_column, ledger
        self.stop_interval = stop_interval
        self.points = points
        self._load(**options)
        actor = ray.get_runtime_context().get_actor_id() if ray.is_initialized() else None
        self.actor = actor or "driver"
        if actor is not None:
            threading.Thread(target=self._say_alive, args=(alive_interval,), name="alive", daemon=True).start()

    def _say_alive(self, interval: float) -> None:
        while True:
            self.ledger.tell("alive", self.actor, process_name())
            time.sleep(interval)

    def _load(self, **options: Any) -> None:
        """Load the model; if an expected error prevents it, report that to the ledger and retry until the run ends.

        If this raised, Ray would restart the actor forever without telling the driver. The driver stops the run if
        there are only failed loads.
        """
        for number in itertools.count():
            self.ledger.begin_load()
            try:
                super().__init__(**options)
                self.ledger.loaded()
                return
            except (PipelineError, TRBertError) as error:
                self.ledger.load_failed(error, for_good=isinstance(error, ModelChangedError))
                if self.ledger is NO_LEDGER:
                    raise
                logger.warning("the model cannot be loaded: %s", error)
            except Exception as error:
                self.ledger.load_failed(error)
                raise
            time.sleep(min(2**number, _MOST_SECONDS_BETWEEN_LOADS))

    def __call__(self, batch: pa.Table) -> pa.Table:
        return pa.concat_tables(self._predict(batch.slice(i, 1)) for i in range(batch.num_rows))

    def _predict(self, split: pa.Table) -> pa.Table:
        row = split.drop_columns(["payload", "rejected"]).to_pylist()[0]
        if row["error"] is not None or row["index"] < 0:
            return split
        start, clock = time.time(), time.perf_counter()
        try:
            with self.ledger.work(f"{SCORING} {row['shard']} {row['version']} {row['index']}") as entry:
                if entry.stop:
                    raise _StoppedError
                if WHOLE in entry.care.killers:
                    raise PipelineError(f"scoring it killed its process {entry.care.deaths} times")
                entry.touch(WHOLE)
                point = self._take_point(entry)
                results, rejected, stats, highlights = self._results(row, split, entry, point)
        except _StoppedError:
            return stopped_table(row)
        except Exception as error:
            # Raising would make Ray compute the split again and finally fail the run: report the split and go on.
            logger.exception("split %d of shard %s cannot be scored", row["index"], row["shard"])
            return error_table(row, error)
        stats.predict_seconds = time.perf_counter() - clock
        span = ActorSplit(self.actor, self.loaded_seconds, start, start + stats.predict_seconds, point)
        total = SplitStats.from_json(row["stats"]) + stats
        scored = {"payload": to_ipc(results), "rejected": to_ipc(rejected), "highlights": json.dumps(highlights)}
        return split_table(row | scored | {"stats": total.to_json(), "actor": json.dumps(dataclasses.asdict(span))})

    def _take_point(self, entry: Entry) -> int | None:
        """Set the operating point of a split; the whole split is scored at it."""
        if not self.points:
            return None
        point = entry.point()
        self._policies = self.engine.policies(self.points[point].thresholds)
        return point

    def _results(
        self, row: dict[str, Any], split: pa.Table, entry: Entry, point: int | None
    ) -> tuple[pa.Table, pa.Table, SplitStats, dict[str, Any]]:
        """Score a split; returns its results, its quarantined rows, its statistics and its highlights."""
        shard = row["shard"]
        before = dataclasses.replace(self.engine.statistics)
        documents, rejected = from_ipc(split["payload"][0]), from_ipc(split["rejected"][0])
        killed = sorted(entry.care.killers)
        if killed:
            names = documents[self.id_column].take(killed) if self.id_column else [None] * len(killed)
            rows = [
                killed_row(shard, documents["row"][position].as_py(), name, "scoring", entry.care)
                for position, name in zip(killed, names)
            ]
            rejected = rejected_table(rejected.to_pylist() + rows)
        # By position, since a passed column may have the same name as the documents' column.
        column = documents.column(documents.num_columns - 1)
        encoded = self._until_stopped(column, row, entry)
        samples = json.loads(row["highlights"] or "{}").get("samples", [])
        recording = Recording({sample["position"] for sample in samples})
        if entry.care.one_at_a_time:
            scored = self._score_each(encoded, entry)
            documents = documents.take([i for i in range(len(documents)) if i not in entry.care.killers])
        else:
            scored = self.engine.score(encoded, *self._policies, recording=recording)
        # Read the column again, which copies no token ids, so that a long document is not held twice.
        kept = self.task.from_column(documents.column(documents.num_columns - 1))
        documents = documents.remove_column(documents.num_columns - 1)
        columns: dict[str, Any] = {}
        if self.id_column:
            columns[self.id_column] = documents[self.id_column]
        columns["shard"] = pa.array([shard] * documents.num_rows, pa.string())
        columns["row"] = documents["row"]
        results = result_columns(self.task, scored, kept, exits=self._exits)
        columns |= results
        version = None if point is None else thresholds_version(self.points[point])
        if version is not None:
            columns[THRESHOLDS_VERSION] = pa.array([version] * documents.num_rows, pa.string())
        columns |= {name: documents[name] for name in self.passed_columns if name != self.id_column}
        after = self.engine.statistics
        stats = SplitStats(
            documents=len(scored),
            labels=self.task.counts(results),
            tokens=int(scored.num_tokens.sum()),
            windows=int(scored.num_windows.sum()),
            kept_tokens=[int(kept) for kept in scored.kept_tokens.sum(axis=0)],
            flops=float(scored.flops.sum()),
            dense_flops=float(scored.dense_flops.sum()),
            model_seconds=after.model_seconds - before.model_seconds,
            halved_batches=after.halved_batches - before.halved_batches,
            by_length=_by_length(scored),
        )
        if self._exits:
            stats.exit_layers, stats.exit_layer_sum = _by_exit_layer(scored), float(scored.exit_layers.sum())
        if killed:
            stats.count_bad(rows)
        shown = self.task.from_column(column.take(pa.array([each["position"] for each in samples], pa.int64())))
        samples = explain_samples(self.engine, samples, recording, shown, results)
        for sample in samples:
            sample |= {"shard": shard, "row": documents["row"][sample["position"]].as_py(), "id": None}
            if self.id_column:
                sample["id"] = printed(documents[self.id_column][sample["position"]])
        highlights = {"samples": samples, "rejected": first_rejects(rejected, TOKENIZER_FAILED)}
        table = pa.table(columns, metadata={VERSION: version} if version else None)
        return table, rejected, stats, highlights

    def _score_each(self, encoded: Iterator[Any], entry: Entry) -> DocumentResults:
        """Score the documents one at a time, to find one that kills the process; known ones are left out.

        Results do not depend on a document's batch, so they equal those of a split scored at once.
        """
        scored = [self.engine.score([], *self._policies)]
        for position, document in enumerate(encoded):
            if position not in entry.care.killers:
                entry.touch(position)
                scored.append(self.engine.score([document], *self._policies))
        entry.touch(WHOLE)
        return DocumentResults.concatenate(scored)

    def _until_stopped(self, encoded: pa.ChunkedArray, row: dict[str, Any], entry: Entry) -> Iterator[Any]:
        """Yield a split's documents. Every `stop_interval`, report progress, and raise _StoppedError if stopped.

        Args:
            encoded: the documents' column.
            row: the split's other columns.
        """
        share = row["rows"] / max(row["shard_rows"], 1) / max(len(encoded), 1)
        started, asked = time.time(), time.monotonic()
        for number, document in enumerate(self.task.from_column(encoded)):
            if time.monotonic() - asked > self.stop_interval:
                asked = time.monotonic()
                if entry.stopping(UnderWay(row["shard"], number, number * share, started)) is Stop.NOW:
                    raise _StoppedError
            yield document
