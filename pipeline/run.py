"""A scoring run from end to end. Read this file first: it wires the stages that the others hold."""

import contextlib
import json
import logging
import os
import secrets
import sys
import threading
import time
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from typing import Any

import ray
import ray.data
from ray._private import ray_constants
from ray.data.exceptions import ExecutionTimeoutError, SystemException
from ray.exceptions import RayError

from trbert_model.engine import check_thresholds, load_model, make_task, task_of
from trbert_model.errors import TRBertError
from trbert_model.tasks.question_answering import QuestionAnsweringTask

from .choice import Expectation, Model, choose, kept_drift, label_drift, last_labels
from .commit import (
    Committed,
    bind_output,
    identity_differences,
    inspect_object,
    output_identity,
    publish_splits,
    refusal,
    write_marker,
)
from .config import ScoreConfig, identity_defaults
from .corpus import MARKERS, RUNS, Plan, Shard, input_root, list_shards, make_plan
from .encode import EncodeOptions, read_shards, shard_groups
from .errors import PipelineError, StorageError, UsageError
from .ledger import NO_LEDGER, start_ledger
from .lock import OutputLock
from .manifest import SUCCESS, Marker, read_manifest, read_markers, write_manifest
from .placement import Placement, place
from .predict import SplitPredictor
from .report import RunStatistics, SplitStats
from .rows import STOPPED
from .stopping import EndWhenOver, OverError, StopRequest, StopWatch
from .storage import Storage, fetch_model, model_digest

logger = logging.getLogger(__name__)

# 2 and 5 are the errors' own: a UsageError, an OutputBusyError.
EXIT_COMPLETE, EXIT_FAILED, EXIT_USAGE, EXIT_BAD_INPUT, EXIT_STOPPED = 0, 1, 2, 3, 4

# Ray Data fuses neighbouring stages that ask for the same resources, and reading would then run inside the actors
# (340 ms of idle GPU between splits); so every stage asks for something else. Actors take 1 CPU or more.
READER_CPUS = 0.5
COMMIT_CPUS = 0.25
_LOADS_AN_ACTOR = 4  # without a split that comes back: nobody can load the model


def score(config: ScoreConfig) -> dict[str, Any]:
    """Score a corpus: everything that the output does not hold yet.

    Returns the run report (also in the output as `_runs/<run id>.json`); its `exit_code` is 0 for a complete output,
    3 for a complete one with unreadable shards or more bad rows than `max_bad_rows`, 1 if splits could not be scored,
    4 if the run was stopped (SIGTERM, `stop_after`) before it was complete. With `dry_run`, returns `plan_of`'s plan.

    Raises:
        UsageError: nothing was started, because of the option, input, model or output that it names.
        OutputBusyError: nothing was started, because another run is at work on the output.
        PipelineError: the run broke off; what was committed stays, and running again finishes it.
    """
    started = time.time()
    output, shards, model = _check(config)
    if config.dry_run:
        return plan_of(config, output, shards, model)
    run_id = time.strftime("%Y%m%dT%H%M%SZ-", time.gmtime()) + secrets.token_hex(3)
    stop = StopRequest()
    with (
        stop.on_sigterm() as install_handler,
        OutputLock(output, run_id, lambda: stop.request("another run has taken the output over")),
    ):
        differences = _differences(config, output, model)
        if differences and not config.overwrite:
            raise refusal(output, differences)
        plan = None if differences else make_plan(shards, output)
        if plan is not None and not plan.pending:
            return _Run(config, output, plan, None, None, model, run_id, started, stop).execute()
        started_ray = _start_ray()
        install_handler()
        try:
            placement = place(config, spare_cpus=READER_CPUS + COMMIT_CPUS)
            config = replace(config, dtype=placement.dtype if config.dtype == "auto" else config.dtype)
            config, expectation = choose(config, model)
            if expectation:
                _say(str(expectation))
            bind_output(
                output, _identity(config, model.digest), overwrite=config.overwrite, defaults=identity_defaults()
            )
            plan = plan or make_plan(shards, output)
            return _Run(config, output, plan, placement, expectation, model, run_id, started, stop).execute()
        finally:
            if started_ray:
                ray.shutdown()


def _check(config: ScoreConfig) -> tuple[Storage, list[Shard], Model]:
    """Everything that can be known before Ray starts."""
    output = config.storage(config.output)
    root = Storage(input_root(config.input))
    inside, around = (f"{place.protocol}:{_real(place)}/" for place in (output, root))
    if inside.startswith(around) or around.startswith(inside):
        raise UsageError(f"output {config.output} and input {config.input} lie inside each other; keep them apart")
    directory = fetch_model(config.model)
    try:
        loaded, tokenizer = load_model(directory)
        task = make_task(task_of(loaded.config), tokenizer, loaded.config, config.engine_options())
        if config.thresholds is not None:
            check_thresholds(loaded.config, config.thresholds)
    except TRBertError as error:
        raise UsageError(str(error)) from error
    model = Model(config.model, directory, model_digest(directory), loaded.config.max_position_embeddings, task)
    if config.dtype != "auto":  # else the cluster decides on the dtype, and with it on the table
        choose(config, model)
    return output, list_shards(config.storage(config.input)), model


def _real(place: Storage) -> str:
    """A place's root without symbolic links."""
    return os.path.realpath(place.root) if place.is_local else place.root


def _identity(config: ScoreConfig, digest: str) -> dict[str, Any]:
    """What an output is bound to."""
    return {"format": 1, "input": Storage(config.input).uri, "model_digest": digest, **config.identity()}


def _differences(config: ScoreConfig, output: Storage, model: Model) -> list[str]:
    """What the output was made with and this run is not. A dtype that the cluster decides on is taken to be the
    output's, until there is a cluster."""
    recorded = output_identity(output)
    if recorded is None:
        return []
    if config.dtype == "auto":
        config = replace(config, dtype=recorded.get("dtype", "float32"))
    try:
        config, _ = choose(config, model)
    except UsageError as error:
        if not config.overwrite:
            raise
        return [str(error)]  # what is there goes away: its dtype is not this run's
    return identity_differences({**identity_defaults(), **recorded}, _identity(config, model.digest))


def plan_of(config: ScoreConfig, output: Storage, shards: list[Shard], model: Model) -> dict[str, Any]:
    """What a run would do: shards and bytes to read, what is done, and whether the output would be refused."""
    differences = _differences(config, output, model)
    plan = Plan(pending=[(shard, frozenset()) for shard in shards]) if differences else make_plan(shards, output)
    return {
        "dry_run": True,
        "exit_code": EXIT_COMPLETE if config.overwrite or not differences else EXIT_USAGE,
        "differences": differences,
        "shards_to_score": [
            {"shard": shard.path, "bytes": shard.size, "splits_done": len(done)} for shard, done in plan.pending
        ],
        "bytes_to_read": sum(shard.size for shard, _ in plan.pending),
        "shards_complete": len(plan.complete),
        "shards_removed": len(plan.removed),
    }


def _start_ray() -> bool:
    """Connect to the cluster that RAY_ADDRESS names (`ray job submit` sets it), or start one here; whether it did."""
    if ray.is_initialized():
        return False
    if os.environ.get("RAY_ADDRESS"):
        try:
            ray.init(logging_level=logging.WARNING)
        except (ConnectionError, RuntimeError) as error:
            raise UsageError(f"RAY_ADDRESS {os.environ['RAY_ADDRESS']}: {_first_line(error)}") from error
    else:
        # With a single core, reader and actor would not fit beside each other.
        cpus = max(os.cpu_count() or 1, 2)
        with _local_settings():
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, logging_level=logging.WARNING)
    return True


@contextlib.contextmanager
def _local_settings() -> Iterator[None]:
    """For a Ray of this machine alone. It listens on loopback: there is no documented option, and a test sees that it
    holds. And it keeps workers that wait for a minute: ended after a second, as they are by default beyond the number
    of CPUs, the readers' and writers' imports would be most of what a small machine's second core does."""
    settings = {ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0", "RAY_idle_worker_killing_time_threshold_ms": "60000"}
    before = {name: os.environ.get(name) for name in settings}
    constant, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    os.environ.update(settings)
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = constant
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@dataclass
class _ShardProgress:
    """A shard's splits as they come in: those committed, by index, and how many there are once that is known."""

    shard: Shard
    splits: dict[int, Committed | None] = field(default_factory=dict)
    num_splits: int | None = None

    @property
    def is_complete(self) -> bool:
        return self.num_splits is not None and len(self.splits) == self.num_splits


class _Run:
    """One run: the Ray Data pipeline and what the driver does with the rows that come out of it."""

    def __init__(
        self,
        config: ScoreConfig,
        output: Storage,
        plan: Plan,
        placement: Placement | None,
        expectation: Expectation | None,
        model: Model,
        run_id: str,
        started: float,
        stop: StopRequest,
    ):
        self.config, self.output, self.plan, self.placement, self.model = config, output, plan, placement, model
        self.expectation, self.run_id, self.started, self.stop = expectation, run_id, started, stop
        self.labels_before = last_labels(output, model.digest) if plan.pending else {}
        self.ledger = start_ledger() if plan.pending else NO_LEDGER
        self.statistics = RunStatistics(self.run_id, plan, started)
        self.progress = {shard.path: _ShardProgress(shard, dict.fromkeys(done)) for shard, done in plan.pending}
        self.known_markers: dict[str, Marker] = {}
        self.marker_writers = ThreadPoolExecutor(8, thread_name_prefix="marker")
        self.markers: list[Future] = []
        self.failure: str | None = None
        self.loads_before, self.splits_before = 0, 0  # see `_hopeless`

    def execute(self) -> dict[str, Any]:
        """Run the pipeline, mark the output complete if it is, write the report, whatever happens in between."""
        if self.plan.complete:
            _say(f"{len(self.plan.complete)} of {len(self.plan.complete) + len(self.plan.pending)} shards are complete")
        status, code = "broken off", EXIT_FAILED
        try:
            manifest = self._open_manifest()
            for shard in self.plan.complete:  # what a run that died after the marker has left
                self.output.delete(self.plan.superseded.get(shard.key, []))
            if self.plan.pending:
                self._stream()
            status, code = self._verdict()
            if self._is_complete():
                self._close_manifest(manifest)
        except (RayError, SystemException, ExecutionTimeoutError) as error:
            raise PipelineError(f"Ray ended the run: {_first_line(error)}; run again to finish it") from error
        finally:
            self.marker_writers.shutdown(wait=True)
            self.statistics.stopped = self.stop.reason
            report = self.statistics.report(status=status, exit_code=code, settings=self._settings())
            report["warnings"] = kept_drift(report["kept_fractions"], self.expectation)
            report["warnings"] += label_drift(report["labels"], self.labels_before)
            try:
                self.output.write(f"{RUNS}/{self.run_id}.json", json.dumps(report, indent=1).encode())
            except StorageError as error:  # the report is returned all the same, and an error under way is not hidden
                logger.error("the run report is not in the output: %s", error)
        return report

    def _open_manifest(self) -> dict[str, Any] | None:
        """Remember what `_SUCCESS` says of the shards, and take it away if the output is about to change."""
        manifest = read_manifest(self.output)
        removed = self.statistics.removed = sorted(self._removed_shards())
        if manifest is None:
            return None
        if not self.plan.pending and manifest["removed"] == removed and not (removed and self.config.delete_removed):
            return manifest
        for marker in manifest["shards"]:
            self.known_markers[Shard(marker["shard"], marker["version"], marker["size"]).marker] = marker
        self.output.delete([SUCCESS])
        return None

    def _removed_shards(self) -> list[str]:
        """The shards with results in the output that the corpus no longer has; keys where there is no marker."""
        first = {key: files[0] for key, files in self.plan.removed.items()}  # markers come first
        marked = {key: path for key, path in first.items() if path.startswith(f"{MARKERS}/")}
        names = [marker["shard"] for _, marker in read_markers(self.output, marked.values())]
        return names + [key for key in first if key not in marked]

    def _close_manifest(self, manifest: dict[str, Any] | None) -> None:
        """`_SUCCESS` for an output that is complete, unless it is there."""
        if self.config.delete_removed:
            for files in self.plan.removed.values():
                self.output.delete(files)
        if manifest is None:
            identity = output_identity(self.output) or {}
            removed = [] if self.config.delete_removed else self.statistics.removed
            write_manifest(self.output, identity, self.known_markers, removed, self.run_id)

    def _is_complete(self) -> bool:
        return all(progress.is_complete for progress in self.progress.values()) and not self.statistics.unreadable

    def _stream(self) -> None:
        """Feed the shards in and take the committed splits as they come."""
        config, done = self.config, threading.Event()
        reporter = threading.Thread(target=self._report_progress, args=(done,), daemon=True)
        reporter.start()
        after = config.stop_after_seconds
        deadline = None if after is None else (self.started + after, f"{config.stop_after} are over")
        try:
            with (
                StopWatch(self.stop, self.ledger, deadline, config.stop_grace, _say, self._hopeless) as watch,
                _data_context(watch),
                contextlib.closing(self._splits()) as splits,
            ):
                try:
                    for row in splits:
                        self._take(row)
                except OverError as error:
                    logger.debug("%r", error)  # why is said; `_verdict` tells what is missing
        finally:
            done.set()
            reporter.join()
        self.statistics.deaths = self.ledger.deaths()
        for marker in self.markers:
            marker.result()

    def _hopeless(self) -> str | None:
        """Why nothing more is to be expected: every actor has tried to load the model again and again since the last
        split came back."""
        loads, reason = self.ledger.loads()
        if self.statistics.splits > self.splits_before:
            self.loads_before, self.splits_before = loads, self.statistics.splits
        assert self.placement is not None
        if loads - self.loads_before <= _LOADS_AN_ACTOR * self.placement.num_actors:
            return None
        self.failure = f"no actor can load the model ({reason or 'they die while they do'})"
        return self.failure

    def _splits(self) -> Generator[dict[str, Any], None, None]:
        """The rows that come out of the Ray Data pipeline; closing it ends the pipeline."""
        tables = iter(self._dataset().iter_batches(batch_size=None, prefetch_batches=0, batch_format="pyarrow"))
        for table in tables:
            yield from table.to_pylist()

    def _dataset(self) -> ray.data.Dataset:
        config, placement = self.config, self.placement
        assert placement is not None  # only a run with nothing to do has none
        options = EncodeOptions(
            input=config.storage(input_root(config.input)),
            task=self.model.task,
            text_columns=(
                (config.question_column, config.context_column)
                if isinstance(self.model.task, QuestionAnsweringTask)
                else (config.text_column,)
            ),
            id_column=config.id_column,
            keep_columns=config.keep_columns,
            split_bytes=config.split_bytes,
        )
        predictor = {
            "passed_columns": options.passed_columns,
            "id_column": config.id_column,
            "model": Storage(config.model).uri,
            "probabilities": config.probabilities,
            "no_answer_threshold": config.no_answer_threshold,
            "spans": config.n_best > 1,
            "threads": placement.threads,
            "ledger": self.ledger,
            **asdict(config.engine_options(placement.device)),
        }
        groups = shard_groups(self.plan.pending)
        return (
            ray.data.from_items(groups, override_num_blocks=len(groups))
            .map_batches(
                read_shards,
                batch_size=1,
                batch_format="pyarrow",
                num_cpus=READER_CPUS,
                fn_kwargs={"options": options, "ledger": self.ledger},
            )
            .map_batches(
                SplitPredictor,
                batch_size=1,
                batch_format="pyarrow",
                num_cpus=placement.cpus_per_actor,
                num_gpus=placement.gpus_per_actor or None,
                # With one task in flight an actor idled 500 ms between splits, with two 10 ms.
                compute=ray.data.ActorPoolStrategy(size=placement.num_actors, max_tasks_in_flight_per_actor=2),
                fn_constructor_kwargs=predictor,
            )
            .map_batches(
                publish_splits,
                batch_size=1,
                batch_format="pyarrow",
                num_cpus=COMMIT_CPUS,
                fn_kwargs={"output": self.output, "ledger": self.ledger},
            )
        )

    def _take(self, row: dict[str, Any]) -> None:
        """Account for a row that left the pipeline, and mark its shard when that was the last one."""
        progress = self.progress[row["shard"]]
        if row["error"] == STOPPED:
            return
        if row["error"] is not None:
            if row["actor"] is not None and row["error"].startswith(f"{StorageError.__name__}:"):
                # The output has failed for longer than the retries last: more results would have nowhere to go.
                self.failure = row["error"]
                self.stop.request("the output cannot be written")
            if row["index"] < 0:
                self.statistics.unreadable[row["shard"]] = row["error"]
            else:
                self.statistics.failed_splits[f"{row['shard']} split {row['index']}"] = row["error"]
            return
        self.statistics.skip(progress.shard, row["skipped_rows"], row["shard_rows"])
        if row["num_splits"] is not None:
            progress.num_splits = row["num_splits"]
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
            self.markers.append(self.marker_writers.submit(self._mark, progress))

    def _mark(self, progress: _ShardProgress) -> None:
        splits = [
            committed or inspect_object(self.output, progress.shard.object(index))
            for index, committed in sorted(progress.splits.items())
        ]
        superseded = self.plan.superseded.get(progress.shard.key, [])
        marker = write_marker(self.output, progress.shard, splits, self.run_id, superseded)
        self.known_markers[progress.shard.marker] = marker
        self.statistics.add_shard(marker["quarantined"])

    def _verdict(self) -> tuple[str, int]:
        """How the run ended, and its exit code."""
        statistics, config = self.statistics, self.config
        failed = {split.rsplit(" split ", 1)[0] for split in statistics.failed_splits}
        accounted = failed | set(statistics.unreadable)
        vanished = [
            path for path, progress in self.progress.items() if not progress.is_complete and path not in accounted
        ]
        if self.failure:
            return f"failed: {self.failure}; run again to finish", EXIT_FAILED
        if vanished and not self.stop.reason:
            raise PipelineError(f"splits of {len(vanished)} shards never came back, of {vanished[0]} first; run again")
        if failed:
            return f"incomplete: {len(statistics.failed_splits)} splits failed; run again", EXIT_FAILED
        if vanished:
            return f"incomplete: stopped ({self.stop.reason}); run again to finish", EXIT_STOPPED
        if statistics.unreadable:
            return "complete but for unreadable shards", EXIT_BAD_INPUT
        if config.max_bad_rows is not None and statistics.quarantined > config.max_bad_rows:
            return f"complete, with more than {config.max_bad_rows} bad rows", EXIT_BAD_INPUT
        return ("complete" if self.plan.pending else "complete already: nothing to do"), EXIT_COMPLETE

    def _report_progress(self, done: threading.Event) -> None:
        while not done.wait(self.config.progress_interval or None):
            _say(self.statistics.progress_line())

    def _settings(self) -> dict[str, Any]:
        """What the report says of the run's conditions."""
        packages = ("ray", "torch", "transformers", "pyarrow", "s3fs")
        return {
            "input": self.config.input,
            "output": self.config.output,
            "model": {"uri": self.config.model, "digest": self.model.digest},
            "options": self.config.identity(),
            "expectation": self.expectation.as_dict() if self.expectation else None,
            "placement": self.placement.as_dict() if self.placement else None,
            "versions": {"python": sys.version.split()[0], **{name: version(name) for name in packages}},
        }


class _data_context:  # noqa: N801 - used as a function
    """Ray Data's settings for a run, put back afterwards: the context is the whole process's."""

    SETTINGS = {
        # Otherwise several splits are put into one block and one actor's task; nothing is cut by it.
        "target_max_block_size": 1,
        "enable_progress_bars": False,
        "print_on_execution_start": False,
        # Ray Data gives up when no block moves for half an hour; a split of a large model on few cores takes longer.
        "execution_no_progress_timeout_s": 24 * 3600,
    }

    def __init__(self, watch: StopWatch | None = None):
        self.watch = watch

    def __enter__(self) -> None:
        self.context = ray.data.DataContext.get_current()
        callbacks = [*self.context.custom_execution_callback_classes, EndWhenOver]
        settings = self.SETTINGS | {"custom_execution_callback_classes": callbacks}
        self.before = {name: getattr(self.context, name) for name in settings}
        for name, value in settings.items():
            setattr(self.context, name, value)
        self.token = EndWhenOver.watch.set(self.watch)

    def __exit__(self, *exception: object) -> None:
        EndWhenOver.watch.reset(self.token)
        for name, value in self.before.items():
            setattr(self.context, name, value)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
