"""Exits and gates of checkpoints: those of DeeBERT (`BertHighway…`), SmartBERT, SENTEE and TOKEE, and new ones."""

import re
from typing import Any

import torch
from torch import Tensor

from ..configuration import TRBertConfig
from ..errors import ConfigurationError
from ..modeling import TRBertPreTrainedModel
from ..tasks.registry import task_of_model

# Names of each system → TR-BERT's, in the order in which they are tried.
_DEEBERT = [
    (r"\bencoder\.highway\.(\d+)\.pooler\.dense\.", r"encoder.exits.\1.dense."),
    (r"\bencoder\.highway\.(\d+)\.classifier\.", r"encoder.exits.\1.classifier."),
]
_SMARTBERT = [
    (r"^embedding\.", "bert.embeddings."),
    (r"^encoder\.", "bert.encoder."),
    (r"^gate\.(\d+)\.output_layer_0\.", r"bert.encoder.gates.\1.attention.narrow."),
    (r"^gate\.(\d+)\.atten\.", r"bert.encoder.gates.\1.attention."),
    (r"^gate\.(\d+)\.output_layer_1\.", r"bert.encoder.gates.\1.linear."),
    (r"^classifier\.(\d+)\.output_layer_0\.", r"bert.encoder.exits.\1.attention.narrow."),
    (r"^classifier\.(\d+)\.atten\.", r"bert.encoder.exits.\1.attention."),
    (r"^classifier\.(\d+)\.output_layer_1\.", r"bert.encoder.exits.\1.dense."),
    (r"^classifier\.(\d+)\.output_layer_2\.", r"bert.encoder.exits.\1.classifier."),
]
_SMARTBERT_TRAINING = re.compile(r"^(contrast\.\d+|classifier\.\d+\.main)\.")
_WORDS = [(r"^ptm_encoder\.", "bert."), (r"^classfiers\.(\d+)\.w\.", r"bert.encoder.exits.\1.classifier.")]


def read_exits(raw: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and tensors of a checkpoint by TR-BERT's names; other checkpoints are returned as they are.

    These systems do not save thresholds, so nothing leaves until some are given. What only their training uses is left
    out.
    """
    if any(".highway." in name for name in tensors):
        tensors = _renamed(tensors, _DEEBERT)
        layers = range(1 + _last(tensors, "exits"))
        return raw | {"model_type": _family(tensors), "exits": {"head": "first", "layers": list(layers)}}, tensors
    if "gate.0.output_layer_0.weight" in tensors:
        tensors = {name: value for name, value in tensors.items() if not _SMARTBERT_TRAINING.match(name)}
        tensors = _renamed(tensors, _SMARTBERT)
        size = tensors["bert.encoder.exits.0.attention.narrow.weight"].shape[0]
        gate_size = tensors["bert.encoder.gates.0.attention.narrow.weight"].shape[0]
        exits: dict[str, Any] = {
            "head": "attention",
            "layers": list(range(1 + _last(tensors, "exits"))),
            "answers_all": True,
            "size": size,
            "heads": raw.get("classifier_heads", 4),
        }
        gates = {"size": gate_size, "heads": raw.get("gate_heads", 2)}
        return raw | {"model_type": "bert", "exits": exits, "gates": gates}, tensors
    if "classfiers.0.w.weight" in tensors:
        tensors = {name: value for name, value in tensors.items() if not name.startswith("ptm_encoder.pooler.")}
        tensors = _renamed(tensors, _WORDS)
        last = _last(tensors, "exits")  # the model's own classifier
        tensors = {name.replace(f"bert.encoder.exits.{last}.", ""): value for name, value in tensors.items()}
        exits = {"head": "words", "layers": list(range(last)), "unit": "word"}
        return raw | {"model_type": "bert", "exits": exits}, tensors
    return raw, tensors


def with_exits(
    model: TRBertPreTrainedModel, exits: dict[str, Any] | None = None, gates: dict[str, Any] | None = None
) -> TRBertPreTrainedModel:
    """The model with new exits and gates instead of its own, in eval mode.

    Nothing leaves and no layer is skipped until thresholds are set, so the outputs are those of the model. Exits begin
    with the weights of its pooler and of its classifier, as far as they have such modules.

    Args:
        exits: fields of `ExitOptions`. Default of `layers`: all but the last. None keeps the model's.
        gates: fields of `GateOptions`. None keeps the model's.

    Raises:
        ConfigurationError: an option is invalid, the model's task has no such exits, or its last exit is its classifier
            (`answers_all`), which new ones cannot replace.
    """
    own, replaced = model.config.exit_options, []
    fields = model.config.to_dict()
    if exits is not None:
        if (own is not None and own.answers_all) or exits.get("answers_all"):
            raise ConfigurationError("exits: an exit that answers for all is the model's classifier; train a new one")
        fields["exits"] = {"layers": list(range(model.config.num_hidden_layers - 1))} | exits
        replaced.append(".exits.")
    if gates is not None:
        fields["gates"] = gates
        replaced.append(".gates.")
    config = TRBertConfig.from_dict(fields)
    task_of_model(model).check(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same new exits at every conversion
        new = type(model)(config)
    kept = {name: value for name, value in model.state_dict().items() if not any(part in name for part in replaced)}
    new.load_state_dict(kept, strict=False)
    if exits is not None:
        for head in new.base_model.encoder.exits:
            if config.exits["head"] == "first":
                bias = {"bias": torch.zeros_like(head.dense.bias)}  # ModernBERT's has none
                head.dense.load_state_dict(bias | new.base_model.pooler.dense.state_dict())
            if config.exits["head"] in ("first", "words"):
                head.classifier.load_state_dict(new.classifier.state_dict())
    return new.eval()


def _renamed(tensors: dict[str, Tensor], names: list[tuple[str, str]]) -> dict[str, Tensor]:
    renamed = {}
    for name, value in tensors.items():
        for old, new in names:
            if re.search(old, name):
                name = re.sub(old, new, name)
                break
        renamed[name] = value
    return renamed


def _last(tensors: dict[str, Tensor], module: str) -> int:
    found = (re.search(rf"encoder\.{module}\.(\d+)\.", name) for name in tensors)
    return max(int(match[1]) for match in found if match)


def _family(tensors: dict[str, Tensor]) -> str:
    return "roberta" if any(name.startswith("roberta.") for name in tensors) else "bert"
