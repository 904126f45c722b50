"""Stopping a run from outside: SIGTERM, `stop_after`, a lost lock, an output that fails."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data.exceptions import ExecutionTimeoutError

from .ledger import LedgerClient, Stop

_INTERVAL, _HOPE_INTERVAL = 0.5, 5.0
# Splits that were told to abandon what they do need a moment to say so.
_LAST_WORDS_SECONDS = 10.0


class StopRequest:
    """Whether, why and since when a run is to stop; the first reason counts. Safe to ask for in a signal handler."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.since: float | None = None  # time.monotonic()

    def request(self, reason: str) -> None:
        if self.since is None:
            self.reason, self.since = reason, time.monotonic()

    @contextlib.contextmanager
    def on_sigterm(self) -> Iterator[Callable[[], None]]:
        """SIGTERM asks to stop as long as the block runs. Yields a function that says so again: `ray.init` puts its
        own handler in, under which a driver aborts. Other threads than the main one cannot, and leave it as it is."""
        if threading.current_thread() is not threading.main_thread():
            yield lambda: None
            return

        def install() -> None:
            signal.signal(signal.SIGTERM, lambda *_: self.request("SIGTERM"))

        before = signal.getsignal(signal.SIGTERM)
        install()
        try:
            yield install
        finally:
            signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


class StopWatch:
    """Passes a stop request on to a run's processes, and gives up on them when the grace is over.

    Args:
        request: what to watch.
        ledger: how the processes hear of it.
        deadline: time.time() at which the run stops by itself, with the reason to give.
        grace: seconds that splits under way have to finish.
        say: where to announce it.
        hopeless: asked every few seconds; a reason to stop if the run cannot get any further.
    """

    def __init__(
        self,
        request: StopRequest,
        ledger: LedgerClient,
        deadline: tuple[float, str] | None,
        grace: float,
        say: Callable[[str], None],
        hopeless: Callable[[], str | None] = lambda: None,
    ):
        self._hopeless = hopeless
        self._request, self._ledger, self._deadline, self._grace, self._say = request, ledger, deadline, grace, say
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stop-watch", daemon=True)

    def __enter__(self) -> "StopWatch":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def is_over(self) -> bool:
        """Whether whatever has not come back by now is left behind."""
        since = self._request.since
        return since is not None and time.monotonic() - since > self._grace + _LAST_WORDS_SECONDS

    def _watch(self) -> None:
        told, looked = Stop.NO, time.monotonic()
        while not self._over.wait(_INTERVAL):
            if self._request.since is None and time.monotonic() - looked > _HOPE_INTERVAL:
                looked = time.monotonic()
                if reason := self._hopeless():
                    self._request.request(reason)
            if self._deadline is not None and time.time() > self._deadline[0]:
                self._request.request(self._deadline[1])
            if self._request.since is None:
                continue
            waited = time.monotonic() - self._request.since
            how = Stop.NOW if waited > self._grace else Stop.AFTER_SPLIT
            if how > told:
                self._say(
                    f"stopping ({self._request.reason}): "
                    + (
                        f"splits under way have {self._grace:g} s to finish"
                        if how is Stop.AFTER_SPLIT
                        else "abandoning splits under way"
                    )
                )
                self._ledger.stop(how)
                told = how


class OverError(ExecutionTimeoutError):
    """A stopped run's grace is over."""  # Ray Data takes others for its own bugs, and prints their tracebacks


class EndWhenOver(ExecutionCallback):
    """Ends Ray Data's execution when a run's grace is over: whoever waits for a split would wait on, where none comes
    (for want of a machine for the actors, say). Ray Data makes it from its class, in the thread that starts the run."""

    watch: ContextVar[StopWatch | None] = ContextVar("watch", default=None)

    def __init__(self) -> None:
        self._watch = self.watch.get()

    def on_execution_step(self, executor: Any) -> None:
        if self._watch is not None and self._watch.is_over:
            raise OverError
