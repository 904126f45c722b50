"""TR-BERT: BERT with dynamic token reduction (Ye et al., NAACL 2021), on batches without padding."""

from .configuration import TRBertConfig
from .convert import convert_checkpoint
from .errors import CheckpointError, ConfigurationError, InputError, TrainingError, TRBertError
from .modeling import TRBertForQuestionAnswering, TRBertForSequenceClassification, TRBertModel
from .varlen import VarlenBatch

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
