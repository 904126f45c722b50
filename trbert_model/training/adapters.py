"""Low-rank adapters in training."""

import copy
from typing import Any

from ..backbones import BACKBONES
from ..checkpoints.conversion import MODULES_TO_SAVE
from .config import TrainingConfig

# A task's model, or peft's wrapper around one, which forwards all attributes.
AnyModel = Any


def merged_copy(model: AnyModel) -> AnyModel:
    """A copy of the model, with its adapter, if any, merged into the weights."""
    duplicate = copy.deepcopy(model)
    return duplicate.merge_and_unload() if hasattr(duplicate, "merge_and_unload") else duplicate


def with_adapter(model: AnyModel, config: TrainingConfig) -> AnyModel:
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=config.adapter_rank,
        lora_alpha=2 * (config.adapter_rank or 0),
        lora_dropout=0.0,
        target_modules=BACKBONES[model.config.backbone].lora_targets,
        modules_to_save=MODULES_TO_SAVE,
    )
    adapted = get_peft_model(model, lora)
    # A local path is useless on other machines, and peft would look up a name on the model hub.
    adapted.peft_config["default"].base_model_name_or_path = None
    return adapted
