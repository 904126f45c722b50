"""TR-BERT: BERT with dynamic token reduction (Ye et al., NAACL 2021), on batches without padding.

The names below are imported when they are first used: a process that only tokenises imports this package too, and
starts in a fraction of the time and memory without torch and transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .configuration import TRBertConfig
    from .convert import convert_checkpoint
    from .errors import CheckpointError, ConfigurationError, InputError, TrainingError, TRBertError
    from .modeling import TRBertForQuestionAnswering, TRBertForSequenceClassification, TRBertModel
    from .varlen import VarlenBatch

_MODULES = {
    "CheckpointError": "errors",
    "ConfigurationError": "errors",
    "InputError": "errors",
    "TRBertConfig": "configuration",
    "TRBertError": "errors",
    "TRBertForQuestionAnswering": "modeling",
    "TRBertForSequenceClassification": "modeling",
    "TRBertModel": "modeling",
    "TrainingError": "errors",
    "VarlenBatch": "varlen",
    "convert_checkpoint": "convert",
}

__all__ = [
    "CheckpointError",
    "ConfigurationError",
    "InputError",
    "TRBertConfig",
    "TRBertError",
    "TRBertForQuestionAnswering",
    "TRBertForSequenceClassification",
    "TRBertModel",
    "TrainingError",
    "VarlenBatch",
    "convert_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
