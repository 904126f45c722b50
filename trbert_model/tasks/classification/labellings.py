"""What a classifier says of a document: one of its labels, any number of them, or numbers.

Called as transformers' `problem_type` calls them. The logits come from `ClassificationTask.combine`.
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
    """How logits, float32 (documents, labels), are read; labels: their names; options: what is told."""

    labels: tuple[str, ...]
    options: TaskOptions = DEFAULTS

    problem_type: ClassVar[str]

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Of the result columns."""

    @abstractmethod
    def columns(self, logits: np.ndarray) -> dict[str, pa.Array]:
        """The result columns."""

    @abstractmethod
    def counts(self, columns: dict[str, pa.Array]) -> dict[str, int]:
        """Documents by label."""


class SingleLabel(Labelling):
    """label: string; score: float32, its probability; probabilities: list<float32>, in the labels' order, on request.
    Probabilities are the logits' softmax."""

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
    """labels: list<string>, those with a probability of at least `label_threshold`, in the labels' order;
    probabilities: list<float32>, every label's by itself, the logit's sigmoid."""

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
    """score: float32, the model's number; or scores: list<float32>, in the labels' order, if it gives several."""

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
    """What a configuration says, and where it says nothing, what transformers takes it for."""
    return config.problem_type or (REGRESSION if config.num_labels == 1 else SINGLE_LABEL)


def check_problem_type(config: "TRBertConfig") -> None:
    """Raises ConfigurationError if it is none that there is."""
    if problem_type_of(config) not in _LABELLINGS:
        raise ConfigurationError(f"problem_type {config.problem_type!r} is none of {', '.join(_LABELLINGS)}")


def labelling_of(config: "TRBertConfig", options: TaskOptions) -> Labelling:
    """How a model's logits are read."""
    labels = tuple(config.id2label[i] for i in range(config.num_labels))
    return _LABELLINGS[problem_type_of(config)](labels, options)


def softmax(logits: np.ndarray) -> np.ndarray:
    """(documents, labels) → probabilities, float32, computed in float64."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return (shifted / shifted.sum(axis=1, keepdims=True)).astype(np.float32)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """(documents, labels) → probabilities, float32, computed in float64."""
    return (0.5 * (1 + np.tanh(0.5 * logits.astype(np.float64)))).astype(np.float32)
