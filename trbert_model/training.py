"""Training a TR-BERT: the paper's four stages, each resumable, on transformers' Trainer.

1. `fine_tune`: the plain BERT on the task, reduction off. A fine-tuned backbone skips it.
2. `imitation`: everything but the selectors frozen; they learn the tokens that the guide ranks highest, or, for
   questions, how near a token is to a right answer (`losses`). Before it the dense model's logits and guide, where
   they are needed, are computed once for the corpus (`teacher`).
3. `selectors`: everything but the selectors frozen; they learn by reinforcement (Ye et al., section 3.3).
4. `joint`: everything, with the task's loss of the reduced model against the dense model's logits.

With `speed_range` each document of a step is reduced for a speed-up drawn from that range, so that one model serves
all of them, and its thresholds choose (`calibration`); with `speedup` alone all are reduced for that one; without
either, λ decides, as in the paper, and the threshold is 0.5. Each stage starts from the last one's result; what each
minimises is in `objectives`.
"""

import copy
import dataclasses
import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Trainer, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import SAFE_WEIGHTS_NAME

from .calibration import cuts_for, keep_logits, kept_fractions_for, schedules, thresholds_of
from .convert import LORA_TARGETS, MODULES_TO_SAVE, convert_checkpoint
from .engine import CLASSIFICATION, QUESTION_ANSWERING, Engine, EngineOptions, computes_bfloat16, make_task
from .errors import ConfigurationError, InputError, TrainingError
from .labelled import LabelledColumns, LabelledCorpus, LabelledTexts, read_corpus, read_labelled
from .losses import ClassificationLosses
from .modeling import SelectionPolicy
from .objectives import FineTune, Imitation, Joint, Objective, OperatingPoints, Reinforcement
from .options import option
from .teacher import TeacherSignals, deep_layer, signals_digest, teacher_signals

logger = logging.getLogger(__name__)

# A task's model, or peft's wrapper around one, which passes everything on.
Model = Any

STAGES = ("fine_tune", "imitation", "selectors", "joint")
# Tokens that thresholds are set with; fewer where training begins, which moves them to what they should let through.
_CALIBRATION_TOKENS = 60_000
_STARTING_TOKENS = 15_000
# A selector that lets through more or less than this, over a logging period, has stopped choosing.
_COLLAPSED = (0.002, 0.998)


@dataclass(frozen=True)
class TrainingConfig(LabelledColumns):
    """Everything a training run depends on."""

    task: str = option(CLASSIFICATION, "classification or question-answering")
    train: str = option("", "Parquet file or URI with the training documents; for questions also SQuAD's JSON")
    backbone: str = option("", "directory of a BERT or DistilBERT checkpoint, or of a model this command fine-tuned")
    output: str = option("", "directory for the trained model; a killed run resumes from its stages/")
    evaluation: str | None = option(None, "Parquet file or URI with documents to measure each stage on")
    reduction_layers: tuple[int, ...] | None = option(None, "zero-based layers with a selector (default: the paper's)")
    selector_size: int = option(32, "width of a selector's hidden layer")
    question_aware: bool = option(
        True, "the selectors know the question, and its tokens stay for two thirds of the layers; not so in the paper"
    )
    max_positions: int | None = option(None, "extend the backbone's position table, for longer windows")
    speedup: float | None = option(
        3.0, "FLOPs speed-up over the dense model that the saved thresholds give; none: 0.5, as in the paper"
    )
    speed_range: tuple[float, ...] | None = option(
        None, "least and greatest FLOPs speed-up to train for (default: the one of `speedup`)"
    )
    length_penalty: float = option(0.5, "λ of the selectors' stage: the price of keeping every token")
    joint_length_penalty: float = option(0.5, "λ of the joint stage")
    samples: int = option(4, "random selections of a document in a step of reinforcement")
    guide_rate: float = option(0.5, "share of the selectors' steps in which a sample follows the guide")
    distillation: bool = option(True, "in the joint stage, learn the dense model's probabilities, not the labels")
    feature_distillation: float = option(
        0.0,
        "with distillation, learn also what the dense model's classifier sees, with this weight (classification)",
    )
    joint_imitation: float = option(
        0.0,
        "in the joint stage, weight of the selectors' imitation loss, of which the layers below them learn too: so the "
        "first layers learn to see where the answer to a question is",
    )
    unreduced: float = option(
        0.15,
        "in the joint stage, share of the documents that are learnt with all their tokens, so that the model works "
        "without reduction too; 0 in the paper",
    )
    crops: float = option(
        0.0,
        "in the joint stage, share of the documents of which a random piece is learnt, as the dense model judges it: "
        "against overfitting (classification, with distillation)",
    )
    unlabelled: str | None = option(
        None,
        "Parquet file or URI with more documents for the stages after the fine-tune, which learn from the dense model: "
        "such as the corpus to score (classification, with distillation)",
    )
    adapter_rank: int | None = option(
        None, "train a low-rank adapter of this rank, saved apart too, and no full weights"
    )
    batch_size: int = option(16, "documents in a step")
    fine_tune_epochs: float = option(3.0, "epochs of the dense fine-tune; 0 takes a fine-tuned backbone as it is")
    imitation_epochs: float = option(0.5, "epochs of the selectors' imitation of the guide")
    selectors_epochs: float = option(0.5, "epochs of the selectors' reinforcement")
    joint_epochs: float = option(1.0, "epochs of everything together")
    learning_rate: float = option(1e-4, "of the dense fine-tune")
    joint_learning_rate: float = option(5e-5, "of everything but the selectors in the joint stage")
    selector_learning_rate: float = option(1e-3, "of the selectors")
    warmup: float = option(0.1, "share of a stage's steps in which the learning rate rises")
    attention_dropout: float = option(0.0, "torch's CPU flash attention knows none; more than 0 trains slower")
    teacher_cache: str | None = option(
        None, "directory that runs with the same dense model and corpus share their teacher in (default: the output's)"
    )
    seed: int = option(0, "of everything random")
    dtype: str = option("float32", "float32, or bfloat16 for autocast; auto: bfloat16 where the machine computes in it")

    def __post_init__(self):
        for name in ("train", "backbone", "output"):
            if not getattr(self, name):
                raise ConfigurationError(f"{name} is required")
        if self.task not in (CLASSIFICATION, QUESTION_ANSWERING):
            raise ConfigurationError(f"task {self.task!r} is neither {CLASSIFICATION} nor {QUESTION_ANSWERING}")
        if self.speedup is not None and self.speedup <= 1:
            raise ConfigurationError(f"speedup {self.speedup} must be more than 1")
        if self.speed_range is not None and not (
            len(self.speed_range) == 2 and 1 < self.speed_range[0] < self.speed_range[1]
        ):
            raise ConfigurationError(
                f"speed_range {self.speed_range} must be two rising numbers above 1, such as 1.5,6"
            )
        if not 0 <= self.crops <= 1:
            raise ConfigurationError(f"crops {self.crops} must be between 0 and 1")
        if not 0 <= self.unreduced < 1:
            raise ConfigurationError(f"unreduced {self.unreduced} must be at least 0 and less than 1")
        if self.crops and (self.task != CLASSIFICATION or not self.distillation):
            raise ConfigurationError(f"crops {self.crops}: only for classification with distillation")
        if self.crops and self.joint_imitation:
            raise ConfigurationError(f"joint_imitation {self.joint_imitation}: not with crops, which have no guide")
        if self.unlabelled and (self.task != CLASSIFICATION or not self.distillation):
            raise ConfigurationError(f"unlabelled {self.unlabelled}: only for classification with distillation")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise ConfigurationError(f"dtype {self.dtype!r} is none of auto, float32, bfloat16")
        if self.feature_distillation and (self.task != CLASSIFICATION or not self.distillation):
            raise ConfigurationError(
                f"feature_distillation {self.feature_distillation}: only for classification with distillation"
            )
        least = {
            "batch_size": 1,
            "feature_distillation": 0,
            "joint_imitation": 0,
            "samples": 0,
            "length_penalty": 0,
            "joint_length_penalty": 0,
            "guide_rate": 0,
        }
        for name in (*least, *(f"{stage}_epochs" for stage in STAGES)):
            if not getattr(self, name) >= least.get(name, 0):  # NaN is neither
                raise ConfigurationError(f"{name} {getattr(self, name)} must be at least {least.get(name, 0)}")
        if self.selectors_epochs and self.samples < 2:
            raise ConfigurationError(f"samples {self.samples}: reinforcement compares at least 2 (selectors_epochs 0?)")

    @property
    def autocast(self) -> torch.dtype | None:
        """What is computed in beside fp32, on this machine."""
        half = self.dtype == "bfloat16" or (self.dtype == "auto" and computes_bfloat16())
        return torch.bfloat16 if half else None

    def epochs(self, stage: str) -> float:
        return getattr(self, f"{stage}_epochs")


def train(config: TrainingConfig, selection_policy: SelectionPolicy | None = None) -> dict:
    """Run all stages and save the model, its tokenizer and, with `adapter_rank`, the adapter alone.

    Args:
        selection_policy: chooses the tokens of the joint stage and its evaluation instead of the selectors, for
            comparisons with simpler rules.

    In a process group of torch.distributed it trains data-parallel; the output must be a directory that all
    processes share.

    Returns the measurements, also written to `output/training.json`: each stage's accuracy and FLOPs speed-up on
    `evaluation` where one is given, its cost in dense forward passes a document, and a digest of the parameters that
    each process ended with.

    Raises:
        ConfigurationError: options that do not go together, or stages in the output that were trained with others.
        InputError: a corpus that cannot be read or has other labels.
        TrainingError: a stage's selectors keep everything, or nothing; processes that ended with other parameters.
    """
    torch.manual_seed(config.seed)
    if config.batch_size % _world_size():
        raise ConfigurationError(f"batch_size {config.batch_size} must be a multiple of the {_world_size()} workers")
    output = Path(config.output)
    tokenizer = AutoTokenizer.from_pretrained(config.backbone, local_files_only=True)
    model = _model(config)
    if _is_main_process():
        _bind_stages(output / "stages", config)
    task = make_task(config.task, tokenizer, model.config, EngineOptions())
    corpus = read_corpus(config.train, config, task, model.config)
    evaluation = read_corpus(config.evaluation, config, task, model.config) if config.evaluation else None
    if config.adapter_rank:
        model = _with_adapter(model, config)
    run = _Run(config, model, tokenizer, task, corpus, evaluation)
    run.execute(selection_policy)
    if _is_main_process():
        _save(model, tokenizer, config, output)
        (output / "training.json").write_text(json.dumps(run.measurements, indent=1) + "\n")
    return run.measurements


def _model(config: TrainingConfig) -> Model:
    """The backbone with the selectors asked for, and a fresh head unless it is taken as fine-tuned."""
    layers = None if config.reduction_layers is None else list(config.reduction_layers)
    changes: dict[str, Any] = {
        "reduction_layers": layers,
        "selector_size": config.selector_size,
        "max_positions": config.max_positions,
    }
    if config.task == CLASSIFICATION:
        model = _classifier(config, changes)
    else:
        fresh = bool(config.fine_tune_epochs)
        changes["question_aware"] = config.question_aware
        model = convert_checkpoint(config.backbone, task=QUESTION_ANSWERING, fresh_head=fresh, **changes)
    model.config.attention_probs_dropout_prob = config.attention_dropout
    for layer in model.bert.encoder.layer:
        layer.attention.self.dropout.p = config.attention_dropout
    below = deep_layer(model.config)
    if config.imitation_epochs and model.config.reduction_layers and model.config.reduction_layers[-1] >= below:
        raise ConfigurationError(
            f"reduction layers {model.config.reduction_layers} cannot be taught by imitation: the guide judges layers "
            f"below {below} of this model"
        )
    return model


def _classifier(config: TrainingConfig, changes: dict[str, Any]) -> Model:
    _, labels = read_labelled(config.train, config.text_column, config.label_column)
    names = sorted(set(labels))
    if len(names) < 2:
        raise InputError(f"{config.train}: column {config.label_column!r} has fewer than two different labels")
    if config.fine_tune_epochs:
        return convert_checkpoint(config.backbone, labels=names, **changes)
    model: Model = convert_checkpoint(config.backbone, task=CLASSIFICATION, **changes)
    if missing := sorted(set(names) - set(model.config.id2label.values())):
        raise ConfigurationError(
            f"{config.backbone}: its labels do not have {missing[:5]} of {config.train}; fine_tune_epochs 0 takes a "
            "backbone that was fine-tuned on the task"
        )
    return model


class _Run:
    """A training run under way: what its stages share."""

    def __init__(
        self,
        config: TrainingConfig,
        model: Model,
        tokenizer: PreTrainedTokenizerBase,
        task: Any,
        corpus: LabelledCorpus,
        evaluation: LabelledCorpus | None,
    ):
        self.config, self.model, self.tokenizer, self.task = config, model, tokenizer, task
        self.evaluation = evaluation
        self.measurements: dict = {"config": dataclasses.asdict(config), "stages": {}}
        self.learn_from(corpus)

    def learn_from(self, corpus: LabelledCorpus) -> None:
        """Train with these documents from now on."""
        self.corpus, self.dataset = corpus, corpus.dataset(self.task)
        if isinstance(self.dataset.losses, ClassificationLosses):
            self.dataset.losses.features = self.config.feature_distillation
        self.documents = corpus.documents
        self.lengths = np.array([len(window.input_ids) for window in self.dataset.windows])

    def execute(self, selection_policy: SelectionPolicy | None) -> None:
        config, model = self.config, self.model
        reinforced: dict[str, Any] = {"samples": config.samples}
        self.stage("fine_tune", FineTune(model, self.dataset.losses))
        self.evaluate("fine_tune", reduce=False)
        if not any(config.epochs(stage) for stage in STAGES[1:]):
            return
        if config.unlabelled and isinstance(self.corpus, LabelledTexts):
            self.learn_from(self.corpus.with_unlabelled(config.unlabelled, self.task, config.text_column))
        losses = self.dataset.losses
        guided = config.imitation_epochs or config.joint_imitation or (config.selectors_epochs and config.guide_rate)
        if (guided and losses.guided_by_saliency) or (config.joint_epochs and config.distillation):
            self.dataset.teacher = self.teacher()
        if config.imitation_epochs:
            targets, _ = self.fractions()
            zeros = [[0.0] * len(targets[0])] * len(targets)
            self.stage("imitation", Imitation(model, losses, OperatingPoints(targets, zeros, len(targets[0]))))
            self.set_thresholds()
            self.evaluate("imitation")
        if config.selectors_epochs:
            guided = round(config.guide_rate * self.steps(config.selectors_epochs))
            penalty = config.length_penalty
            self.stage(
                "selectors",
                Reinforcement(model, losses, self.points(), length_penalty=penalty, guided_steps=guided, **reinforced),
            )
            self.set_thresholds()
            self.evaluate("selectors")
        if config.joint_epochs:
            if selection_policy is not None:
                reinforced["samples"] = 0
            # The backbone is the dense model's until this stage, and a resumed stage begins with it too.
            dense = copy.deepcopy(model).requires_grad_(False) if config.crops else None
            self.dataset.crops = config.crops
            joint = Joint(
                model,
                losses,
                self.points(),
                length_penalty=config.joint_length_penalty,
                distillation=config.distillation,
                imitation=config.joint_imitation,
                unreduced=config.unreduced,
                selection_policy=selection_policy,
                dense=dense,
                **reinforced,
            )
            self.stage("joint", joint)
            self.set_thresholds()
            self.evaluate("joint", policy=selection_policy)
            self.evaluate("joint_without_reduction", reduce=False)

    def sample(self, tokens: int) -> list[Any]:
        """Some of the training documents, of about so many tokens together."""
        return self.documents[:: max(1, int(self.lengths.sum()) // tokens)]

    def fractions(self) -> tuple[list[list[float]], list[float] | None]:
        """The kept fractions to train for, one list a point, and those of the saved thresholds."""
        config, model_config = self.config, self.model.config
        final = None if config.speedup is None else kept_fractions_for(config.speedup, model_config, self.lengths)
        if config.speed_range is None:
            return [final or kept_fractions_for(2.0, model_config, self.lengths)], final
        speeds = np.geomspace(config.speed_range[0], config.speed_range[1], 6)
        points = [
            kept_fractions_for(float(speed), model_config, self.lengths, exponents)
            for speed in speeds
            for exponents in schedules(len(model_config.reduction_layers))
        ]
        return points, final

    def points(self) -> OperatingPoints:
        """The points to train for, cut where the selectors' logits are now."""
        reductions = len(self.model.config.reduction_layers)
        if self.config.speed_range is None and self.config.speedup is None:
            return OperatingPoints([], [], reductions)
        fractions, _ = self.fractions()
        engine, documents = self.engine(), self.sample(_STARTING_TOKENS)
        first = keep_logits(engine, documents)
        cuts = [cuts_for(engine, documents, each, first) for each in fractions]
        return OperatingPoints(fractions, cuts, reductions)

    def set_thresholds(self) -> None:
        """The thresholds of the speed-up asked for, on training documents."""
        _, fractions = self.fractions()
        if fractions is None:
            self.model.config.selector_thresholds = [0.5] * len(self.model.config.reduction_layers)
        else:
            thresholds = thresholds_of(cuts_for(self.engine(), self.sample(_CALIBRATION_TOKENS), fractions))
            self.model.config.selector_thresholds = thresholds
            logger.info("kept fractions %s, thresholds %s", np.round(fractions, 3), np.round(thresholds, 3))

    def engine(self, *, reduce: bool = True, policy: SelectionPolicy | None = None) -> Engine:
        """A copy of the model as it scores."""
        options = EngineOptions(reduce=reduce, dtype="float32")
        return Engine(merged_copy(self.model), self.tokenizer, options, policy)

    def evaluate(self, name: str, *, reduce: bool = True, policy: SelectionPolicy | None = None) -> None:
        if self.evaluation is not None and _is_main_process():
            measured = evaluate(self.engine(reduce=reduce, policy=policy), self.evaluation)
            self.measurements["stages"].setdefault(name, {}).update(measured)
            logger.info("%s: %s", name, measured)

    def teacher(self) -> TeacherSignals:
        """The dense model's signals, computed once for a dense model and corpus."""
        cache = Path(self.config.teacher_cache or Path(self.config.output) / "stages")
        autocast = self.config.autocast
        path = cache / f"teacher-{signals_digest(self.model, self.dataset, autocast=autocast)}.safetensors"
        if not path.is_file() and _is_main_process():
            self.model.requires_grad_(False)
            teacher_signals(self.model, self.dataset, autocast=autocast).save(path)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        return TeacherSignals.load(path)

    def steps(self, epochs: float) -> int:
        """Optimizer steps of a stage, in one process."""
        return round(epochs * len(self.dataset) / self.config.batch_size)

    def stage(self, name: str, objective: Objective) -> None:
        """Train a stage, from its last checkpoint if a killed run left one; not at all if it is complete."""
        config = self.config
        if not config.epochs(name):
            return
        directory = Path(config.output) / "stages" / name
        self.model.requires_grad_(False)
        for parameter in _trainable(self.model, name, adapter=bool(config.adapter_rank)):
            parameter.requires_grad_(True)
        arguments = TrainingArguments(
            output_dir=str(directory),
            per_device_train_batch_size=config.batch_size // _world_size(),
            num_train_epochs=config.epochs(name),
            learning_rate=config.learning_rate if name == "fine_tune" else config.selector_learning_rate,
            warmup_steps=config.warmup,
            max_grad_norm=1.0,
            bf16=config.autocast is torch.bfloat16,
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
        trainer = StageTrainer(
            model=objective,
            args=arguments,
            train_dataset=self.dataset,
            data_collator=self.dataset.collate,
            joint_learning_rate=config.joint_learning_rate if name == "joint" else None,
        )
        checkpoint = get_last_checkpoint(str(directory)) if directory.is_dir() else None
        state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME)) if checkpoint else None
        if checkpoint and state and state.global_step >= state.max_steps:
            # Trainer would take one more step.
            objective.load_state_dict(load_file(Path(checkpoint) / SAFE_WEIGHTS_NAME))
        else:
            trainer.train(resume_from_checkpoint=checkpoint)
            state = trainer.state
        self.measurements["replicas"] = _replicas(self.model)
        history = [entry["dense_passes"] for entry in state.log_history if "dense_passes" in entry]
        if history:
            self.measurements["stages"].setdefault(name, {})["dense_passes_per_document"] = float(np.mean(history))


class StageTrainer(Trainer):
    """Transformers' Trainer for an `Objective`; logs its measurements, and stops when the selectors stop choosing."""

    def __init__(self, *args: Any, joint_learning_rate: float | None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.joint_learning_rate = joint_learning_rate
        self.measured: defaultdict[str, list[float]] = defaultdict(list)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        output = model(**inputs)
        loss = output.pop("loss")
        for name, value in output.items():
            self.measured[name].append(float(value))
        return (loss, output) if return_outputs else loss

    def create_optimizer(self, model=None):
        if self.joint_learning_rate is not None and self.optimizer is None:  # type: ignore[has-type]
            groups: list[list[nn.Parameter]] = [[], []]
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    groups[".selectors." in name].append(parameter)
            rates = (self.joint_learning_rate, self.args.learning_rate)
            self.optimizer = torch.optim.AdamW(
                [{"params": group, "lr": rate} for group, rate in zip(groups, rates) if group],
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
                weight_decay=0.0,
                fused=True,
            )
        return super().create_optimizer(model)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        means = {name: float(np.mean(values)) for name, values in self.measured.items()}
        self.measured.clear()
        super().log({**logs, **means}, *args, **kwargs)
        for name, kept in means.items():
            if name.startswith("kept_") and not _COLLAPSED[0] < kept < _COLLAPSED[1] and self.state.global_step > 20:
                what = "everything" if kept > 0.5 else "nothing"
                raise TrainingError(
                    f"step {self.state.global_step}: selector {name.removeprefix('kept_')} keeps {what} "
                    f"({100 * kept:.2f}% of tokens); {'raise' if kept > 0.5 else 'lower'} the length penalty"
                )


def _is_main_process() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def _world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def _replicas(model: Model) -> list[str]:
    """A digest of every process's parameters.

    Raises:
        TrainingError: they are not the same.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode() + parameter.detach().float().cpu().numpy().tobytes())
    digests = [digest.hexdigest()[:16]] * _world_size()
    if torch.distributed.is_initialized():
        torch.distributed.all_gather_object(digests, digest.hexdigest()[:16])
    if len(set(digests)) > 1:
        raise TrainingError(f"the workers' parameters are not the same: {digests}")
    return digests


def _bind_stages(stages: Path, config: TrainingConfig) -> None:
    """Stages resume; those of other options must not be taken for this run's."""
    record, options = stages / "config.json", json.loads(json.dumps(dataclasses.asdict(config)))
    if record.is_file() and json.loads(record.read_text()) != options:
        raise ConfigurationError(
            f"{stages}: trained with other options; remove it, or choose another output, to train anew"
        )
    stages.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(options, indent=1))


def evaluate(engine: Engine, corpus: LabelledCorpus) -> dict[str, float]:
    """The task's metrics and the FLOPs speed-up on a labelled corpus."""
    results = engine.score(corpus.documents)
    return {
        "documents": len(corpus.documents),
        **corpus.measure(results),
        "flops_speedup": float(results.dense_flops.sum() / results.flops.sum()),
    }


def merged_copy(model: Model) -> Model:
    """A copy of the model, its adapter merged into the weights if it has one."""
    duplicate = copy.deepcopy(model)
    return duplicate.merge_and_unload() if hasattr(duplicate, "merge_and_unload") else duplicate


def _with_adapter(model: Model, config: TrainingConfig) -> Model:
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
    """The parameters a stage trains: the selectors, everything else, or, jointly, both."""
    for name, parameter in model.named_parameters():
        if ".original_module." in name:  # peft's untouched copy of a module trained whole
            continue
        selector = ".selectors." in name
        adapted = not adapter or "lora_" in name or ".modules_to_save." in name
        if adapted and (stage == "joint" or selector == (stage != "fine_tune")):
            yield parameter


def _save(model: Model, tokenizer: PreTrainedTokenizerBase, config: TrainingConfig, output: Path) -> None:
    if config.adapter_rank:
        adapter = output / "adapter"
        model.save_pretrained(adapter)
        model.config.architectures = [type(merged_copy(model)).__name__]
        model.config.save_pretrained(adapter)
    merged = merged_copy(model)
    merged.save_pretrained(output)
    tokenizer.save_pretrained(output)
