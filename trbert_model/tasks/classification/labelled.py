"""Labelled documents, for training and evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ...errors import InputError
from ...labelled import LabelledCorpus, WindowDataset, read_table, strings
from ...options import LabelledColumns
from ..base import DocumentResults
from .labellings import MULTI_LABEL, REGRESSION, SINGLE_LABEL, sigmoid
from .losses import LOSSES, UNLABELLED, RegressionLosses
from .task import ClassificationTask, Window


@dataclass(frozen=True)
class RawTexts:
    """Texts and labels of a Parquet file.

    Attributes:
        values: per text, depending on `problem_type`: a label (as a string), a list of labels, or a list of numbers.
        problem_type: as in transformers.
    """

    uri: str
    texts: list[str]
    values: list[Any]
    problem_type: str

    @classmethod
    def read(cls, uri: str, columns: LabelledColumns, problem_type: str | None = None) -> "RawTexts":
        """Read a file.

        Args:
            problem_type: default: by the type of the label column. Lists of labels are multi-label, floating-point
                numbers and lists of them are regression, and everything else is single-label.

        Raises:
            InputError: the file cannot be read, a column is missing, a text or label is null, or the labels do not fit
                the problem type.
        """
        table = read_table(uri, [columns.text_column, columns.label_column])
        column, texts = table[columns.label_column], strings(table[columns.text_column].to_pylist())
        kind = _problem_type(column.type)
        problem_type = problem_type or kind
        if problem_type != kind and MULTI_LABEL in (problem_type, kind):
            raise InputError(f"{uri}: column {columns.label_column!r} of type {column.type} is none for {problem_type}")
        values = column.to_pylist()
        if problem_type == MULTI_LABEL:
            values = [[str(label) for label in value] for value in values]
        elif problem_type == REGRESSION:
            try:
                values = [
                    [float(number) for number in (value if isinstance(value, list) else [value])] for value in values
                ]
            except (TypeError, ValueError) as error:
                raise InputError(f"{uri}: column {columns.label_column!r}: {error}") from error
            for row, numbers in enumerate(values):
                if not np.isfinite(numbers).all() or len(numbers) != len(values[0]):
                    raise InputError(
                        f"{uri}: column {columns.label_column!r}, row {row}: {numbers} are no such numbers"
                    )
        else:
            values = [str(value) for value in values]
        return cls(uri, texts, values, problem_type)

    def names(self, column: str) -> list[str]:
        """The labels that occur, sorted; for regression, names for the numbers of this column.

        Raises:
            InputError: there are too few labels to learn from.
        """
        if self.problem_type == REGRESSION:
            numbers = len(self.values[0]) if self.values else 0
            names = [column] if numbers == 1 else [f"{column}_{i}" for i in range(numbers)]
        elif self.problem_type == MULTI_LABEL:
            names = sorted({label for labels in self.values for label in labels})
        else:
            names = sorted(set(self.values))
        least = 2 if self.problem_type == SINGLE_LABEL else 1
        if len(names) < least:
            what = "two different labels" if least == 2 else "one label"
            raise InputError(f"{self.uri}: column {column!r} has fewer than {what}")
        return names

    def targets(self, names: Sequence[str]) -> np.ndarray:
        """The targets as the losses take them: int64 (documents,) or float32 (documents, labels).

        Args:
            names: the model's labels, in the order of their indices.

        Raises:
            InputError: a label is not in `names`, or the number of values per document differs.
        """
        if self.problem_type == REGRESSION:
            numbers = np.array(self.values, np.float32).reshape(len(self.values), -1)
            if numbers.size and numbers.shape[1] != len(names):
                raise InputError(f"{self.uri}: {numbers.shape[1]} numbers a document, the model gives {len(names)}")
            return numbers
        single = self.problem_type == SINGLE_LABEL
        lists = [[value] for value in self.values] if single else self.values
        index = {name: i for i, name in enumerate(names)}
        if unknown := sorted({label for labels in lists for label in labels} - set(index)):
            raise InputError(f"{self.uri}: labels {unknown[:5]} are none of the model's: {list(names)[:5]}…")
        if single:
            return np.array([index[label] for (label,) in lists], np.int64)
        targets = np.zeros((len(lists), len(names)), np.float32)
        for row, labels in enumerate(lists):
            targets[row, [index[label] for label in labels]] = 1.0
        return targets


def _problem_type(kind: pa.DataType) -> str:
    """The problem type for a label column of this type."""
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if pa.types.is_floating(kind.value_type if is_list else kind):
        return REGRESSION
    return MULTI_LABEL if is_list else SINGLE_LABEL


@dataclass(frozen=True)
class LabelledTexts(LabelledCorpus):
    """Tokenised documents and their targets.

    Attributes:
        documents: token ids, int32 (tokens,) each.
        targets: as from `RawTexts.targets`; UNLABELLED or NaN for unlabelled documents.
        metric: "accuracy" for one label; "f1" for several labels, of each document; "r2" for numbers, the share of
            their variance that is explained.
    """

    documents: list[np.ndarray]
    targets: np.ndarray
    task: ClassificationTask

    @property
    def metric(self) -> str:  # type: ignore[override]
        return {SINGLE_LABEL: "accuracy", MULTI_LABEL: "f1", REGRESSION: "r2"}[self.task.labelling.problem_type]

    @classmethod
    def read(cls, uri: str, task: ClassificationTask, columns: LabelledColumns) -> "LabelledTexts":
        """Read and tokenise a labelled Parquet file.

        Raises:
            InputError: as in `RawTexts.read` and `RawTexts.targets`.
        """
        raw = RawTexts.read(uri, columns, task.labelling.problem_type)
        return cls(task.tokenize(raw.texts), raw.targets(task.labels), task)

    def all_scores(self, results: DocumentResults) -> dict[str, np.ndarray]:
        outputs, right = results.outputs, self.targets
        if self.metric == "accuracy":
            return {"accuracy": (outputs.argmax(1) == right).astype(np.float64)}
        if self.metric == "f1":
            threshold = self.task.options.label_threshold
            predicted = sigmoid(outputs) >= threshold
            shared, both = (predicted & (right > 0)).sum(1), predicted.sum(1) + (right > 0).sum(1)
            f1 = np.where(both > 0, 2 * shared / np.maximum(both, 1), 1.0)
            return {"f1": f1, "exact_match": (predicted == (right > 0)).all(1).astype(np.float64)}
        errors = np.square(outputs.astype(np.float64) - right)
        return {"r2": (1 - errors / np.maximum(right.astype(np.float64).var(0), 1e-12)).mean(1)}

    def with_unlabelled(self, uri: str, columns: LabelledColumns) -> "LabelledTexts":
        texts = strings(read_table(uri, [columns.text_column])[columns.text_column].to_pylist())
        unknown = UNLABELLED if self.targets.dtype == np.int64 else np.nan
        none = np.full((len(texts), *self.targets.shape[1:]), unknown, self.targets.dtype)
        documents = self.documents + self.task.tokenize(texts)
        return LabelledTexts(documents, np.concatenate([self.targets, none]), self.task)

    def dataset(self, classifier_input_weight: float = 0.0) -> "WindowDataset":
        return TextWindows(self, classifier_input_weight)


class TextWindows(WindowDataset):
    """Draws one random window of each document."""

    def __init__(self, corpus: LabelledTexts, classifier_input_weight: float = 0.0):
        super().__init__(corpus.documents, corpus.task)
        labelling = corpus.task.labelling
        self.losses = LOSSES[labelling.problem_type](len(labelling.labels), classifier_input_weight)
        if isinstance(self.losses, RegressionLosses):
            variance = np.nanvar(corpus.targets, axis=0)
            self.losses.scale = torch.from_numpy(np.where(variance > 0, variance, 1.0).astype(np.float32))
        self.labels = np.repeat(corpus.targets, np.diff(self.first_window), axis=0)

    def target(self, index: int) -> Any:
        return self.labels[index].tolist()

    def shown(self, window: Window) -> Window:
        """The window, or with probability `crops` a random piece of it with at least about a fifth of its tokens."""
        tokens = len(window.input_ids) - 2  # [CLS] and [SEP] stay
        if not self.crops or tokens < 2 or float(torch.rand(())) >= self.crops:
            return window
        count = int(tokens * (0.2 + 0.8 * float(torch.rand(())))) or 1
        start = 1 + int(torch.randint(tokens - count + 1, ()))
        ids = window.input_ids
        return Window(np.concatenate([ids[:1], ids[start : start + count], ids[-1:]]), count)

    def __getitem__(self, index: int) -> list[int]:
        first, end = self.first_window[index], self.first_window[index + 1]
        return [first + int(torch.randint(end - first, ()))]

    def targets(self, examples: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        return {"labels": torch.from_numpy(self.labels[[index for (index,) in examples]])}
