"""Stopping a run early: on a signal, after `stop_after`, or if the lock is lost or the output fails.

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
    """Whether, why and since when a run should stop. Only the first request counts. Safe to use in a signal handler.

    Attributes:
        grace: seconds that work in progress has to finish after the request.
        last_words: seconds after the grace in which abandoned splits can report this and complete ones are recorded.
        reason: why the run should stop; None before a request.
        failed: whether the run made the request itself, because it cannot go on.
    """

    def __init__(self, grace: float = 15.0, last_words: float = 10.0) -> None:
        self.grace, self.last_words = grace, last_words
        self.reason: str | None = None
        self.failed = False
        self.since: float | None = None  # time.monotonic()
        self.deadline: tuple[float, str] | None = None  # time.time() at which the run stops, and the reason
        self.when_abandoned: list[Callable[[], None]] = []

    def request(self, reason: str, failed: bool = False) -> None:
        if self.since is None:
            self.reason, self.failed, self.since = reason, failed, time.monotonic()

    @property
    def grace_is_over(self) -> bool:
        return self.since is not None and time.monotonic() - self.since > self.grace

    @property
    def is_over(self) -> bool:
        """Whether the grace and the last words are over; what has not ended by then is abandoned."""
        return self.since is not None and time.monotonic() - self.since > self.grace + self.last_words

    def check(self) -> None:
        """Raise StoppedError if a stop was requested. For use between the steps of a run's preparation."""
        if self.since is not None:
            raise StoppedError(f"stopped ({self.reason}); run again to go on")

    def wait(self, seconds: float) -> None:
        """Sleep until a stop is requested, at most for `seconds`."""
        until = time.monotonic() + seconds
        while self.since is None and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, _POLL_SECONDS))

    def wait_in_grace(self, seconds: float) -> None:
        """Sleep until the grace is over, at most for `seconds`. For use between two attempts at the same request."""
        until = time.monotonic() + seconds
        while not self.grace_is_over and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, _POLL_SECONDS))

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[Callable[[], None]]:
        """Make SIGTERM, SIGHUP and Ctrl-C request a stop while the block runs. A second Ctrl-C interrupts at once.

        Yields a function that installs the handlers again, since Ray replaces them. Signals that are ignored (nohup)
        stay ignored. Outside the main thread, which alone can handle signals, this does nothing.
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
        """Run `body` in a new thread while this one handles signals and the deadline.

        Even if `body` is blocked (by a hanging request, or a Ray that does not start), this returns about `grace` and
        `last_words` seconds after a stop was requested.

        Raises:
            AbandonedError: `body` did not end in that time. Its thread is abandoned, and its lock released.
        """
        ended: Future[Result] = Future()

        def execute() -> None:
            try:
                ended.set_result(body())
            except BaseException as error:  # noqa: BLE001 - raised again where it was called
                ended.set_exception(error)

        context = contextvars.copy_context()  # the caller's context variables hold in the thread too
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
        """Wait briefly for `ended`, then check signals, deadline and grace; returns whether it has ended."""
        with contextlib.suppress(TimeoutError):
            ended.exception(_POLL_SECONDS)
            return True
        install()
        if self.deadline is not None and time.time() > self.deadline[0]:
            self.request(self.deadline[1])
        # The stream ends by itself at `is_over`. Everything else is abandoned a little later.
        if self.since is not None and time.monotonic() - self.since > self.grace + self.last_words + 2.0:
            error = AbandonedError(f"stopped ({self.reason}) while something did not answer; run again to go on")
            error.exit_code = PipelineError.exit_code if self.failed else StoppedError.exit_code
            raise error
        return False

    def _abandon(self) -> None:
        self.request("interrupted")
        for callback in self.when_abandoned:
            callback()
