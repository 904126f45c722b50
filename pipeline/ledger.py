"""What a run's processes tell each other: which work is under way where, how often it has killed or hung, whether
actors can load the model, when to stop.

Ray computes a killed task again, for ever, and tells nobody how often. So every stage enters its work (a shard being
read, a split being scored or written) here before it begins and crosses it out afterwards; work that another process
has left entered has killed that process. After `DEATHS_BEFORE_CARE` deaths its documents are taken one at a time, each
entered before it is touched, and a document that then kills `DEATHS_OF_A_DOCUMENT` times is put aside. Pre-empted
machines count as well, which is why care comes late and blame needs a repetition.

Work that gives no sign of progress for too long is ended by the driver, which kills its process; that is no
pre-emption, so care comes at once and one more time is blame enough. What is known of deaths is kept in the output
(`deaths.py`) until it is complete, so that a run that goes on where another one ended need not learn it again.

Halving the split until one document is left would find it too, after log2(documents) more deaths; this takes two.
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

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from trbert_model.terminal import get_logger

from .processes import start_time, this_process

logger = get_logger(__name__)

DEATHS_BEFORE_CARE = 3
DEATHS_OF_A_DOCUMENT = 2
SCORING = "scoring"  # what work is called that needs no storage
WHOLE = -1  # in a document's place: what is done for all of them together, such as decoding or writing
_ANSWER_SECONDS = 60.0  # a ledger whose machine died is started again elsewhere

KILLED = "killed_process"  # the quarantine's reason


class Stop(IntEnum):
    """What the driver asks of the others."""

    NO = 0
    AFTER_SPLIT = 1  # begin nothing new
    NOW = 2  # abandon what is under way, too


@dataclass(frozen=True)
class Care:
    """How to go about some work: how often it has killed, and the documents that are to blame for it.

    `killers` has WHOLE in it where the work kills although none of its documents does; then it cannot be done.
    """

    deaths: int = 0
    killers: frozenset[int] = frozenset()

    @property
    def one_at_a_time(self) -> bool:
        return self.deaths >= DEATHS_BEFORE_CARE


@dataclass
class _Work:
    process: str | None = None
    document: int | None = None
    deaths: int = 0
    deaths_at: Counter = field(default_factory=Counter)
    sign: float | None = None  # time.monotonic() of the last sign of progress; None while it waits for others


@dataclass(frozen=True)
class Loads:
    """How loading the model goes: tries since the last that succeeded, the last failure's reason, whether that was for
    good, and the seconds since any work gave a sign of progress (None: there is none)."""

    tries: int = 0
    reason: str = ""
    for_good: bool = False
    idle: float | None = None


class Ledger:
    """The book itself; `start_ledger` runs it as an actor of its own.

    known: what an earlier run has left, see `deaths.py`.
    """

    def __init__(self, known: dict[str, Any] | None = None) -> None:
        self._work: dict[str, _Work] = {}
        for name, work in (known or {}).items():
            self._work[name] = _Work(deaths=work["deaths"], deaths_at=Counter(work["at"]))
        self._stop = Stop.NO
        self._deaths, self._hung = 0, 0
        self._loading: dict[str, float] = {}
        self._alive: dict[str, tuple[str, float]] = {}  # by actor: its process and the last time it said so
        self._loads = Loads()

    def begin(self, work: str, process: str) -> tuple[Care, Stop]:
        """Enter work that a process begins."""
        entry = self._work.setdefault(work, _Work())
        if entry.process not in (None, process):
            self._deaths += 1
            entry.deaths += 1
            if entry.document is not None:
                entry.deaths_at[entry.document] += 1
        entry.process, entry.document, entry.sign = process, None, time.monotonic()
        killers = frozenset(d for d, deaths in entry.deaths_at.items() if deaths >= DEATHS_OF_A_DOCUMENT)
        return Care(entry.deaths, killers), self._stop

    def touch(self, work: str, process: str, document: int | None) -> None:
        """Say which document comes now; None for none."""
        entry = self._work.get(work)
        if entry is not None and entry.process == process:
            entry.document, entry.sign = document, time.monotonic()

    def progress(self, work: str, process: str, waits: bool = False) -> Stop:
        """Give a sign of progress, or say that from now on the work waits for others; when to stop."""
        entry = self._work.get(work)
        if entry is not None and entry.process == process:
            entry.sign = None if waits else time.monotonic()
        return self._stop

    def end(self, work: str, process: str) -> None:
        """Cross finished work out; a process that was thought dead has no say in what another has begun since."""
        entry = self._work.get(work)
        if entry is not None and entry.process == process:
            del self._work[work]

    def stop(self, how: Stop) -> None:
        self._stop = max(self._stop, how)

    def overdue(self, seconds: float, storage_seconds: float) -> list[tuple[str, str]]:
        """Work that has given no sign of progress for so long, with its process: each once, to be killed, and what it
        is at is blamed. Whatever is not scoring may wait for the storage as well, for `storage_seconds`."""
        now = time.monotonic()
        late = [process for process, at in self._loading.items() if now - at > seconds + storage_seconds]
        for process in late:
            del self._loading[process]
        found = [("loading the model", process) for process in late]
        silent = {actor for actor, (_, at) in self._alive.items() if now - at > seconds + storage_seconds}
        silent_processes = [self._alive.pop(actor)[0] for actor in silent]
        for name, entry in self._work.items():
            allowed = seconds if name.startswith(SCORING) else seconds + storage_seconds
            if entry.process is not None and entry.sign is not None and now - entry.sign > allowed:
                found.append((name, entry.process))
                entry.sign = None
                entry.deaths = max(entry.deaths, DEATHS_BEFORE_CARE - 1)  # and one that the next to begin it counts
                if entry.document is not None:
                    entry.deaths_at[entry.document] += 1
        named = {process for _, process in found}
        found += [("an actor between two splits", process) for process in silent_processes if process not in named]
        self._hung += len(found)
        return found

    def alive(self, actor: str, process: str) -> None:
        """Say that an actor is there, whatever it is at: one that stands still between two splits has entered no work,
        and Ray would wait for it without end."""
        self._alive[actor] = (process, time.monotonic())

    def deaths(self) -> tuple[int, int, dict[str, Any]]:
        """Processes that died at their work so far, how many of them had hung, and what is known of unfinished work
        that has killed, as `known`."""
        killing = {name: work for name, work in self._work.items() if work.deaths}
        known = {name: {"deaths": work.deaths, "at": dict(work.deaths_at)} for name, work in killing.items()}
        return self._deaths, self._hung, known

    def begin_load(self, process: str) -> None:
        """Enter that an actor begins to load the model."""
        self._loading[process] = time.monotonic()
        self._loads = dataclasses.replace(self._loads, tries=self._loads.tries + 1)

    def load_failed(self, process: str, reason: str, for_good: bool) -> None:
        """Enter why an actor could not."""
        self._loading.pop(process, None)
        if not self._loads.for_good:
            self._loads = dataclasses.replace(self._loads, reason=reason, for_good=for_good)

    def loaded(self, process: str) -> None:
        """Enter that an actor has the model."""
        self._loading.pop(process, None)
        self._loads = dataclasses.replace(self._loads, tries=0)

    def loads(self) -> Loads:
        now = time.monotonic()
        signs = [now - entry.sign for entry in self._work.values() if entry.sign is not None and entry.process]
        return dataclasses.replace(self._loads, idle=min(signs, default=None))


def start_ledger(known: dict[str, Any] | None = None) -> "LedgerClient":
    """A ledger for one run, next to the driver, which it does not outlive. If it dies it begins anew, at `known`."""
    driver = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=driver)(Ledger)
    return LedgerClient(actor.remote(known))


@cache
def process_name() -> str:
    """This process, also among those that had its number before: "node:number:start:name"."""
    process, node = this_process(), ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
    return f"{node}:{process['pid']}:{process['started']}:{process['name']}"


def kill_process(name: str) -> None:
    """Kill the process of that name, on its machine, unless it is gone."""
    node, pid, started, _ = name.split(":")
    if not node:
        return

    def kill() -> None:
        if str(start_time(int(pid))) == started:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    there = NodeAffinitySchedulingStrategy(node, soft=False)
    ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(kill).remote()


class LedgerClient:
    """A stage's way to the ledger. Without one (in this process, without Ray) nothing is entered.

    A ledger that does not answer delays nobody for long: it protects from documents that kill, and they are rare.
    """

    def __init__(self, actor: Any = None):
        self._actor = actor

    @contextlib.contextmanager
    def work(self, name: str) -> Iterator["Entry"]:
        """Enter work for as long as the block runs, unless the process dies in it."""
        care, stop = self._ask("begin", name, process_name()) or (Care(), Stop.NO)
        try:
            yield Entry(self, name, care, stop)
        finally:
            # Nobody waits for this: the next to begin the same work comes after it, in the actor's order.
            self.tell("end", name, process_name())

    def stop(self, how: Stop) -> None:
        self._ask("stop", how)

    def deaths(self) -> tuple[int, int, dict[str, Any]] | None:
        return self._ask("deaths")

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
        """Say something without waiting for the answer: what this process says next comes after it."""
        if self._actor is not None:
            getattr(self._actor, method).remote(*arguments)

    def _ask(self, method: str, *arguments: Any) -> Any:
        if self._actor is None:
            return None
        try:
            return ray.get(getattr(self._actor, method).remote(*arguments), timeout=_ANSWER_SECONDS)
        except RayError as error:
            logger.warning("the run's ledger does not answer (%s); going on without it", type(error).__name__)
            return None


NO_LEDGER = LedgerClient()


@dataclass(frozen=True)
class Entry:
    """Work that is entered: with what care to do it, and whether to do it at all."""

    client: LedgerClient
    name: str
    care: Care = Care()
    stop: Stop = Stop.NO

    def touch(self, document: int | None) -> None:
        """Before a document is touched (None: nothing is, for a while), where care is due; the ledger has it then."""
        if self.care.one_at_a_time:
            self.client._ask("touch", self.name, process_name(), document)

    def stopping(self) -> Stop:
        """A sign of progress; answered with when to stop."""
        return self.client._ask("progress", self.name, process_name()) or Stop.NO

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """In the block the work waits for others, for however long."""
        self.client.tell("progress", self.name, process_name(), True)
        try:
            yield
        finally:
            self.client.tell("progress", self.name, process_name())
