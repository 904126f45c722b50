"""The exceptions this package raises for input, options or checkpoints it cannot accept."""

from .terminal import printable


class TRBertError(Exception):
    """Base class: the message names the offending thing and what to do about it."""

    def __str__(self) -> str:
        return printable(super().__str__())


class ConfigurationError(TRBertError, ValueError):
    """A model or engine option that cannot be honoured."""


class CheckpointError(TRBertError, ValueError):
    """A checkpoint that is not a BERT, DistilBERT or TR-BERT this package can read."""


class ModelChangedError(CheckpointError):
    """A model directory that holds another model than the run began with."""


class InputError(TRBertError, ValueError):
    """A batch the model cannot compute on."""


class TrainingError(TRBertError, RuntimeError):
    """A training stage that cannot go on: its selectors have stopped choosing."""


class TokenizerError(TRBertError, RuntimeError):
    """A tokenizer that fails on every text."""
