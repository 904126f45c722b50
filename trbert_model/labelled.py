"""Labelled corpora for training and evaluation: read, encoded, cut into windows, laid into varlen batches."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
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
from .options import option
from .tasks.base import DocumentResults
from .varlen import model_inputs

if TYPE_CHECKING:
    from .training.teacher import TeacherSignals

Opener = Callable[[str], contextlib.AbstractContextManager[IO[bytes]]]

_opener: ContextVar[Opener] = ContextVar("opener", default=fsspec.open)  # whose mode is to read bytes


@contextlib.contextmanager
def corpora_opened_by(opener: Opener) -> Iterator[None]:
    """Corpora that are read in the block are opened with `opener`, from their URIs, in the place of fsspec."""
    token = _opener.set(opener)
    try:
        yield
    finally:
        _opener.reset(token)


def open_corpus(uri: str) -> contextlib.AbstractContextManager[IO[bytes]]:
    """A corpus's file, opened for reading."""
    return _opener.get()(uri)


@dataclass(frozen=True)
class LabelledColumns:
    """Where a labelled corpus has what; options of every command that reads one."""

    text_column: str = option("text", "column with the documents")
    label_column: str = option("label", "column with the labels")
    question_column: str = option("question", "column with the questions; beside it `answers` and `answer_start`")
    context_column: str = option("context", "column with the texts that the questions are about")


class LabelledCorpus(ABC):
    """Documents as the engine takes them, and what is right about them.

    metric: the one of the task's metrics that counts, by name; higher is better.
    """

    documents: list[Any]
    metric: str

    @abstractmethod
    def all_scores(self, results: DocumentResults) -> dict[str, np.ndarray]:
        """Each document's score by every metric of the task, 1 at best, float64 (documents,); NaN where a metric says
        nothing about a document."""

    def scores(self, results: DocumentResults) -> np.ndarray:
        """Each document's score by `metric`."""
        return self.all_scores(results)[self.metric]

    def measure(self, results: DocumentResults) -> dict[str, float]:
        """The mean over all documents by every metric."""
        return {name: float(np.nanmean(scores)) for name, scores in self.all_scores(results).items()}

    @abstractmethod
    def dataset(self, features: float = 0.0) -> "WindowDataset":
        """The corpus for training; features: the weight of what the dense model's classifier sees, for tasks that
        `labels_whole_documents`."""

    def with_unlabelled(self, uri: str, columns: LabelledColumns) -> "LabelledCorpus":
        """The corpus and, after it, a Parquet file's documents, which nobody has labelled; for tasks that
        `labels_whole_documents`.

        Raises:
            ConfigurationError: the task is none of these.
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
    """Examples for training: of each document the places of some of its `windows`, drawn anew each time.

    windows: all documents' windows, as the task cuts them; losses: the task's; teacher: what the dense model says of
    the windows, once it is known; crops: the share of examples of which only a random piece is shown, where the task
    can (then what the dense model says of the windows is of no use).
    """

    losses: TaskLosses
    teacher: "TeacherSignals | None" = None
    crops: float = 0.0

    def __init__(self, documents: Sequence[Any], task: Any):
        self.task = task
        self.windows: list[Any] = []
        self.first_window = [0]  # of each document
        for document in documents:
            self.windows += task.windows(document)
            self.first_window.append(len(self.windows))

    def __len__(self) -> int:
        return len(self.first_window) - 1

    def shown(self, window: Any) -> Any:
        """What training sees of a window."""
        return window

    @abstractmethod
    def target(self, place: int) -> Any:
        """What is right about a window."""

    @abstractmethod
    def targets(self, examples: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """What the losses need to know of a batch beside its windows."""

    @abstractmethod
    def __getitem__(self, index: int) -> list[int]: ...

    def collate(self, examples: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Examples → one varlen batch with `example`, int64 (windows,), the targets and the teacher's signals."""
        places = [place for example in examples for place in example]
        windows = [self.shown(self.windows[place]) for place in places]
        batch = model_inputs([window.input_ids for window in windows], self.task.token_types(windows))
        batch["example"] = torch.tensor([i for i, example in enumerate(examples) for _ in example])
        batch |= self.targets(examples)
        if self.teacher is not None and not self.crops:
            batch["teacher"], batch["guide"] = self.teacher.of_windows(places)
            batch = self.losses.completed(batch, batch["teacher"])
        return batch
