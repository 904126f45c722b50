"""Connecting to Ray or starting it, and Ray Data's settings for a run."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator

import ray
import ray.data

from .errors import UsageError
from .ray_internals import ending_when, environment, listening_on_loopback

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


@contextlib.contextmanager
def running_ray() -> Iterator[None]:
    """Provide Ray for the block: the one that this process already uses, the cluster at RAY_ADDRESS (`ray job submit`
    sets it), or a local one, started here.

    Raises:
        UsageError: there is no cluster at RAY_ADDRESS.
    """
    if ray.is_initialized():
        yield
        return
    if os.environ.get("RAY_ADDRESS"):
        try:
            ray.init(logging_level=logging.WARNING)
        except (ConnectionError, RuntimeError) as error:
            raise UsageError(f"RAY_ADDRESS {os.environ['RAY_ADDRESS']}: {first_line(error)}") from error
    else:
        # With a single CPU, a reader and an actor would not fit at the same time.
        cpus = max(os.cpu_count() or 1, 2)
        with environment(_LOCAL_ENVIRONMENT), listening_on_loopback():
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, logging_level=logging.WARNING)
    try:
        yield
    finally:
        ray.shutdown()


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
        with ending_when(is_over):
            yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)


def first_line(error: BaseException) -> str:
    """The first non-empty line of an error's message; its type if there is none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
