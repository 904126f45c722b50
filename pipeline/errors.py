"""The exceptions the pipeline raises; the commands print them as one line and exit with their code."""


class PipelineError(Exception):
    """Base class; the run failed."""

    exit_code = 1

    def __str__(self) -> str:
        return " ".join(super().__str__().splitlines())  # paths may hold line breaks


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
