"""Questions with their correct answers, for training and evaluation."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import InputError
from ...labelled import LabelledCorpus, WindowDataset, open_corpus, read_table, strings
from ...options import LabelledColumns
from ..base import DocumentResults
from .losses import AnswerLosses
from .metrics import exact_match, f1
from .task import EncodedQuestion, QuestionAnsweringTask


@dataclass(frozen=True)
class LabelledQuestions(LabelledCorpus):
    """Encoded questions with their correct answers.

    Attributes:
        documents: the encoded questions.
        answers: the correct answers of each question; none if it cannot be answered.
        starts: the first character of each answer in the context.
        ids: the questions' ids.
    """

    documents: list[EncodedQuestion]
    answers: list[list[str]]
    starts: list[list[int]]
    task: QuestionAnsweringTask
    metric = "f1"
    ids: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, uri: str, task: QuestionAnsweringTask, columns: LabelledColumns) -> "LabelledQuestions":
        """Read and tokenise a Parquet file with `answers` and `answer_start` lists, or a SQuAD-format JSON file.

        Raises:
            InputError: the file cannot be read, a column is missing, an answer is not at its start position, or a
                question leaves no room for its context. The message names the file, column or question.
        """
        rows = read_questions(uri, columns.question_column, columns.context_column)
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
            task,
            ids=[row["id"] for row in rows],
        )

    def predictions(self, results: DocumentResults) -> list[str]:
        """Each question's predicted answer; "" for no answer.

        If some questions of the corpus are unanswerable, "" is predicted if it is more probable than the best span.
        """
        threshold = 0.0 if any(not answers for answers in self.answers) else None
        spans = [answer.best(threshold) for answer in results.outputs]
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

    def dataset(self, classifier_input_weight: float = 0.0) -> "WindowDataset":
        return QuestionWindows(self)


def read_questions(uri: str, question_column: str, context_column: str) -> list[dict[str, Any]]:
    """Read id, question, context, answers and starts of each row of a Parquet or SQuAD-format JSON file.

    Raises:
        InputError: the file cannot be read, a column is missing or has nulls, or the JSON has no questions.
    """
    if uri.endswith(".json"):
        return _read_squad(uri)
    table = read_table(uri, [question_column, context_column, "answers", "answer_start"])
    ids = table["id"].to_pylist() if "id" in table.column_names else list(range(table.num_rows))
    texts = [strings(table[name].to_pylist()) for name in (question_column, context_column)]
    right = [table[name].to_pylist() for name in ("answers", "answer_start")]
    names = ("id", "question", "context", "answers", "starts")
    return [dict(zip(names, row, strict=True)) for row in zip(map(str, ids), *texts, *right, strict=True)]


def _read_squad(uri: str) -> list[dict[str, Any]]:
    rows = []
    try:
        with open_corpus(uri) as file:
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


class QuestionWindows(WindowDataset):
    """Draws at most two windows of each question: one that contains the answer, if there is one, and others."""

    losses = AnswerLosses()
    WINDOWS = 2

    def __init__(self, corpus: LabelledQuestions):
        super().__init__(corpus.documents, corpus.task)
        self.spans: list[list[tuple[int, int]]] = []  # per window: first and last token of each answer in it
        for i, document in enumerate(corpus.documents):
            tokens = [
                span
                for answer, start in zip(corpus.answers[i], corpus.starts[i])
                if (span := document.context.tokens(start, start + len(answer))) is not None
            ]
            for window in self.windows[self.first_window[i] : self.first_window[i + 1]]:
                shift, end = window.first - window.passage, window.first + window.count
                self.spans.append(sorted({(a - shift, b - shift) for a, b in tokens if window.first <= a <= b < end}))

    def target(self, index: int) -> list[tuple[int, int]]:
        return self.spans[index]

    def __getitem__(self, index: int) -> list[int]:
        indices = list(range(self.first_window[index], self.first_window[index + 1]))
        holding = [i for i in indices if self.spans[i]]
        drawn = random.Random(int(torch.randint(2**31, ())))
        chosen = drawn.sample(holding, 1) if holding else []
        others = [i for i in indices if i not in chosen]
        return sorted(chosen + drawn.sample(others, min(self.WINDOWS - len(chosen), len(others))))

    def targets(self, examples: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {"scored": [], "start_targets": [], "end_targets": []}
        for example in examples:
            answered = any(self.spans[index] for index in example)
            for index in example:
                window = self.windows[index]
                masks = {name: torch.zeros(len(window.input_ids), dtype=torch.bool) for name in found}
                masks["scored"][0] = True
                masks["scored"][window.passage : window.passage + window.count] = True
                for first, last in self.spans[index]:
                    masks["start_targets"][first] = masks["end_targets"][last] = True
                if not answered:
                    masks["start_targets"][0] = masks["end_targets"][0] = True
                for name, mask in masks.items():
                    found[name].append(mask)
        return {name: torch.cat(masks) for name, masks in found.items()}
