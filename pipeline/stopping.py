"""Stopping a run from outside: a signal, `stop_after`, a lost lock, an output that fails.

Imports nothing heavy, so that a command can listen for signals before it imports Ray and torch.
"""

import contextlib
import contextvars
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TypeVar

from .errors import AbandonedError, PipelineError, StoppedError

Result = TypeVar("Result")

_POLL_SECONDS = 0.1
_SIGNALS = {signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP", signal.SIGINT: "Ctrl-C"}


class StopRequest:
    """Whether, why and since when a run is to stop; the first reason counts. Safe to ask for in a signal handler.

    grace: seconds that work under way has to finish once a stop was asked for. failed: the run itself asks, because it
    cannot go on. last_words: seconds after the grace in which splits that were told to abandon what they do can say so,
    and what is complete is still recorded.
    """

    def __init__(self, grace: float = 15.0, last_words: float = 10.0) -> None:
        self.grace, self.last_words = grace, last_words
        self.reason: str | None = None
        self.failed = False
        self.since: float | None = None  # time.monotonic()
        self.deadline: tuple[float, str] | None = None  # time.time() at which the run stops by itself, and the reason
        self.when_abandoned: list[Callable[[], None]] = []

    def request(self, reason: str, failed: bool = False) -> None:
        if self.since is None:
            self.reason, self.failed, self.since = reason, failed, time.monotonic()

    @property
    def grace_is_over(self) -> bool:
        return self.since is not None and time.monotonic() - self.since > self.grace

    @property
    def is_over(self) -> bool:
        """Whether whatever has not come back by now is left behind."""
        return self.since is not None and time.monotonic() - self.since > self.grace + self.last_words

    def check(self) -> None:
        """Raise StoppedError if a stop was asked for: between two steps of a run's preparation."""
        if self.since is not None:
            raise StoppedError(f"stopped ({self.reason}); run again to go on")

    def wait(self, seconds: float) -> None:
        """Sleep, unless or until a stop is asked for."""
        until = time.monotonic() + seconds
        while self.since is None and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, _POLL_SECONDS))

    def wait_in_grace(self, seconds: float) -> None:
        """Sleep, unless or until a stop's grace is over: between two attempts at the same request."""
        until = time.monotonic() + seconds
        while not self.grace_is_over and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, _POLL_SECONDS))

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[Callable[[], None]]:
        """SIGTERM, SIGHUP and Ctrl-C ask to stop as long as the block runs; a second Ctrl-C interrupts at once.

        Yields a function that installs the handlers again: Ray puts its own in. Signals that are ignored (nohup) stay
        so. Other threads than the main one cannot listen, and change nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            yield lambda: None
            return

        def handle(number: int, _frame: object) -> None:
            if number == signal.SIGINT and self.reason == _SIGNALS[signal.SIGINT]:
                raise KeyboardInterrupt
            self.request(_SIGNALS[signal.Signals(number)])

        before = {number: signal.getsignal(number) for number in _SIGNALS}
        listened = [number for number, handler in before.items() if handler is not signal.SIG_IGN]

        def install() -> None:
            for number in listened:
                signal.signal(number, handle)

        install()
        try:
            yield install
        finally:
            for number in listened:
                handler = before[number]
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def run(self, body: Callable[[], Result]) -> Result:
        """Run `body` in a thread of its own while this one listens.

        Whatever `body` waits for (a request that hangs, Ray that does not start), this returns within the grace and
        `last_words` seconds of a stop.

        Raises:
            AbandonedError: `body` did not end in that time; it was left behind, without its lock.
        """
        ended: Future[Result] = Future()

        def execute() -> None:
            try:
                ended.set_result(body())
            except BaseException as error:  # noqa: BLE001 - raised again where it was called
                ended.set_exception(error)

        context = contextvars.copy_context()  # Ray Data's settings are of a context
        with self.on_signals() as install:
            threading.Thread(target=context.run, args=(execute,), name="run", daemon=True).start()
            try:
                while not self._wait_for(ended, install):
                    pass
            except BaseException:
                self._abandon()
                raise
            return ended.result()

    def _wait_for(self, ended: Future, install: Callable[[], None]) -> bool:
        """Look at everything once; whether `ended` has."""
        with contextlib.suppress(TimeoutError):
            ended.exception(_POLL_SECONDS)
            return True
        install()
        if self.deadline is not None and time.time() > self.deadline[0]:
            self.request(self.deadline[1])
        # What watches over the streaming gives up at `is_over`; a moment later so does this, on everything else.
        if self.since is not None and time.monotonic() - self.since > self.grace + self.last_words + 2.0:
            error = AbandonedError(f"stopped ({self.reason}) while something did not answer; run again to go on")
            error.exit_code = PipelineError.exit_code if self.failed else StoppedError.exit_code
            raise error
        return False

    def _abandon(self) -> None:
        self.request("interrupted")
        for callback in self.when_abandoned:
            callback()
