"""Labelled corpora for training and evaluation, and their windows as varlen batches."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import IO, TYPE_CHECKING, Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .errors import ConfigurationError, InputError
from .losses import TaskLosses
from .options import LabelledColumns
from .tasks.base import DocumentResults
from .varlen import model_inputs

if TYPE_CHECKING:
    from .training.teacher import TeacherSignals

Opener = Callable[[str], contextlib.AbstractContextManager[IO[bytes]]]

_opener: ContextVar[Opener] = ContextVar("opener", default=fsspec.open)  # opens for reading bytes


@contextlib.contextmanager
def corpora_opened_by(opener: Opener) -> Iterator[None]:
    """Within the context, open corpora with `opener`, which takes a URI, instead of fsspec."""
    token = _opener.set(opener)
    try:
        yield
    finally:
        _opener.reset(token)


def open_corpus(uri: str) -> contextlib.AbstractContextManager[IO[bytes]]:
    """Open a corpus's file for reading bytes."""
    return _opener.get()(uri)


class LabelledCorpus(ABC):
    """Documents with their labels or answers.

    Attributes:
        documents: encoded as the engine takes them.
        metric: name of the task's main metric; higher is better.
    """

    documents: list[Any]
    metric: str

    @abstractmethod
    def all_scores(self, results: DocumentResults) -> dict[str, np.ndarray]:
        """Each document's score by every metric of the task, float64 (documents,).

        The best score is 1. Documents that a metric does not apply to have NaN.
        """

    def scores(self, results: DocumentResults) -> np.ndarray:
        """Each document's score by `metric`."""
        return self.all_scores(results)[self.metric]

    def measure(self, results: DocumentResults) -> dict[str, float]:
        """The mean score by every metric, over the documents that it applies to."""
        return {name: float(np.nanmean(scores)) for name, scores in self.all_scores(results).items()}

    @abstractmethod
    def dataset(self, classifier_input_weight: float = 0.0) -> "WindowDataset":
        """The corpus for training.

        Args:
            classifier_input_weight: weight of the distillation loss on the classifier's input, for tasks with
                `labels_whole_documents`.
        """

    def with_unlabelled(self, uri: str, columns: LabelledColumns) -> "LabelledCorpus":
        """The corpus followed by the unlabelled documents of a Parquet file.

        Raises:
            ConfigurationError: not a task with `labels_whole_documents`.
            InputError: the file cannot be read, the column is missing, or a text is null.
        """
        raise ConfigurationError(f"{uri}: documents without labels are only for tasks that label whole documents")


def read_table(uri: str, columns: list[str]) -> pa.Table:
    try:
        with open_corpus(uri) as file:
            table = pq.read_table(file)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{uri}: cannot be read as Parquet: {error}") from error
    for column in columns:
        if column not in table.column_names:
            raise InputError(f"{uri}: no column {column!r}; its columns are {table.column_names}")
    for column in columns:
        if table[column].null_count:
            raise InputError(f"{uri}: {table[column].null_count} rows have no {column!r}; remove them first")
    return table


def strings(values: list[Any]) -> list[str]:
    return [value.decode(errors="replace") if isinstance(value, bytes) else value for value in values]


class WindowDataset(Dataset, ABC):
    """One training example per document: the indices of some of its windows, drawn again at each access.

    Attributes:
        windows: the windows of all documents, in order.
        first_window: index of each document's first window, and at the end the number of windows.
        losses: the task's losses.
        teacher: the dense model's outputs for the windows, once they are computed.
        crops: share of examples that show only a random piece of the window, if the task supports it. `teacher` is not
            used then, because it describes whole windows.
    """

    losses: TaskLosses
    teacher: "TeacherSignals | None" = None
    crops: float = 0.0

    def __init__(self, documents: Sequence[Any], task: Any):
        self.task = task
        self.windows: list[Any] = []
        self.first_window = [0]
        for document in documents:
            self.windows += task.windows(document)
            self.first_window.append(len(self.windows))

    def __len__(self) -> int:
        return len(self.first_window) - 1

    def shown(self, window: Any) -> Any:
        """The part of a window that training uses."""
        return window

    @abstractmethod
    def target(self, index: int) -> Any:
        """The labels or answers of the window at this index."""

    @abstractmethod
    def targets(self, examples: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """The tensors that the losses need in addition to the model's inputs."""

    @abstractmethod
    def __getitem__(self, index: int) -> list[int]: ...

    def collate(self, examples: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Collate examples into one varlen batch with targets and the teacher's signals.

        `example`, int64 (windows,), is the index of each window's example.
        """
        indices = [index for example in examples for index in example]
        windows = [self.shown(self.windows[index]) for index in indices]
        batch = model_inputs([window.input_ids for window in windows], self.task.token_types(windows))
        batch["example"] = torch.tensor([i for i, example in enumerate(examples) for _ in example])
        batch |= self.targets(examples)
        if self.teacher is not None and not self.crops:
            batch["teacher"], batch["guide"] = self.teacher.of_windows(indices)
            batch = self.losses.completed(batch, batch["teacher"])
        return batch
