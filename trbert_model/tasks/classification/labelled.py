"""Labelled documents, for training and evaluation."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from ...errors import ConfigurationError, InputError
from ...labelled import LabelledCorpus, WindowDataset, class_names, is_text, read_table, read_texts
from ...options import LabelledColumns
from ...scores import Scores
from ..base import DocumentResults
from ..question_answering.labelled import read_questions
from ..question_answering.task import EncodedContext
from .labellings import MULTI_LABEL, REGRESSION, SINGLE_LABEL, sigmoid
from .losses import LOSSES, UNLABELLED, RegressionLosses
from .task import LOG_SUM_EXP, ClassificationTask


@dataclass(frozen=True)
class RawTexts:
    """Texts and labels of Parquet files.

    Attributes:
        values: per text, depending on `problem_type`: a label (as a string), a list of labels, or a list of numbers.
        problem_type: as in transformers.
        class_ids: per text, its labels as integers, if the label column has integers; otherwise None.
        class_names: names of the class ids, as the `datasets` library writes them into a file; empty if there are none.
        flags: number of classes, if each text has a 0 or 1 for each of them instead of labels; otherwise None.
        questions: the question about each text, for pairs; otherwise empty.
    """

    uri: str
    texts: list[str]
    values: list[Any]
    problem_type: str
    class_ids: list[list[int]] | None = None
    class_names: tuple[str, ...] = ()
    flags: int | None = None
    questions: list[str] = field(default_factory=list)

    @classmethod
    def read(
        cls, uri: str, columns: LabelledColumns, problem_type: str | None = None, *, pairs: bool = False
    ) -> "RawTexts":
        """Read the files.

        Args:
            pairs: read the questions too.
            problem_type: default: by the label column. Lists of labels, or with a 0 or 1 for each class, are
                multi-label, other floating-point numbers and lists of them are regression, and everything else is
                single-label.

        Raises:
            InputError: a file cannot be read, a column is missing, a text or label is null, or the labels do not fit
                the problem type.
        """
        asked = [columns.questions] if pairs else []
        table = read_table(uri, [columns.text_column, columns.label_column, *asked])
        texts = read_texts(table, columns.text_column, uri)
        values = cls._values(uri, table, texts, columns, problem_type)
        return dataclasses.replace(values, questions=read_texts(table, columns.questions, uri)) if pairs else values

    @classmethod
    def _values(
        cls, uri: str, table: pa.Table, texts: list[str], columns: LabelledColumns, problem_type: str | None
    ) -> "RawTexts":
        """The texts with their labels; see `read`."""
        column = table[columns.label_column]
        where = f"{uri}: column {columns.label_column!r}"
        names = class_names(table.schema, columns.label_column)
        flags = None if problem_type == REGRESSION else _flags(column)
        kind = MULTI_LABEL if flags is not None else _problem_type(column.type)
        problem_type = problem_type or kind
        if problem_type != kind and MULTI_LABEL in (problem_type, kind):
            raise InputError(f"{where} of type {column.type} is none for {problem_type}")
        if problem_type == REGRESSION:
            return cls(uri, texts, _numbers(column.to_pylist(), where), problem_type)
        if is_text(column.type):
            return cls(uri, texts, read_texts(table, columns.label_column, uri), problem_type)
        if flags is not None:
            names = names if len(names) == flags.shape[1] else tuple(map(str, range(flags.shape[1])))
            classes = [np.flatnonzero(row).tolist() for row in flags]
            values = [[names[i] for i in each] for each in classes]
            return cls(uri, texts, values, problem_type, classes, names, flags.shape[1])
        integers = pa.types.is_integer(column.type.value_type if kind == MULTI_LABEL else column.type)
        if pa.types.is_floating(column.type):
            column = _class_numbers(column, where)
        rows = [value if isinstance(value, list) else [value] for value in column.to_pylist()]
        if kind != MULTI_LABEL and any(len(row) != 1 for row in rows):
            raise InputError(f"{where} of type {column.type} is none for {problem_type}")
        if nulls := sum(None in row for row in rows):
            raise InputError(f"{where}: {nulls} rows have a null label; remove them first")
        ids = rows if integers else None
        if ids is not None and names:
            for row, each in enumerate(ids):
                if wrong := [i for i in each if not 0 <= i < len(names)]:
                    raise InputError(f"{where}, row {row}: there is no class {wrong[0]} in {list(names)[:5]}")
            rows = [[names[i] for i in each] for each in ids]
        values = [[_name(label) for label in row] for row in rows]
        return cls(uri, texts, values if kind == MULTI_LABEL else [v for (v,) in values], problem_type, ids, names)

    def rows(self) -> list[tuple[str, ...]]:
        """The texts of each row, in the order of `Task.text_options`."""
        return list(zip(self.questions, self.texts)) if self.questions else [(text,) for text in self.texts]

    def names(self, column: str) -> list[str]:
        """The labels: class names, or else those that occur, sorted. For regression, names for this column's numbers.

        Raises:
            InputError: there are too few labels to learn from.
        """
        if self.problem_type == REGRESSION:
            numbers = len(self.values[0]) if self.values else 0
            names = [column] if numbers == 1 else [f"{column}_{i}" for i in range(numbers)]
        else:
            names = sorted({label for labels in self._lists() for label in labels})
        least = 2 if self.problem_type == SINGLE_LABEL else 1
        if len(names) < least:
            what = "two different labels" if least == 2 else "one label"
            raise InputError(f"{self.uri}: column {column!r} has fewer than {what}")
        if self.class_ids is not None:
            return list(self.class_names) or [str(i) for i in sorted({i for ids in self.class_ids for i in ids})]
        return names

    def targets(self, names: Sequence[str]) -> np.ndarray:
        """The targets as the losses take them: int64 (documents,) or float32 (documents, labels).

        Integers that are not all names of the model's labels are their indices.

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
        if self.flags not in (None, len(names)):
            raise InputError(f"{self.uri}: a 0 or 1 for {self.flags} classes, the model has {len(names)} labels")
        index, lists = {name: i for i, name in enumerate(names)}, self._lists()
        if unknown := sorted({label for labels in lists for label in labels} - set(index)):
            ids = self.class_ids
            if ids is None or not all(0 <= i < len(names) for each in ids for i in each):
                raise InputError(f"{self.uri}: labels {unknown[:5]} are none of the model's: {list(names)[:5]}…")
            indices = ids
        else:
            indices = [[index[label] for label in labels] for labels in lists]
        if self.problem_type == SINGLE_LABEL:
            return np.array([i for (i,) in indices], np.int64)
        targets = np.zeros((len(lists), len(names)), np.float32)
        for row, each in enumerate(indices):
            targets[row, each] = 1.0
        return targets

    def _lists(self) -> list[list[str]]:
        return [[value] for value in self.values] if self.problem_type == SINGLE_LABEL else self.values


def _flags(column: pa.ChunkedArray) -> np.ndarray | None:
    """Labels as transformers takes several of them, bool (texts, classes): lists with a 0 or 1 for each class.

    None for other columns. Lists of integers are class ids if no list has an integer twice.
    """
    if not _is_list(column.type):
        return None
    kind, rows = column.type.value_type, column.to_pylist()
    if not (pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        return None
    width = len(rows[0])
    if width < 2 or any(len(row) != width or any(flag not in (0, 1) for flag in row) for row in rows):
        return None
    if pa.types.is_integer(kind) and all(len(set(row)) == width for row in rows):
        return None
    return np.array(rows, bool)


def _class_numbers(column: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    """Labels that are floating-point numbers (pandas makes them of integers with gaps), as integers if they are whole.

    Raises:
        InputError: some are NaN.
    """
    if nans := pc.sum(pc.is_nan(column)).as_py():
        raise InputError(f"{where}: {nans} rows have no label but NaN; remove them first")
    whole = pc.all(pc.and_(pc.is_finite(column), pc.equal(column, pc.floor(column)))).as_py()
    return column.cast(pa.int64()) if whole else column


def _numbers(values: list[Any], where: str) -> list[list[float]]:
    try:
        numbers = [[float(number) for number in (value if isinstance(value, list) else [value])] for value in values]
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: {error}") from error
    for row, each in enumerate(numbers):
        if not np.isfinite(each).all() or len(each) != len(numbers[0]):
            raise InputError(f"{where}, row {row}: {each} are no such numbers")
    return numbers


def _name(label: Any) -> str:
    return label.decode(errors="replace") if isinstance(label, bytes) else str(label)


def _problem_type(kind: pa.DataType) -> str:
    """The problem type for a label column of this type."""
    is_list = _is_list(kind)
    if pa.types.is_floating(kind.value_type if is_list else kind):
        return REGRESSION
    return MULTI_LABEL if is_list else SINGLE_LABEL


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


@dataclass(frozen=True)
class LabelledTexts(LabelledCorpus):
    """Tokenised documents and their targets.

    Attributes:
        documents: encoded as the task does.
        targets: as from `RawTexts.targets`; UNLABELLED or NaN for unlabelled documents.
        metric: "accuracy" for one label; "f1" for several labels, of each document; "r2" for numbers, the share of
            their variance that is explained.
        evidence: of each document, the first and last tokens of the pieces of its text that show the label; None if
            that is not known.
    """

    documents: list[Any]
    targets: np.ndarray
    task: ClassificationTask
    evidence: list[list[tuple[int, int]]] | None = None

    @property
    def metric(self) -> str:  # type: ignore[override]
        return {SINGLE_LABEL: "accuracy", MULTI_LABEL: "f1", REGRESSION: "r2"}[self.task.labelling.problem_type]

    @classmethod
    def read(cls, uri: str, task: ClassificationTask, columns: LabelledColumns) -> "LabelledTexts":
        """Read and tokenise labelled Parquet files.

        Raises:
            InputError: as in `RawTexts.read` and `RawTexts.targets`, a question is named for a model that reads none,
                or a question leaves no room for its text.
        """
        if columns.question_column is not None and not task.asks:
            raise InputError(
                f"{uri}: question column {columns.question_column!r}: the model classifies texts without questions; "
                "leave the column out, or train on pairs with it"
            )
        raw = RawTexts.read(uri, columns, task.labelling.problem_type, pairs=task.asks)
        return cls(_documents(uri, task, raw.rows()), raw.targets(task.labels), task)

    def all_scores(self, results: DocumentResults) -> dict[str, Scores]:
        return {name: Scores.mean_of(scores) for name, scores in self._scores(results.outputs, self.targets).items()}

    def _scores(self, outputs: np.ndarray, right: np.ndarray) -> dict[str, np.ndarray]:
        """Each document's score by every metric."""
        if self.metric == "accuracy":
            return {"accuracy": outputs.argmax(1) == right}
        if self.metric == "f1":
            threshold = self.task.options.label_threshold
            predicted = sigmoid(outputs) >= threshold
            shared, both = (predicted & (right > 0)).sum(1), predicted.sum(1) + (right > 0).sum(1)
            f1 = np.where(both > 0, 2 * shared / np.maximum(both, 1), 1.0)
            return {"f1": f1, "exact_match": (predicted == (right > 0)).all(1)}
        errors = np.square(outputs.astype(np.float64) - right)
        return {"r2": (1 - errors / np.maximum(right.astype(np.float64).var(0), 1e-12)).mean(1)}

    def with_unlabelled(self, uri: str, columns: LabelledColumns) -> "LabelledTexts":
        names = [columns.questions, columns.text_column] if self.task.asks else [columns.text_column]
        table = read_table(uri, names)
        rows = list(zip(*(read_texts(table, name, uri) for name in names)))
        unknown = UNLABELLED if self.targets.dtype == np.int64 else np.nan
        none = np.full((len(rows), *self.targets.shape[1:]), unknown, self.targets.dtype)
        documents = self.documents + _documents(uri, self.task, rows)
        evidence = None if self.evidence is None else self.evidence + [[] for _ in rows]
        return LabelledTexts(documents, np.concatenate([self.targets, none]), self.task, evidence)

    def with_evidence(self, uri: str, columns: LabelledColumns) -> "LabelledTexts":
        if not self.task.asks:
            raise ConfigurationError(f"{uri}: evidence is for the classification of questions with their texts")
        rows = read_questions(uri, columns.questions, columns.text_column)
        contexts = {row["context"]: EncodedContext.of(row["context"], self.task.tokenizer) for row in rows}
        evidence = [
            [
                span
                for piece, start in zip(row["answers"], row["starts"])
                if (span := contexts[row["context"]].tokens(start, start + len(piece))) is not None
            ]
            for row in rows
        ]
        return dataclasses.replace(self, evidence=evidence)

    def dataset(self, classifier_input_weight: float = 0.0) -> "WindowDataset":
        return TextWindows(self, classifier_input_weight)


def _documents(uri: str, task: ClassificationTask, rows: list[tuple[str, ...]]) -> list[Any]:
    """Tokenise rows. A text without tokens is a document, but a question needs room for its text.

    Raises:
        InputError: there is a pair that the model cannot read.
    """
    documents = task.encode_all(rows)
    if task.asks:
        for row, document in enumerate(documents):
            if problem := task.problem(document):
                raise InputError(f"{uri}, row {row}: {problem[1]}")
    return documents


class TextWindows(WindowDataset):
    """Draws random windows of each document: one, or several if they are pooled by log-sum-exp.

    One of several has evidence, if it is known and there is any.

    Attributes:
        evidence: of each window, which tokens are evidence, bool (tokens,); None if that is not known.
    """

    evidence: list[np.ndarray] | None = None

    def __init__(self, corpus: LabelledTexts, classifier_input_weight: float = 0.0):
        super().__init__(corpus.documents, corpus.task)
        if corpus.task.window_pooling == LOG_SUM_EXP:
            self.most_windows = 4
        if corpus.evidence is not None:
            self.evidence = self._evidence(corpus.evidence)
        labelling = corpus.task.labelling
        self.losses = LOSSES[labelling.problem_type](
            len(labelling.labels), classifier_input_weight, self.evidence is not None
        )
        if isinstance(self.losses, RegressionLosses):
            variance = np.nanvar(corpus.targets, axis=0)
            self.losses.scale = torch.from_numpy(np.where(variance > 0, variance, 1.0).astype(np.float32))
        self.labels = np.repeat(corpus.targets, np.diff(self.first_window), axis=0)

    def target(self, index: int) -> Any:
        return self.labels[index].tolist()

    def shown(self, window: Any) -> Any:
        """The window, or with probability `crops` a random piece of it with at least about a fifth of its tokens."""
        before = window.passage
        tokens = len(window.input_ids) - before - 1  # what is before the text, and the last [SEP], stay
        if not self.crops or tokens < 2 or float(torch.rand(())) >= self.crops:
            return window
        count = int(tokens * (0.2 + 0.8 * float(torch.rand(())))) or 1
        start = before + int(torch.randint(tokens - count + 1, ()))
        kept = np.r_[:before, start : start + count, len(window.input_ids) - 1]
        pieces = {name: value[kept] for name, value in vars(window).items() if isinstance(value, np.ndarray)}
        return dataclasses.replace(window, **pieces)

    def __getitem__(self, index: int) -> list[int]:
        if self.most_windows > 1 or self.evidence is not None:
            return self.drawn(index, lambda window: self.evidence is not None and bool(self.evidence[window].any()))
        first, end = self.first_window[index], self.first_window[index + 1]
        return [first + int(torch.randint(end - first, ()))]

    def targets(self, examples: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        found = {"labels": torch.from_numpy(self.labels[[example[0] for example in examples]])}
        if self.evidence is not None and not self.crops:
            masks = [self.evidence[index] for example in examples for index in example]
            found["evidence"] = torch.from_numpy(np.concatenate(masks))
        return found

    def _evidence(self, spans: Sequence[Sequence[tuple[int, int]]]) -> list[np.ndarray]:
        """See `evidence`. A window has a piece of a text if it has half of it."""
        masks = []
        for i, pieces in enumerate(spans):
            for window in self.windows[self.first_window[i] : self.first_window[i + 1]]:
                mask = np.zeros(len(window.input_ids), bool)
                for first, last in pieces:
                    start, end = max(first, window.first), min(last + 1, window.first + window.count)
                    if 2 * (end - start) >= last + 1 - first:
                        shift = window.passage - window.first
                        mask[start + shift : end + shift] = True
                masks.append(mask)
        return masks
