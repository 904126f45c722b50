"""The options of a training run."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ConfigurationError
from ..exits.options import HEADS, ExitOptions
from ..options import LabelledColumns, option
from ..tasks.classification.task import ClassificationTask
from ..tasks.registry import TASKS, task_named

if TYPE_CHECKING:
    import torch

STAGES = ("fine_tune", "imitation", "selectors", "joint", "gates", "exits", "halting")
REDUCTION_STAGES = STAGES[1:4]  # those that train selectors
GRADIENT, ATTENTION = GUIDES = ("gradient", "attention")


@dataclass(frozen=True)
class TrainingConfig(LabelledColumns):
    """All options of a training run."""

    task: str = option(ClassificationTask.name, " or ".join(TASKS))
    problem_type: str | None = option(
        None,
        "what a classifier gives: single_label_classification, multi_label_classification or regression (default: by "
        "the label column: lists of labels are several, floating-point numbers and lists of them are to be regressed)",
    )
    train: str = option(
        "",
        "Parquet file, folder or glob with the training documents, local or a URI; for questions also SQuAD's JSON",
        path=True,
    )
    backbone: str = option(
        "", "directory of a BERT or DistilBERT checkpoint, or of a model this command fine-tuned", path=True
    )
    output: str = option("", "directory for the trained model; a killed run resumes from its stages/", path=True)
    evaluation: str | None = option(None, "documents to measure each stage on, given as for train", path=True)
    reduction_layers: tuple[int, ...] | None = option(
        None,
        "zero-based layers with a selector (default: the paper's, or the backbone's if only exits are trained; an "
        "empty list: no reduction)",
    )
    selector_size: int = option(32, "width of a selector's hidden layer")
    question_aware: bool = option(
        True, "the selectors know the question, and its tokens stay for two thirds of the layers; not so in the paper"
    )
    window_pooling: str | None = option(
        None,
        "how a classifier joins the windows of a document: mean, or log-sum-exp, for labels that one place of a long "
        "text shows (default: mean, or as the fine-tuned backbone does)",
    )
    example_windows: int | None = option(
        None, "windows of a document in a training example, with log-sum-exp (default: 4) and for answers (default: 2)"
    )
    evidence: bool = option(
        False,
        "for pairs, with log-sum-exp: `answers` and `answer_start` are pieces of the text that show the label; an "
        "example has a window with one, and the selectors imitate nearness to them",
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
    guide: str = option(
        GRADIENT,
        "what the selectors of classifiers imitate: gradient, the tokens that the gradient of the dense model's loss "
        "points at, as in the paper, or attention, those that its last layer attends to",
    )
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
        "Parquet file, folder or glob with more documents for the stages after the fine-tune, which learn from the "
        "dense model: such as the corpus to score (classification, with distillation)",
        path=True,
    )
    exits: str | None = option(
        None,
        "new exits, after which documents or words can leave: first (as in DeeBERT) or attention (SmartBERT) for "
        "classification, words (SENTEE, TOKEE) for token classification",
    )
    exit_layers: tuple[int, ...] | None = option(None, "zero-based layers with an exit (default: all but the last)")
    exit_unit: str = option(
        "sequence", "with exits that read words: sequence if all words leave together, word if each is halted by itself"
    )
    exit_window: int = option(5, "with exit_unit word: number of words around and with a word that must be sure too")
    gates: bool = option(False, "new gates, with which documents skip layers (SmartBERT; classification)")
    gate_penalty: float = option(0.04, "λ of the gates: the price of computing every layer")
    adapter_rank: int | None = option(
        None, "train a low-rank adapter of this rank, saved apart too, and no full weights"
    )
    report_to: tuple[str, ...] = option((), "where transformers' Trainer reports too, such as tensorboard, wandb")
    push_to_hub: str | None = option(None, "repository on the Hugging Face Hub to upload the trained model to")
    batch_size: int = option(16, "documents in a step, or windows of documents for token classification")
    fine_tune_epochs: float = option(3.0, "epochs of the dense fine-tune; 0 takes a fine-tuned backbone as it is")
    imitation_epochs: float = option(0.5, "epochs of the selectors' imitation of the guide")
    selectors_epochs: float = option(0.5, "epochs of the selectors' reinforcement")
    joint_epochs: float = option(1.0, "epochs of everything together")
    gates_epochs: float | None = option(None, "epochs of the gates with all layers (default: 5 with `gates`)")
    exits_epochs: float | None = option(
        None, "epochs of the exits (default: 3 with `exits`, but 0 if they have just learnt words with the fine-tune)"
    )
    halting_epochs: float | None = option(
        None, "epochs of everything with halted words (default: 3 with `exit_unit` word)"
    )
    learning_rate: float = option(1e-4, "of the dense fine-tune")
    joint_learning_rate: float = option(5e-5, "of layers and gates in the stages joint, gates and halting")
    selector_learning_rate: float = option(1e-3, "of the selectors")
    exit_learning_rate: float = option(5e-4, "of the exits")
    warmup: float = option(0.1, "share of a stage's steps in which the learning rate rises")
    attention_dropout: float = option(0.0, "torch's CPU flash attention knows none; more than 0 trains slower")
    teacher_cache: str | None = option(
        None,
        "directory that runs with the same dense model and corpus share their teacher in (default: the output's)",
        path=True,
    )
    seed: int = option(0, "of everything random")
    dtype: str = option("float32", "float32, or bfloat16 for autocast; auto: bfloat16 where the machine computes in it")

    def __post_init__(self):
        for name in ("train", "backbone", "output"):
            if not getattr(self, name):
                raise ConfigurationError(f"{name} is required")
        task = task_named(self.task)
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
        for name in ("crops", "unlabelled", "feature_distillation"):
            if getattr(self, name) and not (task.labels_whole_documents and self.distillation):
                raise ConfigurationError(f"{name} {getattr(self, name)}: only for classification with distillation")
        if self.window_pooling is not None and self.task != ClassificationTask.name:
            raise ConfigurationError(f"window_pooling {self.window_pooling}: only for classification")
        if self.evidence and not self.pairs:
            raise ConfigurationError("evidence: only for classification of pairs, which need question_column")
        if self.crops and self.joint_imitation:
            raise ConfigurationError(f"joint_imitation {self.joint_imitation}: not with crops, which have no guide")
        if self.guide not in GUIDES:
            raise ConfigurationError(f"guide {self.guide!r} is none of {', '.join(GUIDES)}")
        if self.guide == ATTENTION and (not task.labels_whole_documents or self.evidence):
            raise ConfigurationError("guide attention: only for classification without evidence")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise ConfigurationError(f"dtype {self.dtype!r} is none of auto, float32, bfloat16")
        least = {
            "batch_size": 1,
            "feature_distillation": 0,
            "joint_imitation": 0,
            "samples": 0,
            "length_penalty": 0,
            "joint_length_penalty": 0,
            "gate_penalty": 0,
            "guide_rate": 0,
        }
        if self.example_windows is not None and self.example_windows < 1:
            raise ConfigurationError(f"example_windows {self.example_windows} must be at least 1")
        values = {name: getattr(self, name) for name in least} | {
            f"{each}_epochs": self.epochs(each) for each in STAGES
        }
        for name, value in values.items():
            if not value >= least.get(name, 0):  # also rejects NaN
                raise ConfigurationError(f"{name} {value} must be at least {least.get(name, 0)}")
        self._check_exits()
        if self.selectors_epochs and self.samples < 2:
            raise ConfigurationError(f"samples {self.samples}: reinforcement compares at least 2 (selectors_epochs 0?)")

    @property
    def pairs(self) -> bool:
        """Whether a classifier of pairs is trained."""
        return self.task == ClassificationTask.name and self.question_column is not None

    @property
    def autocast(self) -> "torch.dtype | None":
        """The autocast dtype on this machine; None to compute in fp32 only."""
        import torch

        from ..engine.precision import computes_bfloat16

        half = self.dtype == "bfloat16" or (self.dtype == "auto" and computes_bfloat16())
        return torch.bfloat16 if half else None

    def epochs(self, stage: str) -> float:
        if stage in REDUCTION_STAGES and self.reduction_layers == ():
            return 0.0
        epochs = getattr(self, f"{stage}_epochs")
        return self._usual_epochs(stage) if epochs is None else epochs

    def _usual_epochs(self, stage: str) -> float:
        if stage == "gates":
            return 5.0 if self.gates else 0.0
        if stage == "halting":
            return 3.0 if self.exit_unit == "word" else 0.0
        trained = self.exits == "words" and self.fine_tune_epochs and not self.epochs("joint")
        return 3.0 if self.exits and not trained else 0.0

    @property
    def exit_fields(self) -> dict[str, Any] | None:
        """The fields of `ExitOptions` for new exits, without their layers if these are not given."""
        if self.exits is None:
            return None
        fields: dict[str, Any] = {"head": self.exits, "unit": self.exit_unit, "window": self.exit_window}
        return fields if self.exit_layers is None else fields | {"layers": list(self.exit_layers)}

    def _check_exits(self) -> None:
        allowed = task_named(self.task).exit_heads
        if self.exits is not None and self.exits not in allowed:
            raise ConfigurationError(f"exits {self.exits!r}: {self.task} can have {' or '.join(allowed) or 'none'}")
        if self.exits is None and (self.exit_layers is not None or self.exit_unit != "sequence"):
            raise ConfigurationError(f"exit_layers and exit_unit need exits: one of {', '.join(HEADS)}")
        if self.exit_fields is not None:
            ExitOptions(**{"layers": ()} | self.exit_fields)  # refuses what does not fit together
        if self.gates and not task_named(self.task).labels_whole_documents:
            raise ConfigurationError(f"gates: they skip layers of whole documents, not for {self.task}")
        if self.adapter_rank and (self.gates or self.exits or self.epochs("exits")):
            raise ConfigurationError("exits and gates: an adapter has none; leave adapter_rank out")
