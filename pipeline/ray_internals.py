"""All uses of undocumented parts of Ray. If a version of Ray lacks one, a warning is logged and the run goes on."""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import cache
from typing import Any

import ray
import ray.data
from ray.data.exceptions import ExecutionTimeoutError

from trbert_model.terminal import get_logger

try:
    from ray._private import ray_constants
except ImportError:
    ray_constants = None
try:
    from ray._private import worker
except ImportError:
    worker = None
try:
    from ray.data._internal.execution.execution_callback import ExecutionCallback
except ImportError:
    ExecutionCallback = None

logger = get_logger(__name__)

_LOG_LEVEL = "RAY_BACKEND_LOG_LEVEL"
# Versions of Ray in which these parts are known to work: at least the first, below the second.
_VERSIONS = ((2, 60), (3, 0))


class OverError(ExecutionTimeoutError):
    """A stopped run did not end in time."""  # Ray Data reports other errors as internal ones, with tracebacks


@contextlib.contextmanager
def listening_on_loopback() -> Iterator[None]:
    """Make a Ray that is started in the block listen on 127.0.0.1 only."""
    if not _has(ray_constants, "ENABLE_RAY_CLUSTER", "a local Ray listens on all of this machine's addresses"):
        yield
        return
    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        with environment({"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}):  # the same for the processes that Ray starts
            yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextlib.contextmanager
def quiet_core_worker() -> Iterator[None]:
    """If this process connects to Ray in the block, its core worker reports fatal errors only.

    It prints its errors on the terminal, among them one in each run that has no consequence: Ray Data keeps its actors'
    arguments in the object store, where they could be lost before an actor is restarted, which would fail (ray#53727).
    Here the driver holds them until the run ends. What does fail is also raised as an exception. A user's own level is
    kept.
    """
    if os.environ.get(_LOG_LEVEL) or not _has(worker, "connect", "it prints errors that have no consequence"):
        yield
        return
    connect = worker.connect

    def connect_quietly(*arguments: Any, **options: Any) -> Any:
        with environment({_LOG_LEVEL: "fatal"}), _stderr_without(_LOG_LEVEL):  # which it says that it has read
            return connect(*arguments, **options)

    worker.connect = connect_quietly
    try:
        yield
    finally:
        worker.connect = connect


@contextlib.contextmanager
def _stderr_without(text: str) -> Iterator[None]:
    """Leave out lines with this text from what the process writes to stderr in the block, Python or not."""
    with contextlib.ExitStack() as stack:
        try:
            stderr = os.dup(2)
        except OSError:  # it is closed
            yield
            return
        stack.callback(os.close, stderr)
        written = stack.enter_context(tempfile.TemporaryFile())
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            written.seek(0)
            os.write(2, b"".join(line for line in written if text.encode() not in line))


class EndWhenOver(ExecutionCallback or object):  # type: ignore[misc]
    """Callback that ends an execution of Ray Data with an OverError when a stopped run's time is over.

    Without it, the driver would wait forever for a split that never comes, for example if there is no machine for the
    actors. Ray Data instantiates the class in the thread that starts the execution.
    """

    is_over: ContextVar[Callable[[], bool] | None] = ContextVar("is_over", default=None)

    def __init__(self) -> None:
        self._is_over = self.is_over.get()

    def on_execution_step(self, executor: Any) -> None:
        if self._is_over is not None and self._is_over():
            raise OverError


@contextlib.contextmanager
def ending_when(is_over: Callable[[], bool]) -> Iterator[None]:
    """Make executions of Ray Data that are started in the block end with an OverError once `is_over` returns true."""
    context, name = ray.data.DataContext.get_current(), "custom_execution_callback_classes"
    owner = None if ExecutionCallback is None else context
    if not _has(owner, name, "a stopped run that waits for a machine is left behind, not ended"):
        yield
        return
    before, token = getattr(context, name), EndWhenOver.is_over.set(is_over)
    setattr(context, name, [*before, EndWhenOver])
    try:
        yield
    finally:
        setattr(context, name, before)
        EndWhenOver.is_over.reset(token)


@contextlib.contextmanager
def environment(settings: dict[str, str]) -> Iterator[None]:
    """Set environment variables while the block runs."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def worker_errors(error: BaseException) -> list[BaseException]:
    """The errors that the workers of a failed training raised, without Ray's wrapper if it is a known one."""
    return [getattr(each, "_base_exc", each) for each in getattr(error, "worker_failures", {}).values()]


def _has(owner: Any, name: str, without: str) -> bool:
    """Whether this Ray has a known version and `owner` has the part; if not, warn once about the consequence."""
    first, end = _VERSIONS
    found = first <= tuple(int(part) for part in ray.__version__.split(".")[:2]) < end and hasattr(owner, name)
    if not found:
        _warn(name, without)
    return found


@cache
def _warn(name: str, without: str) -> None:
    logger.warning("Ray %s has no %s that is known here: %s", ray.__version__, name, without)
