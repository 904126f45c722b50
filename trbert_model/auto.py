"""TR-BERT in transformers' Auto classes, without an import of transformers.

transformers knows its own models by name and imports a model's module when it is first used. TR-BERT's classes are
entered in the same tables, as soon as the modules with the tables are imported by anybody.
"""

import sys
from types import ModuleType
from typing import Any

import wrapt

MODEL_TYPE = "trbert"
CONFIG = "TRBertConfig"
MODELS = {
    "MODEL_MAPPING": "TRBertModel",
    "MODEL_FOR_MULTIPLE_CHOICE_MAPPING": "TRBertForMultipleChoice",
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING": "TRBertForQuestionAnswering",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING": "TRBertForSequenceClassification",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING": "TRBertForTokenClassification",
}


def _enter_config(auto: ModuleType) -> None:
    auto.CONFIG_MAPPING._mapping[MODEL_TYPE] = CONFIG
    _found_here(auto.CONFIG_MAPPING)


def _enter_models(auto: ModuleType) -> None:
    for table, name in MODELS.items():
        mapping = getattr(auto, table)
        mapping._reverse_config_mapping[CONFIG] = MODEL_TYPE
        mapping._model_mapping[MODEL_TYPE] = name
        _found_here(mapping)


def _found_here(mapping: Any) -> None:
    """Take this package for the model's module: its names are imported on first use, too."""
    mapping._modules[MODEL_TYPE] = sys.modules[__package__]


def register() -> None:
    """Enter TR-BERT's classes when transformers' tables are imported, or at once if they already are."""
    wrapt.register_post_import_hook(_enter_config, "transformers.models.auto.configuration_auto")
    wrapt.register_post_import_hook(_enter_models, "transformers.models.auto.modeling_auto")
