"""Training a TR-BERT classifier in three stages: dense fine-tune, selectors by imitation, everything together.

1. `fine_tune`: the plain BERT on the task, reduction off.
2. `imitation`: everything but the selectors frozen. Each selector learns, by binary cross-entropy, the tokens that the
   guide ranks highest: abs⟨∂loss/∂h_d, h_d − h_i⟩ per token (thunlp/TR-BERT's saliency), the top r·n of them. The
   selectors meet the tokens that they themselves let through, as they will when they are used.
3. `joint`: everything but the selectors on the task, with the selectors' hard choices in place.

After stages 2 and 3 the selectors' thresholds are set so that the mean kept fractions on training documents are the
ones the FLOPs speed-up asked for implies. Reinforcement of the selectors (the paper's own signal) belongs between 2
and 3. The loop itself, checkpoints and resuming are transformers' Trainer.
"""

import copy
import dataclasses
import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from .configuration import TRBertConfig
from .convert import LORA_TARGETS, MODULES_TO_SAVE, convert_checkpoint
from .engine import Engine, EngineOptions
from .errors import ConfigurationError, InputError
from .flops import dense_flops, reduced_flops
from .modeling import Selection, TRBertForSequenceClassification
from .options import option
from .tasks.classification import ClassificationTask
from .varlen import VarlenBatch, first_tokens

logger = logging.getLogger(__name__)

# A TRBertForSequenceClassification, or peft's wrapper around one, which passes everything on.
Model = Any


@dataclass(frozen=True)
class TrainingConfig:
    """Everything a training run depends on."""

    train: str = option("", "Parquet file or URI with the training documents")
    backbone: str = option("", "directory of a BERT or DistilBERT checkpoint")
    output: str = option("", "directory for the trained model; a killed run resumes from its stages/")
    evaluation: str | None = option(None, "Parquet file or URI with documents to measure each stage on")
    text_column: str = option("text", "column with the documents")
    label_column: str = option("label", "column with the labels")
    speedup: float = option(2.5, "FLOPs speed-up over the dense model that the selectors are taught")
    reduction_layers: tuple[int, ...] | None = option(None, "zero-based layers with a selector (default: the paper's)")
    adapter_rank: int | None = option(
        None, "train a low-rank adapter of this rank, saved apart too, and no full weights"
    )
    batch_size: int = option(16, "documents in a step")
    fine_tune_epochs: float = option(3.0, "epochs of the dense fine-tune")
    imitation_epochs: float = option(1.0, "epochs of the selectors alone")
    joint_epochs: float = option(1.0, "epochs of everything, with the selectors choosing")
    learning_rate: float = option(1e-4, "of the dense fine-tune")
    joint_learning_rate: float = option(5e-5, "of the joint stage")
    selector_learning_rate: float = option(1e-3, "of the selectors")
    warmup: float = option(0.1, "share of a stage's steps in which the learning rate rises")
    attention_dropout: float = option(0.0, "torch's CPU flash attention knows none; more than 0 trains slower")
    seed: int = option(0, "of everything random")
    dtype: str = option("float32", "float32, or bfloat16 for autocast")

    def __post_init__(self):
        for name in ("train", "backbone", "output"):
            if not getattr(self, name):
                raise ConfigurationError(f"{name} is required")
        if self.speedup <= 1:
            raise ConfigurationError(f"speedup {self.speedup} must be more than 1")
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigurationError(f"dtype {self.dtype!r} is neither float32 nor bfloat16")


@dataclass(frozen=True)
class LabelledCorpus:
    """Documents as token ids, int32 (tokens,) each, with label indices, and the label names."""

    documents: list[np.ndarray]
    labels: list[int]
    names: list[str]


def train(config: TrainingConfig) -> dict:
    """Run all stages and save the model, its tokenizer and, with `adapter_rank`, the adapter alone.

    Returns the measurements, also written to `output/training.json`: each stage's accuracy and FLOPs speed-up on
    `evaluation` where one is given.
    """
    torch.manual_seed(config.seed)
    output = Path(config.output)
    texts, labels = read_labelled(config.train, config.text_column, config.label_column)
    names = sorted(set(labels))
    layers = None if config.reduction_layers is None else list(config.reduction_layers)
    model: Model = convert_checkpoint(config.backbone, labels=names, reduction_layers=layers)
    model.config.attention_probs_dropout_prob = config.attention_dropout
    for layer in model.bert.encoder.layer:
        layer.attention.self.dropout.p = config.attention_dropout
    tokenizer = AutoTokenizer.from_pretrained(config.backbone, local_files_only=True)
    if model.config.reduction_layers and model.config.reduction_layers[-1] >= _deep_layer(model.config):
        raise ConfigurationError(
            f"reduction layers {model.config.reduction_layers} cannot be taught by imitation: the guide judges layers "
            f"below {_deep_layer(model.config)} of this model"
        )
    _bind_stages(output / "stages", config)
    task = ClassificationTask(tokenizer, model.config.max_position_embeddings)
    corpus = LabelledCorpus(task.tokenize(texts), [names.index(label) for label in labels], names)
    evaluation = None
    if config.evaluation:
        texts, labels = read_labelled(config.evaluation, config.text_column, config.label_column)
        if unknown := sorted(set(labels) - set(names)):
            raise InputError(f"{config.evaluation}: labels {unknown[:5]} do not occur in {config.train}")
        evaluation = LabelledCorpus(task.tokenize(texts), [names.index(label) for label in labels], names)

    lengths = np.array([len(w.input_ids) for document in corpus.documents for w in task.windows(document)])
    fractions = kept_fractions_for(config.speedup, model.config, lengths)
    logger.info("kept fractions for %.2fx fewer FLOPs: %s", config.speedup, [round(f, 3) for f in fractions])
    if config.adapter_rank:
        model = _with_adapter(model, config)
    measurements: dict = {"config": dataclasses.asdict(config), "kept_fractions": fractions, "stages": {}}

    def finish(stage: str, reduce: bool) -> None:
        if evaluation is not None:
            measured = evaluate(model, tokenizer, evaluation, reduce=reduce)
            measurements["stages"][stage] = measured
            logger.info("%s: %s", stage, measured)

    dataset = WindowDataset(corpus, task)
    _run_stage("fine_tune", StageTrainer, model, dataset, config, config.fine_tune_epochs, config.learning_rate)
    finish("fine_tune", reduce=False)
    _run_stage(
        "imitation",
        ImitationTrainer,
        model,
        dataset,
        config,
        config.imitation_epochs,
        config.selector_learning_rate,
        fractions=fractions,
    )
    calibrate_thresholds(model, dataset, fractions)
    finish("imitation", reduce=True)
    _run_stage("joint", StageTrainer, model, dataset, config, config.joint_epochs, config.joint_learning_rate)
    calibrate_thresholds(model, dataset, fractions)
    finish("joint", reduce=True)
    finish("joint_without_reduction", reduce=False)

    _save(model, tokenizer, config, output)
    (output / "training.json").write_text(json.dumps(measurements, indent=1) + "\n")
    return measurements


def _bind_stages(stages: Path, config: TrainingConfig) -> None:
    """Stages resume; those of other options must not be taken for this run's."""
    record, options = stages / "config.json", json.loads(json.dumps(dataclasses.asdict(config)))
    if record.is_file() and json.loads(record.read_text()) != options:
        raise ConfigurationError(
            f"{stages}: trained with other options; remove it, or choose another output, to train anew"
        )
    stages.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(options, indent=1))


def read_labelled(uri: str, text_column: str, label_column: str) -> tuple[list[str], list[str]]:
    """Texts and labels (as strings) of a labelled Parquet file.

    Raises:
        InputError: the file cannot be read, a column is missing, a text or label is null, or there are fewer than two
            labels.
    """
    try:
        with fsspec.open(uri, "rb") as file:
            table = pq.read_table(file)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{uri}: cannot be read as Parquet: {error}") from error
    for column in (text_column, label_column):
        if column not in table.column_names:
            raise InputError(f"{uri}: no column {column!r}; its columns are {table.column_names}")
    for column in (text_column, label_column):
        if table[column].null_count:
            raise InputError(f"{uri}: {table[column].null_count} rows have no {column!r}; remove them first")
    labels = [str(label) for label in table[label_column].to_pylist()]
    if len(set(labels)) < 2:
        raise InputError(f"{uri}: column {label_column!r} has fewer than two different labels")
    texts = table[text_column].to_pylist()
    return [text.decode(errors="replace") if isinstance(text, bytes) else text for text in texts], labels


def kept_fractions_for(speedup: float, config: TRBertConfig, lengths: np.ndarray) -> list[float]:
    """Kept fractions r, r², … that spend 1/speedup of the dense FLOPs on sequences of these lengths.

    Raises:
        ConfigurationError: the layers before the first reduction alone cost more than that.
    """
    reductions = np.arange(1, len(config.reduction_layers) + 1)
    dense = dense_flops(config, lengths).sum()

    def speedup_at(r: float) -> float:
        kept = np.maximum(np.round(np.outer(lengths, r**reductions)), 1)
        return float(dense / reduced_flops(config, lengths, kept).sum())

    if not len(reductions) or speedup_at(0.0) < speedup:
        raise ConfigurationError(
            f"a FLOPs speed-up of {speedup} is out of reach with reduction layers {config.reduction_layers}: "
            f"keeping one token after each gives {speedup_at(0.0):.2f}; reduce earlier (layer 0 is allowed)"
        )
    low, high = 0.0, 1.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if speedup_at(middle) > speedup else (low, middle)
    return [float(low**i) for i in reductions]


class WindowDataset(Dataset):
    """One window of each document, of the several that a long one has a random one each time it is asked for."""

    def __init__(self, corpus: LabelledCorpus, task: ClassificationTask):
        self.windows = [[w.input_ids for w in task.windows(document)] for document in corpus.documents]
        self.labels = corpus.labels

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        windows = self.windows[index]
        return windows[int(torch.randint(len(windows), ()))], self.labels[index]


def collate(rows: Sequence[tuple[np.ndarray, int]]) -> dict[str, Tensor]:
    """Windows and labels → the model's keyword arguments, as one varlen batch."""
    batch = VarlenBatch.from_sequences([window for window, _ in rows])
    return {
        "input_ids": batch.input_ids,
        "token_type_ids": batch.token_type_ids,
        "position_ids": batch.position_ids,
        "cu_seqlens": batch.cu_seqlens,
        "labels": torch.tensor([label for _, label in rows]),
    }


class StageTrainer(Trainer):
    """The task's loss; `reduce` says whether the selectors choose."""

    def __init__(self, *args, stage: str, fractions: list[float] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.stage, self.fractions = stage, fractions or []

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        output = model(**inputs, reduce=self.stage != "fine_tune")
        return (output.loss, output) if return_outputs else output.loss


class ImitationTrainer(StageTrainer):
    """Binary cross-entropy of each selector to the guide's choice."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        model.eval()  # the guide and the states it judges must be those of inference
        scores = guide(model, inputs)
        labels = inputs.pop("labels")
        output = model(**inputs, output_selections=True)
        lengths = inputs["cu_seqlens"].diff()
        losses = []
        for selection, score, fraction in zip(output.selections, scores, self.fractions):
            chosen = top_tokens(score, inputs["cu_seqlens"], (lengths * fraction).round().long().clamp(min=1))
            target = chosen[selection.token_index].float()
            losses.append(F.binary_cross_entropy_with_logits(selection.logits, target))
        inputs["labels"] = labels
        loss = torch.stack(losses).sum()
        return (loss, output) if return_outputs else loss


def guide(model: Model, inputs: dict[str, Tensor]) -> list[Tensor]:
    """How much each token matters to the dense model's loss, one fp32 (total tokens,) a reduction layer.

    abs⟨∂loss/∂h_d, h_d − h_i⟩ with h_k the input of layer k (the original counts layer outputs from one, which is the
    same), d = 9 of 12 layers and 5 of 6, i the reduction layer.
    """
    config = model.config
    deep = _deep_layer(config)
    with torch.enable_grad():
        output = model(**inputs, reduce=False, output_hidden_states=True)
        # A sum, so that a document's gradients don't depend on the batch's size.
        loss = output.loss * len(inputs["labels"])
        (gradient,) = torch.autograd.grad(loss, output.hidden_states[deep])
    states = output.hidden_states
    return [
        (gradient * (states[deep] - states[layer])).sum(-1).abs().float().detach() for layer in config.reduction_layers
    ]


def _deep_layer(config: TRBertConfig) -> int:
    """Where the guide's gradient is taken: three quarters up, but below the top, where only [CLS] has a gradient."""
    return min(math.ceil(config.num_hidden_layers * 3 / 4), config.num_hidden_layers - 1)


def top_tokens(scores: Tensor, cu_seqlens: Tensor, counts: Tensor) -> Tensor:
    """The `counts[i]` highest-scored tokens of each sequence i, the first token always among them: bool, as scores."""
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    scores = scores.clone()
    scores[first_tokens(cu_seqlens)] = torch.inf
    bounds = cu_seqlens.tolist()
    for start, end, count in zip(bounds, bounds[1:], counts.tolist()):
        chosen[start + scores[start:end].topk(min(count, end - start)).indices] = True
    return chosen


@torch.no_grad()
def calibrate_thresholds(model: Model, dataset: WindowDataset, fractions: list[float], documents: int = 256) -> None:
    """Set the selectors' thresholds so that the mean kept fractions on training documents are `fractions`.

    One reduction after the other, because what a selector sees depends on the ones before it.
    """
    was_training = model.training
    model.eval()
    thresholds = model.config.selector_thresholds
    step = max(1, len(dataset) // documents)
    rows = [(dataset.windows[i][0], 0) for i in range(0, len(dataset), step)]
    device = next(model.parameters()).device
    batches = [
        {name: value.to(device) for name, value in collate(rows[start : start + 16]).items()}
        for start in range(0, len(rows), 16)
    ]
    for reduction, fraction in enumerate(fractions):
        selections: list[tuple[Selection, int]] = []
        for batch in batches:
            output = model(**batch, output_selections=True)
            selections.append((output.selections[reduction], len(batch["input_ids"])))
        # [CLS] stays whatever its probability, so it counts as kept and the quantile is over the others.
        others = torch.cat([_without_first(selection) for selection, _ in selections])
        total = sum(tokens for _, tokens in selections)
        keep = min(max(round(fraction * total) - len(rows), 1), len(others) - 1)
        threshold = others.sort(descending=True).values[keep - 1 : keep + 1].mean()
        thresholds[reduction] = float(torch.sigmoid(threshold))
    logger.info("thresholds: %s", thresholds)
    model.train(was_training)


def _without_first(selection: Selection) -> Tensor:
    """A selection's logits without each sequence's first token's."""
    mask = torch.ones_like(selection.keep)
    mask[first_tokens(selection.cu_seqlens)] = False
    return selection.logits[mask]


def evaluate(
    model: Model, tokenizer: PreTrainedTokenizerBase, corpus: LabelledCorpus, *, reduce: bool
) -> dict[str, float]:
    """Accuracy and FLOPs speed-up on a labelled corpus, by a copy of the model in the engine that scores."""
    engine = Engine(merged_copy(model), tokenizer, EngineOptions(reduce=reduce, dtype="float32"))
    results = engine.score(corpus.documents)
    correct = results.logits.argmax(1) == np.array(corpus.labels)
    return {
        "documents": len(corpus.labels),
        "accuracy": float(correct.mean()),
        "flops_speedup": float(results.dense_flops.sum() / results.flops.sum()),
    }


def merged_copy(model: Model) -> TRBertForSequenceClassification:
    """A copy of the model, its adapter merged into the weights if it has one."""
    duplicate = copy.deepcopy(model)
    return duplicate.merge_and_unload() if hasattr(duplicate, "merge_and_unload") else duplicate


def _with_adapter(model: TRBertForSequenceClassification, config: TrainingConfig) -> Model:
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=config.adapter_rank,
        lora_alpha=2 * (config.adapter_rank or 0),
        lora_dropout=0.0,
        target_modules=LORA_TARGETS,
        modules_to_save=MODULES_TO_SAVE,
    )
    adapted = get_peft_model(model, lora)
    # A path of this machine means nothing elsewhere, and peft would look a name up on the model hub.
    adapted.peft_config["default"].base_model_name_or_path = None
    return adapted


def _trainable(model: Model, stage: str, adapter: bool) -> Iterator[nn.Parameter]:
    """The parameters a stage trains."""
    for name, parameter in model.named_parameters():
        if ".original_module." in name:  # peft's untouched copy of a module trained whole
            continue
        selector = ".selectors." in name
        adapted = not adapter or "lora_" in name or ".modules_to_save." in name
        if selector == (stage == "imitation") and adapted:
            yield parameter


def _run_stage(
    stage: str,
    trainer_class: type[StageTrainer],
    model: Model,
    dataset: WindowDataset,
    config: TrainingConfig,
    epochs: float,
    learning_rate: float,
    fractions: list[float] | None = None,
) -> None:
    """Train a stage, from its last checkpoint if a killed run left one; not at all if it is complete."""
    directory = Path(config.output) / "stages" / stage
    model.requires_grad_(False)
    for parameter in _trainable(model, stage, adapter=bool(config.adapter_rank)):
        parameter.requires_grad_(True)
    if stage == "imitation":
        model.enable_input_require_grads()  # the guide's gradient must pass layers whose weights are all frozen
    arguments = TrainingArguments(
        output_dir=str(directory),
        per_device_train_batch_size=config.batch_size,
        num_train_epochs=epochs,
        learning_rate=learning_rate,
        warmup_steps=config.warmup,
        max_grad_norm=1.0,
        bf16=config.dtype == "bfloat16",
        seed=config.seed,
        save_steps=50,
        save_total_limit=1,
        logging_steps=10,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # DataParallel would scatter tokens and cu_seqlens independently of each other
    trainer = trainer_class(
        model=model, args=arguments, train_dataset=dataset, data_collator=collate, stage=stage, fractions=fractions
    )
    checkpoint = get_last_checkpoint(str(directory)) if directory.is_dir() else None
    trainer.train(resume_from_checkpoint=checkpoint)
    if stage == "imitation":
        model.disable_input_require_grads()


def _save(model: Model, tokenizer: PreTrainedTokenizerBase, config: TrainingConfig, output: Path) -> None:
    if config.adapter_rank:
        adapter = output / "adapter"
        model.save_pretrained(adapter)
        model.config.architectures = ["TRBertForSequenceClassification"]
        model.config.save_pretrained(adapter)
    merged = merged_copy(model)
    merged.save_pretrained(output)
    tokenizer.save_pretrained(output)
