"""Training losses of classification, one class per problem type."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...losses import SaliencyGuided, log_sums, nearness
from .labellings import MULTI_LABEL, REGRESSION, SINGLE_LABEL, problem_type_of

if TYPE_CHECKING:
    from ...configuration import TRBertConfig
    from ...exits.passing import ExitPass

# Target of an unlabelled document in single-label classification. The other problem types use NaN.
UNLABELLED = -1


@dataclass
class ClassificationLosses(SaliencyGuided, ABC):
    """Base class of the losses.

    An example's windows are pooled by log-sum-exp before its logits are compared, as in decoding. Models that take the
    mean learn from one window of a document at a time.

    Batches have `labels`, one for each example and described in the subclasses, and `teacher`, float32
    (windows, labels + hidden): the dense model's logits and the input of its classifier. Without `example`, each window
    is an example.

    Args:
        classifier_input_weight: weight in `distilled` of the difference to the input of the dense model's classifier:
            squared distance over squared norm. The logits of a few labels carry much less information about a document.
        evidence: batches also have `evidence`, bool (total tokens,), the tokens that show the label. The guide is then
            the nearness to them, not the dense model's saliency, as for answers.
    """

    NEAR: ClassVar[float] = 12.0
    num_labels: int
    classifier_input_weight: float = 0.0
    evidence: bool = False

    @property
    def guided_by_saliency(self) -> bool:
        return not self.evidence

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
        return self.to_labels(_pooled(output.logits, batch, repeats), labels.repeat(repeats, *[1] * (labels.dim() - 1)))

    def distilled(self, output: Any, batch: dict[str, Tensor], repeats: int = 1) -> Tensor:
        logits, classifier_inputs = batch["teacher"].tensor_split([self.num_labels], dim=1)
        loss = self.to_logits(
            _pooled(output.logits, batch, repeats), _pooled(logits.repeat(repeats, 1), batch, repeats)
        )
        if not self.classifier_input_weight:
            return loss
        distance = (output.pooler_output.float() - classifier_inputs.repeat(repeats, 1)).square().sum(-1)
        norm = classifier_inputs.square().sum(-1).clamp(min=1e-6)
        distance = distance / norm.repeat(repeats)
        if (several := _examples(batch, repeats)) is not None:
            example, windows = several
            distance = torch.zeros_like(loss).index_add(0, example, distance) / windows
        return loss + self.classifier_input_weight * distance

    def of_exits(self, exits: "ExitPass", batch: dict[str, Tensor], *, distilled: bool) -> Tensor:
        several, means = _examples(batch, 1), []
        for logits, judged in exits.recorded():
            pooled = _pooled(logits, batch)
            if distilled:
                losses = self.to_logits(pooled, _pooled(batch["teacher"][:, : self.num_labels], batch))
            else:
                losses = self.to_labels(pooled, batch["labels"])
            if several is not None:  # an example counts if all of its windows were judged
                example, windows = several
                judged = torch.zeros_like(windows).index_add(0, example, judged.long()) == windows
            means.append(losses[judged].sum() / judged.sum().clamp(min=1))
        return torch.stack(means)

    def signals(self, output: Any) -> Tensor:
        parts = [output.logits.float()]
        if output.pooler_output is not None:
            parts.append(output.pooler_output.float())
        return torch.cat(parts, dim=1)

    def rows(self, lengths: Tensor) -> Tensor:
        return torch.ones_like(lengths, dtype=torch.int64)

    def guide(self, batch: dict[str, Tensor], layers: Sequence[int]) -> Tensor:
        if not self.evidence:
            return super().guide(batch, layers)
        return nearness(batch["evidence"], batch["cu_seqlens"], self.NEAR).expand(len(layers), -1)

    def keep_targets(self, batch: dict[str, Tensor], layers: Sequence[int], counts: Tensor) -> Tensor:
        # Independent of the counts: a window without evidence has nothing to keep.
        return self.guide(batch, layers) if self.evidence else super().keep_targets(batch, layers, counts)

    def completed(self, batch: dict[str, Tensor], signals: Tensor) -> dict[str, Tensor]:
        logits = _pooled(signals[:, : self.num_labels], batch)
        return {**batch, "labels": self.where_missing(batch["labels"], logits)}


def _examples(batch: dict[str, Tensor], repeats: int) -> tuple[Tensor, Tensor] | None:
    """The example of each window, int64 (repeats · windows,), and the windows of each example; None: one of each."""
    example = batch.get("example")
    if example is None or int(example.max()) + 1 == len(example):
        return None
    windows = example.bincount()
    example = torch.cat([example + len(windows) * repeat for repeat in range(repeats)])
    return example, windows.repeat(repeats)


def _pooled(logits: Tensor, batch: dict[str, Tensor], repeats: int = 1) -> Tensor:
    """Pool windows by the log-sum-exp of the mean: (repeats · windows, labels) → (repeats · examples, labels)."""
    if (several := _examples(batch, repeats)) is None:
        return logits
    example, windows = several
    labels = logits.shape[1]
    group = example[:, None] * labels + torch.arange(labels, device=logits.device)
    sums = log_sums(logits.float().flatten(), group.flatten(), len(windows) * labels)
    return sums.view(-1, labels) - windows.log()[:, None]


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
