"""An episode: one run of `jobs/score.py` into a fresh output, faults at random moments, reruns until it is complete."""

import contextlib
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from tests.chaos.cluster import ACTOR, READER, ROOT, RayCluster
from tests.chaos.corpus import SPLIT_BYTES, make_corpus, put_corpus, put_model
from tests.chaos.fault_proxy import KINDS as REQUEST_KINDS
from tests.chaos.fault_proxy import FaultProxy
from tests.chaos.protocol_faults import FAULTS as PROTOCOL_FAULTS
from tests.chaos.verification import (
    SUCCESS,
    Contents,
    Findings,
    only_results,
    read_prefix,
    result_keys,
    top_names,
    verify,
)
from tests.integration.s3_server import S3Server

PROCESS_KINDS = ("kill_actor", "kill_reader", "kill_raylet", "kill_driver", "kill_cluster")
PROTOCOL_KINDS = tuple(PROTOCOL_FAULTS)
WINDOW_KINDS = (*REQUEST_KINDS, "mix")  # a share of the requests for some seconds
KINDS = (*PROCESS_KINDS, "s3_outage", *PROTOCOL_KINDS, *WINDOW_KINDS)

BUCKET, CORPUS, MODEL, REFERENCE = "chaos", "corpus", "model", "reference"
DOCUMENT_TIMEOUT = 20.0  # an actor that hangs is ended after this
MAX_RUNS = 13  # the first and 12 reruns
HUNG_SECONDS = 300.0  # without anything new in the output
POLL_SECONDS = 0.25
WINDOW_LEAST_SECONDS = 4.0  # that a window lasts before the next one may end it
RESTART_SECONDS = 180.0  # at most, of the server: 20 on an idle machine
VICTIMS = {"kill_actor": ACTOR, "kill_reader": READER}
# When faults may strike: (shares of all splits, seconds after that). Later ones often come too late, and readers of so
# small splits are done soon.
STRIKE, READER_STRIKE = ((0.03, 0.85), (0.0, 1.0)), ((0.0, 0.2), (0.0, 5.0))


@dataclass(frozen=True)
class Fault:
    """What strikes when: `delay` seconds after a share `after` of all splits' results has appeared, and a process to
    kill has."""

    kind: str
    after: float
    delay: float = 0.0
    seconds: float = 0.0  # that an outage or a window of request faults lasts
    share: float = 0.0  # of the requests in such a window


@dataclass(frozen=True)
class Episode:
    number: int
    faults: tuple[Fault, ...]
    seed: str = ""  # of what is chosen while it runs: victims


@dataclass
class Strike:
    """A fault that was injected. Seconds count from the episode's start, `recovery` from the strike."""

    kind: str
    at: float
    results: int  # that were there
    recovery: float | None = None  # to the next new results object; None: there were none to come
    reruns: int = 0
    requests: dict[str, int] = field(default_factory=dict)  # that a window has hit, by kind

    @property
    def has_hit(self) -> bool:
        """A window in whose time no request came is no fault."""
        return self.kind not in WINDOW_KINDS or bool(self.requests)


@dataclass
class Outcome:
    number: int
    strikes: list[Strike] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)  # faults that were not injected: no victim, or the run was over
    exits: list[int] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)  # exits that no fault explains
    hung: list[str] = field(default_factory=list)
    findings: Findings = field(default_factory=Findings)
    seconds: float = 0.0

    @property
    def is_clean(self) -> bool:
        return not (self.findings or self.hung or self.unexpected)


def plan(
    seed: int, kinds: Sequence[str] = KINDS, *, outage_seconds: float = 30.0, window_seconds: float = 10.0
) -> Iterator[Episode]:
    """Episodes without end, the same for the same arguments. Kinds are dealt from shuffled decks, so they come equally
    often."""
    deck: list[str] = []
    number = 0
    while True:
        number += 1
        generator = random.Random(f"{seed}:{number}")
        faults = []
        for _ in range(generator.randint(4, 6)):
            if not deck:
                deck = generator.sample(kinds, len(kinds))
            faults.append(_make_fault(deck.pop(), generator, outage_seconds, window_seconds))
        faults.sort(key=lambda fault: fault.after)
        yield Episode(number, tuple(faults), f"{seed}:{number}")


def _make_fault(kind: str, generator: random.Random, outage_seconds: float, window_seconds: float) -> Fault:
    shares, seconds = READER_STRIKE if kind == "kill_reader" else STRIKE
    after, delay = generator.uniform(*shares), generator.uniform(*seconds)
    share = generator.uniform(0.05, 0.2)
    if kind == "s3_outage":
        return Fault(kind, after, delay, seconds=outage_seconds)
    if kind in WINDOW_KINDS:
        return Fault(kind, after, delay, seconds=window_seconds, share=share)
    return Fault(kind, after, delay)


class World:
    """What episodes happen in: the server, the proxy before it, the cluster, the corpus and what its results must be.

    Args:
        directory: for logs and the tiny model.
        splits: about how many the corpus is cut into.
        cpus: of each of the cluster's nodes.
        command: what Python runs as the driver.
    """

    def __init__(
        self,
        server: S3Server,
        directory: Path,
        *,
        splits: int = 100,
        cpus: int = 2,
        seed: int = 0,
        command: Sequence[str] = ("jobs/score.py",),
    ):
        self.server, self.directory, self.command = server, directory, command
        server.bucket(BUCKET)
        shards = make_corpus(splits, seed)
        self.rows = {path: table.num_rows for path, table in shards.items()}
        put_corpus(server, BUCKET, CORPUS, shards)
        put_model(server, BUCKET, MODEL, directory / "model")
        self.proxy = FaultProxy(server.endpoint, seed)
        self.environment = {
            **server.environment,
            "AWS_ENDPOINT_URL": self.proxy.endpoint,
            "XDG_CACHE_HOME": str(directory / "cache"),
        }
        self.reference = Contents()
        try:
            self.cluster = RayCluster(self.environment, cpus)
        except BaseException:
            self.proxy.stop()
            raise

    def close(self) -> None:
        self.cluster.close()
        self.proxy.stop()

    def make_reference(self) -> Findings:
        """One undisturbed run; what is wrong with it."""
        log = self.directory / "reference.log"
        driver = self.start_driver(REFERENCE, log)
        try:
            driver.wait(HUNG_SECONDS)
        except subprocess.TimeoutExpired:
            _dump_stacks(driver.pid, log.with_suffix(".stacks"))
        finally:
            kill_group(driver)
        if driver.returncode != 0:
            raise RuntimeError(f"the undisturbed run ended with {driver.returncode}:\n{tail(log)}")
        self.reference = read_prefix(self.server, BUCKET, REFERENCE)
        return verify(self.server, BUCKET, REFERENCE, self.rows, self.reference)

    @property
    def num_splits(self) -> int:
        return len(only_results(set(self.reference.objects)))

    def start_driver(self, prefix: str, log: Path) -> subprocess.Popen:
        """`jobs/score.py` against the cluster, in a process group of its own."""
        options = {
            "input": f"s3://{BUCKET}/{CORPUS}",
            "output": f"s3://{BUCKET}/{prefix}",
            "model": f"s3://{BUCKET}/{MODEL}",
            "id-column": "id",
            "keep-columns": "source",
            "split-bytes": SPLIT_BYTES,
            "num-actors": 2,
            "threads-per-actor": 1,
            "progress-interval": 1,
            "document-timeout": DOCUMENT_TIMEOUT,
        }
        arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        with log.open("wb") as file:
            return subprocess.Popen(
                [sys.executable, *self.command, *arguments],
                cwd=ROOT,
                env={**os.environ, **self.environment, **self.cluster.driver_environment},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )


class EpisodeRun:
    """One episode's course.

    Args:
        hung_seconds: without anything new in the output, after which a run counts as hung.
        put_delay: seconds that every write takes, so that a fast machine is not at the end before all faults are due.
        most_seconds: after which no run is started any more.
    """

    def __init__(
        self,
        world: World,
        episode: Episode,
        *,
        hung_seconds: float = HUNG_SECONDS,
        put_delay: float = 0.0,
        most_seconds: float = math.inf,
    ):
        self.world, self.episode, self.hung_seconds, self.put_delay = world, episode, hung_seconds, put_delay
        self.most_seconds = most_seconds
        self.bucket, self.model, self.prefix = BUCKET, MODEL, f"episode-{episode.number:04d}"
        self.others = 0  # runs beside those that follow each other
        self.random = random.Random(episode.seed)
        self.outcome = Outcome(episode.number)
        self.todo: dict[Fault, float | None] = dict.fromkeys(episode.faults)  # with when they are due, once known
        self.started = time.monotonic()
        self.window: Window | None = None
        self.results: set[str] = set()
        self.early_success = ""
        self.progressed = self.started

    def execute(self) -> Outcome:
        outcome, world = self.outcome, self.world
        world.proxy.put_delay = self.put_delay
        try:
            for number in range(1, MAX_RUNS + 1):
                if self._run(number) == 0:
                    break
                if number == MAX_RUNS or time.monotonic() - self.started > self.most_seconds:
                    outcome.hung.append(f"not complete after {number} runs, {time.monotonic() - self.started:.0f} s")
                    break
        finally:
            self._close_window()
            world.proxy.put_delay = 0.0
        outcome.missed += [fault.kind for fault in self.todo]
        outcome.missed += [strike.kind for strike in outcome.strikes if not strike.has_hit]
        outcome.strikes = [strike for strike in outcome.strikes if strike.has_hit]
        outcome.findings = verify(world.server, BUCKET, self.prefix, world.rows, world.reference)
        outcome.findings.wrong += [self.early_success] if self.early_success else []
        outcome.seconds = time.monotonic() - self.started
        return outcome

    def _log(self, number: int) -> Path:
        return self.world.directory / f"{self.prefix}-run-{number}.log"

    def _run(self, number: int) -> int:
        """Start the driver and strike while it runs; its exit code."""
        outcome, before = self.outcome, len(self.outcome.strikes)
        open_windows = [self.window.strike] if self.window and self.window.is_open else []
        driver = self.world.start_driver(self.prefix, self._log(number))
        self.progressed = time.monotonic()
        hung = False
        try:
            while driver.poll() is None and not hung:
                self._look()
                if due := next(filter(self._is_due, self.todo), None):
                    self._strike(due, driver)
                hung = time.monotonic() - self.progressed > self.hung_seconds
                time.sleep(POLL_SECONDS)
            if hung:
                stacks = self._log(number).with_suffix(".stacks")
                _dump_stacks(driver.pid, stacks)
                outcome.hung.append(f"run {number}: nothing new for {self.hung_seconds:.0f} s; see {stacks.name}")
        finally:
            kill_group(driver)
        code = driver.wait()
        outcome.exits.append(code)
        self._look()
        if code and not hung:
            if hits := [strike for strike in outcome.strikes if strike.has_hit]:
                hits[-1].reruns += 1
            now = {strike.kind for strike in [*open_windows, *outcome.strikes[before:]] if strike.has_hit}
            if not _explains(code, now):
                outcome.unexpected.append(f"run {number} ended with {code}: {last_line(self._log(number))}")
        return code

    def _look(self) -> None:
        """See what is new in the output."""
        try:
            names = top_names(self.world.server, BUCKET, self.prefix)
        except (BotoCoreError, ClientError):  # down: nothing to see
            return
        now, results = time.monotonic(), only_results(names)
        if SUCCESS in names and len(results) < self.world.num_splits and not self.early_success:
            self.early_success = f"{SUCCESS} was there beside {len(results)} of {self.world.num_splits} splits"
        if results != self.results:
            self.results, self.progressed = results, now
        for strike in self.outcome.strikes:
            if strike.recovery is None and len(results) > strike.results:
                strike.recovery = now - self.started - strike.at

    def _is_due(self, fault: Fault) -> bool:
        """Whether a fault strikes now; those that wait for something do not hold up others."""
        if len(self.results) < math.ceil(fault.after * self.world.num_splits):
            return False
        if fault.kind in WINDOW_KINDS and self.window and self.window.is_busy:
            return False  # one window after the other, so that each one's faults are known
        if fault.kind in VICTIMS and not self.world.cluster.processes(VICTIMS[fault.kind]):
            return False
        due = self.todo[fault] = self.todo[fault] or time.monotonic() + fault.delay
        return time.monotonic() >= due

    def _strike(self, fault: Fault, driver: subprocess.Popen) -> None:
        strike = Strike(fault.kind, time.monotonic() - self.started, len(self.results))
        if not self._inject(fault, strike, driver):
            return  # the victim is gone; there may be another one soon
        del self.todo[fault]
        self.outcome.strikes.append(strike)
        # What was under way when it struck is no recovery from it.
        with contextlib.suppress(BotoCoreError, ClientError):
            strike.results = len(result_keys(self.world.server, BUCKET, self.prefix))
        self.progressed = time.monotonic()

    def _inject(self, fault: Fault, strike: Strike, driver: subprocess.Popen) -> bool:
        """Do it; whether it was possible."""
        world = self.world
        if fault.kind in PROTOCOL_FAULTS:
            return PROTOCOL_FAULTS[fault.kind](self, driver)
        if fault.kind in VICTIMS:
            return world.cluster.kill_worker(VICTIMS[fault.kind], self.random)
        if fault.kind == "kill_raylet":
            # Starting another takes seconds, in which no other fault can strike.
            world.proxy.put_delay = math.inf if self.put_delay else 0.0
            world.cluster.kill_node(self.random)
            world.proxy.put_delay = self.put_delay
        elif fault.kind == "kill_driver":
            kill_group(driver)
        elif fault.kind == "kill_cluster":
            world.cluster.kill_all()
            world.cluster.start()
        elif fault.kind == "s3_outage":
            world.server.stop()
            time.sleep(fault.seconds)
            world.server.start(RESTART_SECONDS)
        else:
            self._open_window(fault, strike)
        return True

    def kill(self, driver: subprocess.Popen) -> None:
        kill_group(driver)

    def note_end(self, code: int, what: str, expected: set[int]) -> None:
        """How a run beside the episode's own ended."""
        self.outcome.exits.append(code)
        open_windows = {self.window.strike.kind} if self.window and self.window.is_open else set()
        before = {strike.kind for strike in self.outcome.strikes if strike.has_hit}
        if code not in expected and not _explains(code, open_windows | before):
            self.outcome.unexpected.append(f"{what} ended with {code}")

    def _open_window(self, fault: Fault, strike: Strike) -> None:
        """Begin a window of request faults; it ends by itself, or when the next one begins."""
        self._close_window()
        self.window = Window(self.world.proxy, fault, strike)

    def _close_window(self) -> None:
        if self.window is not None:
            self.window.close()


class Window:
    """Some seconds in which a share of the requests is hit: longer while none has been, but not for ever."""

    def __init__(self, proxy: FaultProxy, fault: Fault, strike: Strike):
        self.strike, self._proxy, self._seconds = strike, proxy, fault.seconds
        self._opened, self._before = time.monotonic(), self._counts()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        proxy.hit(fault.share, REQUEST_KINDS if fault.kind == "mix" else (fault.kind,))
        self._thread.start()

    def _watch(self) -> None:
        elapsed = 0.0
        while elapsed < self._seconds or (not self.strike.requests and elapsed < 6 * self._seconds):
            if self._over.wait(0.2):
                break
            elapsed = time.monotonic() - self._opened
            self._count()
        self._proxy.hit(0.0)
        self._count()

    def _counts(self) -> Counter[str]:
        return Counter(dict(self._proxy.counts))  # a copy made at once: another thread counts on

    def _count(self) -> None:
        counts = self._counts() - self._before
        self.strike.requests = {kind: counts[kind] for kind in REQUEST_KINDS if counts[kind]}

    @property
    def is_open(self) -> bool:
        return self._thread.is_alive()

    @property
    def is_busy(self) -> bool:
        """Whether it has not had its time yet."""
        return self.is_open and (not self.strike.requests or time.monotonic() - self._opened < WINDOW_LEAST_SECONDS)

    def close(self) -> None:
        self._over.set()
        self._thread.join()


def _explains(code: int, kinds: set[str]) -> bool:
    """Whether faults of these kinds may end a driver like that: 1 says run again, and a driver that Ray's own code ends
    when its cluster is gone dies by a signal."""
    if code == -signal.SIGKILL:
        return bool(kinds & {"kill_driver", "torn_split", "kill_deleting", "foreign_lock"})
    if code == 5:
        return "pause_driver" in kinds
    if code < 0 or code > 128:
        return bool(kinds & {"kill_cluster", "kill_raylet"})
    return code == 1 and bool(kinds)


def _dump_stacks(pid: int, file: Path) -> None:
    with file.open("wb") as out:
        subprocess.run([Path(sys.executable).with_name("py-spy"), "dump", "--pid", str(pid)], stdout=out, stderr=out)


def kill_group(driver: subprocess.Popen) -> None:
    """SIGKILL a driver and what it started, if it is still there."""
    if driver.poll() is None:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()


def tail(log: Path, size: int = 3000) -> str:
    return log.read_text(errors="replace")[-size:]


def last_line(log: Path) -> str:
    lines = [line.strip() for line in tail(log).splitlines() if line.strip()]
    return next((line for line in reversed(lines) if line.startswith("error:")), lines[-1] if lines else "")[:300]


def as_json(outcome: Outcome) -> dict[str, Any]:
    """An outcome as the report holds it."""
    return {
        **{name: value for name, value in vars(outcome).items() if name not in ("strikes", "findings")},
        "strikes": [vars(strike) for strike in outcome.strikes],
        "findings": vars(outcome.findings),
    }
