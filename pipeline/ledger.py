"""The ledger of a run's processes: work in progress, how often it killed its process or hung, model loads, stops.

Ray retries a task without limit if its process dies, and does not report how often. So every stage enters its work
(reading a shard, scoring or writing a split) in the ledger before it begins, and removes it afterwards. If another
process begins work that is still entered, that work has killed the first process. After `DEATHS_BEFORE_CARE` deaths,
the documents are processed one at a time, each entered before it is processed. A document that then kills
`DEATHS_OF_A_DOCUMENT` times is quarantined. Both need several deaths, because pre-empted machines count as deaths too.

If work gives no sign of progress for too long, the driver kills its process. That is not a pre-emption, so the
documents are processed one at a time from then on, and a document at which the work hangs again is blamed at once. The
deaths are recorded in the output (`deaths.py`) until it is complete, so that the next run need not learn them again.

Halving the split until one document is left would take log2(documents) more deaths to find it; this takes two.
"""

import contextlib
import dataclasses
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cache
from typing import Any

from trbert_model.terminal import get_logger

from .processes import start_time, this_process

logger = get_logger(__name__)

DEATHS_BEFORE_CARE = 3
DEATHS_OF_A_DOCUMENT = 2
SCORING = "scoring"  # begins the name of work that does not access the storage
WHOLE = -1  # instead of a document: work on all of them together, such as decoding or writing
_ANSWER_SECONDS = 60.0  # enough for Ray to restart the ledger elsewhere if its machine died

KILLED = "killed_process"  # a reason for quarantine


class Stop(IntEnum):
    """What the driver asks the other processes to do."""

    NO = 0
    AFTER_SPLIT = 1  # begin no new work
    NOW = 2  # also abandon work in progress


@dataclass(frozen=True)
class Care:
    """How carefully to process some work.

    Attributes:
        deaths: how often it has killed its process.
        killers: the documents to blame for that, numbered as in `Entry.touch`. WHOLE is among them if the work kills
            its process although no single document does; then it cannot be done.
    """

    deaths: int = 0
    killers: frozenset[int] = frozenset()

    @property
    def one_at_a_time(self) -> bool:
        return self.deaths >= DEATHS_BEFORE_CARE


@dataclass(frozen=True)
class UnderWay:
    """How far the scoring of a split is.

    Attributes:
        shard: path of its shard.
        documents: its documents that were given to the model so far.
        share: the share of its shard's rows that these are.
        started: when it began, in seconds since the epoch.
    """

    shard: str
    documents: int
    share: float
    started: float


@dataclass
class _Work:
    process: str | None = None
    document: int | None = None
    deaths: int = 0
    deaths_at: Counter = field(default_factory=Counter)
    sign: float | None = None  # time.monotonic() of the last sign of progress; None while waiting for other stages
    point: int | None = None  # the operating point to score at, once a process has asked for it
    under_way: UnderWay | None = None


@dataclass(frozen=True)
class Loads:
    """The state of loading the model.

    Attributes:
        tries: attempts since the last successful one.
        reason: the reason of the last failure.
        for_good: whether that failure is permanent.
        idle: seconds since any work gave a sign of progress; None if no work is in progress.
    """

    tries: int = 0
    reason: str = ""
    for_good: bool = False
    idle: float | None = None


class Ledger:
    """The ledger itself; `start_ledger` runs it as a Ray actor.

    Args:
        known: deaths that an earlier run recorded, as `read_deaths` returns them.
    """

    def __init__(self, known: dict[str, Any] | None = None) -> None:
        self._work: dict[str, _Work] = {}
        for name, work in (known or {}).items():
            self._work[name] = _Work(deaths=work["deaths"], deaths_at=Counter(work["at"]))
        self._stop = Stop.NO
        self._point = 0
        self._deaths, self._hung = 0, 0
        self._loading: dict[str, float] = {}
        self._alive: dict[str, tuple[str, float]] = {}  # by actor: its process and when it last called `alive`
        self._loads = Loads()

    def begin(self, work: str, process: str) -> tuple[Care, Stop]:
        """Enter work that a process begins; it counts as a death if another process is still entered for it."""
        entry = self._work.setdefault(work, _Work())
        if entry.process not in (None, process):
            self._deaths += 1
            entry.deaths += 1
            if entry.document is not None:
                entry.deaths_at[entry.document] += 1
        entry.process, entry.document, entry.sign, entry.under_way = process, None, time.monotonic(), None
        killers = frozenset(d for d, deaths in entry.deaths_at.items() if deaths >= DEATHS_OF_A_DOCUMENT)
        return Care(entry.deaths, killers), self._stop

    def touch(self, work: str, process: str, document: int | None) -> None:
        """Enter the document that is processed next; None for none."""
        entry = self._work.get(work)
        if entry is not None and entry.process == process:
            entry.document, entry.sign = document, time.monotonic()

    def progress(self, work: str, process: str, waits: bool = False, under_way: UnderWay | None = None) -> Stop:
        """Record a sign of progress, or with `waits` that the work waits for other stages; returns when to stop."""
        entry = self._work.get(work)
        if entry is not None and entry.process == process:
            entry.sign = None if waits else time.monotonic()
            entry.under_way = under_way
        return self._stop

    def under_way(self) -> list[UnderWay]:
        """How far the scoring of the splits in progress is."""
        return [entry.under_way for entry in self._work.values() if entry.under_way is not None]

    def end(self, work: str, process: str) -> None:
        """Remove finished work, unless another process has begun it since."""
        entry = self._work.get(work)
        if entry is not None and entry.process == process:
            del self._work[work]

    def stop(self, how: Stop) -> None:
        self._stop = max(self._stop, how)

    def set_point(self, point: int) -> None:
        """Set the operating point of the splits that are begun from now on."""
        self._point = point

    def point(self, work: str) -> int:
        """The operating point to score a split at. It stays the same if its process dies and another begins it."""
        entry = self._work.get(work, _Work())  # a ledger that was started again does not know it
        if entry.point is None:
            entry.point = self._point
        return entry.point

    def overdue(self, seconds: float, storage_seconds: float) -> list[tuple[str, str]]:
        """Find work, model loads and actors without a sign of progress for `seconds`; blame the current documents.

        All but scoring may also wait for the storage, for `storage_seconds` more.

        Returns:
            What hangs, each thing once, and the process to kill.
        """
        now = time.monotonic()
        late = [process for process, at in self._loading.items() if now - at > seconds + storage_seconds]
        for process in late:
            del self._loading[process]
        hanging = [("loading the model", process) for process in late]
        silent = {actor for actor, (_, at) in self._alive.items() if now - at > seconds + storage_seconds}
        silent_processes = [self._alive.pop(actor)[0] for actor in silent]
        for name, entry in self._work.items():
            allowed = seconds if name.startswith(SCORING) else seconds + storage_seconds
            if entry.process is not None and entry.sign is not None and now - entry.sign > allowed:
                hanging.append((name, entry.process))
                entry.sign = None
                entry.deaths = max(entry.deaths, DEATHS_BEFORE_CARE - 1)  # `begin` counts one more
                if entry.document is not None:
                    entry.deaths_at[entry.document] += 1
        named = {process for _, process in hanging}
        hanging += [("an actor between two splits", process) for process in silent_processes if process not in named]
        self._hung += len(hanging)
        return hanging

    def alive(self, actor: str, process: str) -> None:
        """Record that an actor is alive, whether it has work or not.

        An actor that hangs between two splits has no work entered, and Ray would wait for it forever.
        """
        self._alive[actor] = (process, time.monotonic())

    def deaths(self) -> tuple[int, int, dict[str, Any]]:
        """How many processes died at their work, how many hung, and the deaths of unfinished work, as in `known`.

        A death counts when another process begins the work. What hung counts when `overdue` finds it: processes at
        their work, which also count as deaths once that work begins again, and processes that were loading the model or
        were between two splits, which do not.
        """
        killing = {name: work for name, work in self._work.items() if work.deaths}
        known = {name: {"deaths": work.deaths, "at": dict(work.deaths_at)} for name, work in killing.items()}
        return self._deaths, self._hung, known

    def begin_load(self, process: str) -> None:
        """Record that an actor begins to load the model."""
        self._loading[process] = time.monotonic()
        self._loads = dataclasses.replace(self._loads, tries=self._loads.tries + 1)

    def load_failed(self, process: str, reason: str, for_good: bool) -> None:
        """Record why an actor could not load the model."""
        self._loading.pop(process, None)
        if not self._loads.for_good:
            self._loads = dataclasses.replace(self._loads, reason=reason, for_good=for_good)

    def loaded(self, process: str) -> None:
        """Record that an actor has loaded the model."""
        self._loading.pop(process, None)
        self._loads = dataclasses.replace(self._loads, tries=0)

    def loads(self) -> Loads:
        now = time.monotonic()
        signs = [now - entry.sign for entry in self._work.values() if entry.sign is not None and entry.process]
        return dataclasses.replace(self._loads, idle=min(signs, default=None))


def start_ledger(known: dict[str, Any] | None = None) -> "LedgerClient":
    """Start a ledger for one run, on the driver's node if possible; it ends with the driver.

    If it dies, Ray starts it again from `known`.
    """
    import ray  # here and below: commands that only read an output do without it
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    driver = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=driver)(Ledger)
    return LedgerClient(actor.remote(known))


@cache
def process_name() -> str:
    """A name of this process that is unique even if its PID is reused: "node:pid:start:name"."""
    import ray

    process, node = this_process(), ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
    return f"{node}:{process['pid']}:{process['started']}:{process['name']}"


def kill_process(name: str) -> None:
    """Kill the process with this `process_name` on its node, unless it has died."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    node, pid, started, _ = name.split(":")
    if not node:
        return

    def kill() -> None:
        if str(start_time(int(pid))) == started:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    on_its_node = NodeAffinitySchedulingStrategy(node, soft=False)
    ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=on_its_node)(kill).remote()


class LedgerClient:
    """A process's client of the ledger. Without an actor (no Ray), it does nothing.

    If the ledger does not answer, the process goes on without it: documents that kill a process are rare.
    """

    def __init__(self, actor: Any = None):
        self._actor = actor

    @contextlib.contextmanager
    def work(self, name: str) -> Iterator["Entry"]:
        """Enter work while the block runs; it stays entered if the process dies."""
        care, stop = self._ask("begin", name, process_name()) or (Care(), Stop.NO)
        try:
            yield Entry(self, name, care, stop)
        finally:
            # No need to wait: the actor handles this before the next process begins the same work.
            self.tell("end", name, process_name())

    def stop(self, how: Stop) -> None:
        self._ask("stop", how)

    def set_point(self, point: int) -> None:
        self.tell("set_point", point)

    def deaths(self) -> tuple[int, int, dict[str, Any]] | None:
        return self._ask("deaths")

    def under_way(self) -> list[UnderWay]:
        return self._ask("under_way") or []

    def overdue(self, seconds: float, storage_seconds: float) -> list[tuple[str, str]]:
        return self._ask("overdue", seconds, storage_seconds) or []

    def begin_load(self) -> None:
        self._ask("begin_load", process_name())

    def load_failed(self, error: BaseException, for_good: bool = False) -> None:
        reason = f"on {socket.gethostname()}: {type(error).__name__}: {error}"
        self._ask("load_failed", process_name(), reason, for_good)

    def loaded(self) -> None:
        self._ask("loaded", process_name())

    def loads(self) -> Loads:
        return self._ask("loads") or Loads()

    def tell(self, method: str, *arguments: Any) -> None:
        """Call a method without waiting for the result; the actor handles this process's later calls after it."""
        if self._actor is not None:
            getattr(self._actor, method).remote(*arguments)

    def _ask(self, method: str, *arguments: Any) -> Any:
        if self._actor is None:
            return None
        import ray
        from ray.exceptions import RayError

        try:
            return ray.get(getattr(self._actor, method).remote(*arguments), timeout=_ANSWER_SECONDS)
        except RayError as error:
            logger.warning("the run's ledger does not answer (%s); going on without it", type(error).__name__)
            return None


NO_LEDGER = LedgerClient()


@dataclass(frozen=True)
class Entry:
    """Work that is entered in the ledger.

    Attributes:
        care: how carefully to process it.
        stop: whether not to begin it, because the run is stopping.
    """

    client: LedgerClient
    name: str
    care: Care = Care()
    stop: Stop = Stop.NO

    def touch(self, document: int | None) -> None:
        """Enter the document that is processed next (None for none), if they are processed one at a time.

        Returns when the ledger has it. Documents may be numbered in any way that is the same in a retry.
        """
        if self.care.one_at_a_time:
            self.client._ask("touch", self.name, process_name(), document)

    def point(self) -> int:
        """The operating point to score the split at; the run's first one if the ledger does not answer."""
        return self.client._ask("point", self.name) or 0

    def stopping(self, under_way: UnderWay | None = None) -> Stop:
        """Give a sign of progress; returns when to stop."""
        return self.client._ask("progress", self.name, process_name(), False, under_way) or Stop.NO

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Mark the work as waiting for other stages while the block runs, so that it is never overdue."""
        self.client.tell("progress", self.name, process_name(), True)
        try:
            yield
        finally:
            self.client.tell("progress", self.name, process_name())
