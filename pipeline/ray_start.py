"""Connecting to Ray or starting it, and Ray Data's settings for a run."""

import contextlib
import logging
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import ray
import ray.data

from .errors import PipelineError, UsageError
from .ray_internals import ending_when, environment, listening_on_loopback, quiet_core_worker

_DATA_SETTINGS = {
    # Otherwise one block, and so one task of an actor, holds several splits. A row is never divided.
    "target_max_block_size": 1,
    "enable_progress_bars": False,
    "print_on_execution_start": False,
    # Ray Data's default is half an hour without progress; one split takes a large model on few cores longer.
    "execution_no_progress_timeout_s": 24 * 3600,
}
# Keep idle workers for a minute. By default those beyond the number of CPUs end after a second, and on a small machine
# one core would be busy mostly with the imports of new readers and writers.
_LOCAL_ENVIRONMENT = {"RAY_idle_worker_killing_time_threshold_ms": "60000"}


# The levels of loggers that otherwise say that Ray's SIGTERM handler is not set (`stopping.py` has its own), that Ray's
# default authentication is used, that the progress bars are off, and when an execution has ended.
_TALKATIVE = {
    "ray._private.worker": logging.ERROR,
    "ray._private.authentication.authentication_token_setup": logging.ERROR,
    "ray.data._internal.progress": logging.ERROR,
    "ray.data._internal.execution.streaming_executor": logging.WARNING,
}


class RayStart:
    """Ray for a run: the one that this process already uses, the cluster at RAY_ADDRESS (`ray job submit` sets it), or
    a local one. A context manager that ends what it has started.

    A local Ray takes four seconds to start, mostly waiting for its processes, so it starts in a thread. The thread
    lives until the end, because Linux ends Ray's processes with the thread that started them.
    """

    def __init__(self) -> None:
        self._running: Future[None] = Future()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ray", daemon=True)

    def __enter__(self) -> "RayStart":
        return self

    def begin(self) -> None:
        """Begin to start a local Ray, unless that was done before.

        To connect to a cluster takes a second only. And a submitted job has no working directory for a moment while it
        connects, in which imports fail.
        """
        if not os.environ.get("RAY_ADDRESS"):
            self._begin()

    def _begin(self) -> None:
        if self._thread.ident is None:
            self._thread.start()

    def wait(self) -> None:
        """Wait until Ray is running.

        Raises:
            UsageError: there is no cluster at RAY_ADDRESS.
        """
        self._begin()
        self._running.result()

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        started = not ray.is_initialized()
        try:
            if started:
                _start_ray()
        except BaseException as error:  # noqa: BLE001 - raised again by `wait`
            self._running.set_exception(error)
            return
        self._running.set_result(None)
        self._over.wait()
        if started:
            ray.shutdown()


def _start_ray() -> None:
    """Connect to Ray or start it."""
    with _silenced(), quiet_core_worker():
        if os.environ.get("RAY_ADDRESS"):
            try:
                ray.init(logging_level=logging.WARNING)
            except (ConnectionError, RuntimeError) as error:
                raise UsageError(f"RAY_ADDRESS {os.environ['RAY_ADDRESS']}: {first_line(error)}") from error
        else:
            # With a single CPU, a reader and an actor would not fit at the same time.
            cpus = max(os.cpu_count() or 1, 2)
            with environment(_LOCAL_ENVIRONMENT | local_token()), listening_on_loopback():
                try:
                    ray.init(address="local", num_cpus=cpus, include_dashboard=False, logging_level=logging.WARNING)
                except OSError as error:
                    raise PipelineError(f"Ray cannot start on this machine: {error}") from error


def local_token() -> dict[str, str]:
    """Environment variables for a local Ray: its authentication token, if it cannot keep one in ~/.ray."""
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return {}
    try:
        token = Path.home() / ".ray/auth_token"
        token.parent.mkdir(parents=True, exist_ok=True)
        if os.access(token, os.R_OK) or os.access(token.parent, os.W_OK | os.X_OK):
            return {}
    except (OSError, RuntimeError):  # the latter without a home directory
        pass
    return {"RAY_AUTH_TOKEN": secrets.token_hex(32)}


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Set the levels in `_TALKATIVE` while the block runs."""
    before = {name: logging.getLogger(name).level for name in _TALKATIVE}
    for name, level in _TALKATIVE.items():
        logging.getLogger(name).setLevel(level)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def data_context(is_over: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Apply Ray Data's settings for a run, and restore the previous ones afterwards: they hold for the whole process.

    Executions that are started in the block end with an OverError once `is_over` returns true.
    """
    context = ray.data.DataContext.get_current()
    before = {name: getattr(context, name) for name in _DATA_SETTINGS}
    for name, value in _DATA_SETTINGS.items():
        setattr(context, name, value)
    try:
        with ending_when(is_over), _silenced():
            yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)


def first_line(error: BaseException) -> str:
    """The first non-empty line of an error's message; its type if there is none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
