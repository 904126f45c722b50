"""The exceptions of this package."""

from .terminal import printable


class TRBertError(Exception):
    """Base class; the message names what is wrong and what to do about it."""

    def __str__(self) -> str:
        return printable(super().__str__())


class ConfigurationError(TRBertError, ValueError):
    """A model or engine option that is invalid or not supported."""


class CheckpointError(TRBertError, ValueError):
    """A checkpoint, or a file in a model directory, that this package cannot read."""


class ModelChangedError(CheckpointError):
    """The model directory holds a different model than the one the run started with."""


class InputError(TRBertError, ValueError):
    """A batch, text or corpus that cannot be used."""


class TrainingError(TRBertError, RuntimeError):
    """Training cannot continue: the selectors keep all tokens or none, or the workers' parameters differ."""


class TokenizerError(TRBertError, RuntimeError):
    """The tokenizer fails on every text."""
