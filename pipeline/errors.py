"""The exceptions that the pipeline raises. The commands print them as one line and exit with their `exit_code`."""

from trbert_model.errors import TRBertError
from trbert_model.terminal import printable


class PipelineError(Exception):
    """Base class of the pipeline's exceptions: the run failed."""

    exit_code = 1

    def __str__(self) -> str:
        return printable(" ".join(super().__str__().splitlines()))  # paths may contain control characters


class UsageError(PipelineError, ValueError):
    """An invalid option, configuration file, input, model or output; found before any work started."""

    exit_code = 2


class StorageError(PipelineError, OSError):
    """A location cannot be listed, read or written; the message names it."""


class ShardError(PipelineError, ValueError):
    """A shard cannot be read."""


class OutputBusyError(PipelineError):
    """Another run is using the output; nothing was started."""

    exit_code = 5


class LeaseLostError(OutputBusyError):
    """Another run has taken over the output; this run wrote no marker or manifest and deleted nothing after that."""


class StoppedError(PipelineError):
    """The run was stopped from outside before it was complete."""

    exit_code = 4


class AbandonedError(StoppedError):
    """A stopped run did not end in time; one of its threads may still be blocked."""


def exit_code_of(error: BaseException | None) -> int:
    """The exit code of a command that ends with this error."""
    if isinstance(error, PipelineError):
        return error.exit_code
    if isinstance(error, TRBertError):
        return UsageError.exit_code
    return 130 if isinstance(error, KeyboardInterrupt) else PipelineError.exit_code
