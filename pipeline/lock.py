"""Lock an output for one run at a time, with numbered leases in the output itself. The highest number holds the lock.

A run takes an output by creating the lease with the next number, which the store allows only one run to do, and renews
that object while it is alive. No run writes another run's lease, so a late renewal changes nothing. The numbers order
runs (`Marker["epoch"]`), which clocks cannot do reliably. A run that finds a higher number than its own has lost the
output. It calls `check` before it writes a marker or manifest or deletes anything, because its process may have been
paused for longer than its lease.

A run that was killed cannot release its lease. The next run takes over at once if it can see that the process has died
(on the same machine, in the same PID namespace), otherwise once the lease has expired without a renewal.
"""

import json
import re
import threading
import time
from collections.abc import Callable
from typing import Any

from trbert_model.terminal import get_logger

from .errors import LeaseLostError, OutputBusyError, PipelineError, StorageError, UsageError
from .processes import clock, is_gone, this_process
from .stopping import StopRequest
from .storage import Storage

logger = get_logger(__name__)

LEASES = "_leases"
LEASE_SECONDS, RENEWAL_SECONDS, LOOK_SECONDS = 60.0, 10.0, 1.0
_RELEASE_SECONDS = 5.0  # how long to try to release a lease while the store fails
_NAME = re.compile(rf"{LEASES}/(\d{{8}})\.json$")

Lease = dict[str, Any]


class OutputLock:
    """Hold an output for a run, as a context manager.

    Args:
        output: the output.
        run_id: the holder's name for other runs.
        lost: called once, from another thread, if another run takes over the output.
        stop: ends the wait for another run's lease.
        lease_seconds: how long a lease lasts without a renewal.
        renewal_seconds: the interval between renewals.
        look_seconds: the interval between two looks at another run's lease.

    Raises:
        OutputBusyError: on entry, if another run is using the output; the message names it.
        UsageError: on entry, if the store lets two runs create the same object.
        StorageError: on entry, if a lease is damaged, or cannot be read or written.
        StoppedError: on entry, if the run was stopped meanwhile.
    """

    def __init__(
        self,
        output: Storage,
        run_id: str,
        lost: Callable[[], None] = lambda: None,
        stop: StopRequest | None = None,
        *,
        lease_seconds: float = LEASE_SECONDS,
        renewal_seconds: float = RENEWAL_SECONDS,
        look_seconds: float = LOOK_SECONDS,
    ):
        self.epoch = 0  # the number of this run's lease, once it holds the output
        self._output, self._run_id, self._lost = output, run_id, lost
        self._stop = stop or StopRequest()
        self._lease_seconds, self._renewal_seconds, self._look_seconds = lease_seconds, renewal_seconds, look_seconds
        # A renewal that is retried for longer than the lease lasts would be too late.
        self._leases = Storage(output.uri, min(output.retry_seconds, lease_seconds / 4))
        self._valid_until = 0.0  # by `clock`; until then no other run takes over
        self._renewals = 0
        self._over, self._is_lost = threading.Event(), threading.Event()
        self._one_at_a_time = threading.Lock()
        self._renewer = threading.Thread(target=self._renew_until_over, name="output-lock", daemon=True)

    def __enter__(self) -> "OutputLock":
        self._take()
        try:
            self._probe()
        except BaseException:
            self._release()
            raise
        self._stop.when_abandoned.append(self._give_up)
        self._renewer.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._give_up in self._stop.when_abandoned:
            self._stop.when_abandoned.remove(self._give_up)
        self._over.set()
        self._renewer.join(self._lease_seconds)
        self._release()

    @property
    def is_lost(self) -> bool:
        """Whether another run is known to have taken over the output."""
        return self._is_lost.is_set()

    def check(self) -> None:
        """Make sure that this run still holds the output. Makes requests only if the lease may have expired.

        Raises:
            LeaseLostError: another run has taken over the output.
            StorageError: the lease cannot be renewed.
        """
        if self._is_lost.is_set():
            raise self._lost_error()
        if clock() < self._valid_until:
            return
        with self._one_at_a_time:
            self._renew()

    def _take(self) -> None:
        """Create the lease with the highest number, or raise OutputBusyError if its present holder renews it."""
        seen, since, announced = None, 0.0, False
        while True:
            leases = self._listed()
            number = max(leases, default=0)
            lease = self._read(number) if number else None
            if lease is None and number:
                continue  # deleted between listing and reading: there is a higher one
            if lease is None or lease["released"] or is_gone(lease) or self._has_lapsed(lease, seen, since):
                if self._create(number + 1):
                    self._delete(leases)
                    if lease is not None and not lease["released"]:
                        logger.warning("run %s left its lock behind; took %s over", lease["run"], self._output.uri)
                    return
                seen, since = None, 0.0  # another run was faster: watch its lease from the start
            elif seen is None or number != seen["epoch"]:
                seen, since = lease, clock()
            elif lease != seen:
                raise OutputBusyError(
                    f"{self._output.uri}: run {lease['run']} is at work there (process {lease['pid']} on "
                    f"{lease['host']}); one run at a time, so nothing was started"
                )
            elif not announced:
                announced = True
                logger.warning(
                    "run %s holds %s; waiting up to %g s to see whether it lives",
                    *(lease["run"], self._output.uri, self._lease_seconds),
                )
            self._stop.wait(self._look_seconds)
            self._stop.check()

    def _has_lapsed(self, lease: Lease, seen: Lease | None, since: float) -> bool:
        return lease == seen and clock() - since > self._lease_seconds

    def _create(self, number: int) -> bool:
        """Create the lease with this number; returns whether it is now this run's and the highest."""
        self.epoch, started = number, clock()
        if not (self._output.create(_path(number), self._content()) or self._is_mine(number)):
            return False
        if max(self._listed(), default=0) > number:  # others already had this number and deleted it
            self._delete([number])
            return False
        self._valid_until = started + self._lease_seconds
        return True

    def _probe(self) -> None:
        """Check that a create request does not replace an object: locking and publishing rely on that."""
        if self._output.create(_path(self.epoch), self._content()):
            raise UsageError(
                f"{self._output.uri}: this store replaces objects that a request asked only to create (it ignores "
                "If-None-Match), so rows could be doubled and two runs be at work; choose another store"
            )

    def _content(self, released: bool = False) -> bytes:
        lease = {"epoch": self.epoch, "run": self._run_id, **this_process(), "released": released}
        return json.dumps(lease | {"renewals": self._renewals, "renewed": time.time()}).encode()

    def _listed(self) -> list[int]:
        return [int(match[1]) for file in self._output.files(LEASES) if (match := _NAME.search(file.path))]

    def _read(self, number: int) -> Lease | None:
        """Read a lease; None if it does not exist."""
        data = self._output.read_if_there(_path(number))
        if data is None:
            return None
        try:
            lease = json.loads(data)
            if not isinstance(lease, dict) or not {"epoch", "run", "host", "pid", "released"} <= lease.keys():
                raise ValueError("entries are missing")
            return lease
        except ValueError as error:
            raise StorageError(
                f"{self._output.uri}/{_path(number)}: damaged: {error}; delete it if no run is at work"
            ) from error

    def _is_mine(self, number: int) -> bool:
        """Whether a lease is this run's: the response to the request that created it may have been lost."""
        lease = self._read(number)
        return lease is not None and lease["run"] == self._run_id

    def _delete(self, numbers: list[int]) -> None:
        self._output.delete(_path(number) for number in numbers)

    def _renew(self) -> None:
        """Renew the lease, and check that no other run has taken over the output.

        Raises:
            LeaseLostError: another run has.
        """
        if self._is_lost.is_set():
            raise self._lost_error()
        started = clock()
        self._renewals += 1
        self._leases.write(_path(self.epoch), self._content())
        if max(self._listed(), default=0) > self.epoch:
            self._is_lost.set()
            raise self._lost_error()
        self._valid_until = started + self._lease_seconds

    def _renew_until_over(self) -> None:
        while not self._over.wait(self._renewal_seconds):
            try:
                with self._one_at_a_time:
                    self._renew()
            except LeaseLostError as error:
                logger.error("%s", error)
                self._lost()
                return
            except PipelineError as error:
                logger.warning("the output's lock could not be renewed: %s", error)

    def _lost_error(self) -> LeaseLostError:
        return LeaseLostError(f"{self._output.uri}: another run has taken the output over; this one stopped")

    def _give_up(self) -> None:
        """Release the lease of an abandoned run and forbid it further changes, so that the next run need not wait."""
        self._over.set()
        self._release()
        self._is_lost.set()

    def _release(self) -> None:
        """Mark the lease as released. The object stays, so that the next run's number is higher."""
        if self._is_lost.is_set():
            return
        renewing = not self._one_at_a_time.acquire(timeout=_RELEASE_SECONDS)
        try:
            if renewing:
                raise StorageError(f"{self._output.uri}/{_path(self.epoch)}: a renewal has not been answered")
            Storage(self._output.uri, _RELEASE_SECONDS).write(_path(self.epoch), self._content(released=True))
        except StorageError as error:
            logger.warning("the output's lock stays and lapses after %g s: %s", self._lease_seconds, error)
        finally:
            if not renewing:
                self._one_at_a_time.release()


def _path(number: int) -> str:
    return f"{LEASES}/{number:08d}.json"
