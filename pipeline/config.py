"""ScoreConfig: all options of a scoring run, set by the command line, a YAML file or a library call."""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trbert_model.calibration.table import CONFIDENCE
from trbert_model.engine.options import EngineOptions
from trbert_model.errors import ConfigurationError
from trbert_model.options import QUESTIONS, option
from trbert_model.tasks.base import Task

from .errors import UsageError
from .stopping import StopRequest
from .storage import RETRY_SECONDS, Storage
from .times import finish_time, seconds

# Result columns besides those of the model's task. Input columns with these names cannot be passed through.
RESULT_COLUMNS = ("shard", "row", "num_tokens", "num_windows", "kept_tokens")
# With finish_by, and of models with exits, one more each.
THRESHOLDS_VERSION = "thresholds_version"
EXIT_LAYER = "exit_layer"


@dataclass(frozen=True)
class ScoreConfig:
    """The options of a scoring run. `None` means that an option is chosen automatically or not used.

    Raises:
        UsageError: an option is missing or out of range, or options contradict each other.
    """

    input: str = option(
        "", "the corpus: a Parquet file, a prefix, a glob or a table's folder; local or any fsspec URI (s3://…)"
    )
    output: str = option("", "prefix that the results go to")
    model: str = option("", "directory of a TR-BERT model (jobs/train.py, jobs/convert.py); local or URI")
    text_column: str = option("text", "column with the documents", identity=True)
    question_column: str | None = option(
        None, "column with the questions, for models that read them (default: question)", identity=True
    )
    context_column: str = option("context", "column with the texts that the questions are about", identity=True)
    id_column: str | None = option(None, "column that names the documents; passed through as it is", identity=True)
    keep_columns: tuple[str, ...] = option((), "further columns to pass through", identity=True)
    probabilities: bool = option(False, "write every label's probability, in the order of the labels", identity=True)
    label_threshold: float = option(
        0.5, "probability from which on a label is one of a document's, where it may have several", identity=True
    )
    max_answer_tokens: int = option(30, "tokens of an answer at most", identity=True)
    n_best: int = option(1, "answers to write into the column `spans`, if more than 1", identity=True)
    no_answer_threshold: float | None = option(
        None, "no answer, if that is more probable than the best answer by more than this", identity=True
    )
    tags: bool = option(False, "write a tag for every word, not entities (token classification)", identity=True)
    overflow: str = option("windows", "documents longer than the model's positions: windows or truncate", identity=True)
    stride: int | None = option(None, "tokens a window shares with the one before it", identity=True)
    reduce: bool = option(True, "drop tokens; --no-reduce runs the dense model", identity=True)
    speedup: float | None = option(None, "least FLOPs speed-up, its thresholds from the model's calibration table")
    max_drop: float | None = option(None, "most points of accuracy to lose for speed, from the calibration table")
    max_drop_confidence: float = option(
        CONFIDENCE, "confidence that max_drop is kept, by the table's paired documents; 0 goes by the measured drop"
    )
    finish_by: str | None = option(
        None,
        "finish by then (06:00, 2026-11-28T06:00Z, 3h): splits are scored faster if it would be late, within max_drop",
    )
    thresholds: tuple[float, ...] | None = option(
        None,
        "keep probability from which on a token stays, one a reduction; for models with exits then the uncertainty "
        "below which a document or word leaves, one an exit, and the gates' threshold (default: the model's)",
        identity=True,
    )
    dtype: str = option("auto", "float32, bfloat16, float16; auto: bfloat16 where that is fast", identity=True)
    split_bytes: int | None = option(
        None,
        "text bytes in one unit of work and of commit (default: 8 MiB on GPUs, on CPUs what takes some seconds)",
        identity=True,
    )
    max_tokens_per_batch: int | None = option(None, "tokens in one batch of an actor")
    num_actors: int | None = option(None, "model actors")
    gpus_per_actor: float | None = option(None, "GPUs an actor takes; 0 runs on the CPU")
    threads_per_actor: int | None = option(None, "torch threads of an actor")
    document_timeout: float = option(
        3600.0, "seconds without a sign of progress after which a document counts as one that kills; 0: never"
    )
    wait_for_resources: float = option(0.0, "seconds to wait for an autoscaling cluster to make room for the actors")
    max_bad_rows: int | None = option(
        None, "exit with 3 if the shards a run completes have more quarantined rows than this"
    )
    stop_after: str | None = option(None, "stop after this long (6h, 90m, 45s), to be finished by the next run")
    stop_grace: float = option(15.0, "seconds that splits under way have to finish when the run is stopped")
    storage_retry_seconds: float = option(
        RETRY_SECONDS, "for how long a storage request that fails for a passing reason is made again"
    )
    progress_interval: float = option(10.0, "seconds between progress lines")
    delete_removed: bool = option(False, "delete the results of shards that are no longer in the corpus")
    overwrite: bool = option(False, "replace an output made with another model or other options")
    samples: bool = option(True, "show ten documents with their texts in the run's page; --no-samples leaves them out")
    metrics_file: str | None = option(
        None, "keep the run's metrics in this .prom file, for the node exporter's textfile collector", path=True
    )
    openlineage: str | None = option(
        None, "send lineage events to this OpenLineage server (its URL), or append them to this file", path=True
    )
    dry_run: bool = option(False, "show what would be read and what is done; start nothing")

    def __post_init__(self):
        required = {name: getattr(self, name) for name in ("input", "output", "model", "text_column", "context_column")}
        for name, value in {**required, "question_column": self.questions}.items():
            if not value:
                raise UsageError(f"{name} is required")
        least_values = {"split_bytes": 1, "num_actors": 1, "threads_per_actor": 1, "progress_interval": 0}
        for name, least in {**least_values, "max_answer_tokens": 1, "n_best": 1, "no_answer_threshold": -1}.items():
            value = getattr(self, name)
            if value is not None and not value >= least:  # not `value < least`, which is false for NaN
                raise UsageError(f"{name} {value} must be at least {least}")
        counts = (
            "gpus_per_actor",
            "document_timeout",
            "wait_for_resources",
            "max_bad_rows",
            "stop_grace",
            "storage_retry_seconds",
            "max_drop",
        )
        for name in counts:
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise UsageError(f"{name} {value} must not be negative")
        choices = [name for name in ("speedup", "max_drop", "thresholds") if getattr(self, name) is not None]
        if self.finish_by is not None:
            self._check_finish_by()
        elif len(choices) > 1 or (choices and not self.reduce):
            names = choices if self.reduce else ["no_reduce", *choices]
            raise UsageError(f"{' and '.join(names)} cannot go together: each of them decides the speed")
        if self.speedup is not None and not self.speedup >= 1:
            raise UsageError(f"speedup {self.speedup} must be at least 1")
        if not 0 <= self.max_drop_confidence < 1:
            raise UsageError(f"max_drop_confidence {self.max_drop_confidence} must be from 0 to below 1")
        if isinstance(self.keep_columns, str):
            raise UsageError(f"keep_columns {self.keep_columns!r} must be a tuple of names")
        passed = self.passed_columns
        if twice := sorted({name for name in passed if passed.count(name) > 1}):
            raise UsageError(f"columns {twice} are named more than once in id_column and keep_columns")
        if alike := sorted({name for name in passed if [other.lower() for other in passed].count(name.lower()) > 1}):
            raise UsageError(
                f"columns {alike} differ only by case: Spark and DuckDB cannot read both; rename one first"
            )
        self.check_names(RESULT_COLUMNS if self.finish_by is None else (*RESULT_COLUMNS, THRESHOLDS_VERSION))
        if self.stop_after is not None:
            seconds("stop_after", self.stop_after)
        try:
            self.engine_options()
        except ConfigurationError as error:
            raise UsageError(str(error)) from error

    def _check_finish_by(self) -> None:
        finish_time(self.finish_by or "", time.time())
        if self.max_drop is None:
            raise UsageError("finish_by needs max_drop: how many points of accuracy may be lost to finish in time")
        if self.thresholds is not None or not self.reduce:
            name = "no_reduce" if self.thresholds is None else "thresholds"
            raise UsageError(f"{name} and finish_by cannot go together: each of them decides the speed")

    @property
    def questions(self) -> str:
        """Name of the column with the questions."""
        return QUESTIONS if self.question_column is None else self.question_column

    def text_columns(self, task: Task) -> tuple[str, ...]:
        """The columns with the texts that a task reads, in its order.

        Raises:
            UsageError: `question_column` is set, and the task reads no questions.
        """
        return text_columns(task, self.text_column, self.question_column, self.context_column)

    @property
    def passed_columns(self) -> list[str]:
        """Columns that are copied from the input to the results, `id_column` first."""
        return [*([self.id_column] if self.id_column else []), *self.keep_columns]

    def check_names(self, results: Sequence[str]) -> None:
        """Check that no passed column has the name of one of these result columns, or one that differs only by case.

        Spark and DuckDB do not tell upper from lower case in names.

        Raises:
            UsageError: a passed column has such a name.
        """
        names = {name.lower() for name in results}
        if taken := sorted(name for name in self.passed_columns if name.lower() in names):
            raise UsageError(f"columns {taken} of the input are named like columns of the results; rename them first")

    @property
    def stop_after_seconds(self) -> float | None:
        return None if self.stop_after is None else seconds("stop_after", self.stop_after)

    def storage(self, uri: str, stop: StopRequest | None = None) -> Storage:
        """A Storage at `uri` with this run's retry budget."""
        return Storage(uri, self.storage_retry_seconds, stop)

    def engine_options(self, device: str | None = None) -> EngineOptions:
        """The options of the model's engine on `device`."""
        return EngineOptions(
            max_tokens_per_batch=self.max_tokens_per_batch,
            device=device,
            dtype=self.dtype,
            overflow=self.overflow,
            stride=self.stride,
            probabilities=self.probabilities,
            label_threshold=self.label_threshold,
            max_answer_tokens=self.max_answer_tokens,
            n_best=self.n_best,
            spans=self.n_best > 1,
            no_answer_threshold=self.no_answer_threshold,
            tags=self.tags,
            reduce=self.reduce,
            thresholds=self.thresholds,
        )

    def identity(self) -> dict[str, Any]:
        """The options that affect the results, as JSON values."""
        fields = dataclasses.fields(self)
        values = {field.name: getattr(self, field.name) for field in fields if field.metadata.get("identity")}
        lists = {"keep_columns": list(self.keep_columns), "thresholds": self.thresholds and list(self.thresholds)}
        return values | lists | {"question_column": self.questions}


def identity_defaults() -> dict[str, Any]:
    """Defaults of the options that affect the results, for outputs of older versions that do not record all of them."""
    fields = [field for field in dataclasses.fields(ScoreConfig) if field.metadata.get("identity")]
    return {field.name: field.default for field in fields} | {"question_column": QUESTIONS}


def text_columns(task: Task, text: str, question: str | None, context: str) -> tuple[str, ...]:
    """The columns with the texts that a task reads, in its order; see `ScoreConfig.text_columns`."""
    if question is not None and "question_column" not in task.text_options:
        raise UsageError(
            f"question_column {question!r}: the model reads no questions; leave it out, or train a model on pairs"
        )
    names = {"text_column": text, "question_column": question or QUESTIONS, "context_column": context}
    return tuple(names[option] for option in task.text_options)
