"""A scoring run from end to end. Read this file first: it connects the stages, which are in the other files."""

import json
import secrets
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any

from ray.data.exceptions import ExecutionTimeoutError, SystemException
from ray.exceptions import RayError

from trbert_model.terminal import get_logger

from .choice import kept_drift, label_drift, last_labels
from .commit import Committed, bind_output, clear_output, output_identity, settle_done, write_marker
from .config import ScoreConfig, identity_defaults
from .corpus import MARKERS, RUNS, SAMPLES, Shard
from .deaths import write_deaths
from .errors import LeaseLostError, PipelineError, StoppedError, StorageError, UsageError, exit_code_of
from .finish_by import FinishBy, ScoredSplit
from .job import Job, make_job
from .lineage import Lineage
from .lock import OutputLock
from .manifest import SUCCESS, Marker, read_markers, write_manifest
from .metrics import RunMetrics
from .page import earlier_reports, write_page
from .placement import Placement, auto_dtype, place_actors
from .plan import Plan, make_plan
from .ray_start import RayStart, first_line
from .report import Progress, RunStatistics, SplitStats
from .rows import ErrorKind
from .schema import is_outgrown, known_types, settle_output, settle_types, shown, strings_for_nulls
from .stopping import StopRequest
from .storage import Storage
from .stream import COMMIT_CPUS, READER_CPUS, Patience, Stream, say
from .times import finish_time

logger = get_logger(__name__)

# The errors have exit codes of their own, such as 2 (UsageError) and 5 (OutputBusyError).
EXIT_COMPLETE, EXIT_FAILED, EXIT_USAGE, EXIT_BAD_INPUT, EXIT_STOPPED = 0, 1, 2, 3, 4


@dataclass(frozen=True)
class RunContext:
    """One run of a job.

    Attributes:
        run_id: its name in reports and markers.
        started: when it started, in seconds since the epoch.
        stop: request to stop it.
        patience: when it gives up.
        metrics: its metrics; None for those at Ray's endpoint only.
        lineage: where it reports what it reads and writes.
    """

    run_id: str = field(default_factory=lambda: time.strftime("%Y%m%dT%H%M%SZ-", time.gmtime()) + secrets.token_hex(3))
    started: float = field(default_factory=time.time)
    stop: StopRequest = field(default_factory=StopRequest)
    patience: Patience = field(default_factory=Patience)
    metrics: RunMetrics | None = None
    lineage: Lineage = field(default_factory=Lineage)


def score(config: ScoreConfig, stop: StopRequest | None = None) -> dict[str, Any]:
    """Score the rows of a corpus that the output does not hold yet.

    Args:
        config: the options.
        stop: lets the caller stop the run. Signals stop it too if this is the main thread.

    Returns:
        The run report, which is also written to the output as `_runs/<run id>.json`. Its `exit_code` is 0 if the
        output is complete, 3 if it is complete but for unreadable shards or has more bad rows than `max_bad_rows`, 1
        if splits could not be scored, and 4 if the run was stopped (SIGTERM, SIGHUP, Ctrl-C, `stop_after`) before the
        output was complete. With `dry_run`, the result of `plan_of`.

    Raises:
        UsageError: an option, the input, the model or the output does not fit; nothing was started.
        OutputBusyError: another run is working on the output (nothing was started), or has taken it over.
        AbandonedError: the run was stopped and did not end in time.
        PipelineError: the run failed. Committed splits are kept, and the next run finishes the rest.
    """
    wanted = not config.dry_run
    metrics = RunMetrics(config.output, config.metrics_file) if wanted else None
    lineage = Lineage(config.openlineage if wanted else None)
    run = RunContext(stop=stop or StopRequest(), metrics=metrics, lineage=lineage)
    run.stop.grace = config.stop_grace
    if (after := config.stop_after_seconds) is not None:
        run.stop.deadline = (run.started + after, f"{config.stop_after} are over")
    report = raised = None
    try:
        report = run.stop.run(lambda: _score(config, run))
        return report
    except BaseException as error:
        raised = error
        raise
    finally:
        if metrics is not None:
            metrics.end(report["exit_code"] if report is not None else exit_code_of(raised))
        lineage.end(report, raised)


def _score(config: ScoreConfig, run: RunContext) -> dict[str, Any]:
    stop = run.stop
    try:
        if config.dry_run:
            return plan_of(make_job(config, stop))
        with RayStart() as ray_start:
            job = make_job(config, stop, ray_start.begin)
            stop.check()
            return run_job(job, run, ray_start)
    except (UsageError, LeaseLostError):
        raise
    except PipelineError as error:
        if stop.since is None or stop.failed:
            raise
        # Retries end with the grace, so the stop may have caused any other error too.
        meanwhile = "" if isinstance(error, StoppedError) else f"; meanwhile: {error}"
        statistics = RunStatistics(run.run_id, Plan(), run.started)
        statistics.stopped = stop.reason
        status = f"incomplete: stopped ({stop.reason}){meanwhile}; run again to finish"
        return statistics.report(
            status=status, exit_code=EXIT_STOPPED, settings={"input": config.input, "output": config.output}
        )


def run_job(job: Job, run: RunContext, ray_start: RayStart) -> dict[str, Any]:
    """Lock the output, plan what is missing, and score it. Returns and raises the same as `score`."""

    def lost() -> None:
        run.stop.request("another run has taken the output over", failed=True)

    with OutputLock(job.output, run.run_id, lost, run.stop) as lock:
        job = job.locked(lock.check)
        job.require_output()
        job.output.sweep()
        run.lineage.start(run.run_id, run.started, job.config.input, job.output.uri)
        plan = None if job.differences else make_plan(job.shards, job.output, job.recorded_key)
        if plan is not None and not plan.pending:
            return _Run(job, plan, run, lock).execute()
        run.stop.check()
        ray_start.wait()
        placement = place_actors(job.config, spare_cpus=READER_CPUS + COMMIT_CPUS, stop=run.stop)
        if job.dtype_is_open:
            dtype, reason = auto_dtype(placement)
            job = job.on(dtype)
            if job.config.dtype != dtype:
                reason = f"only its calibration table has the speed asked for, that of {dtype} would be faster"
            say(f"dtype {job.config.dtype}: {reason}")
        job = job.divided(placement.device)
        if job.expectation:
            say(str(job.expectation))
        run.stop.check()
        if _begins_anew(job, run.stop.check):
            clear_output(job.output)
            plan = None
        bind_output(job.output, job.identity, overwrite=job.config.overwrite, defaults=identity_defaults())
        if plan is None or job.differences:  # then bind_output has cleared the output
            plan = make_plan(job.shards, job.output, job.identity_key)
        pending = [shard for shard, _ in plan.pending]
        columns = job.config.passed_columns
        types = settle_output(job.output, job.input, pending, columns, job.partitions, run.stop.check)
        job = replace(job, types=types)
        return _Run(job, plan, run, lock).execute(placement)


def _begins_anew(job: Job, check: Callable[[], None] = lambda: None) -> bool:
    """Whether `overwrite` replaces an output with the same settings, because its kept columns need wider types."""
    columns = job.config.passed_columns
    return job.config.overwrite and is_outgrown(job.output, job.input, job.shards, columns, job.partitions, check)


def plan_of(job: Job) -> dict[str, Any]:
    """What a run would do: shards and bytes to read, what is complete, and whether the output would be refused.

    Also the types that the kept columns would have, and shards that would be unreadable because of theirs.
    """
    differences, passed = job.differences, job.config.passed_columns
    anew = bool(differences) or _begins_anew(job)
    fresh = Plan(pending=[(shard, frozenset()) for shard in job.shards])
    plan = fresh if anew else make_plan(job.shards, job.output, job.recorded_key)
    pending = [shard for shard, _ in plan.pending]
    known = {} if anew else known_types(job.output, passed)
    settled = settle_types(job.input, pending, passed, known, job.partitions)
    return {
        "dry_run": True,
        "exit_code": EXIT_COMPLETE if job.config.overwrite or not differences else EXIT_USAGE,
        "differences": differences,
        "shards_to_score": [
            {"shard": shard.path, "bytes": shard.size, "splits_done": len(done)} for shard, done in plan.pending
        ],
        "bytes_to_read": sum(shard.size for shard, _ in plan.pending),
        "shards_complete": len(plan.complete),
        "shards_removed": len(plan.removed),
        "column_types": {name: shown(kind) for name, kind in strings_for_nulls(settled.types).items()},
        "conflicts": [{"shard": path, "error": error} for path, error in sorted(settled.conflicts.items())],
    }


@dataclass
class _ShardProgress:
    """A shard's committed splits by index, and its number of splits, None until it is known."""

    shard: Shard
    splits: dict[int, Committed] = field(default_factory=dict)
    num_splits: int | None = None

    @property
    def is_complete(self) -> bool:
        return self.num_splits is not None and len(self.splits) == self.num_splits


class _Run:
    """One run on the driver: processes the rows that leave the pipeline, and writes markers, manifest and report."""

    def __init__(self, job: Job, plan: Plan, context: RunContext, lock: OutputLock):
        self.job, self.config, self.output, self.plan = job, job.config, job.output, plan
        self.run_id, self.stop, self.patience, self.lock = context.run_id, context.stop, context.patience, lock
        self.statistics = RunStatistics(self.run_id, plan, context.started)
        self.metrics = context.metrics or RunMetrics(job.output.uri)
        self.progress = {shard.path: _ShardProgress(shard) for shard, _ in plan.pending}
        self.markers: dict[str, Marker] = dict(plan.markers)  # by path; of complete and removed shards
        self.marker_writers = ThreadPoolExecutor(8, thread_name_prefix="marker")
        self.written: list[Future] = []
        self.failed_shards: set[str] = set()
        self.failure: str | None = None
        self.finish_by: FinishBy | None = None
        if (asked := job.asked.finish_by) and job.expectation:
            self.finish_by = FinishBy(asked, job.expectation, finish_time(asked, context.started), context.started)

    def execute(self, placement: Placement | None = None) -> dict[str, Any]:
        """Run the pipeline, create `_SUCCESS` if the output is complete, and write the report even after an error.

        Args:
            placement: placement of the actors; None if there is nothing to do.
        """
        earlier = self.marker_writers.submit(earlier_reports, self.output)
        labels_before = last_labels(self.output, self.job.model.digest) if self.plan.pending else {}
        if self.plan.complete:
            say(f"{len(self.plan.complete)} of {len(self.plan.complete) + len(self.plan.pending)} shards are complete")
        status, code = "broken off", EXIT_FAILED
        try:
            has_manifest = self._open_manifest()
            for shard in self.plan.complete:  # left by a run that died after it wrote the marker
                self.output.delete(self.plan.superseded.get(shard.key, []))
            if placement is not None and self.plan.pending:
                self._settle()
                self._stream(placement)
            if self.lock.is_lost:
                self.lock.check()
            status, code = self._verdict()
            if self._is_complete():
                self._close_manifest(has_manifest)
        except (RayError, SystemException, ExecutionTimeoutError) as error:
            raise PipelineError(f"Ray ended the run: {first_line(error)}; run again to finish it") from error
        except PipelineError as error:
            status, code = f"broken off: {error}", error.exit_code
            raise
        finally:
            self.marker_writers.shutdown(wait=True)
            self.statistics.stopped = self.stop.reason
            self._observe()
            self.metrics.end(code)  # while Ray is there
            report = self.statistics.report(status=status, exit_code=code, settings=self._settings(placement))
            if self.finish_by is None:
                report["warnings"] = kept_drift(report["kept_fractions"], self.job.expectation)
            elif self.plan.pending:
                ended = self.statistics.finished or time.time()
                report["finish_by"] = self.finish_by.report(ended, complete=code in (EXIT_COMPLETE, EXIT_BAD_INPUT))
                report["warnings"] = self.finish_by.warnings(ended)
            report["warnings"] += label_drift(report["labels"], labels_before)
            report["page"] = f"{RUNS}/{self.run_id}.html"
            output = self.output.fenced(lambda: None)
            try:
                # No other run writes this name, so a run that has lost the output may write it too.
                output.write(f"{RUNS}/{self.run_id}.json", json.dumps(report, indent=1).encode())
            except StorageError as error:  # still return the report, and do not replace an error that is being raised
                logger.error("the run report is not in the output: %s", error)
            self._write_page(output, report, earlier)
        return report

    def _write_page(self, output: Storage, report: dict[str, Any], earlier: Future) -> None:
        """Write the page beside the report. It is for people only, so no error of it counts."""
        samples = self.statistics.highlights.samples
        try:
            if samples:
                output.write(f"{SAMPLES}/{self.run_id}.json", json.dumps(samples).encode())
            write_page(output, report, earlier.result(), samples)
        except Exception as error:  # noqa: BLE001
            report["page"] = None
            logger.warning("the run's page is not in the output: %s: %s", type(error).__name__, error)

    def _open_manifest(self) -> bool:
        """Return whether `_SUCCESS` is valid; if it is not, delete it and the invalid markers."""
        removed = self.statistics.removed = sorted(self._removed_shards())
        manifest = self.plan.manifest
        goes = bool(removed) and self.config.delete_removed
        if manifest is not None and sorted(manifest["removed"]) == removed and not goes:
            return True
        if self.plan.has_success:
            self.output.delete([SUCCESS])
        self.output.delete(self.plan.distrusted)
        return False

    def _removed_shards(self) -> list[str]:
        """The shards in the output that are no longer in the corpus: by path, or by key if there is no marker."""
        first = {key: files[0] for key, files in self.plan.removed.items()}  # markers come first
        marked = {path: key for key, path in first.items() if path.startswith(f"{MARKERS}/")}
        read = dict(read_markers(self.output, marked))
        self.markers |= {path: marker for path, marker in read.items() if marker and not self.config.delete_removed}
        names = {marked[path]: marker["shard"] for path, marker in read.items() if marker}
        return [names.get(key, key) for key in first]

    def _close_manifest(self, has_manifest: bool) -> None:
        """Finish a complete output: delete removed shards if configured, and create `_SUCCESS` unless it exists."""
        if self.config.delete_removed:
            for files in self.plan.removed.values():
                self.output.delete(files)
        if not has_manifest:
            identity = output_identity(self.output) or {}
            removed = [] if self.config.delete_removed else self.statistics.removed
            write_manifest(self.output, identity, self.markers.values(), removed, self.run_id, self.lock.epoch)
            write_deaths(self.output, {})

    def _settle(self) -> None:
        """Take over the intact splits that earlier runs committed of the pending shards."""
        settled = settle_done(self.output, self.plan.pending, self.job.identity_key, self.job.types)
        for (path, index), committed in settled.items():
            self.progress[path].splits[index] = committed
        self.plan.pending = [(shard, frozenset(self.progress[shard.path].splits)) for shard, _ in self.plan.pending]

    def _is_complete(self) -> bool:
        return all(progress.is_complete for progress in self.progress.values()) and not self.statistics.unreadable

    def _stream(self, placement: Placement) -> None:
        stream = Stream(self.job, placement, self.statistics, self.patience, self.finish_by, self._observe)
        try:
            stream.run(self.plan.pending, self._take, self.stop)
        finally:
            self.failure = stream.failure or self.failure
        for written in self.written:
            written.result()

    def _observe(self, progress: Progress | None = None) -> None:
        deadlines = [self.stop.deadline[0]] if self.stop.deadline else []
        if self.finish_by is not None:
            deadlines.append(self.finish_by.control.deadline)
        self.metrics.update(self.statistics, progress, min(deadlines, default=None))

    def _take(self, row: dict[str, Any]) -> None:
        """Record a row that left the pipeline, and write its shard's marker if the shard is now complete."""
        progress = self.progress[row["shard"]]
        if row["error_kind"] == ErrorKind.STOPPED:
            return
        if row["error"] is not None:
            if row["error_kind"] == ErrorKind.OUTPUT:
                # The retries are used up, so further results could not be written either.
                self.failure = row["error"]
                self.stop.request("the output cannot be written", failed=True)
            if row["index"] < 0:
                self.statistics.unreadable[row["shard"]] = row["error"]
                self.statistics.skip_rest(progress.shard)
            else:
                self.statistics.skip(progress.shard, row["rows"] or 0, row["shard_rows"] or 0)
                self.statistics.failed_splits[f"{row['shard']} split {row['index']}"] = row["error"]
                self.failed_shards.add(row["shard"])
            return
        self.statistics.skip(progress.shard, row["skipped_rows"], row["shard_rows"])
        if row["num_splits"] is not None:
            progress.num_splits = row["num_splits"]
            for index in [index for index in progress.splits if index >= row["num_splits"]]:
                del progress.splits[index]  # not a split of this shard
        if row["index"] >= 0:
            committed = Committed(**json.loads(row["committed"]))
            progress.splits[row["index"]] = committed
            stats = SplitStats.from_json(row["stats"])
            actor = json.loads(row["actor"])
            self.statistics.highlights.add(row, committed.object, stats.documents, stats.tokens)
            self.statistics.add_split(
                stats,
                progress.shard,
                row["rows"],
                row["shard_rows"],
                actor,
            )
            self.metrics.add_split(stats)
            if self.finish_by is not None:
                size = progress.shard.size * row["rows"] / max(row["shard_rows"], 1)
                split = ScoredSplit(actor["point"], actor["actor"], actor["start"], actor["end"], size)
                self.finish_by.add(split, stats, committed.thresholds_version, committed.results)
        if progress.is_complete:
            self.written.append(self.marker_writers.submit(self._mark, progress))

    def _mark(self, progress: _ShardProgress) -> None:
        marker = write_marker(
            self.output,
            progress.shard,
            [committed for _, committed in sorted(progress.splits.items())],
            self.run_id,
            epoch=self.lock.epoch,
            identity_key=self.job.identity_key,
            superseded=self.plan.superseded.get(progress.shard.key, ()),
        )
        self.markers[progress.shard.marker] = marker
        self.statistics.add_shard(marker["quarantined"])

    def _verdict(self) -> tuple[str, int]:
        """The status and exit code of the run."""
        statistics, config = self.statistics, self.config
        accounted = self.failed_shards | set(statistics.unreadable)
        vanished = [
            path for path, progress in self.progress.items() if not progress.is_complete and path not in accounted
        ]
        if self.failure:
            return f"failed: {self.failure}; run again to finish", EXIT_FAILED
        if vanished and not self.stop.reason:
            raise PipelineError(f"splits of {len(vanished)} shards never came back, of {vanished[0]} first; run again")
        if self.failed_shards:
            return f"incomplete: {len(statistics.failed_splits)} splits failed; run again", EXIT_FAILED
        if vanished:
            return f"incomplete: stopped ({self.stop.reason}); run again to finish", EXIT_STOPPED
        if statistics.unreadable:
            return "complete but for unreadable shards", EXIT_BAD_INPUT
        if config.max_bad_rows is not None and statistics.quarantined > config.max_bad_rows:
            return f"complete, with more than {config.max_bad_rows} bad rows", EXIT_BAD_INPUT
        return ("complete" if self.plan.pending else "complete already: nothing to do"), EXIT_COMPLETE

    def _settings(self, placement: Placement | None) -> dict[str, Any]:
        """The report's entries about options, model, placement and versions."""
        config, model, expectation = self.config, self.job.model, self.job.expectation
        packages = ("ray", "torch", "transformers", "pyarrow", "s3fs")
        return {
            "input": config.input,
            "output": config.output,
            "model": {
                "uri": config.model,
                "digest": model.digest,
                "layers": model.layers,
                "reduction_layers": list(model.reduction_layers) if config.reduce else [],
            },
            "options": config.identity(),
            "expectation": expectation.as_dict() if expectation else None,
            "placement": placement.as_dict() if placement else None,
            "versions": {"python": sys.version.split()[0], **{name: version(name) for name in packages}},
        }
