"""Questions with their correct answers, for training and evaluation."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import InputError
from ...labelled import LabelledCorpus, WindowDataset, open_corpus, read_table, read_texts
from ...options import LabelledColumns
from ...scores import Scores
from ...terminal import get_logger
from ..base import DocumentResults
from .losses import AnswerLosses
from .metrics import exact_match, f1
from .task import EncodedQuestion, QuestionAnsweringTask

logger = get_logger(__name__)


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
        """Read and tokenise labelled questions, as from `read_questions`.

        Raises:
            InputError: as in `read_questions`, or a question leaves no room for its context.
        """
        rows = read_questions(uri, columns.questions, columns.context_column)
        documents = task.encode([row["question"] for row in rows], [row["context"] for row in rows])
        for row, document in zip(rows, documents):
            if problem := task.problem(document):
                raise InputError(f"{uri}: question {row['id']!r}: {problem[1]}")
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

    def all_scores(self, results: DocumentResults) -> dict[str, Scores]:
        found = list(zip(self.predictions(results), self.answers))
        scores = {
            self.metric: np.array([f1(*each) for each in found]),
            "exact_match": np.array([float(exact_match(*each)) for each in found]),
        }
        unanswerable = np.array([not answers for answers in self.answers])
        if unanswerable.any():
            scores["no_answer_f1"] = np.where(unanswerable, scores[self.metric], np.nan)
        return {name: Scores.mean_of(values) for name, values in scores.items()}

    def dataset(self, classifier_input_weight: float = 0.0) -> "WindowDataset":
        return QuestionWindows(self)


def read_questions(uri: str, question_column: str, context_column: str) -> list[dict[str, Any]]:
    """Read id, question, context, answers and starts of each row of Parquet files or a JSON file in SQuAD's format.

    Parquet files have `answers` and `answer_start`, both lists, or `answers` as the `datasets` library has it: a struct
    with the lists `text` and `answer_start`. JSON files have SQuAD's articles, or rows like these as `data`, as a list
    or one per line. Questions that `is_impossible` says have no answer need no `answers`. Empty answers are none.

    An answer that differs from the context at its position in white space only becomes the context's text; how many do
    is logged.

    Raises:
        InputError: a file cannot be read, a column is missing or has nulls, there are no questions, or an answer is not
            at its position. The message names the file, column or question.
    """
    read = _json_rows if uri.endswith((".json", ".jsonl")) else _parquet_rows
    rows, mended = [], 0
    for identifier, question, context, answered in read(uri, question_column, context_column):
        try:
            texts, starts = _answers(answered)
            spans = [_span(context, text, start) for text, start in zip(texts, starts, strict=True)]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{uri}: question {identifier!r}: its answers cannot be read: {error!r}") from error
        for text, start, span in zip(texts, starts, spans):
            if span is None:
                raise InputError(f"{uri}: question {identifier!r}: {text!r} is not at {start} of its context")
        answers = [context[start:end] for start, end in filter(None, spans)]
        mended += sum(answer != text for answer, text in zip(answers, texts))
        values = (identifier, question, context, answers, [start for start, _ in filter(None, spans)])
        rows.append(dict(zip(("id", "question", "context", "answers", "starts"), values, strict=True)))
    if not rows:
        raise InputError(f"{uri}: it has no questions")
    if mended:
        logger.warning(
            "%s: %d answers differ from their contexts in white space; the contexts' text is used", uri, mended
        )
    return rows


# A row as it is read: id, question, context and answers in any form.
_Row = tuple[str, str, str, Any]


def _parquet_rows(uri: str, question_column: str, context_column: str) -> Iterator[_Row]:
    names = ("answers", "answer_start", "is_impossible", "id")
    table = read_table(uri, [question_column, context_column], names)
    if "answers" not in table.column_names:
        raise InputError(f"{uri}: no column 'answers'")
    texts = [read_texts(table, name, uri) for name in (question_column, context_column)]
    nothing = [None] * table.num_rows
    answers, starts, impossible, ids = (
        table[name].to_pylist() if name in table.column_names else nothing for name in names
    )
    if isinstance(next((answer for answer in answers if answer), None), list) and "answer_start" in table.column_names:
        answers = [
            None if texts is None else {"text": texts, "answer_start": places}
            for texts, places in zip(answers, starts, strict=True)
        ]
    for row, (question, context) in enumerate(zip(*texts, strict=True)):
        identifier = str(row if ids is nothing else ids[row])
        if answers[row] is None and not impossible[row]:
            raise InputError(f"{uri}: question {identifier!r} has no 'answers'; remove it, or set is_impossible")
        yield identifier, question, context, answers[row] or []


def _json_rows(uri: str, question_column: str, context_column: str) -> Iterator[_Row]:
    try:
        with open_corpus(uri) as file:
            content = file.read()
        text = content.decode(json.detect_encoding(content))
        try:
            articles = json.loads(text)
        except json.JSONDecodeError as error:
            if not error.msg.startswith("Extra data"):
                raise
            articles = [json.loads(line) for line in text.split("\n") if line.strip()]
        if isinstance(articles, dict):
            articles = articles.get("data", [articles])
        for article in articles:
            if "paragraphs" not in article:  # a row, as the `datasets` library has it
                yield _json_row(article, article[question_column], article[context_column])
            for paragraph in article.get("paragraphs", ()):
                for asked in paragraph["qas"]:
                    yield _json_row(asked, asked["question"], paragraph["context"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{uri}: cannot be read as SQuAD's JSON: {error!r}") from error


def _json_row(asked: dict[str, Any], question: str, context: str) -> _Row:
    if not isinstance(question, str) or not isinstance(context, str):
        raise TypeError(f"question {asked['id']!r} and its context must be strings")
    answers = asked.get("answers") if asked.get("is_impossible") else asked["answers"]
    return str(asked["id"]), question, context, answers or []


def _answers(answered: Any) -> tuple[list[str], list[int]]:
    """Texts and positions of answers: a list of dictionaries, as in SQuAD, or `datasets`' dictionary of lists."""
    if isinstance(answered, dict):
        texts, starts = answered["text"], answered["answer_start"]
        if not isinstance(texts, list):
            texts, starts = [texts], [starts]
    else:
        texts, starts = ([answer[name] for answer in answered] for name in ("text", "answer_start"))
    if not all(isinstance(text, str) for text in texts):
        raise TypeError(f"the answers {texts} must be strings")
    answers = [(text, _position(start)) for text, start in zip(texts, starts, strict=True) if text]
    return [text for text, _ in answers], [start for _, start in answers]


def _position(start: Any) -> int:
    """A position as an integer; some files have it as text, or as a float."""
    if isinstance(start, float) and not start.is_integer():
        raise ValueError(f"the position {start} is not a whole number")
    return int(start)


def _span(context: str, answer: str, start: int) -> tuple[int, int] | None:
    """First and end character of an answer in its context; None if it is not there. White space may differ."""
    if start < 0:
        return None
    if context.startswith(answer, start):
        return start, start + len(answer)
    words = r"\s+".join(map(re.escape, answer.split()))
    before = r"\s*" if answer[:1].isspace() else ""
    found = re.compile(f"{before}({words})").match(context, start) if words else None
    return found.span(1) if found else None


class QuestionWindows(WindowDataset):
    """Draws at most two windows of each question: one that contains the answer, if there is one, and others."""

    losses = AnswerLosses()
    most_windows = 2

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
        return self.drawn(index, lambda window: bool(self.spans[window]))

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
