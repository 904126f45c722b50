"""Conversion of BERT, DistilBERT, RoBERTa, XLM-R, ModernBERT and original TR-BERT checkpoints to TR-BERT models.

The tensors determine a checkpoint's head, because the original's checkpoints and old transformers ones name their
classes inconsistently. Weights are read from safetensors only, nothing is unpickled.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backbones import BACKBONES, Backbone
from ..backbones.roberta import RobertaBackbone
from ..configuration import TRBertConfig
from ..errors import CheckpointError, ConfigurationError, TRBertError
from ..modeling import TRBertModel, TRBertPreTrainedModel
from ..tasks.classification.task import ClassificationTask
from ..tasks.multiple_choice.head import TRBertForMultipleChoice
from ..tasks.registry import KINDS, MULTIPLE_CHOICE, NO_TASK, TASKS, task_of
from ..tasks.token_classification.task import TokenClassificationTask
from .early_exits import read_exits, with_exits
from .files import saved_files
from .source import read_config, without_wrappers

# Modules that an adapter holds in full, in addition to low-rank updates of the layers (`Backbone.lora_targets`).
MODULES_TO_SAVE = [*dict.fromkeys(module for task in TASKS.values() for module in task.head_modules), "pooler"]
MODULES_TO_SAVE += ["linear_1", "linear_2"]  # of selectors
MODULES_TO_SAVE += ["word_weight", "asks", "answers", "evidence"]  # of question-aware selectors

# Configuration fields of the selectors.
_SELECTOR_FIELDS = (
    "reduction_layers", "selector_size", "selector_thresholds", "question_aware", "question_layers"
)  # fmt: skip

# Names of the heads of exits and gates.
_EARLY = re.compile(r"bert\.encoder\.(exits|gates)\.")


def convert_checkpoint(
    src: str | Path,
    *,
    task: str | None = None,
    head: dict[str, Any] | None = None,
    reduction_layers: list[int] | None = None,
    selector_size: int | None = None,
    question_aware: bool = False,
    max_positions: int | None = None,
    text_pairs: bool = False,
    keep_selectors: bool = False,
    exits: dict[str, Any] | None = None,
    gates: dict[str, Any] | None = None,
) -> TRBertPreTrainedModel:
    """Convert a checkpoint directory to a TR-BERT model, in eval mode and fp32.

    Selectors come from the checkpoint if it has them (the original's format). Otherwise they are newly initialised and
    keep every token, so that the outputs are those of the source model until the selectors are trained.

    Args:
        src: a directory with config.json and safetensors weights: transformers BERT, DistilBERT, RoBERTa, XLM-R or
            ModernBERT, or the original TR-BERT (BERT classification, BERT span QA, DistilBERT classification), or a
            model saved by this package, whose selectors are replaced by new ones, unless `keep_selectors`.
        task: one of `KINDS`. Default: the task of the checkpoint's head. A single output means regression, unless the
            checkpoint's class is a multiple-choice model.
        head: configuration fields of a new head for the task (`Task.learnt_head`), which replaces the checkpoint's.
        reduction_layers: zero-based layers with a selector. Default: the paper's. Not allowed for the original's
            checkpoints, which determine them.
        selector_size: width of the hidden layer of new selectors. Default: 32, as in the paper.
        question_aware: new selectors use the question (`TRBertConfig.question_aware`).
        max_positions: extend the position table to this many positions. New ones are initialised with copies of the
            existing ones, in order, as in Longformer. The model must then be trained: until then it cannot tell a new
            position from the one that it was copied from. ModernBERT has no table and computes any position, but its
            layers have not seen greater distances either.
        text_pairs: the checkpoint's classifier was fine-tuned on pairs of texts (`TRBertConfig.text_pairs`), which
            nothing in a transformers checkpoint says.
        keep_selectors: keep the selectors of a model saved by this package, with their thresholds, unless other
            `reduction_layers` are given.
        exits, gates: as for `with_exits`.

    Raises:
        ConfigurationError: `max_positions` is less than the checkpoint has, `text_pairs` for another task, or an option
            is invalid.
        CheckpointError: no safetensors weights, another architecture, a damaged configuration or one that does not fit
            the weights, missing or unexpected tensors, or a task that the checkpoint has no head for.
    """
    src = Path(src)
    try:
        model = _converted(
            src, task, head, reduction_layers, selector_size, question_aware, max_positions, text_pairs, keep_selectors
        )
        return model if exits is None and gates is None else with_exits(model, exits, gates)
    except TRBertError:
        raise
    except Exception as error:  # whatever else transformers and torch find wrong with a configuration or a tensor
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{src}: its config.json and weights make no model ({type(error).__name__}: {reason})"
        ) from error


def _converted(
    src: Path,
    task: str | None,
    head: dict[str, Any] | None,
    reduction_layers: list[int] | None,
    selector_size: int | None,
    question_aware: bool,
    max_positions: int | None,
    text_pairs: bool,
    keep_selectors: bool,
) -> TRBertPreTrainedModel:
    raw_config, tensors = _read(src)
    kind = raw_config["model_type"]
    backbone = _backbone(raw_config, kind)
    if backbone is None:  # other architectures may use the same tensor names differently
        raise CheckpointError(
            f"{src}: a {kind} checkpoint, not a BERT, DistilBERT, RoBERTa, XLM-R, ModernBERT or original TR-BERT to "
            "convert"
        )
    family = BACKBONES[backbone]
    kept: dict[str, Any] = {}
    if (
        kind == TRBertConfig.model_type
        and keep_selectors
        and reduction_layers in (None, raw_config.get("reduction_layers"))
    ):
        kept = {name: raw_config[name] for name in _SELECTOR_FIELDS if name in raw_config}
        reduction_layers = None
    elif kind == TRBertConfig.model_type:
        tensors = {name: value for name, value in tensors.items() if ".selectors." not in name}
    selectors_stored = any(".linear_1." in name for name in tensors)
    if selectors_stored and reduction_layers is not None:
        raise CheckpointError(f"{src}: its selectors belong to its own layers; reduction_layers cannot be chosen")
    state = _state(tensors, family, raw_config, src)
    if not any(name.startswith("bert.encoder.layer.") for name in state):
        raise CheckpointError(f"{src}: no {backbone} encoder among its tensors (first: {sorted(tensors)[:3]})")

    if max_positions is not None:
        _extend_positions(state, raw_config, family, max_positions, src)
    asked, own_task = task, _task_of_head(raw_config, state, tensors, asked=task)
    if head is not None:
        raw_config = {name: value for name, value in raw_config.items() if name not in ("exits", "gates")}
        encoders = (name for name in state if name.startswith("bert.") and not _EARLY.match(name))
        state = {name: state[name] for name in encoders}
    task = task or own_task
    if task not in KINDS:
        raise CheckpointError(f"task {task!r} is none of {', '.join(KINDS)}")
    if head is None and asked != NO_TASK and (foreign := _foreign_head(raw_config, state, tensors, asked=asked)):
        raise CheckpointError(
            f"{src}: its head, {foreign}, is for none of the tasks {', '.join(KINDS[:-1])}; --task {NO_TASK} converts "
            "the encoder without it, and jobs/train.py gives it a new one"
        )
    if head is None and task not in (own_task, NO_TASK):
        raise CheckpointError(
            f"{src}: it has no head for {task} (its head: {own_task}); fine-tune it for the task, or train with "
            "jobs/train.py, which gives it a fresh one"
        )

    if text_pairs and task != ClassificationTask.name:
        raise ConfigurationError(f"{src}: text_pairs is for {ClassificationTask.name}; the task is {task}")
    if text_pairs:
        raw_config["text_pairs"] = True
    try:
        config = _config(raw_config, state, backbone, task, head, {"reduction_layers": reduction_layers} | kept)
    except ConfigurationError as error:
        raise ConfigurationError(f"{src}: {error}") from error
    if selector_size is not None and not selectors_stored:
        config.selector_size = selector_size
    if not kept:
        config.question_aware = question_aware and not selectors_stored
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same new selectors and head at every conversion
        model = _model_class(task)(config)
        for selector in model.base_model.encoder.selectors:
            selector.start_afresh()
        if config.question_aware and not kept:
            config.selector_thresholds = [0.0] * len(config.reduction_layers)  # keep all tokens
    if task == NO_TASK:
        state = {name.removeprefix("bert."): value for name, value in state.items() if name.startswith("bert.")}
    if model.base_model.pooler is None:
        state = {name: value for name, value in state.items() if not name.startswith("bert.pooler.")}
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if bad := [name for name, value in state.items() if tuple(value.shape) != shapes.get(name, tuple(value.shape))]:
        raise CheckpointError(
            f"{src}: {bad[0]} has shape {tuple(state[bad[0]].shape)}, in the model of its config.json {shapes[bad[0]]}"
        )
    missing, unexpected = model.load_state_dict(state, strict=False)
    fresh = ["pooler."] if head is not None or task == NO_TASK else []
    fresh += [f"{module}." for module in TASKS[task].head_modules] if head is not None else []
    fresh += [] if selectors_stored else ["encoder.selectors."]
    missing = [name for name in missing if not any(part in name for part in fresh)]
    if missing or unexpected:
        raise CheckpointError(
            f"{src}: not a complete checkpoint for {task}: missing {missing[:5]}, left over {unexpected[:5]}"
        )
    return model.eval()


def apply_adapter(backbone: str | Path, adapter: str | Path) -> TRBertPreTrainedModel:
    """Merge an adapter saved by `jobs/train.py --adapter-rank` into its backbone checkpoint.

    Raises:
        CheckpointError: the adapter is incomplete or does not fit the backbone's shapes.
    """
    from peft import PeftModel

    adapter = Path(adapter)
    for name in ("config.json", "adapter_config.json", "adapter_model.safetensors"):
        if not (adapter / name).is_file():
            raise CheckpointError(f"{adapter}: no {name} there; an adapter is what jobs/train.py --adapter-rank saves")
    trained = TRBertConfig.from_pretrained(adapter)
    task = task_of(trained)
    model = convert_checkpoint(
        backbone,
        task=task.name,
        head=task.fresh_head(trained),
        reduction_layers=trained.reduction_layers,
        selector_size=trained.selector_size,
        question_aware=trained.question_aware,
        max_positions=trained.usable_positions,
    )
    try:
        model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{adapter}: does not fit the backbone {backbone}: {error}") from error
    model.config.selector_thresholds = trained.selector_thresholds
    return model.eval()


def _read(src: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read config.json and all tensors of a checkpoint directory, floating-point tensors as fp32."""
    with saved_files(src) as files:
        config = read_config(src)
        tensors = files.weights()
    if "quantization_config" in config:
        raise CheckpointError(f"{src}: its weights are quantized (quantization_config); convert the full ones")
    config, tensors = read_exits(config, tensors)
    tensors, encoder = without_wrappers(tensors, src)
    config.setdefault("model_type", encoder or "bert")  # old checkpoints have none
    return config, {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}


def _state(tensors: dict[str, Tensor], family: Backbone, raw: dict[str, Any], src: Path) -> dict[str, Tensor]:
    """The tensors by TR-BERT's names, without those that it does not use."""
    state: dict[str, Tensor] = {}
    # Poolers first: RoBERTa's classifier has a layer of its own in this place, and does not use the encoder's.
    for name in sorted(tensors, key=lambda name: "pooler." not in name):
        new = family.tensor_name(name, raw)
        if family.ignored.match(new):
            continue
        if new in state and not new.startswith("bert.pooler."):
            raise CheckpointError(f"{src}: two tensors for {new}, one of them {name}")
        if not tensors[name].is_floating_point():
            raise CheckpointError(
                f"{src}: {name} holds integers; quantized weights are not read, convert the full ones"
            )
        state[new] = tensors[name]
    return state


def _backbone(raw: dict, kind: str) -> str | None:
    """The name of the backbone for a checkpoint's `model_type` `kind`; None if there is none."""
    if kind == TRBertConfig.model_type:
        return raw.get("backbone", "bert") if raw.get("backbone", "bert") in BACKBONES else None
    return next((name for name, family in BACKBONES.items() if kind in family.names), None)


def _task_of_head(raw: dict, state: dict[str, Tensor], tensors: dict[str, Tensor], asked: str | None) -> str:
    """The task of a checkpoint's head.

    Multiple choice and regression have the same tensors, so the checkpoint's class or `asked` decides between them.
    """
    chooses = asked == MULTIPLE_CHOICE or any("MultipleChoice" in name for name in raw.get("architectures") or [])
    if chooses and state.get("classifier.weight", torch.empty(0)).shape[:1] == (1,):
        return MULTIPLE_CHOICE
    if _answer(raw, state) is not None:
        return ClassificationTask.name
    if "classifier.weight" in state:
        of_tokens = _classifies_tokens(raw, state, tensors, asked)
        return TokenClassificationTask.name if of_tokens else ClassificationTask.name
    has = (name for name, task in TASKS.items() if all(f"{module}.weight" in state for module in task.head_modules))
    return next(has, NO_TASK)


def _answer(raw: dict, state: dict[str, Tensor]) -> Tensor | None:
    """The classifier's weight in the exit that answers for all, if the checkpoint has one."""
    exits = raw.get("exits") or {}
    if not exits.get("answers_all"):
        return None
    return state.get(f"bert.encoder.exits.{len(exits['layers']) - 1}.classifier.weight")


def _classifies_tokens(raw: dict, state: dict[str, Tensor], tensors: dict[str, Tensor], asked: str | None) -> bool:
    """Whether a classifier is of tokens, not of documents: by the checkpoint's class, or else by its tensors.

    RoBERTa's classifier of documents has two layers. BERT's and DistilBERT's has a pooler. BERT's old classifiers of
    tokens have one too, so `asked` decides.
    """
    classes = raw.get("architectures") or []
    if any(name.endswith(("ForTokenClassification", "ForSequenceClassification")) for name in classes):
        return any(name.endswith("ForTokenClassification") for name in classes)
    if raw["model_type"] in RobertaBackbone.names:
        return "classifier.weight" in tensors and len(tensors["classifier.weight"]) > 1
    return "bert.pooler.dense.weight" not in state if asked is None else asked == TokenClassificationTask.name


def _foreign_head(
    raw: dict[str, Any], state: dict[str, Tensor], tensors: dict[str, Tensor], asked: str | None
) -> str | None:
    """What shows that a checkpoint's head is of no task here: the name of a tensor."""
    # RoBERTa's classifier of documents has two layers.
    of_documents = _task_of_head(raw, state, tensors, asked) == ClassificationTask.name
    if raw["model_type"] in RobertaBackbone.names and "classifier.weight" in tensors and of_documents:
        return "classifier.weight"
    heads = {module for task in TASKS.values() for module in task.head_modules}
    unknown = (name for name in state if not name.startswith("bert.") and name.rpartition(".")[0] not in heads)
    return next(unknown, None)


def _model_class(task: str) -> type[TRBertPreTrainedModel]:
    if task in TASKS:
        return TASKS[task].model_class()
    return TRBertForMultipleChoice if task == MULTIPLE_CHOICE else TRBertModel


def _extend_positions(
    state: dict[str, Tensor], raw: dict[str, Any], family: Backbone, positions: int, src: Path
) -> None:
    """Extend the position table in `state` by repeating it; without a table, the number of positions in `raw`."""
    name = "bert.embeddings.position_embeddings.weight"
    pad = raw.get("pad_token_id")
    offset = family.position_offset(family.pad_token_id if pad is None else pad)
    present = len(state[name]) - offset if name in state else raw.get("max_position_embeddings", 0)
    if positions < present:
        raise ConfigurationError(f"max_positions {positions}: {src} has {present} positions already")
    if name in state:
        head, table = state[name][:offset], state[name][offset:]
        state[name] = torch.cat([head, table.repeat(-(-positions // len(table)), 1)[:positions]])
    else:
        raw["max_position_embeddings"] = positions


def _config(
    raw: dict,
    state: dict[str, Tensor],
    backbone: str,
    task: str,
    head: dict[str, Any] | None,
    selectors: dict[str, Any],
) -> TRBertConfig:
    fields = BACKBONES[backbone].config_fields(raw, state) | {
        "backbone": backbone,
        "exits": raw.get("exits"),
        "gates": raw.get("gates"),
    }
    selector = state.get("bert.encoder.selectors.0.linear_1.weight")
    if selector is not None:
        fields["selector_size"] = selector.shape[0]
    if head is None and task in TASKS:
        answer = _answer(raw, state)
        head = TASKS[task].saved_head(raw, state if answer is None else {**state, "classifier.weight": answer})
    fields |= (head or {}) | selectors
    config = TRBertConfig(**fields)
    if task in TASKS:
        TASKS[task].check(config)
    return config
