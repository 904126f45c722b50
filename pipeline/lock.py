"""One run at a time on an output: a lease in the output itself, renewed while its holder lives.

Two runs on one output could not double a row, but they would compute everything twice; so the second is refused. A run
that was killed cannot give its lease back. The next one takes it over at once if it can see that the process is gone
(the same machine), else when the lease has not been renewed for as long as it lasts.
"""

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from .errors import OutputBusyError, PipelineError, StorageError
from .ledger import process_name
from .storage import Storage

logger = logging.getLogger(__name__)

LOCK = "_lock.json"
TAKE_OVER = "_lock.take-over-{}.json"  # who is about to replace a lease that lapsed; the next if that one died at it
LEASE_SECONDS = 60.0
_RENEWAL_SECONDS = 10.0
_LOOK_SECONDS = 1.0


class OutputLock:
    """Holds an output for a run, as a context manager.

    Args:
        output: the output.
        run_id: what others are told of the holder.
        lost: called once, from another thread, if the lease has been taken over meanwhile.

    Raises:
        OutputBusyError: on entry, if another run is at work there; names it.
    """

    def __init__(self, output: Storage, run_id: str, lost: Callable[[], None] = lambda: None):
        self._output, self._run_id, self._lost = output, run_id, lost
        self._over = threading.Event()
        self._renewer = threading.Thread(target=self._renew, name="output-lock", daemon=True)

    def __enter__(self) -> "OutputLock":
        if not self._create(LOCK):
            self._take_over()
        self._renewer.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._renewer.join()
        try:
            if self._is_mine():
                self._output.delete([LOCK])
        except StorageError as error:
            logger.warning("the output's lock stays and lapses after %g s: %s", LEASE_SECONDS, error)

    def _content(self) -> bytes:
        me = {"run": self._run_id, "host": socket.gethostname(), "pid": os.getpid(), "process": process_name()}
        return json.dumps(me | {"renewed": time.time()}).encode()

    def _read(self, path: str = LOCK) -> dict[str, Any] | None:
        """Whose lease lies there; None if there is none."""
        try:
            return json.loads(self._output.read(path))
        except ValueError as error:
            raise StorageError(
                f"{self._output.uri}/{path}: damaged: {error}; delete it if no run is at work"
            ) from error
        except StorageError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise

    def _is_mine(self, path: str = LOCK) -> bool:
        holder = self._read(path)
        return holder is not None and holder["run"] == self._run_id

    def _create(self, path: str) -> bool:
        """Whether it is there now and this run's; the answer to a request that created it may have been lost."""
        return self._output.create(path, self._content()) or self._is_mine(path)

    def _take_over(self) -> None:
        """Wait until the lease lapses, or refuse when its holder shows that it lives."""
        first, started = self._read(), time.monotonic()
        attempt, other, other_since = 0, None, started  # who else takes over, and since when it has been seen there
        told = False
        while True:
            holder, waited = self._read(), time.monotonic() - started
            if holder is None:
                if self._create(LOCK):
                    return
                first, started = None, time.monotonic()  # another one was faster: its lock is a new one
            elif holder != first:
                raise OutputBusyError(
                    f"{self._output.uri}: run {holder['run']} is at work there (process {holder['pid']} on "
                    f"{holder['host']}); one run at a time, so nothing was started"
                )
            elif waited > LEASE_SECONDS or _is_gone(holder):
                if self._replace(holder, attempt):
                    return
                seen, now = self._read(TAKE_OVER.format(attempt)), time.monotonic()
                if seen != other:
                    other, other_since = seen, now
                if seen is not None and (now - other_since > LEASE_SECONDS or _is_gone(seen)):
                    attempt += 1  # not deleted here: by then it could be another, living one's
            elif not told:
                told = True
                logger.warning(
                    "run %s holds %s; waiting up to %g s to see whether it lives",
                    *(holder["run"], self._output.uri, LEASE_SECONDS),
                )
            time.sleep(_LOOK_SECONDS)

    def _replace(self, lapsed: dict[str, Any], attempt: int) -> bool:
        """Put this run's lease in the place of one that lapsed, if it is still there; one run at a time may try.

        Were the lapsed one deleted and a new one created, a slow run could delete the new one of a faster run.
        """
        if not self._create(TAKE_OVER.format(attempt)):
            return False
        try:
            if self._read() != lapsed:
                return False
            logger.warning("run %s left its lock behind; taking %s over", lapsed["run"], self._output.uri)
            self._output.write(LOCK, self._content())
            return True
        finally:
            # Whoever creates one of them after this sees that the lapsed lease is no longer there.
            self._output.delete(TAKE_OVER.format(number) for number in range(attempt + 1))

    def _renew(self) -> None:
        while not self._over.wait(_RENEWAL_SECONDS):
            try:
                if not self._is_mine():
                    logger.error("another run has taken %s over; this one stops", self._output.uri)
                    self._lost()
                    return
                self._output.write(LOCK, self._content())
            except PipelineError as error:
                logger.warning("the output's lock could not be renewed: %s", error)


def _is_gone(holder: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine that is no more. False where that cannot be seen."""
    if holder["host"] != socket.gethostname():
        return False
    if holder["pid"] == os.getpid():  # in containers numbers begin anew
        return holder["process"] != process_name()
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
