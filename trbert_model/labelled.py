"""Labelled corpora for training and evaluation: read, tokenised, cut into windows, laid into varlen batches."""

from collections.abc import Sequence
from dataclasses import dataclass

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .errors import InputError
from .tasks.classification import ClassificationTask
from .teacher import TeacherSignals
from .varlen import model_inputs


@dataclass(frozen=True)
class LabelledCorpus:
    """Documents as token ids, int32 (tokens,) each, with label indices, and the label names."""

    documents: list[np.ndarray]
    labels: list[int]
    names: list[str]

    @classmethod
    def read(
        cls,
        uri: str,
        task: ClassificationTask,
        text_column: str = "text",
        label_column: str = "label",
        *,
        names: Sequence[str] | None = None,
    ) -> "LabelledCorpus":
        """Read and tokenise a labelled Parquet file.

        Args:
            names: the label names by index; default: those of the file, sorted.

        Raises:
            InputError: as `read_labelled`, or a label that is not among `names`.
        """
        texts, labels = read_labelled(uri, text_column, label_column)
        known = sorted(set(labels)) if names is None else list(names)
        if unknown := sorted(set(labels) - set(known)):
            raise InputError(f"{uri}: labels {unknown[:5]} are none of the model's: {known[:5]}…")
        index = {name: i for i, name in enumerate(known)}
        return cls(task.tokenize(texts), [index[label] for label in labels], known)


def read_labelled(uri: str, text_column: str, label_column: str) -> tuple[list[str], list[str]]:
    """Texts and labels (as strings) of a labelled Parquet file.

    Raises:
        InputError: the file cannot be read, a column is missing, or a text or label is null.
    """
    try:
        with fsspec.open(uri, "rb") as file:
            table = pq.read_table(file)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{uri}: cannot be read as Parquet: {error}") from error
    for column in (text_column, label_column):
        if column not in table.column_names:
            raise InputError(f"{uri}: no column {column!r}; its columns are {table.column_names}")
    for column in (text_column, label_column):
        if table[column].null_count:
            raise InputError(f"{uri}: {table[column].null_count} rows have no {column!r}; remove them first")
    labels = [str(label) for label in table[label_column].to_pylist()]
    texts = table[text_column].to_pylist()
    return [text.decode(errors="replace") if isinstance(text, bytes) else text for text in texts], labels


class WindowDataset(Dataset):
    """One window of each document, of the several that a long one has a random one each time it is asked for.

    An item is its token ids, its label, and its place among `windows`, which is where `teacher` has its signals.
    """

    def __init__(self, corpus: LabelledCorpus, task: ClassificationTask):
        self.windows: list[np.ndarray] = []
        self.labels: list[int] = []  # of the windows
        self.first_window = [0]  # of each document
        for document, label in zip(corpus.documents, corpus.labels):
            self.windows += [window.input_ids for window in task.windows(document)]
            self.first_window.append(len(self.windows))
            self.labels += [label] * (self.first_window[-1] - self.first_window[-2])
        self.teacher: TeacherSignals | None = None

    def __len__(self) -> int:
        return len(self.first_window) - 1

    def __getitem__(self, index: int) -> tuple[np.ndarray, int, int]:
        first, end = self.first_window[index], self.first_window[index + 1]
        place = first + int(torch.randint(end - first, ()))
        return self.windows[place], self.labels[place], place

    def collate(self, rows: Sequence[tuple[np.ndarray, int, int]]) -> dict[str, Tensor]:
        """Items → one varlen batch with labels and, where there is a teacher, its signals."""
        batch = model_inputs([window for window, _, _ in rows])
        batch["labels"] = torch.tensor([label for _, label, _ in rows])
        if self.teacher is not None:
            batch["teacher_logits"], batch["guide"] = self.teacher.of_windows([place for _, _, place in rows])
        return batch
