"""What a run's processes tell each other: which work is under way where, how often it has killed, whether actors can
load the model, when to stop.

Ray computes a killed task again, for ever, and tells nobody how often. So every stage enters its work (a shard being
read, a split being scored or written) here before it begins and crosses it out afterwards; work that another process
has left entered has killed that process. After `DEATHS_BEFORE_CARE` deaths its documents are taken one at a time, each
entered before it is touched, and a document that then kills `DEATHS_OF_A_DOCUMENT` times is put aside. Pre-empted
machines count as well, which is why care comes late and blame needs a repetition.

Halving the split until one document is left would find it too, after log2(documents) more deaths; this takes two.
"""

import contextlib
import logging
import os
import socket
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

logger = logging.getLogger(__name__)

DEATHS_BEFORE_CARE = 3
DEATHS_OF_A_DOCUMENT = 2
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


class Ledger:
    """The book itself; `start_ledger` runs it as an actor of its own."""

    def __init__(self) -> None:
        self._work: dict[str, _Work] = {}
        self._stop = Stop.NO
        self._deaths = 0
        self._loads, self._load_failure = 0, ""

    def begin(self, work: str, process: str) -> tuple[Care, Stop]:
        """Enter work that a process begins."""
        entry = self._work.setdefault(work, _Work())
        if entry.process not in (None, process):
            self._deaths += 1
            entry.deaths += 1
            if entry.document is not None:
                entry.deaths_at[entry.document] += 1
        entry.process, entry.document = process, None
        killers = frozenset(d for d, deaths in entry.deaths_at.items() if deaths >= DEATHS_OF_A_DOCUMENT)
        return Care(entry.deaths, killers), self._stop

    def touch(self, work: str, process: str, document: int | None) -> None:
        """Say which document comes now; None for none."""
        entry = self._work.get(work)
        if entry is not None and entry.process == process:
            entry.document = document

    def end(self, work: str, process: str) -> None:
        """Cross finished work out; a process that was thought dead has no say in what another has begun since."""
        entry = self._work.get(work)
        if entry is not None and entry.process == process:
            del self._work[work]

    def stop(self, how: Stop) -> None:
        self._stop = max(self._stop, how)

    def stopping(self) -> Stop:
        return self._stop

    def deaths(self) -> int:
        """Processes that died at their work, so far."""
        return self._deaths

    def begin_load(self) -> None:
        """Enter that an actor begins to load the model."""
        self._loads += 1

    def load_failed(self, reason: str) -> None:
        """Enter why an actor could not."""
        self._load_failure = reason

    def loads(self) -> tuple[int, str]:
        """How often loading the model was begun, and what the last failure was."""
        return self._loads, self._load_failure


def start_ledger() -> "LedgerClient":
    """A ledger for one run, next to the driver, which it does not outlive. If it dies it begins anew, at no deaths."""
    driver = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=driver)(Ledger)
    return LedgerClient(actor.remote())


_PROCESS = ""


def process_name() -> str:
    """This process, also among those that had its number before."""
    global _PROCESS
    if not _PROCESS:
        _PROCESS = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex}"
    return _PROCESS


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
            if self._actor is not None:
                self._actor.end.remote(name, process_name())

    def stop(self, how: Stop) -> None:
        self._ask("stop", how)

    def stopping(self) -> Stop:
        return self._ask("stopping") or Stop.NO

    def deaths(self) -> int:
        return self._ask("deaths") or 0

    def begin_load(self) -> None:
        self._ask("begin_load")

    def load_failed(self, error: Exception) -> None:
        self._ask("load_failed", f"on {socket.gethostname()}: {type(error).__name__}: {error}")

    def loads(self) -> tuple[int, str]:
        return self._ask("loads") or (0, "")

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
