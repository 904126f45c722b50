"""Training a TR-BERT: the paper's four stages on transformers' Trainer. Each stage can be resumed.

1. `fine_tune`: the dense model learns the task. A backbone that is already fine-tuned skips it (0 epochs).
2. `imitation`: only the selectors are trained. They learn which tokens the guide ranks highest or, for questions, how
   near a token is to a correct answer (`losses`). If needed, the dense model's outputs and guide are computed for the
   whole corpus before this stage (`teacher`).
3. `selectors`: only the selectors are trained, by reinforcement (Ye et al., section 3.3).
4. `joint`: everything is trained, with the task loss of the reduced model against the dense model's outputs.
5. `gates`: layers and gates are trained, with layers that are skipped in part (SmartBERT).
6. `exits`: only the exits are trained, on the states that the reduced model has (DeeBERT).
7. `halting`: everything is trained, with halted words (TOKEE's self-sampling).

With `speed_range`, each document of a step is reduced for a speed-up drawn from the range. One model then serves all of
them, and its thresholds set the speed (`calibration`). With only `speedup`, all documents are reduced for that one.
Without both, λ determines the speed, as in the paper, and the threshold is 0.5. Each stage starts from the result of
the previous one. What a stage minimises is in `objectives`.
"""

import copy
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import SAFE_WEIGHTS_NAME

from ..calibration.measure import cutoffs_for, keep_logits, kept_fractions_for, schedules, thresholds_of
from ..card import write_card
from ..checkpoints.conversion import convert_checkpoint
from ..checkpoints.tokenizer import read_tokenizer, save_tokenizer
from ..engine import Engine, EngineOptions
from ..errors import CheckpointError, ConfigurationError, TrainingError
from ..labelled import LabelledCorpus
from ..reduction.state import SelectionPolicy
from ..tasks.base import TaskOptions
from ..tasks.classification.task import LOG_SUM_EXP
from ..tasks.registry import task_named
from ..terminal import get_logger
from .adapters import AnyModel, merged_copy, with_adapter
from .config import ATTENTION, REDUCTION_STAGES, STAGES, TrainingConfig
from .objectives import (
    Exits,
    FineTune,
    Gates,
    Imitation,
    Joint,
    Objective,
    OperatingPoints,
    Reinforcement,
    SelfSampling,
)
from .processes import is_main_process, replicas, world_size
from .teacher import (
    Compute,
    TeacherSignals,
    attention_guide,
    deep_layer,
    exit_signals,
    guide,
    outputs,
    signals_digest,
    teacher_signals,
)
from .trainer import StageTrainer

logger = get_logger(__name__)

# Tokens to set thresholds with. Initial cutoffs need fewer, because training adjusts them.
_CALIBRATION_TOKENS = 60_000
_STARTING_TOKENS = 15_000
# A larger share of skipped layers leaves no model.
_ALL_SKIPPED = 0.99
# Below this uncertainty documents and words leave when the exits' stage is measured.
_MEASURED_UNCERTAINTY = 0.2


def train(config: TrainingConfig, selection_policy: SelectionPolicy | None = None) -> dict:
    """Run all stages and save the model, its tokenizer and, with `adapter_rank`, also the adapter alone.

    In a torch.distributed process group, training is data-parallel. The output must then be a directory that all
    processes share.

    Args:
        selection_policy: chooses the tokens in the joint stage and its evaluation instead of the selectors, for
            comparisons with simpler rules.

    Returns:
        The measurements, also written to `output/training.json`: each stage's metrics and FLOPs speed-up on
        `evaluation`, if given, its cost in dense forward passes per document, and a digest of each process's final
        parameters.

    Raises:
        ConfigurationError: options that do not fit together, or stages in the output trained with other options.
        InputError: a corpus that cannot be read or has other labels.
        TrainingError: a stage's selectors keep everything or nothing, gates skip every layer, or the processes' final
            parameters differ.
    """
    # torch and oneDNN keep the kernels of the last 1,024 shapes. Ragged batches always have new ones, and what is kept
    # of them lies between freed blocks: a training in bfloat16 on a CPU grew to several gigabytes.
    for cache in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(cache, "64")
    torch.manual_seed(config.seed)
    if config.batch_size % world_size():
        raise ConfigurationError(f"batch_size {config.batch_size} must be a multiple of the {world_size()} workers")
    output = Path(config.output)
    if os.path.realpath(config.output) == os.path.realpath(config.backbone):
        raise ConfigurationError(f"output {config.output} is the backbone, which would be replaced; choose another")
    if output.exists() and not output.is_dir():
        raise ConfigurationError(f"output {config.output} is not a directory")
    model = _model(config)
    tokenizer = read_tokenizer(Path(config.backbone), model.config)
    if tokenizer is None:
        raise CheckpointError(f"{config.backbone}: no tokenizer there (tokenizer.json or vocab.txt)")
    if is_main_process():
        _bind_stages(output / "stages", config)
    task = task_named(config.task).of(tokenizer, model.config, TaskOptions())
    corpus = task.read_corpus(config.train, config)
    if config.evidence:
        corpus = corpus.with_evidence(config.train, config)
    evaluation = task.read_corpus(config.evaluation, config) if config.evaluation else None
    if config.adapter_rank:
        model = with_adapter(model, config)
    run = _Run(config, model, tokenizer, corpus, evaluation)
    run.execute(selection_policy)
    if is_main_process():
        _save(model, tokenizer, config, output)
        (output / "training.json").write_text(json.dumps(run.measurements, indent=1) + "\n")
        write_card(output)
        if config.push_to_hub:
            _push(config.push_to_hub, output)
    return run.measurements


def _model(config: TrainingConfig) -> AnyModel:
    """The backbone with fresh selectors, and with a fresh head unless the fine-tune is skipped."""
    layers = None if config.reduction_layers is None else list(config.reduction_layers)
    task = task_named(config.task)
    learnt = task.learnt_head(config.train, config, config.problem_type)
    model: AnyModel = convert_checkpoint(
        config.backbone,
        task=task.name,
        head=learnt if config.fine_tune_epochs else None,
        reduction_layers=layers,
        selector_size=config.selector_size,
        question_aware=config.question_aware and (task.asks or config.pairs),
        max_positions=config.max_positions,
        text_pairs=config.pairs,
        keep_selectors=not any(config.epochs(stage) for stage in ("fine_tune", *REDUCTION_STAGES)),
        exits=config.exit_fields,
        gates={} if config.gates else None,
    )
    if model.config.exits is not None:  # thresholds of exits that are trained, or whose layers are, mean nothing
        model.config.exits = {name: value for name, value in model.config.exits.items() if name != "thresholds"}
    exits, gates = model.config.exit_options, model.config.gate_options
    if exits is None and config.epochs("exits"):
        raise ConfigurationError("exits_epochs: the model has no exits; exits names the kind of new ones")
    if gates is None and config.epochs("gates"):
        raise ConfigurationError("gates_epochs: the model has no gates; the option gates adds them")
    if config.epochs("halting") and not (exits is not None and exits.halts):
        raise ConfigurationError("halting_epochs: the model has no exits that halt words: exits words, exit_unit word")
    if config.feature_distillation and exits is not None and exits.answers_all:
        raise ConfigurationError("feature_distillation: the model's classifier is an exit, which has no such input")
    if model.config.text_pairs and not config.pairs:
        raise ConfigurationError(
            f"{config.backbone}: it classifies questions with their texts; name the column of the questions with "
            "question_column"
        )
    if config.window_pooling is not None:
        model.config.window_pooling = config.window_pooling
        task.check(model.config)
    if config.evidence and model.config.window_pooling != LOG_SUM_EXP:
        raise ConfigurationError(f"evidence: only with window_pooling {LOG_SUM_EXP}")
    model.config.attention_probs_dropout_prob = config.attention_dropout
    backbone = model.bert.encoder.backbone
    for layer in model.bert.encoder.layer:
        backbone.set_attention_dropout(layer, config.attention_dropout)
    below = deep_layer(model.config)
    if config.epochs("imitation") and model.config.reduction_layers and model.config.reduction_layers[-1] >= below:
        raise ConfigurationError(
            f"reduction layers {model.config.reduction_layers} cannot be taught by imitation: the guide judges layers "
            f"below {below} of this model"
        )
    return model


class _Run:
    """A training run: the state that its stages share."""

    def __init__(
        self,
        config: TrainingConfig,
        model: AnyModel,
        tokenizer: PreTrainedTokenizerBase,
        corpus: LabelledCorpus,
        evaluation: LabelledCorpus | None,
    ):
        self.config, self.model, self.tokenizer = config, model, tokenizer
        self.evaluation = evaluation
        self.measurements: dict = {"config": dataclasses.asdict(config), "stages": {}}
        self.learn_from(corpus)

    def learn_from(self, corpus: LabelledCorpus) -> None:
        """Use this corpus for training from now on."""
        self.corpus, self.dataset = corpus, corpus.dataset(self.config.feature_distillation)
        if self.config.example_windows is not None and self.dataset.most_windows > 1:
            self.dataset.most_windows = self.config.example_windows
        self.documents = corpus.documents
        self.lengths = np.array([len(window.input_ids) for window in self.dataset.windows])

    def execute(self, selection_policy: SelectionPolicy | None) -> None:
        config, model = self.config, self.model
        reinforced: dict[str, Any] = {"samples": config.samples}
        if any(config.epochs(stage) for stage in REDUCTION_STAGES):
            self.fractions()  # refuses speeds that are out of reach, before the fine-tune
        self.stage("fine_tune", FineTune(model, self.dataset.losses))
        self.evaluate("fine_tune", reduce=False)
        if not any(config.epochs(stage) for stage in STAGES[1:]):
            return
        if config.unlabelled:
            self.learn_from(self.corpus.with_unlabelled(config.unlabelled, config))
        losses = self.dataset.losses
        joint, gates, exits = (config.epochs(stage) for stage in ("joint", "gates", "exits"))
        guided = config.epochs("imitation") or (joint and config.joint_imitation)
        guided = bool(guided or (config.epochs("selectors") and config.guide_rate))
        if (guided and losses.guided_by_saliency) or ((joint or gates or exits) and config.distillation):
            self.dataset.teacher = self.teacher(guided=guided)
        if config.epochs("imitation"):
            targets, _ = self.fractions()
            zeros = [[0.0] * len(targets[0])] * len(targets)
            self.stage("imitation", Imitation(model, losses, OperatingPoints(targets, zeros, len(targets[0]))))
            self.set_thresholds()
            self.evaluate("imitation")
        if config.epochs("selectors"):
            guided_steps = round(config.guide_rate * self.steps(config.selectors_epochs))
            penalty = config.length_penalty
            self.stage(
                "selectors",
                Reinforcement(
                    model, losses, self.points(), length_penalty=penalty, guided_steps=guided_steps, **reinforced
                ),
            )
            self.set_thresholds()
            self.evaluate("selectors")
        if joint:
            if selection_policy is not None:
                reinforced["samples"] = 0
            # Here the backbone is still the dense model's, also in a resumed stage: its checkpoint is loaded later.
            dense = copy.deepcopy(model).requires_grad_(False) if config.crops else None
            self.dataset.crops = config.crops
            everything = Joint(
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
            self.stage("joint", everything)
            self.set_thresholds()
            self.evaluate("joint", policy=selection_policy)
            self.evaluate("joint_without_reduction", reduce=False)
        self.dataset.crops = 0.0
        if gates:
            soft = round(0.6 * self.steps(gates))
            distillation, penalty = config.distillation, config.gate_penalty
            mixing = Gates(
                model, losses, self.exit_points(), distillation=distillation, penalty=penalty, soft_steps=soft
            )
            self.stage("gates", mixing)
            model.config.gates = {**model.config.gates, "threshold": 0.5}
            self.evaluate("gates")
        if exits:
            self.stage("exits", Exits(model, losses, self.exit_points(), distillation=config.distillation))
            # As it is saved nothing leaves, as before this stage.
            self.evaluate(f"exits_at_{_MEASURED_UNCERTAINTY}", thresholds=self.exiting_at(_MEASURED_UNCERTAINTY))
        if config.epochs("halting"):
            self.dataset.teacher = self.signals("exits", exit_signals)
            self.stage("halting", SelfSampling(model, losses, self.exit_points()))
            self.evaluate(f"halting_at_{_MEASURED_UNCERTAINTY}", thresholds=self.exiting_at(_MEASURED_UNCERTAINTY))

    def sample(self, tokens: int) -> list[Any]:
        """A sample of the training documents, of about this many tokens in total."""
        return self.documents[:: max(1, int(self.lengths.sum()) // tokens)]

    def fractions(self) -> tuple[list[list[float]], list[float] | None]:
        """The kept fractions to train for, one list per point, and those of the saved thresholds."""
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
        """The points to train for, with cutoffs from the selectors' current logits."""
        reductions = len(self.model.config.reduction_layers)
        if self.config.speed_range is None and self.config.speedup is None:
            return OperatingPoints([], [], reductions)
        fractions, _ = self.fractions()
        engine, documents = self.engine(), self.sample(_STARTING_TOKENS)
        first = keep_logits(engine, documents)
        cutoffs = [cutoffs_for(engine, documents, each, first) for each in fractions]
        return OperatingPoints(fractions, cutoffs, reductions)

    def exit_points(self) -> OperatingPoints | None:
        """The points to train the exits for: of all speeds, or that of the thresholds; None without reduction."""
        thresholds = torch.tensor(self.model.config.selector_thresholds)
        if not len(thresholds):
            return None
        if self.config.speed_range is not None:
            return self.points()
        return OperatingPoints([], [torch.logit(thresholds).tolist()], len(thresholds))

    def exiting_at(self, uncertainty: float) -> tuple[float, ...]:
        """The model's thresholds, with this one at all exits."""
        config = self.model.config
        exits, gates = config.exit_options, config.gate_options
        return (
            *config.selector_thresholds,
            *([uncertainty] * len(exits.layers)),
            *([gates.threshold] if gates else []),
        )

    def set_thresholds(self) -> None:
        """Set the thresholds for the requested speed-up, measured on training documents."""
        _, fractions = self.fractions()
        if fractions is None:
            self.model.config.selector_thresholds = [0.5] * len(self.model.config.reduction_layers)
        else:
            thresholds = thresholds_of(cutoffs_for(self.engine(), self.sample(_CALIBRATION_TOKENS), fractions))
            self.model.config.selector_thresholds = thresholds
            logger.info("kept fractions %s, thresholds %s", np.round(fractions, 3), np.round(thresholds, 3))

    def engine(self, *, reduce: bool = True, thresholds: tuple[float, ...] | None = None) -> Engine:
        """An engine with a copy of the model."""
        options = EngineOptions(reduce=reduce, dtype="float32", thresholds=thresholds)
        return Engine(merged_copy(self.model), self.tokenizer, options)

    def evaluate(
        self,
        name: str,
        *,
        reduce: bool = True,
        policy: SelectionPolicy | None = None,
        thresholds: tuple[float, ...] | None = None,
    ) -> None:
        if self.evaluation is not None and is_main_process():
            engine = self.engine(reduce=reduce, thresholds=thresholds)
            measured = evaluate(engine, self.evaluation, policy)
            self.measurements["stages"].setdefault(name, {}).update(measured)
            logger.info("%s: %s", name, measured)

    def teacher(self, *, guided: bool) -> TeacherSignals:
        """The dense model's signals; guided: also the guide, if the task has one."""
        if not self.dataset.losses.guided_by_saliency:
            return self.signals("teacher", None)
        if not guided:
            return self.signals("outputs", outputs)
        if self.config.guide == ATTENTION:
            return self.signals("attention", attention_guide)
        return self.signals("teacher", guide)

    def signals(self, name: str, compute: Compute | None) -> TeacherSignals:
        """Signals of the model, computed once per model and corpus and then read from a file; name: its first part."""
        cache = Path(self.config.teacher_cache or Path(self.config.output) / "stages")
        autocast = self.config.autocast
        digest = signals_digest(self.model, self.dataset, autocast=autocast, with_exits=compute is exit_signals)
        path = cache / f"{name}-{digest}.safetensors"
        if not path.is_file() and is_main_process():
            self.model.requires_grad_(False)
            teacher_signals(self.model, self.dataset, autocast=autocast, compute=compute).save(path)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        return TeacherSignals.load(path)

    def steps(self, epochs: float) -> int:
        """Number of optimizer steps in this many epochs."""
        return round(epochs * len(self.dataset) / self.config.batch_size)

    def stage(self, name: str, objective: Objective) -> None:
        """Train a stage, resuming from its last checkpoint, if any. A complete stage is loaded, not trained again."""
        config = self.config
        if not config.epochs(name):
            return
        directory = Path(config.output) / "stages" / name
        self.model.requires_grad_(False)
        for parameter in _trainable(self.model, name, adapter=bool(config.adapter_rank)):
            parameter.requires_grad_(True)
        rates = {"fine_tune": config.learning_rate}
        rates |= dict.fromkeys(REDUCTION_STAGES, config.selector_learning_rate)
        arguments = TrainingArguments(
            output_dir=str(directory),
            per_device_train_batch_size=config.batch_size // world_size(),
            num_train_epochs=config.epochs(name),
            learning_rate=rates.get(name, config.exit_learning_rate),
            warmup_steps=config.warmup,
            max_grad_norm=1.0,
            bf16=config.autocast is torch.bfloat16,
            seed=config.seed,
            save_steps=50,
            save_total_limit=1,
            logging_steps=10,
            report_to=list(config.report_to) or "none",
            run_name=f"{Path(config.output).name}-{name}",
            disable_tqdm=True,
            remove_unused_columns=False,
            label_names=["labels"],
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        if arguments.n_gpu > 1:
            arguments._n_gpu = 1  # DataParallel would split tokens and cu_seqlens independently of each other
        stages = [stage for stage in STAGES if config.epochs(stage)]
        try:
            trainer = StageTrainer(
                title=f"stage {stages.index(name) + 1} of {len(stages)}, {name}",
                model=objective,
                args=arguments,
                train_dataset=self.dataset,
                data_collator=self.dataset.collate,
                joint_learning_rate=config.joint_learning_rate if name in ("joint", "gates", "halting") else None,
            )
        except (RuntimeError, ValueError) as error:
            if not config.report_to:
                raise
            raise ConfigurationError(f"report_to {', '.join(config.report_to)}: {error}") from error
        checkpoint = get_last_checkpoint(str(directory)) if directory.is_dir() else None
        state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME)) if checkpoint else None
        if checkpoint and state and state.global_step >= state.max_steps:
            # Resuming would take one more step.
            objective.load_state_dict(load_file(Path(checkpoint) / SAFE_WEIGHTS_NAME))
        else:
            trainer.train(resume_from_checkpoint=checkpoint)
            state = trainer.state
        skipped = [entry["skipped"] for entry in state.log_history if "skipped" in entry]
        if skipped and skipped[-1] > _ALL_SKIPPED:
            raise TrainingError(f"gates: they skip {skipped[-1]:.0%} of all layers; lower gate_penalty and train anew")
        self.measurements["replicas"] = replicas(self.model)
        history = [entry["dense_passes"] for entry in state.log_history if "dense_passes" in entry]
        if history:
            self.measurements["stages"].setdefault(name, {})["dense_passes_per_document"] = float(np.mean(history))


def _bind_stages(stages: Path, config: TrainingConfig) -> None:
    """Record the options of the stages; raise ConfigurationError if existing stages were trained with others."""
    shown = {"report_to", "push_to_hub"}  # these do not change what is trained
    options = {name: value for name, value in dataclasses.asdict(config).items() if name not in shown}
    # As versions without pairs recorded it.
    options |= {"question_column": config.questions, "pairs": config.pairs}
    record, options = stages / "config.json", json.loads(json.dumps(options))
    defaults = {field.name: field.default for field in dataclasses.fields(config)} | {"pairs": False}
    known = json.loads(json.dumps({name: defaults[name] for name in options}))  # for options that were added later
    if record.is_file() and known | json.loads(record.read_text()) != options:
        raise ConfigurationError(
            f"{stages}: trained with other options; remove it, or choose another output, to train anew"
        )
    try:
        stages.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(options, indent=1))
    except OSError as error:
        raise ConfigurationError(f"output {config.output}: it cannot be written: {error}") from error


def evaluate(engine: Engine, corpus: LabelledCorpus, policy: SelectionPolicy | None = None) -> dict[str, float]:
    """Measure the task's metrics and the FLOPs speed-up on a labelled corpus."""
    results = engine.score(corpus.documents, policy)
    return {
        "documents": len(corpus.documents),
        **corpus.measure(results),
        "flops_speedup": float(results.dense_flops.sum() / results.flops.sum()),
    }


def _trainable(model: AnyModel, stage: str, adapter: bool) -> Iterator[nn.Parameter]:
    """The parameters that a stage trains.

    The layers learn in the stages in `beside`, which names the modules of selectors, exits and gates that learn with
    them. Exits that read words learn with the layers in the fine-tune too.
    """
    beside = {"fine_tune": (), "joint": ("selectors",), "gates": ("gates",), "halting": ("exits",)}
    alone = {"imitation": "selectors", "selectors": "selectors", "exits": "exits"}
    options = model.config.exit_options
    answering = f".exits.{len(options.layers) - 1}." if options is not None and options.answers_all else None
    for name, parameter in model.named_parameters():
        if ".original_module." in name:  # peft's frozen copy of a module that is trained in full
            continue
        adapted = not adapter or "lora_" in name or ".modules_to_save." in name
        kind = next((kind for kind in ("selectors", "exits", "gates") if f".{kind}." in name), None)
        if kind == "exits" and answering and answering in name:
            kind = None  # it is the model's classifier
        if stage in alone:
            trained = kind == alone[stage]
        else:
            with_words = stage == "fine_tune" and options is not None and options.head == "words"
            trained = kind is None or kind in beside[stage] or (kind == "exits" and with_words)
        if adapted and trained:
            yield parameter


def _save(model: AnyModel, tokenizer: PreTrainedTokenizerBase, config: TrainingConfig, output: Path) -> None:
    if config.adapter_rank:
        adapter = output / "adapter"
        model.save_pretrained(adapter)
        model.config.architectures = [type(merged_copy(model)).__name__]
        model.config.save_pretrained(adapter)
    merged = merged_copy(model)
    merged.save_pretrained(output)
    save_tokenizer(tokenizer, output, model.config, extended=config.max_positions is not None)


def _push(repository: str, output: Path) -> None:
    """Upload a trained model to the Hugging Face Hub, as who is logged in there.

    Raises:
        TrainingError: it cannot be uploaded.
    """
    try:
        huggingface_hub.create_repo(repository, exist_ok=True)
        huggingface_hub.upload_folder(repo_id=repository, folder_path=output, ignore_patterns=["stages/**"])
    except Exception as error:  # also those of the libraries below the hub's
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise TrainingError(f"push_to_hub {repository}: {reason}; the model is in {output}") from error
