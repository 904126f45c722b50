"""The Ray Data pipeline of a run, from shards to committed splits, and its supervision while it runs."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import ray
import ray.data

from trbert_model.terminal import get_logger, printable

from .commit import publish_splits
from .corpus import Shard
from .deaths import read_deaths, write_deaths
from .encode import read_shards, shard_groups
from .errors import PipelineError
from .finish_by import FinishBy
from .job import Job
from .ledger import kill_process, start_ledger
from .placement import Placement
from .predict import SplitPredictor
from .ray_internals import OverError
from .ray_start import data_context
from .report import Progress, RunStatistics
from .stopping import StopRequest
from .watch import LOOK_SECONDS, StopWatch

logger = get_logger(__name__)

# Ray Data fuses neighbouring stages that request the same resources. Reading would then run inside the actors, with
# 340 ms of idle GPU between splits. So each stage requests a different share; those of actors are in `placement.py`.
READER_CPUS = 0.5
COMMIT_CPUS = 0.25


@dataclass(frozen=True)
class Patience:
    """When a run gives up.

    Attributes:
        loads_an_actor: attempts per actor to load the model, none of them successful, before the run gives up.
        idle_seconds: seconds that all work must be idle as well, since progress means that an actor has the model.
        look_seconds: seconds between two checks.
    """

    loads_an_actor: int = 4
    idle_seconds: float = 120.0
    look_seconds: float = LOOK_SECONDS


class Stream:
    """The pipeline of a job over its pending shards.

    Args:
        observe: called periodically with the run's progress.

    Attributes:
        failure: why the run cannot go on; None if it can.
    """

    def __init__(
        self,
        job: Job,
        placement: Placement,
        statistics: RunStatistics,
        patience: Patience = Patience(),
        finish_by: FinishBy | None = None,
        observe: Callable[[Progress], None] = lambda progress: None,
    ):
        self.job, self.placement, self.statistics, self.patience = job, placement, statistics, patience
        self.finish_by, self._observe = finish_by, observe
        self.failure: str | None = None
        self._deaths = read_deaths(job.output)
        self._ledger = start_ledger(self._deaths)

    def run(self, pending: list[tuple[Shard, frozenset[int]]], take: Callable[[dict], None], stop: StopRequest) -> None:
        """Run the pipeline and pass each row to `take`, until all are done or a stopped run's time is over."""
        if self.finish_by is not None:
            say(self.finish_by.line(self.finish_by.control.choices[0]))
            self._steer(self.finish_by)
        done = threading.Event()
        reporter = threading.Thread(target=self._report_progress, args=(done,), daemon=True)
        reporter.start()
        try:
            with (
                StopWatch(stop, self._ledger, say, self._look, look_seconds=self.patience.look_seconds) as watch,
                data_context(lambda: watch.is_over),
                contextlib.closing(self._rows(pending)) as rows,
            ):
                try:
                    for row in rows:
                        take(row)
                except OverError as error:
                    logger.debug("%r", error)  # the reason was shown; the run's status says what is missing
        finally:
            done.set()
            reporter.join()
        self._keep_deaths()

    def _rows(self, pending: list[tuple[Shard, frozenset[int]]]) -> Generator[dict[str, Any], None, None]:
        """Yield the rows that leave the pipeline. Closing the generator ends the pipeline."""
        for table in self.dataset(pending).iter_batches(batch_size=None, prefetch_batches=0, batch_format="pyarrow"):
            yield from table.to_pylist()

    def dataset(self, pending: list[tuple[Shard, frozenset[int]]]) -> ray.data.Dataset:
        """Build the Ray Data pipeline without starting it."""
        job, placement, ledger = self.job, self.placement, self._ledger
        groups = shard_groups(pending)
        return (
            ray.data.from_items(groups, override_num_blocks=len(groups))
            .map_batches(
                read_shards,
                batch_size=1,
                batch_format="pyarrow",
                num_cpus=READER_CPUS,
                fn_kwargs={"options": job.encode_options(len(pending)), "ledger": ledger},
            )
            .map_batches(
                SplitPredictor,
                batch_size=1,
                batch_format="pyarrow",
                num_cpus=placement.cpus_per_actor,
                num_gpus=placement.gpus_per_actor or None,
                # With one task in flight an actor idled 500 ms between splits, with two 10 ms.
                compute=ray.data.ActorPoolStrategy(size=placement.num_actors, max_tasks_in_flight_per_actor=2),
                fn_constructor_kwargs=job.predictor_arguments(placement) | {"ledger": ledger},
            )
            .map_batches(
                publish_splits,
                batch_size=1,
                batch_format="pyarrow",
                num_cpus=COMMIT_CPUS,
                fn_kwargs={"output": job.output, "ledger": ledger, "identity_key": job.identity_key},
            )
        )

    def _look(self) -> str | None:
        """Store known deaths, report progress, steer the speed, kill hung processes; returns why the run cannot go on.

        Called periodically.
        """
        self._keep_deaths()
        self._observe(self.statistics.progress(self._ledger.under_way()))
        if self.finish_by is not None:
            self._steer(self.finish_by)
        config, patience = self.job.config, self.patience
        if timeout := config.document_timeout:
            for work, process in self._ledger.overdue(timeout, config.storage_retry_seconds):
                say(f"{work} has given no sign of progress for {timeout:g} s or more: ending its process")
                kill_process(process)
        loads = self._ledger.loads()
        if loads.for_good:
            self.failure = f"the model changed during the run ({loads.reason})"
        elif loads.tries > patience.loads_an_actor * self.placement.num_actors and not (
            loads.idle is not None and loads.idle < patience.idle_seconds
        ):
            self.failure = f"no actor can load the model ({loads.reason or 'they die while they do'})"
        return self.failure

    def _steer(self, finish_by: FinishBy) -> None:
        """Choose the operating point of the splits that are begun next."""
        under_way, control = self._ledger.under_way(), finish_by.control
        left, actors = self.statistics.bytes_left(under_way), self.placement.num_actors
        if choice := control.steer(time.time(), left, len(under_way), actors):
            say(finish_by.line(choice))
        self._ledger.set_point(control.point)  # each time, since the ledger may have been started again

    def _keep_deaths(self) -> None:
        recorded = self._ledger.deaths()
        if recorded is None:
            return
        self.statistics.deaths, self.statistics.hung, known = recorded
        if known != self._deaths:
            self._deaths = known
            try:
                write_deaths(self.job.output, known)
            except PipelineError as error:
                logger.warning("what is known of deaths is not kept: %s", error)

    def _report_progress(self, done: threading.Event) -> None:
        while not done.wait(self.job.config.progress_interval or None):
            line = self.statistics.progress_line(self._ledger.under_way())
            say(line if self.finish_by is None else f"{line} · {self.finish_by.shown()}")


def say(line: str) -> None:
    """Print a line for the user to stderr."""
    print(printable(line), file=sys.stderr, flush=True)
