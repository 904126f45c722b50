"""The runs: which models are trained on which corpus, and at which speeds they are measured."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.quality.rules import first_tokens_policy, random_tokens_policy
from trbert_model.calibration.table import SPEEDUPS
from trbert_model.reduction.state import SelectionPolicy

TARGETS = (2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Run:
    """A model to train and measure.

    Attributes:
        corpus: name of the corpus.
        title: name of the run in the tables.
        options: training options, in addition to the corpus's recipe.
        targets: FLOPs speed-ups to measure.
        rule: chooses the tokens instead of the selectors.
        layers: number of layers, for a dense model without selectors.
        folds: number of models, each with its own split of the corpus; their test documents are measured as one set.
        parts: the parts of the corpus to measure, and for each the part that its thresholds are chosen on.
        speedups: speed-ups of the calibration table that thresholds are chosen from. Default: `targets`.
        long: also measure the documents of more than 512 tokens separately.
        against: another run on the same documents to compare with, in addition to the dense model.
        on: the run whose model it continues with. Default: the dense model.
    """

    corpus: str
    title: str
    options: dict[str, Any] = field(default_factory=dict)
    targets: tuple[float, ...] = TARGETS
    rule: Callable[[Sequence[float]], SelectionPolicy] | None = None
    layers: int | None = None
    folds: int | None = None
    parts: dict[str, str] = field(default_factory=lambda: {"test": "dev"})
    speedups: tuple[float, ...] = ()
    long: bool = False
    against: str | None = None
    on: str | None = None

    @property
    def corpora(self) -> list[str]:
        return [self.corpus] if self.folds is None else [f"{self.corpus}-{fold}" for fold in range(self.folds)]

    @property
    def is_comparison(self) -> bool:
        """Whether it is measured at one speed only, to compare it with the full recipe."""
        return len(self.targets) == 1


NONE: dict[str, Any] = {"imitation_epochs": 0.0, "selectors_epochs": 0.0, "joint_epochs": 0.0}
AT_3 = (3.0,)
# For 6,000 tokens, the thresholds of 1,500 are used: there are only more windows of the same kind.
CONTEXTS = {"test": "dev", "test-1500": "dev-1500", "test-6000": "dev-1500"}
# Runs that are compared at 3× train about a third of the joint stage, also the full recipe they are compared with.
SHORT = {"joint_epochs": 0.35}
FULL = "20news-short"


def _compared(title: str, **options: Any) -> Run:
    return Run("20news", title, {**SHORT, **options}, AT_3, against=FULL)


# Exits on finished models; those of the dense model are DeeBERT's.
_ONLY_EXITS: dict[str, Any] = {**NONE, "exits": "first"}
_NO_REDUCTION: dict[str, Any] = {"reduction_layers": (), "speedup": None, "speed_range": None}
_WORDS: dict[str, Any] = {**NONE, **_NO_REDUCTION, "exits": "words"}
_EARLY = (2.0, 3.0, 4.0)

RUNS: dict[str, Run] = {
    "20news": Run("20news", "full recipe, seed 0", speedups=SPEEDUPS, long=True),
    "20news-seed1": Run("20news", "full recipe, seed 1", {"seed": 1}, long=True),
    "imdb": Run("imdb", "full recipe", targets=(2.0, 3.0, 4.0), long=True),
    # Too few documents for a development set: thresholds are chosen on the training documents.
    "hyperpartisan": Run("hyperpartisan", "full recipe", targets=(2.0, 3.0), folds=5, parts={"test": "train"}),
    # 4.5 is beyond the fastest target, because thresholds chosen for 4× on few long contexts may give only 3.9×.
    "squad": Run("squad", "full recipe", targets=(2.0, 3.0, 4.0), parts=CONTEXTS, speedups=(2.0, 3.0, 4.0, 4.5)),
    "squad2": Run("squad2", "full recipe, with questions that have no answer", targets=(2.0, 3.0, 4.0)),
    **{
        f"{corpus}-{name}": Run(corpus, title, options, targets=_EARLY, on=on)
        for corpus in ("20news", "imdb")
        for name, title, options, on in (
            ("deebert", "documents leave (DeeBERT)", {**_ONLY_EXITS, **_NO_REDUCTION}, None),
            ("exits", "full recipe, and documents leave", _ONLY_EXITS, corpus),
        )
    },
    **{
        f"{corpus}-{name}": Run(corpus, title, options, targets=(2.0, 3.0), on=on)
        for corpus, epochs in (("gum", 4.0), ("wnut17", 2.0))
        for name, title, options, on in (
            ("reduction", "reduction", {}, None),
            ("sentee", "sentences leave (SENTEE)", {**_WORDS, "fine_tune_epochs": epochs, "exits_epochs": 0.0}, None),
            (
                "tokee",
                "words halted (TOKEE)",
                {**_WORDS, "exit_unit": "word", "fine_tune_epochs": epochs, "halting_epochs": epochs},
                None,
            ),
            (
                "halting",
                "reduction, and words halted",
                {**NONE, "exits": "words", "exit_unit": "word"},
                f"{corpus}-reduction",
            ),
        )
    },
    FULL: Run("20news", "full recipe", SHORT, AT_3),
    "20news-features": _compared("full recipe, learning the dense model's features too", feature_distillation=1.0),
    "20news-imitation": Run(
        "20news",
        "imitation only",
        {"selectors_epochs": 0.0, "joint_epochs": 0.0, "imitation_epochs": 0.5},
        AT_3,
        against=FULL,
    ),
    "20news-no-imitation": _compared("reinforcement only", imitation_epochs=0.0, selectors_epochs=0.35),
    "20news-no-reinforcement": _compared("no reinforcement", selectors_epochs=0.0, samples=0),
    "20news-no-distillation": _compared("no distillation", distillation=False),
    "20news-two-selectors": _compared("the paper's two selectors", reduction_layers=(1, 3), speed_range=(1.5, 5.0)),
    "20news-one-penalty": _compared(
        "trained for one λ, as in the paper",
        speed_range=None,
        speedup=None,
        length_penalty=1.0,
        joint_length_penalty=1.0,
    ),
    "20news-one-speed": _compared("trained for 3× alone", speed_range=None),
    "20news-random": dataclasses.replace(_compared("random tokens"), rule=random_tokens_policy),
    "20news-first": dataclasses.replace(_compared("first tokens"), rule=first_tokens_policy),
    "20news-two-layers": Run("20news", "dense, the first 2 of 6 layers", layers=2, targets=AT_3, against=FULL),
    "20news-three-layers": Run("20news", "dense, the first 3 of 6 layers", layers=3, targets=(2.0,)),
    "hyperpartisan-layers": Run(
        "hyperpartisan",
        "three selectors, the first after a layer",
        {"reduction_layers": (1, 2, 4)},
        AT_3,
        folds=5,
        parts={"test": "train"},
    ),
}
