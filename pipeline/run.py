"""A scoring run from end to end. Read this file first: it wires the stages that the others hold."""

import json
import secrets
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from ray.data.exceptions import ExecutionTimeoutError, SystemException
from ray.exceptions import RayError

from trbert_model.terminal import get_logger

from .choice import kept_drift, label_drift, last_labels
from .commit import Committed, bind_output, output_identity, settle_done, write_marker
from .config import ScoreConfig, identity_defaults
from .corpus import MARKERS, RUNS, Shard
from .deaths import write_deaths
from .errors import LeaseLostError, PipelineError, StoppedError, StorageError, UsageError
from .job import Job, make_job
from .lock import OutputLock
from .manifest import SUCCESS, Marker, read_markers, write_manifest
from .placement import Placement, auto_dtype, place
from .plan import Plan, make_plan
from .ray_start import first_line, running_ray
from .report import RunStatistics, SplitStats
from .rows import ErrorKind
from .stopping import StopRequest
from .stream import COMMIT_CPUS, READER_CPUS, Patience, Stream, say

logger = get_logger(__name__)

# 2 and 5 are the errors' own: a UsageError, an OutputBusyError.
EXIT_COMPLETE, EXIT_FAILED, EXIT_USAGE, EXIT_BAD_INPUT, EXIT_STOPPED = 0, 1, 2, 3, 4


@dataclass(frozen=True)
class RunContext:
    """One run of a job: its name in reports and markers, when it started (seconds since the epoch), what stops it, and
    when it gives up."""

    run_id: str = field(default_factory=lambda: time.strftime("%Y%m%dT%H%M%SZ-", time.gmtime()) + secrets.token_hex(3))
    started: float = field(default_factory=time.time)
    stop: StopRequest = field(default_factory=StopRequest)
    patience: Patience = field(default_factory=Patience)


def score(config: ScoreConfig, stop: StopRequest | None = None) -> dict[str, Any]:
    """Score a corpus: everything that the output does not hold yet.

    Returns the run report (also in the output as `_runs/<run id>.json`); its `exit_code` is 0 for a complete output,
    3 for a complete one with unreadable shards or more bad rows than `max_bad_rows`, 1 if splits could not be scored,
    4 if the run was stopped (SIGTERM, SIGHUP, Ctrl-C, `stop_after`) before it was complete. With `dry_run`, returns
    `plan_of`'s plan.

    Args:
        stop: how a caller asks the run to stop; signals do as well, where this is the main thread.

    Raises:
        UsageError: nothing was started, because of the option, input, model or output that it names.
        OutputBusyError: nothing was started, because another run is at work on the output, or it took it over.
        AbandonedError: the run was stopped and did not end in the time that it had.
        PipelineError: the run broke off; what was committed stays, and running again finishes it.
    """
    run = RunContext(stop=stop or StopRequest())
    run.stop.grace = config.stop_grace
    if (after := config.stop_after_seconds) is not None:
        run.stop.deadline = (run.started + after, f"{config.stop_after} are over")
    return run.stop.run(lambda: _score(config, run))


def _score(config: ScoreConfig, run: RunContext) -> dict[str, Any]:
    stop = run.stop
    try:
        job = make_job(config, stop)
        stop.check()
        return plan_of(job) if config.dry_run else run_job(job, run)
    except (UsageError, LeaseLostError):
        raise
    except PipelineError as error:
        if stop.since is None or stop.failed:
            raise
        # Whatever else it was, it had only the grace to be tried again.
        meanwhile = "" if isinstance(error, StoppedError) else f"; meanwhile: {error}"
        statistics = RunStatistics(run.run_id, Plan(), run.started)
        statistics.stopped = stop.reason
        status = f"incomplete: stopped ({stop.reason}){meanwhile}; run again to finish"
        return statistics.report(
            status=status, exit_code=EXIT_STOPPED, settings={"input": config.input, "output": config.output}
        )


def run_job(job: Job, run: RunContext) -> dict[str, Any]:
    """Lock the output, plan what it lacks, start Ray if it lacks anything; `score` says what comes of it."""

    def lost() -> None:
        run.stop.request("another run has taken the output over", failed=True)

    with OutputLock(job.output, run.run_id, lost, run.stop) as lock:
        job = job.locked(lock.check)
        job.require_output()
        job.output.sweep()
        plan = None if job.differences else make_plan(job.shards, job.output, job.recorded_key)
        if plan is not None and not plan.pending:
            return _Run(job, plan, run, lock).execute()
        if (gpus := job.config.gpus_per_actor) is not None:  # then so is the dtype, without a cluster
            job = job.on(auto_dtype(gpus))
            job.require_output()
        run.stop.check()
        with running_ray():
            placement = place(job.config, spare_cpus=READER_CPUS + COMMIT_CPUS, stop=run.stop)
            job = job.on(placement.dtype)
            if job.expectation:
                say(str(job.expectation))
            run.stop.check()
            bind_output(job.output, job.identity, overwrite=job.config.overwrite, defaults=identity_defaults())
            if plan is None or job.differences:  # then nothing is left of what there was
                plan = make_plan(job.shards, job.output, job.identity_key)
            return _Run(job, plan, run, lock).execute(placement)


def plan_of(job: Job) -> dict[str, Any]:
    """What a run would do: shards and bytes to read, what is done, and whether the output would be refused."""
    differences = job.differences
    fresh = Plan(pending=[(shard, frozenset()) for shard in job.shards])
    plan = fresh if differences else make_plan(job.shards, job.output, job.recorded_key)
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
    }


@dataclass
class _ShardProgress:
    """A shard's splits as they come in: those committed, by index, and how many there are once that is known."""

    shard: Shard
    splits: dict[int, Committed] = field(default_factory=dict)
    num_splits: int | None = None

    @property
    def is_complete(self) -> bool:
        return self.num_splits is not None and len(self.splits) == self.num_splits


class _Run:
    """One run: what the driver does with the rows that come out of the stream, and what it leaves in the output."""

    def __init__(self, job: Job, plan: Plan, context: RunContext, lock: OutputLock):
        self.job, self.config, self.output, self.plan = job, job.config, job.output, plan
        self.run_id, self.stop, self.patience, self.lock = context.run_id, context.stop, context.patience, lock
        self.statistics = RunStatistics(self.run_id, plan, context.started)
        self.progress = {shard.path: _ShardProgress(shard) for shard, _ in plan.pending}
        self.markers: dict[str, Marker] = dict(plan.markers)  # by path: of the complete shards
        self.marker_writers = ThreadPoolExecutor(8, thread_name_prefix="marker")
        self.written: list[Future] = []
        self.failed_shards: set[str] = set()
        self.failure: str | None = None

    def execute(self, placement: Placement | None = None) -> dict[str, Any]:
        """Run the pipeline, mark the output complete if it is, write the report, whatever happens in between.

        placement: where the actors go; a run with nothing to do needs none.
        """
        labels_before = last_labels(self.output, self.job.model.digest) if self.plan.pending else {}
        if self.plan.complete:
            say(f"{len(self.plan.complete)} of {len(self.plan.complete) + len(self.plan.pending)} shards are complete")
        status, code = "broken off", EXIT_FAILED
        try:
            has_manifest = self._open_manifest()
            for shard in self.plan.complete:  # what a run that died after the marker has left
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
            report = self.statistics.report(status=status, exit_code=code, settings=self._settings(placement))
            report["warnings"] = kept_drift(report["kept_fractions"], self.job.expectation)
            report["warnings"] += label_drift(report["labels"], labels_before)
            try:
                # Its name is this run's alone: written also by one that has lost the output.
                place = self.output.fenced(lambda: None)
                place.write(f"{RUNS}/{self.run_id}.json", json.dumps(report, indent=1).encode())
            except StorageError as error:  # the report is returned all the same, and an error under way is not hidden
                logger.error("the run report is not in the output: %s", error)
        return report

    def _open_manifest(self) -> bool:
        """Whether `_SUCCESS` is true and stays; else it goes, and so do markers that are not true."""
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
        """The shards with results in the output that the corpus no longer has; keys where there is no marker."""
        first = {key: files[0] for key, files in self.plan.removed.items()}  # markers come first
        marked = {path: key for key, path in first.items() if path.startswith(f"{MARKERS}/")}
        read = dict(read_markers(self.output, marked))
        self.markers |= {path: marker for path, marker in read.items() if marker and not self.config.delete_removed}
        names = {marked[path]: marker["shard"] for path, marker in read.items() if marker}
        return [names.get(key, key) for key in first]

    def _close_manifest(self, has_manifest: bool) -> None:
        """`_SUCCESS` for an output that is complete, unless it is there."""
        if self.config.delete_removed:
            for files in self.plan.removed.values():
                self.output.delete(files)
        if not has_manifest:
            identity = output_identity(self.output) or {}
            removed = [] if self.config.delete_removed else self.statistics.removed
            write_manifest(self.output, identity, self.markers.values(), removed, self.run_id, self.lock.epoch)
            write_deaths(self.output, {})

    def _settle(self) -> None:
        """Take over what an earlier run has left of the shards to score, as far as it is whole."""
        settled = settle_done(self.output, self.plan.pending, self.job.identity_key)
        for (path, index), committed in settled.items():
            self.progress[path].splits[index] = committed
        self.plan.pending = [(shard, frozenset(self.progress[shard.path].splits)) for shard, _ in self.plan.pending]

    def _is_complete(self) -> bool:
        return all(progress.is_complete for progress in self.progress.values()) and not self.statistics.unreadable

    def _stream(self, placement: Placement) -> None:
        stream = Stream(self.job, placement, self.statistics, self.patience)
        try:
            stream.run(self.plan.pending, self._take, self.stop)
        finally:
            self.failure = stream.failure or self.failure
        for written in self.written:
            written.result()

    def _take(self, row: dict[str, Any]) -> None:
        """Account for a row that left the pipeline, and mark its shard when that was the last one."""
        progress = self.progress[row["shard"]]
        if row["error_kind"] == ErrorKind.STOPPED:
            return
        if row["error"] is not None:
            if row["error_kind"] == ErrorKind.OUTPUT:
                # The output has failed for longer than the retries last: more results would have nowhere to go.
                self.failure = row["error"]
                self.stop.request("the output cannot be written", failed=True)
            if row["index"] < 0:
                self.statistics.unreadable[row["shard"]] = row["error"]
            else:
                self.statistics.failed_splits[f"{row['shard']} split {row['index']}"] = row["error"]
                self.failed_shards.add(row["shard"])
            return
        self.statistics.skip(progress.shard, row["skipped_rows"], row["shard_rows"])
        if row["num_splits"] is not None:
            progress.num_splits = row["num_splits"]
            for index in [index for index in progress.splits if index >= row["num_splits"]]:
                del progress.splits[index]  # no split of this shard, whoever has written it
        if row["index"] >= 0:
            progress.splits[row["index"]] = Committed(**json.loads(row["committed"]))
            self.statistics.add_split(
                SplitStats.from_json(row["stats"]),
                progress.shard,
                row["rows"],
                row["shard_rows"],
                json.loads(row["actor"]),
            )
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
            found=self.plan.superseded.get(progress.shard.key, ()),
        )
        self.markers[progress.shard.marker] = marker
        self.statistics.add_shard(marker["quarantined"])

    def _verdict(self) -> tuple[str, int]:
        """How the run ended, and its exit code."""
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
        """What the report says of the run's conditions."""
        config, model, expectation = self.config, self.job.model, self.job.expectation
        packages = ("ray", "torch", "transformers", "pyarrow", "s3fs")
        return {
            "input": config.input,
            "output": config.output,
            "model": {"uri": config.model, "digest": model.digest},
            "options": config.identity(),
            "expectation": expectation.as_dict() if expectation else None,
            "placement": placement.as_dict() if placement else None,
            "versions": {"python": sys.version.split()[0], **{name: version(name) for name in packages}},
        }
