"""TR-BERT: BERT with dynamic token reduction (Ye et al., NAACL 2021), on batches without padding.

The names below are imported on first use. Processes that only tokenise import this package too, and start much faster
and with less memory without torch and transformers. transformers' Auto classes and pipelines know the models after
`import trbert_model`.
"""

from typing import TYPE_CHECKING

from .auto import register
from .lazy import lazy_names

if TYPE_CHECKING:
    from .checkpoints.conversion import convert_checkpoint
    from .configuration import TRBertConfig
    from .engine.explain import explain
    from .errors import CheckpointError, ConfigurationError, InputError, TrainingError, TRBertError
    from .explanation import Explanation
    from .modeling import TRBertModel
    from .tasks.classification.head import TRBertForSequenceClassification
    from .tasks.multiple_choice.head import TRBertForMultipleChoice
    from .tasks.question_answering.head import TRBertForQuestionAnswering
    from .tasks.token_classification.head import TRBertForTokenClassification
    from .varlen import VarlenBatch

_MODULES = {
    "CheckpointError": "errors",
    "ConfigurationError": "errors",
    "Explanation": "explanation",
    "InputError": "errors",
    "TRBertConfig": "configuration",
    "TRBertError": "errors",
    "TRBertForMultipleChoice": "tasks.multiple_choice.head",
    "TRBertForQuestionAnswering": "tasks.question_answering.head",
    "TRBertForSequenceClassification": "tasks.classification.head",
    "TRBertForTokenClassification": "tasks.token_classification.head",
    "TRBertModel": "modeling",
    "TrainingError": "errors",
    "VarlenBatch": "varlen",
    "convert_checkpoint": "checkpoints.conversion",
    "explain": "engine.explain",
}

__all__ = [
    "CheckpointError",
    "ConfigurationError",
    "Explanation",
    "InputError",
    "TRBertConfig",
    "TRBertError",
    "TRBertForMultipleChoice",
    "TRBertForQuestionAnswering",
    "TRBertForSequenceClassification",
    "TRBertForTokenClassification",
    "TRBertModel",
    "TrainingError",
    "VarlenBatch",
    "convert_checkpoint",
    "explain",
]

__getattr__, __dir__ = lazy_names(__name__, _MODULES)

register()
