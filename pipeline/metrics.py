"""Metrics of a run for Prometheus: at Ray's endpoint while the run is at work, and in a file for the node exporter.

The driver takes all of them from `RunStatistics`, which also makes the report. So the last values are the report's, and
a split that was computed twice counts once. Ray puts `ray_` in front of the names. The file has it too, so that one
dashboard and one set of alert rules fit both.

What alerts look at are gauges: counters of Ray cannot be 0, so the first increase is not seen by `increase()`; and its
endpoint keeps the counters of runs that have ended, but not their gauges.
"""

import bisect
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import prometheus_client
import ray
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.parser import text_string_to_metric_families
from ray.util import metrics as ray_metrics

from trbert_model.terminal import get_logger, printable

from .errors import OutputBusyError, UsageError
from .report import Progress, RunStatistics, SplitStats
from .storage import Storage

logger = get_logger(__name__)

PREFIX = "ray_"
ENDING = ".prom"  # the node exporter reads no other files
FILE_SECONDS = 15.0  # between two writes of the file at least, except for the last one
_LAST_SUCCESS = "trbert_last_success_timestamp_seconds"


@dataclass(frozen=True)
class Metric:
    """A counter or a gauge.

    Attributes:
        name: without the prefix.
        meaning: its help text.
        value: of a run's statistics; None if there is none yet. By the label's values if it has a label.
        label: a label besides `output`.
    """

    name: str
    meaning: str
    value: Callable[[RunStatistics], float | Mapping[str, float] | None]
    label: str | None = None

    def values(self, statistics: RunStatistics) -> dict[str, float]:
        """The values by the label's values; under "" without a label."""
        value = self.value(statistics)
        return dict(value) if isinstance(value, Mapping) else {} if value is None else {"": value}


def _by_reduction(run: RunStatistics) -> dict[str, float]:
    return {str(number): kept for number, kept in enumerate(run.total.kept_tokens, start=1)}


def _by_stage(run: RunStatistics) -> dict[str, float]:
    total = run.total
    return {
        "read": total.read_seconds,
        "tokenize": total.tokenize_seconds,
        "predict": total.predict_seconds,
        "model": total.model_seconds,
        "commit": total.commit_seconds,
    }


def _rejected(run: RunStatistics) -> float | None:
    rows = run.total.documents + run.total.bad
    return run.total.bad / rows if rows else None


def _tokens_per_second(run: RunStatistics) -> float | None:
    return run.total.tokens / steady if (steady := run.steady_seconds()) else None


COUNTERS = (
    Metric("trbert_documents_total", "Documents scored", lambda run: run.total.documents),
    Metric("trbert_rejects_total", "Rows quarantined", lambda run: run.total.bad_rows, "reason"),
    Metric("trbert_tokens_total", "Tokens the model was given", lambda run: run.total.tokens),
    Metric("trbert_kept_tokens_total", "Tokens kept by a reduction", _by_reduction, "reduction"),
    Metric("trbert_exits_total", "Documents that left a model with exits", lambda run: run.total.exit_layers, "layer"),
    Metric("trbert_windows_total", "Windows that documents were cut into", lambda run: run.total.windows),
    Metric("trbert_text_bytes_total", "Bytes of the documents' texts", lambda run: run.total.text_bytes),
    Metric("trbert_result_bytes_total", "Bytes of the results objects written", lambda run: run.total.result_bytes),
    Metric("trbert_flops_total", "FLOPs spent by the model", lambda run: run.total.flops),
    Metric("trbert_dense_flops_total", "FLOPs of the same model without reduction", lambda run: run.total.dense_flops),
    Metric("trbert_stage_seconds_total", "Busy seconds of a stage; model is a part of predict", _by_stage, "stage"),
    Metric("trbert_splits_total", "Splits committed", lambda run: run.splits),
    Metric("trbert_failed_splits_total", "Splits that could not be scored", lambda run: len(run.failed_splits)),
    Metric("trbert_shards_total", "Shards completed", lambda run: run.shards_completed),
    Metric("trbert_unreadable_shards_total", "Shards that could not be read", lambda run: len(run.unreadable)),
    Metric("trbert_storage_retries_total", "Storage requests made again", lambda run: run.total.storage_retries),
    Metric("trbert_process_deaths_total", "Processes that died at their work", lambda run: run.deaths),
    Metric("trbert_hung_processes_total", "Processes ended because they hung", lambda run: run.hung),
    Metric("trbert_halved_batches_total", "Batches halved for lack of memory", lambda run: run.total.halved_batches),
)

GAUGES = (
    Metric("trbert_run_start_timestamp_seconds", "When the run started", lambda run: run.started),
    Metric("trbert_run_rejected_ratio", "Share of the run's rows that were quarantined", _rejected),
    Metric("trbert_run_process_deaths", "Processes of the run that died or hung", lambda run: run.deaths + run.hung),
    Metric("trbert_run_tokens_per_second", "Tokens a second in steady state", _tokens_per_second),
)

# Not of the statistics: of the run's progress, and of how it ended.
PROGRESS = {
    "trbert_run_progress_ratio": "Share of the run's bytes that is done",
    "trbert_run_eta_seconds": "Remaining time at the speed so far",
    "trbert_run_deadline_timestamp_seconds": "When the run should end or will be stopped",
}
ENDED = {
    "trbert_last_run_exit_code": "Exit code of the last run",
    "trbert_last_run_timestamp_seconds": "When the last run ended",
    "trbert_last_run_duration_seconds": "How long the last run took",
    _LAST_SUCCESS: "When a run with exit code 0 ended last",
}
SPLIT_SECONDS = ("trbert_split_seconds", "Busy seconds of a split in all stages; its queues are not in it")
SPLIT_BOUNDS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)


class RunMetrics:
    """The metrics of one run; safe to use from several threads.

    Args:
        output: where the run writes to; its URI is the label `output` of all metrics, with escapes for odd characters.
        file: a file to keep up to date, in Prometheus' text format; its folder must exist.

    Raises:
        UsageError: the URI is malformed or contains credentials, or the folder cannot be written.
    """

    def __init__(self, output: str, file: str | None = None):
        self.output = printable(Storage(output).uri)
        self.file = Path(file).absolute() if file else None
        self._lock = threading.Lock()
        self._started, self._written = time.time(), -math.inf
        self._counters: dict[str, dict[str, float]] = {}
        self._gauges: dict[str, float] = {}
        self._splits: list[int] = [0] * (len(SPLIT_BOUNDS) + 1)  # by bucket
        self._split_seconds = 0.0
        self._registry = prometheus_client.CollectorRegistry()
        self._registry.register(self)
        if self.file is not None:
            if self.file.suffix != ENDING:
                raise UsageError(f"metrics_file {self.file} must end in {ENDING}, or the node exporter ignores it")
            if not os.access(self.file.parent, os.W_OK | os.X_OK):
                raise UsageError(f"metrics_file {self.file}: its folder does not exist or cannot be written")
            self._read_last_run(self.file)

    def add_split(self, stats: SplitStats) -> None:
        """Record how long a committed split took."""
        seconds = stats.read_seconds + stats.tokenize_seconds + stats.predict_seconds + stats.commit_seconds
        with self._lock:
            self._splits[bisect.bisect_left(SPLIT_BOUNDS, seconds)] += 1
            self._split_seconds += seconds
        if ray.is_initialized():
            _ray(ray_metrics.Histogram, *SPLIT_SECONDS, None).observe(seconds, {"output": self.output})

    def update(
        self, statistics: RunStatistics, progress: Progress | None = None, deadline: float | None = None
    ) -> None:
        """Take over the run's numbers so far.

        Args:
            statistics: of the run.
            progress: how far it is.
            deadline: when it should end or will be stopped, in seconds since the epoch.
        """
        gauges = {metric.name: metric.values(statistics).get("") for metric in GAUGES}
        if progress is not None:
            gauges["trbert_run_progress_ratio"] = progress.share
            gauges["trbert_run_eta_seconds"] = progress.eta_seconds
        gauges["trbert_run_deadline_timestamp_seconds"] = deadline
        with self._lock:
            for metric in COUNTERS:
                self._count(metric, metric.values(statistics))
            self._set(gauges)
            self._write(FILE_SECONDS)

    def end(self, exit_code: int) -> None:
        """Record how the run ended.

        Calling it again with the same code changes nothing in Ray, which may be gone by then.
        """
        now = time.time()
        with self._lock:
            ended = {
                "trbert_last_run_exit_code": exit_code,
                "trbert_last_run_timestamp_seconds": now,
                "trbert_last_run_duration_seconds": now - self._started,
            }
            self._set(ended | ({_LAST_SUCCESS: now, "trbert_run_progress_ratio": 1.0} if exit_code == 0 else {}))
            for name in ("trbert_run_eta_seconds", "trbert_run_deadline_timestamp_seconds"):
                self._gauges.pop(name, None)  # or the run would be late for ever
            if exit_code != OutputBusyError.exit_code:  # then the file is the other run's
                self._write(0.0)

    def _count(self, metric: Metric, values: dict[str, float]) -> None:
        counted = self._counters.setdefault(metric.name, {})
        for value in values:
            # A ledger that died begins to count anew.
            increase = values[value] - counted.get(value, 0)
            if increase > 0:
                counted[value] = values[value]
                if ray.is_initialized():
                    tags = {"output": self.output} | ({metric.label: value} if metric.label else {})
                    _ray(ray_metrics.Counter, metric.name, metric.meaning, metric.label).inc(increase, tags)
            else:
                counted.setdefault(value, 0)

    def _set(self, gauges: Mapping[str, float | None]) -> None:
        for name, value in gauges.items():
            if value is not None:
                self._gauges[name] = value
                if ray.is_initialized():
                    _ray(ray_metrics.Gauge, name, _meanings()[name], None).set(value, {"output": self.output})

    def collect(self) -> Iterator[Any]:
        """Yield the metrics as prometheus_client's registry asks for them."""
        for metric in COUNTERS:
            labels = ["output", metric.label] if metric.label else ["output"]
            counter = CounterMetricFamily(PREFIX + metric.name, metric.meaning, labels=labels)
            for value, count in self._counters.get(metric.name, {}).items():
                counter.add_metric([self.output, value] if metric.label else [self.output], count)
            yield counter
        for name, meaning in _meanings().items():
            gauge = GaugeMetricFamily(PREFIX + name, meaning, labels=["output"])
            if name in self._gauges:
                gauge.add_metric([self.output], self._gauges[name])
            yield gauge
        histogram = HistogramMetricFamily(PREFIX + SPLIT_SECONDS[0], SPLIT_SECONDS[1], labels=["output"])
        bounds = [*map(str, SPLIT_BOUNDS), "+Inf"]
        buckets = [(bound, float(sum(self._splits[: i + 1]))) for i, bound in enumerate(bounds)]
        histogram.add_metric([self.output], buckets, self._split_seconds)
        yield histogram

    def _write(self, seconds: float) -> None:
        """Write the file, unless it is younger than this. That it cannot be written ends no run."""
        if self.file is None or time.monotonic() - self._written < seconds:
            return
        self._written = time.monotonic()
        try:
            prometheus_client.write_to_textfile(str(self.file), self._registry)
        except OSError as error:
            logger.warning("the metrics are not in %s: %s", self.file, error)

    def _read_last_run(self, file: Path) -> None:
        """Take over from the file how the last run on this output ended, until this one has."""
        try:
            for family in text_string_to_metric_families(file.read_text()):
                for sample in family.samples:
                    name = sample.name.removeprefix(PREFIX)
                    if name in ENDED and sample.labels.get("output") == self.output:
                        self._gauges[name] = sample.value
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            logger.warning("%s does not say how the last run ended: %s", file, error)


def series() -> set[str]:
    """The names of all series, as Prometheus has them."""
    names = {metric.name for metric in COUNTERS} | set(_meanings())
    names |= {SPLIT_SECONDS[0] + ending for ending in ("_bucket", "_count", "_sum")}
    return {PREFIX + name for name in names}


def _meanings() -> dict[str, str]:
    """The help texts of all gauges."""
    return {metric.name: metric.meaning for metric in GAUGES} | PROGRESS | ENDED


@cache
def _ray(kind: type[Any], name: str, meaning: str, label: str | None) -> Any:
    """Ray's object for a metric; one in a process."""
    bounds = {"boundaries": list(SPLIT_BOUNDS)} if kind is ray_metrics.Histogram else {}
    return kind(name, meaning, tag_keys=("output", label) if label else ("output",), **bounds)
