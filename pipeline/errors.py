"""The exceptions the pipeline raises; the commands print them as one line and exit with their code."""

from trbert_model.terminal import printable


class PipelineError(Exception):
    """Base class; the run failed."""

    exit_code = 1

    def __str__(self) -> str:
        return printable(" ".join(super().__str__().splitlines()))  # paths may hold line breaks, and worse


class UsageError(PipelineError, ValueError):
    """An option, a configuration file or an output that does not fit; found before any work started."""

    exit_code = 2


class StorageError(PipelineError, OSError):
    """A place that cannot be listed, read or written; names it."""


class ShardError(PipelineError, ValueError):
    """A shard that cannot be read; names it."""


class OutputBusyError(PipelineError):
    """Another run is at work on the output; nothing was started."""

    exit_code = 5


class LeaseLostError(OutputBusyError):
    """Another run has taken the output over; this one changed nothing after that."""


class StoppedError(PipelineError):
    """The run was stopped from outside, before it was complete."""

    exit_code = 4


class AbandonedError(StoppedError):
    """A stopped run did not end in time; a thread of it may still wait for something."""
