"""TR-BERT: BERT with dynamic token reduction (Ye et al., NAACL 2021), on batches without padding.

The names below are imported when they are first used: a process that only tokenises imports this package too, and
starts in a fraction of the time and memory without torch and transformers.
"""

from typing import TYPE_CHECKING

from .lazy import lazy_names

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

__getattr__, __dir__ = lazy_names(__name__, _MODULES)
