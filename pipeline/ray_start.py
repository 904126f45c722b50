"""Ray for a run: connecting to it or starting it, and Ray Data's settings."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator

import ray
import ray.data

from .errors import UsageError
from .ray_internals import ending_when, environment, listening_on_loopback

_DATA_SETTINGS = {
    # Otherwise several splits are put into one block and one actor's task; nothing is cut by it.
    "target_max_block_size": 1,
    "enable_progress_bars": False,
    "print_on_execution_start": False,
    # Ray Data gives up when no block moves for half an hour; a split of a large model on few cores takes longer.
    "execution_no_progress_timeout_s": 24 * 3600,
}
# Workers that wait are kept for a minute: ended after a second, as they are by default beyond the number of CPUs, the
# readers' and writers' imports would be most of what a small machine's second core does.
_LOCAL_ENVIRONMENT = {"RAY_idle_worker_killing_time_threshold_ms": "60000"}


@contextlib.contextmanager
def running_ray() -> Iterator[None]:
    """Ray for the block: the one that this process has, the cluster that RAY_ADDRESS names (`ray job submit` sets it),
    or one that is started here.

    Raises:
        UsageError: there is none at RAY_ADDRESS.
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
        # With a single core, reader and actor would not fit beside each other.
        cpus = max(os.cpu_count() or 1, 2)
        with environment(_LOCAL_ENVIRONMENT), listening_on_loopback():
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, logging_level=logging.WARNING)
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def data_context(is_over: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Ray Data's settings for a run, put back afterwards: the context is the whole process's. Executions end with an
    OverError once `is_over` says so."""
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
    """The first line of what an error says that is not empty; its type if there is none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
