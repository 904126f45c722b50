"""Checkpoints of transformers' BERT and DistilBERT and of the original TR-BERT, read as TR-BERT models.

What a checkpoint is, is told by its tensors, because the original's directories and old transformers ones name their
classes inconsistently. Weights are read from safetensors only: nothing is unpickled.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from .configuration import TRBertConfig
from .errors import CheckpointError, ConfigurationError
from .modeling import (
    TRBertForMultipleChoice,
    TRBertForQuestionAnswering,
    TRBertForSequenceClassification,
    TRBertModel,
    TRBertPreTrainedModel,
)

# DistilBERT's names to BERT's, inside a layer; the original TR-BERT keeps both families' names.
_DISTILBERT_LAYER = {
    "attention.q_lin": "attention.self.query",
    "attention.k_lin": "attention.self.key",
    "attention.v_lin": "attention.self.value",
    "attention.out_lin": "attention.output.dense",
    "sa_layer_norm": "attention.output.LayerNorm",
    "ffn.lin1": "intermediate.dense",
    "ffn.lin2": "output.dense",
    "output_layer_norm": "output.LayerNorm",
}
# Parts of a checkpoint that no TR-BERT has: pre-training heads and buffers that were stored once.
_IGNORED = re.compile(r"^(cls\.|vocab_|bert\.embeddings\.(position_ids|token_type_ids)$)")
_HEADS = {
    "classification": TRBertForSequenceClassification,
    "question-answering": TRBertForQuestionAnswering,
    "multiple-choice": TRBertForMultipleChoice,
    "none": TRBertModel,
}
# What an adapter holds: low-rank updates of the layers' matrices, and the small modules whole.
LORA_TARGETS = r".*\.encoder\.layer\.\d+\..*(query|key|value|dense)"
MODULES_TO_SAVE = ["classifier", "qa_outputs", "pooler", "linear_1", "linear_2"]
MODULES_TO_SAVE += ["word_weight", "asks", "answers", "evidence"]  # of selectors that know the question

_HEAD_TENSOR = {"classification": "classifier.weight", "question-answering": "qa_outputs.weight"}


def convert_checkpoint(
    src: str | Path,
    *,
    task: str | None = None,
    labels: Sequence[str] | None = None,
    fresh_head: bool = False,
    reduction_layers: list[int] | None = None,
    selector_size: int | None = None,
    question_aware: bool = False,
    max_positions: int | None = None,
) -> TRBertPreTrainedModel:
    """Read a checkpoint directory as a TR-BERT model, in eval mode and fp32.

    Selectors come from the checkpoint if it has them (the original's format); otherwise they are fresh and keep
    every token, so that the converted model answers as its source did until they are trained.

    Args:
        src: a directory with config.json and safetensors weights: transformers BERT or DistilBERT, or the original
            TR-BERT (BERT classification, BERT span QA, DistilBERT classification), or a model saved by this package,
            whose selectors are replaced by fresh ones.
        task: "classification", "question-answering", "multiple-choice" or "none"; default: the head the checkpoint
            has, where one with a single output is a classifier's unless the checkpoint says that it chooses.
        labels: give the model a fresh classification head with these labels, whatever head the checkpoint has.
        fresh_head: give the model a fresh head for the task, whatever head the checkpoint has.
        reduction_layers: zero-based layers with a selector; default: the paper's. The original's checkpoints fix
            their own.
        selector_size: width of fresh selectors' hidden layer; default: 32, the paper's.
        question_aware: fresh selectors know the question (`TRBertConfig.question_aware`).
        max_positions: extend the position table to so many, the new ones beginning as copies of the old in their
            order (Longformer's way): to be trained, for until then a token far behind looks like one at the front.

    Raises:
        ConfigurationError: fewer positions than the checkpoint has.
        CheckpointError: no safetensors weights, another architecture, tensors missing or left over, or a task the
            checkpoint has no head for.
    """
    src = Path(src)
    raw_config, tensors = _read(src)
    kind = str(raw_config.get("model_type", "bert"))
    if kind not in ("bert", "distilbert", TRBertConfig.model_type):  # others may mean something else by the same names
        raise CheckpointError(f"{src}: a {kind} checkpoint, not a BERT, DistilBERT or original TR-BERT to convert")
    if kind == TRBertConfig.model_type:
        tensors = {name: value for name, value in tensors.items() if ".selectors." not in name}
    selectors_stored = any(".linear_1." in name for name in tensors)
    if selectors_stored and reduction_layers is not None:
        raise CheckpointError(f"{src}: its selectors belong to its own layers; reduction_layers cannot be chosen")
    state = {new: value for name, value in tensors.items() if not _IGNORED.match(new := _bert_name(name))}
    if not any(name.startswith("bert.encoder.layer.") for name in state):
        raise CheckpointError(f"{src}: no BERT or DistilBERT encoder among its tensors (first: {sorted(tensors)[:3]})")

    if max_positions is not None:
        _extend_positions(state, max_positions, src)
    found = _found_task(raw_config, state, asked=task)
    if labels is not None or fresh_head:
        state = {name: value for name, value in state.items() if name.startswith("bert.")}
        task = "classification" if labels is not None else task
    task = task or found
    if task not in _HEADS:
        raise CheckpointError(f"task {task!r} is none of {', '.join(_HEADS)}")
    if not fresh_head and labels is None and task not in (found, "none"):
        raise CheckpointError(
            f"{src}: it has no head for {task} (its head: {found}); fine-tune it for the task, or train with "
            "jobs/train.py, which gives it a fresh one"
        )

    config = _config(raw_config, state, task, labels, reduction_layers)
    if selector_size is not None and not selectors_stored:
        config.selector_size = selector_size
    config.question_aware = question_aware and not selectors_stored
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same fresh selectors and head at every conversion
        model = _HEADS[task](config)
        for selector in model.base_model.encoder.selectors:
            selector.start_afresh()
        if config.question_aware:
            config.selector_thresholds = [0.0] * len(config.reduction_layers)  # all tokens go on
    if task == "none":
        state = {name.removeprefix("bert."): value for name, value in state.items() if name.startswith("bert.")}
    if model.base_model.pooler is None:
        state = {name: value for name, value in state.items() if not name.startswith("bert.pooler.")}
    missing, unexpected = model.load_state_dict(state, strict=False)
    fresh = ["pooler."] if labels is not None or fresh_head or task == "none" else []
    fresh += ["classifier.", "qa_outputs."] if labels is not None or fresh_head else []
    fresh += [] if selectors_stored else ["encoder.selectors."]
    missing = [name for name in missing if not any(part in name for part in fresh)]
    if missing or unexpected:
        raise CheckpointError(
            f"{src}: not a complete checkpoint for {task}: missing {missing[:5]}, left over {unexpected[:5]}"
        )
    return model.eval()


def apply_adapter(backbone: str | Path, adapter: str | Path) -> TRBertPreTrainedModel:
    """A backbone checkpoint and an adapter that `jobs/train.py --adapter-rank` saved → the trained model.

    Raises:
        CheckpointError: the adapter is incomplete or was trained on another backbone's shapes.
    """
    from peft import PeftModel

    adapter = Path(adapter)
    for name in ("config.json", "adapter_config.json", "adapter_model.safetensors"):
        if not (adapter / name).is_file():
            raise CheckpointError(f"{adapter}: no {name} there; an adapter is what jobs/train.py --adapter-rank saves")
    trained = TRBertConfig.from_pretrained(adapter)
    answers = TRBertForQuestionAnswering.__name__ in (trained.architectures or [])
    head: dict[str, Any] = {"labels": [trained.id2label[i] for i in range(trained.num_labels)]}
    model = convert_checkpoint(
        backbone,
        **({"task": "question-answering", "fresh_head": True} if answers else head),
        reduction_layers=trained.reduction_layers,
        selector_size=trained.selector_size,
        question_aware=trained.question_aware,
        max_positions=trained.max_position_embeddings,
    )
    try:
        model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{adapter}: does not fit the backbone {backbone}: {error}") from error
    model.config.selector_thresholds = trained.selector_thresholds
    return model.eval()


def _read(src: Path) -> tuple[dict, dict[str, Tensor]]:
    """config.json and all tensors of a checkpoint directory, as fp32."""
    if not (src / "config.json").is_file():
        raise CheckpointError(f"{src}: no config.json there; a checkpoint is a directory with config.json and weights")
    config = json.loads((src / "config.json").read_text())
    index = src / "model.safetensors.index.json"
    if index.is_file():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    elif (src / "model.safetensors").is_file():
        files = ["model.safetensors"]
    elif any(src.glob("*.bin")) or any(src.glob("*.pt")):
        raise CheckpointError(f"{src}: only pickled weights there, which are not read; save them as safetensors first")
    else:
        raise CheckpointError(f"{src}: no model.safetensors there")
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors.update(load_file(src / file))
        except Exception as error:
            raise CheckpointError(f"{src / file}: cannot be read as safetensors: {error}") from error
    return config, {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}


def _bert_name(name: str) -> str:
    """A tensor's name in any of the source formats → its name in TRBertFor…"""
    name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
    name = name.replace("distilbert.transformer.", "bert.encoder.").replace("distilbert.", "bert.")
    name = re.sub(r"^transformer\.layer\.", "bert.encoder.layer.", name)
    name = re.sub(r"^(embeddings|encoder|pooler)\.", r"bert.\1.", name)
    name = re.sub(r"^pre_classifier\.", "bert.pooler.dense.", name)
    name = re.sub(r"\.encoder\.(linear_[12])\.(\d+)\.", r".encoder.selectors.\2.\1.", name)
    if match := re.match(r"(bert\.encoder\.layer\.\d+\.)(.+)(\.(?:weight|bias))$", name):
        name = match[1] + _DISTILBERT_LAYER.get(match[2], match[2]) + match[3]
    return name


def _found_task(raw: dict, state: dict[str, Tensor], asked: str | None) -> str:
    """The task of the head a checkpoint has. Choosing among options and regression have the same tensors, so that
    the checkpoint's class or the caller must say."""
    chooses = asked == "multiple-choice" or any("MultipleChoice" in name for name in raw.get("architectures") or [])
    if chooses and state.get("classifier.weight", torch.empty(0)).shape[:1] == (1,):
        return "multiple-choice"
    return next((task for task, tensor in _HEAD_TENSOR.items() if tensor in state), "none")


def _extend_positions(state: dict[str, Tensor], positions: int, src: Path) -> None:
    name = "bert.embeddings.position_embeddings.weight"
    table = state[name]
    if positions < len(table):
        raise ConfigurationError(f"max_positions {positions}: {src} has {len(table)} positions already")
    state[name] = table.repeat(-(-positions // len(table)), 1)[:positions].clone()


def _config(
    raw: dict, state: dict[str, Tensor], task: str, labels: Sequence[str] | None, reduction_layers: list[int] | None
) -> TRBertConfig:
    distilbert = "dim" in raw
    words = state["bert.embeddings.word_embeddings.weight"]
    fields = {
        "vocab_size": words.shape[0],
        "hidden_size": words.shape[1],
        "num_hidden_layers": 1 + max(int(m[1]) for m in map(re.compile(r".*\.layer\.(\d+)\.").match, state) if m),
        "num_attention_heads": raw["n_heads" if distilbert else "num_attention_heads"],
        "intermediate_size": state["bert.encoder.layer.0.intermediate.dense.weight"].shape[0],
        "max_position_embeddings": state["bert.embeddings.position_embeddings.weight"].shape[0],
        "hidden_act": raw.get("activation" if distilbert and "activation" in raw else "hidden_act", "gelu"),
        "hidden_dropout_prob": raw.get("dropout" if distilbert else "hidden_dropout_prob", 0.1),
        "attention_probs_dropout_prob": raw.get(
            "attention_dropout" if distilbert else "attention_probs_dropout_prob", 0.1
        ),
        "layer_norm_eps": raw.get("layer_norm_eps", 1e-12),
        "pad_token_id": raw.get("pad_token_id", 0),
        "reduction_layers": reduction_layers,
    }
    if distilbert:
        # DistilBERT has no token types; zero embeddings for BERT's two say the same.
        fields |= {"pooler_activation": "relu", "classifier_dropout": raw.get("seq_classif_dropout", 0.2)}
        state["bert.embeddings.token_type_embeddings.weight"] = torch.zeros(2, words.shape[1])
    else:
        fields["classifier_dropout"] = raw.get("classifier_dropout")
        fields["pooler_activation"] = raw.get("pooler_activation", "tanh")
    fields["type_vocab_size"] = state["bert.embeddings.token_type_embeddings.weight"].shape[0]
    selector = state.get("bert.encoder.selectors.0.linear_1.weight")
    if selector is not None:
        fields["selector_size"] = selector.shape[0]
    if labels is not None:
        fields |= {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    elif task == "classification":
        fields |= {"num_labels": state["classifier.weight"].shape[0], "problem_type": raw.get("problem_type")}
        if "id2label" in raw:
            id2label = {int(i): label for i, label in raw["id2label"].items()}
            fields |= {"id2label": id2label, "label2id": {label: i for i, label in id2label.items()}}
            del fields["num_labels"]
    return TRBertConfig(**fields)
