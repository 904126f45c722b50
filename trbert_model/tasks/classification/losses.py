"""Training losses of classification, one class per problem type."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...losses import SaliencyGuided
from .labellings import MULTI_LABEL, REGRESSION, SINGLE_LABEL, problem_type_of

if TYPE_CHECKING:
    from ...configuration import TRBertConfig
    from ...exits.passing import ExitPass

# Target of an unlabelled document in single-label classification. The other problem types use NaN.
UNLABELLED = -1


@dataclass
class ClassificationLosses(SaliencyGuided, ABC):
    """Base class of the losses.

    Batches have `labels`, described in the subclasses, and `teacher`, float32 (windows, labels + hidden): the dense
    model's logits and the input of its classifier.

    Args:
        classifier_input_weight: weight in `distilled` of the difference to the input of the dense model's classifier:
            squared distance over squared norm. The logits of a few labels carry much less information about a document.
    """

    num_labels: int
    classifier_input_weight: float = 0.0

    @abstractmethod
    def to_labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of logits, (sequences, labels), against labels: (sequences,)."""

    @abstractmethod
    def to_logits(self, logits: Tensor, teacher: Tensor) -> Tensor:
        """The loss of logits, (sequences, labels), against the teacher's logits of the same shape: (sequences,)."""

    @abstractmethod
    def where_missing(self, labels: Tensor, logits: Tensor) -> Tensor:
        """The labels, with missing ones replaced by the predictions of these logits."""

    def labelled(self, output: Any, batch: dict[str, Tensor], repeats: int = 1) -> Tensor:
        labels = batch["labels"]
        return self.to_labels(output.logits, labels.repeat(repeats, *[1] * (labels.dim() - 1)))

    def distilled(self, output: Any, batch: dict[str, Tensor], repeats: int = 1) -> Tensor:
        logits, classifier_inputs = batch["teacher"].tensor_split([self.num_labels], dim=1)
        loss = self.to_logits(output.logits, logits.repeat(repeats, 1))
        if not self.classifier_input_weight:
            return loss
        distance = (output.pooler_output.float() - classifier_inputs.repeat(repeats, 1)).square().sum(-1)
        norm = classifier_inputs.square().sum(-1).clamp(min=1e-6)
        return loss + self.classifier_input_weight * distance / norm.repeat(repeats)

    def of_exits(self, exits: "ExitPass", batch: dict[str, Tensor], *, distilled: bool) -> Tensor:
        means = []
        for logits, judged in exits.recorded():
            if distilled:
                losses = self.to_logits(logits, batch["teacher"][:, : self.num_labels])
            else:
                losses = self.to_labels(logits, batch["labels"])
            means.append(losses[judged].sum() / judged.sum().clamp(min=1))
        return torch.stack(means)

    def signals(self, output: Any) -> Tensor:
        parts = [output.logits.float()]
        if output.pooler_output is not None:
            parts.append(output.pooler_output.float())
        return torch.cat(parts, dim=1)

    def rows(self, lengths: Tensor) -> Tensor:
        return torch.ones_like(lengths, dtype=torch.int64)

    def completed(self, batch: dict[str, Tensor], signals: Tensor) -> dict[str, Tensor]:
        return {**batch, "labels": self.where_missing(batch["labels"], signals[:, : self.num_labels])}


class SingleLabelLosses(ClassificationLosses):
    """Cross-entropy; labels: int64 (windows,)."""

    def to_labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, reduction="none")

    def to_logits(self, logits: Tensor, teacher: Tensor) -> Tensor:
        return -(teacher.softmax(-1) * logits.log_softmax(-1)).sum(-1)

    def where_missing(self, labels: Tensor, logits: Tensor) -> Tensor:
        return torch.where(labels == UNLABELLED, logits.argmax(-1), labels)


class MultiLabelLosses(ClassificationLosses):
    """Mean binary cross-entropy over the labels; labels: float32 (windows, labels), 1 for each label it has."""

    def to_labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none").mean(-1)

    def to_logits(self, logits: Tensor, teacher: Tensor) -> Tensor:
        return self.to_labels(logits, teacher.sigmoid())

    def where_missing(self, labels: Tensor, logits: Tensor) -> Tensor:
        return torch.where(labels.isnan(), (logits > 0).to(labels.dtype), labels)


@dataclass
class RegressionLosses(ClassificationLosses):
    """Mean squared error in units of `scale`; labels: float32 (windows, numbers).

    Args:
        scale: float32 (numbers,), for example each number's variance in a corpus, so that the relative weight of the
            length penalty does not depend on the units.
    """

    scale: Tensor | None = None

    def to_labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        squares = (logits.float() - labels.view_as(logits)).square()
        return (squares if self.scale is None else squares / self.scale.to(squares.device)).mean(-1)

    def to_logits(self, logits: Tensor, teacher: Tensor) -> Tensor:
        return self.to_labels(logits, teacher)

    def where_missing(self, labels: Tensor, logits: Tensor) -> Tensor:
        return torch.where(labels.isnan(), logits, labels)


LOSSES: dict[str, type[ClassificationLosses]] = {
    SINGLE_LABEL: SingleLabelLosses,
    MULTI_LABEL: MultiLabelLosses,
    REGRESSION: RegressionLosses,
}


def losses_of(config: "TRBertConfig") -> ClassificationLosses:
    """The losses for a model's problem type."""
    return LOSSES[problem_type_of(config)](config.num_labels)
