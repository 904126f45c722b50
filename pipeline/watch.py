"""Supervision of a run while its pipeline runs: passing on a stop request, and periodic checks."""

import threading
import time
from collections.abc import Callable

from .ledger import LedgerClient, Stop
from .stopping import StopRequest

LOOK_SECONDS = 5.0
_INTERVAL = 0.5  # seconds between two checks of the request


class StopWatch:
    """Passes a stop request on to a run's processes.

    Args:
        request: the stop request to watch.
        ledger: passes it on to the processes.
        say: shows a line to the user.
        look: called every `look_seconds`; returns a reason to stop if the run cannot go on.
    """

    def __init__(
        self,
        request: StopRequest,
        ledger: LedgerClient,
        say: Callable[[str], None],
        look: Callable[[], str | None] = lambda: None,
        *,
        look_seconds: float = LOOK_SECONDS,
    ):
        self._request, self._ledger, self._say, self._look = request, ledger, say, look
        self._look_seconds = look_seconds
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
        """Whether a stopped run's time is over; what has not ended by then is abandoned."""
        return self._request.is_over

    def _watch(self) -> None:
        request, told, looked = self._request, Stop.NO, time.monotonic()
        while not self._over.wait(_INTERVAL):
            if request.since is None and time.monotonic() - looked > self._look_seconds:
                looked = time.monotonic()
                if reason := self._look():
                    request.request(reason, failed=True)
            if request.since is None:
                continue
            how = Stop.NOW if request.grace_is_over else Stop.AFTER_SPLIT
            if how > told:
                what = f"splits under way have {request.grace:g} s to finish"
                self._say(
                    f"stopping ({request.reason}): {what if how is Stop.AFTER_SPLIT else 'abandoning splits under way'}"
                )
                self._ledger.stop(how)
                told = how
