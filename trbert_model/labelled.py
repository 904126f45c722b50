"""Labelled corpora for training and evaluation: read, encoded, cut into windows, laid into varlen batches."""

import json
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .configuration import TRBertConfig
from .engine import DocumentResults
from .errors import InputError
from .losses import UNLABELLED, AnswerLosses, ClassificationLosses, TaskLosses
from .options import option
from .tasks.classification import ClassificationTask, Window
from .tasks.question_answering import EncodedQuestion, QuestionAnsweringTask, exact_match, f1
from .teacher import TeacherSignals
from .varlen import model_inputs


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
        """Each document's score by every metric of the task, from 0 to 1, float64 (documents,); NaN where a metric says
        nothing about a document."""

    def scores(self, results: DocumentResults) -> np.ndarray:
        """Each document's score by `metric`."""
        return self.all_scores(results)[self.metric]

    def measure(self, results: DocumentResults) -> dict[str, float]:
        """The mean over all documents by every metric."""
        return {name: float(np.nanmean(scores)) for name, scores in self.all_scores(results).items()}

    @abstractmethod
    def dataset(self, task: Any) -> "WindowDataset":
        """The corpus for training."""


@dataclass(frozen=True)
class LabelledTexts(LabelledCorpus):
    """Documents as token ids, int32 (tokens,) each, with label indices (or UNLABELLED), and the label names."""

    documents: list[np.ndarray]
    labels: list[int]
    names: list[str]
    metric = "accuracy"

    @classmethod
    def read(
        cls,
        uri: str,
        task: ClassificationTask,
        text_column: str = "text",
        label_column: str = "label",
        *,
        names: Sequence[str] | None = None,
    ) -> "LabelledTexts":
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

    def all_scores(self, results: DocumentResults) -> dict[str, np.ndarray]:
        return {self.metric: (results.logits.argmax(1) == np.asarray(self.labels)).astype(np.float64)}

    def with_unlabelled(self, uri: str, task: ClassificationTask, text_column: str) -> "LabelledTexts":
        """The corpus and, after it, a Parquet file's documents, which have no labels.

        Raises:
            InputError: the file cannot be read, the column is missing, or a text is null.
        """
        texts = _strings(_read_table(uri, [text_column])[text_column].to_pylist())
        documents = self.documents + task.tokenize(texts)
        return LabelledTexts(documents, self.labels + [UNLABELLED] * len(texts), self.names)

    def dataset(self, task: ClassificationTask) -> "WindowDataset":
        return TextWindows(self, task)


@dataclass(frozen=True)
class LabelledQuestions(LabelledCorpus):
    """Encoded questions with the answers that are right, none for a question without one, and where they begin."""

    documents: list[EncodedQuestion]
    answers: list[list[str]]
    starts: list[list[int]]
    metric = "f1"
    ids: list[str] = field(default_factory=list)

    @classmethod
    def read(
        cls,
        uri: str,
        task: QuestionAnsweringTask,
        question_column: str = "question",
        context_column: str = "context",
    ) -> "LabelledQuestions":
        """Read and tokenise a Parquet file with `answers` and `answer_start` lists, or a SQuAD-format JSON file.

        Raises:
            InputError: it cannot be read, a column is missing, an answer is not where it says, or a question leaves no
                room for its context; names the row.
        """
        rows = read_questions(uri, question_column, context_column)
        documents = task.encode([row["question"] for row in rows], [row["context"] for row in rows])
        for row, document in zip(rows, documents):
            if problem := task.problem(document):
                raise InputError(f"{uri}: question {row['id']!r}: {problem[1]}")
            for answer, start in zip(row["answers"], row["starts"]):
                if row["context"][start : start + len(answer)] != answer:
                    raise InputError(f"{uri}: question {row['id']!r}: {answer!r} is not at {start} of its context")
        return cls(
            documents,
            [row["answers"] for row in rows],
            [row["starts"] for row in rows],
            ids=[row["id"] for row in rows],
        )

    def predictions(self, results: DocumentResults) -> list[str]:
        """Each question's answer; "" for none, which is decided by which is more probable."""
        threshold = 0.0 if any(not answers for answers in self.answers) else None
        spans = [answer.best(threshold) for answer in results.answers]
        return [
            "" if span is None else document.context.text[span.start : span.end]
            for span, document in zip(spans, self.documents)
        ]

    def all_scores(self, results: DocumentResults) -> dict[str, np.ndarray]:
        found = list(zip(self.predictions(results), self.answers))
        scores = {
            self.metric: np.array([f1(*each) for each in found]),
            "exact_match": np.array([float(exact_match(*each)) for each in found]),
        }
        unanswerable = np.array([not answers for answers in self.answers])
        if unanswerable.any():
            scores["no_answer_f1"] = np.where(unanswerable, scores[self.metric], np.nan)
        return scores

    def dataset(self, task: QuestionAnsweringTask) -> "WindowDataset":
        return QuestionWindows(self, task)


def read_corpus(uri: str, columns: LabelledColumns, task: Any, config: TRBertConfig) -> LabelledCorpus:
    """Labelled documents for a model's task.

    Raises:
        InputError: they cannot be read, or have labels that the model has not.
    """
    if isinstance(task, QuestionAnsweringTask):
        return LabelledQuestions.read(uri, task, columns.question_column, columns.context_column)
    names = [config.id2label[i] for i in range(config.num_labels)]
    return LabelledTexts.read(uri, task, columns.text_column, columns.label_column, names=names)


def read_labelled(uri: str, text_column: str, label_column: str) -> tuple[list[str], list[str]]:
    """Texts and labels (as strings) of a labelled Parquet file.

    Raises:
        InputError: the file cannot be read, a column is missing, or a text or label is null.
    """
    table = _read_table(uri, [text_column, label_column])
    labels = [str(label) for label in table[label_column].to_pylist()]
    return _strings(table[text_column].to_pylist()), labels


def read_questions(uri: str, question_column: str, context_column: str) -> list[dict[str, Any]]:
    """Rows of id, question, context, answers and starts of a Parquet or SQuAD-format JSON file.

    Raises:
        InputError: the file cannot be read, or has no questions.
    """
    if uri.endswith(".json"):
        return _read_squad(uri)
    table = _read_table(uri, [question_column, context_column, "answers", "answer_start"])
    ids = table["id"].to_pylist() if "id" in table.column_names else list(range(table.num_rows))
    texts = [_strings(table[name].to_pylist()) for name in (question_column, context_column)]
    right = [table[name].to_pylist() for name in ("answers", "answer_start")]
    names = ("id", "question", "context", "answers", "starts")
    return [dict(zip(names, row, strict=True)) for row in zip(map(str, ids), *texts, *right, strict=True)]


def _read_squad(uri: str) -> list[dict[str, Any]]:
    rows = []
    try:
        with fsspec.open(uri, "rb") as file:
            articles = json.load(file)["data"]
        for article in articles:
            for paragraph in article["paragraphs"]:
                for asked in paragraph["qas"]:
                    rows.append(
                        {
                            "id": str(asked["id"]),
                            "question": asked["question"],
                            "context": paragraph["context"],
                            "answers": [answer["text"] for answer in asked["answers"]],
                            "starts": [answer["answer_start"] for answer in asked["answers"]],
                        }
                    )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{uri}: cannot be read as SQuAD's JSON: {error!r}") from error
    if not rows:
        raise InputError(f"{uri}: it has no questions")
    return rows


def _read_table(uri: str, columns: list[str]) -> pa.Table:
    try:
        with fsspec.open(uri, "rb") as file:
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


def _strings(values: list[Any]) -> list[str]:
    return [value.decode(errors="replace") if isinstance(value, bytes) else value for value in values]


class WindowDataset(Dataset, ABC):
    """Examples for training: of each document the places of some of its `windows`, drawn anew each time.

    windows: all documents' windows, as the task cuts them; losses: the task's; teacher: what the dense model says of
    the windows, once it is known; crops: the share of examples of which only a random piece is shown, where the task
    can (then what the dense model says of the windows is of no use).
    """

    losses: TaskLosses
    teacher: TeacherSignals | None = None
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


class TextWindows(WindowDataset):
    """One window of each document, of the several that a long one has a random one."""

    def __init__(self, corpus: LabelledTexts, task: ClassificationTask):
        super().__init__(corpus.documents, task)
        self.losses = ClassificationLosses(len(corpus.names))
        counts = np.diff(self.first_window)
        self.labels = np.repeat(np.asarray(corpus.labels, np.int64), counts).tolist()

    def target(self, place: int) -> int:
        return self.labels[place]

    def shown(self, window: Window) -> Window:
        """The window, or with probability `crops` a random piece of it, of a fifth of its tokens or more."""
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
        return {"labels": torch.tensor([self.labels[place] for (place,) in examples])}


class QuestionWindows(WindowDataset):
    """Two windows of each question: one that holds its answer, if one does, and another."""

    losses = AnswerLosses()
    WINDOWS = 2

    def __init__(self, corpus: LabelledQuestions, task: QuestionAnsweringTask):
        super().__init__(corpus.documents, task)
        self.spans: list[list[tuple[int, int]]] = []  # of each window: first and last token of each answer in it
        for i, document in enumerate(corpus.documents):
            tokens = [
                span
                for answer, start in zip(corpus.answers[i], corpus.starts[i])
                if (span := document.context.tokens(start, start + len(answer))) is not None
            ]
            for window in self.windows[self.first_window[i] : self.first_window[i + 1]]:
                shift, end = window.first - window.passage, window.first + window.count
                self.spans.append(sorted({(a - shift, b - shift) for a, b in tokens if window.first <= a <= b < end}))

    def target(self, place: int) -> list[tuple[int, int]]:
        return self.spans[place]

    def __getitem__(self, index: int) -> list[int]:
        places = list(range(self.first_window[index], self.first_window[index + 1]))
        holding = [place for place in places if self.spans[place]]
        drawn = random.Random(int(torch.randint(2**31, ())))
        chosen = drawn.sample(holding, 1) if holding else []
        others = [place for place in places if place not in chosen]
        return sorted(chosen + drawn.sample(others, min(self.WINDOWS - len(chosen), len(others))))

    def targets(self, examples: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {"scored": [], "start_targets": [], "end_targets": []}
        for example in examples:
            answered = any(self.spans[place] for place in example)
            for place in example:
                window = self.windows[place]
                masks = {name: torch.zeros(len(window.input_ids), dtype=torch.bool) for name in found}
                masks["scored"][0] = True
                masks["scored"][window.passage : window.passage + window.count] = True
                for first, last in self.spans[place]:
                    masks["start_targets"][first] = masks["end_targets"][last] = True
                if not answered:
                    masks["start_targets"][0] = masks["end_targets"][0] = True
                for name, mask in masks.items():
                    found[name].append(mask)
        return {name: torch.cat(masks) for name, masks in found.items()}
