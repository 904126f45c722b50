"""Labelled corpora for training and evaluation, and their windows as varlen batches."""

import contextlib
import json
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import IO, TYPE_CHECKING, Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .errors import ConfigurationError, InputError
from .losses import TaskLosses
from .options import LabelledColumns
from .scores import Scores
from .tasks.base import DocumentResults
from .varlen import model_inputs

if TYPE_CHECKING:
    from .training.teacher import TeacherSignals

# What the names of a task's extra inputs begin with in a batch.
EXTRA_INPUT = "extra_"

Opener = Callable[[str], contextlib.AbstractContextManager[IO[bytes]]]
Lister = Callable[[str], list[str]]


def _only_file(uri: str) -> list[str]:
    return [uri]


_opener: ContextVar[Opener] = ContextVar("opener", default=fsspec.open)  # opens for reading bytes
_lister: ContextVar[Lister] = ContextVar("lister", default=_only_file)


@contextlib.contextmanager
def corpora_opened_by(opener: Opener, lister: Lister = _only_file) -> Iterator[None]:
    """Within the context, open corpora with `opener`, which takes the URI of a file, instead of fsspec.

    Args:
        lister: lists the Parquet files of a corpus, such as a folder or a glob. Default: a corpus is one file.
    """
    tokens = _opener.set(opener), _lister.set(lister)
    try:
        yield
    finally:
        _opener.reset(tokens[0])
        _lister.reset(tokens[1])


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
    def all_scores(self, results: DocumentResults) -> dict[str, Scores]:
        """The documents' scores by every metric of the task; the best value is 1."""

    def scores(self, results: DocumentResults) -> Scores:
        """The documents' scores by `metric`."""
        return self.all_scores(results)[self.metric]

    def measure(self, results: DocumentResults) -> dict[str, float]:
        """The value of every metric."""
        return {name: scores.value for name, scores in self.all_scores(results).items()}

    def with_evidence(self, uri: str, columns: LabelledColumns) -> "LabelledCorpus":
        """The corpus with the pieces of its texts that show the labels; uri: the files that it was read from.

        Raises:
            ConfigurationError: not a corpus of questions to be classified with their texts.
            InputError: the files cannot be read, or a piece of evidence is not at its position.
        """
        raise ConfigurationError(f"{uri}: evidence is for the classification of questions with their texts")

    @abstractmethod
    def dataset(self, classifier_input_weight: float = 0.0) -> "WindowDataset":
        """The corpus for training.

        Args:
            classifier_input_weight: weight of the distillation loss on the classifier's input, for tasks with
                `labels_whole_documents`.
        """

    def with_unlabelled(self, uri: str, columns: LabelledColumns) -> "LabelledCorpus":
        """The corpus followed by the unlabelled documents of Parquet files.

        Raises:
            ConfigurationError: not a task with `labels_whole_documents`.
            InputError: a file cannot be read, the column is missing, or a text is null.
        """
        raise ConfigurationError(f"{uri}: documents without labels are only for tasks that label whole documents")


def read_table(uri: str, columns: Sequence[str], optional: Sequence[str] = ()) -> pa.Table:
    """Read columns of a Parquet corpus of one or several files, dictionaries as their values.

    Args:
        columns: must be in each file, without nulls.
        optional: may be missing, and may have nulls.

    Raises:
        InputError: a file cannot be read, a column is missing or has nulls, or all are missing, the files' types do not
            fit together, or there are no rows.
    """
    tables = []
    for file in _lister.get()(uri):
        try:
            with open_corpus(file) as opened:
                parquet = pq.ParquetFile(opened)
                names = parquet.schema_arrow.names
                for column in columns:
                    if column not in names:
                        raise InputError(f"{file}: no column {column!r}; its columns are {names}")
                wanted = [*columns, *(name for name in optional if name in names)]
                if not wanted:
                    raise InputError(f"{file}: none of the columns {list(optional)}; its columns are {names}")
                tables.append(_without_dictionaries(parquet.read(columns=list(dict.fromkeys(wanted)))))
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{file}: cannot be read as Parquet: {error}") from error
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise InputError(f"{uri}: the types of a column do not fit together in all files: {error}") from error
    if not table.num_rows:
        raise InputError(f"{uri}: it has no rows")
    for column in columns:
        if table[column].null_count:
            raise InputError(f"{uri}: {table[column].null_count} rows have no {column!r}; remove them first")
    return table


def _without_dictionaries(table: pa.Table) -> pa.Table:
    kinds = [field.type.value_type if pa.types.is_dictionary(field.type) else field.type for field in table.schema]
    return table.cast(
        pa.schema([field.with_type(kind) for field, kind in zip(table.schema, kinds)], table.schema.metadata)
    )


def is_text(kind: pa.DataType) -> bool:
    """Whether values of this type are text, or bytes that may be."""
    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    binaries = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    return any(is_kind(kind) for is_kind in (*texts, *binaries))


def read_texts(table: pa.Table, column: str, uri: str) -> list[str]:
    """The values of a text column; bytes that are not UTF-8 become replacement characters.

    Raises:
        InputError: the column is not of text.
    """
    values, kind = table[column], table[column].type
    if not is_text(kind):
        raise InputError(f"{uri}: column {column!r} is of type {kind}, not of text")
    if pa.types.is_string_view(kind):
        values = values.cast(pa.binary_view())
    return [value.decode(errors="replace") for value in values.cast(pa.large_binary()).to_pylist()]


def class_names(schema: pa.Schema, column: str) -> tuple[str, ...]:
    """Names of the class ids of a column, or of its lists, from metadata that the `datasets` library writes."""
    try:
        feature = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][column]
        return tuple(map(str, feature.get("names") or feature["feature"]["names"]))
    except (KeyError, TypeError, ValueError, AttributeError):  # it has none, or is of another kind
        return ()


class WindowDataset(Dataset, ABC):
    """One training example per document: the indices of some of its windows, drawn again at each access.

    Attributes:
        windows: the windows of all documents, in order.
        first_window: index of each document's first window, and at the end the number of windows.
        losses: the task's losses.
        teacher: the dense model's outputs for the windows, once they are computed.
        crops: share of examples that show only a random piece of the window, if the task supports it. `teacher` is not
            used then, because it describes whole windows.
        most_windows: windows of an example at most; 1 for tasks that learn from one at a time.
    """

    losses: TaskLosses
    teacher: "TeacherSignals | None" = None
    crops: float = 0.0
    most_windows: int = 1

    def __init__(self, documents: Sequence[Any], task: Any):
        self.task = task
        self.windows: list[Any] = []
        self.first_window = [0]
        for document in documents:
            self.windows += task.windows(document)
            self.first_window.append(len(self.windows))

    def __len__(self) -> int:
        return len(self.first_window) - 1

    def drawn(self, index: int, holds: Callable[[int], bool]) -> list[int]:
        """Draw at most `most_windows` windows of a document: one for which `holds` is true, if any is, and others.

        Returns:
            Their indices, in order.
        """
        indices = list(range(self.first_window[index], self.first_window[index + 1]))
        holding = [i for i in indices if holds(i)]
        generator = random.Random(int(torch.randint(2**31, ())))
        chosen = generator.sample(holding, 1) if holding else []
        others = [i for i in indices if i not in chosen]
        return sorted(chosen + generator.sample(others, min(self.most_windows - len(chosen), len(others))))

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
        extra = self.task.extra_inputs(windows)
        batch |= {f"{EXTRA_INPUT}{name}": torch.from_numpy(values) for name, values in extra.items()}
        batch["example"] = torch.tensor([i for i, example in enumerate(examples) for _ in example])
        batch |= self.targets(examples)
        if self.teacher is not None and not self.crops:
            batch["teacher"], batch["guide"] = self.teacher.of_windows(indices)
            batch = self.losses.completed(batch, batch["teacher"])
        return batch
