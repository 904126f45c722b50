"""What a classifier predicts for a document: one label, several labels, or numbers.

The names are those of transformers' `problem_type`. The logits come from `ClassificationTask.combine`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...errors import ConfigurationError
from ..base import DEFAULTS, TaskOptions

if TYPE_CHECKING:
    from ...configuration import TRBertConfig

SINGLE_LABEL, MULTI_LABEL, REGRESSION = "single_label_classification", "multi_label_classification", "regression"


@dataclass(frozen=True)
class Labelling(ABC):
    """Converts logits, float32 (documents, labels), to result columns; labels: their names, by index."""

    labels: tuple[str, ...]
    options: TaskOptions = DEFAULTS

    problem_type: ClassVar[str]

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Names of the result columns."""

    @abstractmethod
    def columns(self, logits: np.ndarray) -> dict[str, pa.Array]:
        """The result columns, by name."""

    @abstractmethod
    def counts(self, columns: dict[str, pa.Array]) -> dict[str, int]:
        """Number of documents with each label."""


class SingleLabel(Labelling):
    """One label per document. Probabilities are the softmax of the logits.

    Columns:
        label: string.
        score: float32, the label's probability.
        probabilities: list<float32>, in the order of the labels, if requested.
    """

    problem_type = SINGLE_LABEL

    @property
    def names(self) -> tuple[str, ...]:
        return ("label", "score", *(("probabilities",) if self.options.probabilities else ()))

    def columns(self, logits: np.ndarray) -> dict[str, pa.Array]:
        shares = softmax(logits)
        best = shares.argmax(axis=1) if len(shares) else np.zeros(0, np.int64)
        columns = {
            "label": pa.array([self.labels[i] for i in best], pa.string()),
            "score": pa.array(shares[np.arange(len(best)), best], pa.float32()),
        }
        if self.options.probabilities:
            columns["probabilities"] = pa.array(list(shares), pa.list_(pa.float32()))
        return columns

    def counts(self, columns: dict[str, pa.Array]) -> dict[str, int]:
        return {each["values"]: each["counts"] for each in pc.value_counts(columns["label"]).to_pylist()}


class MultiLabel(Labelling):
    """Any number of labels per document. Each label's probability is the sigmoid of its logit.

    Columns:
        labels: list<string>, those with a probability of at least `label_threshold`, in the order of the labels.
        probabilities: list<float32>, in the order of the labels.
    """

    problem_type = MULTI_LABEL
    names = ("labels", "probabilities")

    def columns(self, logits: np.ndarray) -> dict[str, pa.Array]:
        shares = sigmoid(logits)
        found = [
            [label for label, has in zip(self.labels, row) if has] for row in shares >= self.options.label_threshold
        ]
        return {
            "labels": pa.array(found, pa.list_(pa.string())),
            "probabilities": pa.array(list(shares), pa.list_(pa.float32())),
        }

    def counts(self, columns: dict[str, pa.Array]) -> dict[str, int]:
        found = pc.value_counts(columns["labels"].flatten()).to_pylist()
        return {each["values"]: each["counts"] for each in found}


class Regression(Labelling):
    """score: float32, the predicted number; if there are several, scores: list<float32>, in the order of the labels."""

    problem_type = REGRESSION

    @property
    def names(self) -> tuple[str, ...]:
        return ("score",) if len(self.labels) == 1 else ("scores",)

    def columns(self, logits: np.ndarray) -> dict[str, pa.Array]:
        if len(self.labels) == 1:
            return {"score": pa.array(logits[:, 0], pa.float32())}
        return {"scores": pa.array(list(logits), pa.list_(pa.float32()))}

    def counts(self, columns: dict[str, pa.Array]) -> dict[str, int]:
        return {}


_LABELLINGS: dict[str, type[Labelling]] = {each.problem_type: each for each in (SingleLabel, MultiLabel, Regression)}


def problem_type_of(config: "TRBertConfig") -> str:
    """The configuration's problem type, or transformers' default if it has none."""
    return config.problem_type or (REGRESSION if config.num_labels == 1 else SINGLE_LABEL)


def check_problem_type(config: "TRBertConfig") -> None:
    """Raise ConfigurationError if the problem type is unknown."""
    if problem_type_of(config) not in _LABELLINGS:
        raise ConfigurationError(f"problem_type {config.problem_type!r} is none of {', '.join(_LABELLINGS)}")


def labelling_of(config: "TRBertConfig", options: TaskOptions) -> Labelling:
    """The labelling for a model's problem type."""
    labels = tuple(config.id2label[i] for i in range(config.num_labels))
    return _LABELLINGS[problem_type_of(config)](labels, options)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Logits (documents, labels) → probabilities, float32, computed in float64."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return (shifted / shifted.sum(axis=1, keepdims=True)).astype(np.float32)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Logits (documents, labels) → probabilities, float32, computed in float64."""
    return (0.5 * (1 + np.tanh(0.5 * logits.astype(np.float64)))).astype(np.float32)
