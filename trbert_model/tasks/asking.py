"""Tasks whose windows begin with a question: [CLS] question [SEP] piece of the text [SEP].

A text that several questions are about is tokenised once and shared by their documents.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ..errors import ConfigurationError
from .base import Task, TaskOptions
from .text import encode_apart, token_ids

# Least number of the text's tokens that must fit in a window beside the question.
_LEAST_TEXT_TOKENS = 16


@dataclass(frozen=True)
class QuestionWindow:
    """[CLS] question [SEP] passage [SEP], with a second [SEP] before the passage for RoBERTa.

    Attributes:
        input_ids, token_type_ids: int32 (tokens,).
        passage: index of the passage's first token in the window.
        first: index of the passage's first token in the text.
        count: number of tokens in the passage.
        new_tokens: number of tokens in the passage that no earlier window has; at least 1.
    """

    input_ids: np.ndarray
    token_type_ids: np.ndarray
    passage: int
    first: int
    count: int
    new_tokens: int


class AskingTask(Task):
    """Base class of the tasks whose rows are a question and a text.

    A document has `ids`, the question's token ids, int32 (tokens,), and what `_encode_texts` makes of its text.

    Attributes:
        max_positions: maximum tokens of a sequence.
        pair_separators: number of [SEP] tokens between a question and its passage.
    """

    tokenizer: Any
    max_positions: int
    options: TaskOptions
    pair_separators: int

    asks = True

    @abstractmethod
    def _encode_texts(self, texts: Sequence[str]) -> list[Any]:
        """Tokenise texts that questions are about."""

    @abstractmethod
    def _document(self, question: np.ndarray, text: Any) -> Any:
        """The document of a question's token ids and a text from `_encode_texts`."""

    @abstractmethod
    def _text_ids(self, document: Any) -> np.ndarray:
        """Token ids of a document's text, int32 (tokens,)."""

    def _encode_questions(self, questions: Sequence[str]) -> list[np.ndarray]:
        return token_ids(self.tokenizer, questions)

    def _default_stride(self, room: int) -> int:
        """Number of the text's tokens that consecutive windows share, of the `room` for them."""
        return min(128, room // 4)

    def encode(self, questions: Sequence[str], texts: Sequence[str]) -> list[Any]:
        """Tokenise questions and the texts that they are about. Equal texts are tokenised once and shared."""
        different = list(dict.fromkeys(texts))
        known = dict(zip(different, self._encode_texts(different)))
        return [self._document(ids, known[text]) for ids, text in zip(self._encode_questions(questions), texts)]

    def encode_rows(self, rows: Sequence[tuple[str, ...]]) -> tuple[list[Any], dict[int, str]]:
        """As `Task.encode_rows`; each row is a question and a text."""
        texts = list(dict.fromkeys(text for _, text in rows))
        encoded, bad_texts = encode_apart(self._encode_texts, texts)
        ids, bad_questions = encode_apart(self._encode_questions, [question for question, _ in rows])
        index_of = {text: index for index, text in enumerate(texts)}
        documents, failures = [], {}
        for row, (question, (_, text)) in enumerate(zip(ids, rows)):
            about = encoded[index_of[text]]
            if question is None or about is None:
                failures[row] = bad_questions.get(row) or bad_texts[index_of[text]]
                documents.append(self.nothing())
            else:
                documents.append(self._document(question, about))
        return documents, failures

    def problem(self, document: Any) -> tuple[str, str] | None:
        """Why a document cannot be scored, as a reason and a sentence; None if it can be scored."""
        name = self.text_names()[1]
        if not len(document.ids) or not len(self._text_ids(document)):
            what = name if len(document.ids) else "question"
            return "no_tokens", f"the tokenizer finds no token in the {what}"
        if self.room(document) <= self._shared(document):
            return "question_too_long", (
                f"the question's {len(document.ids)} tokens leave too little of {self.max_positions} positions for the "
                f"{name}"
            )
        return None

    def _shared(self, document: Any) -> int:
        """Number of the text's tokens that consecutive windows of a document share."""
        stride = self.options.stride
        return self._default_stride(self.room(document)) if stride is None else stride

    def room(self, document: Any) -> int:
        """Number of the text's tokens that fit in a window with the question; 0 if the question is too long."""
        room = self.max_positions - 2 - self.pair_separators - len(document.ids)
        return room if room >= min(_LEAST_TEXT_TOKENS, self.max_positions // 4) else 0

    def windows(self, document: Any) -> Iterator[QuestionWindow]:
        """Split a document's text into windows.

        Raises:
            ConfigurationError: the question leaves no room for a passage, or the stride is not less than the room.
        """
        room, shared = self.room(document), self._shared(document)
        if room < 1 or shared >= room:
            raise ConfigurationError(
                f"a question of {len(document.ids)} tokens leaves {max(room, 0)} of {self.max_positions} positions for "
                f"the {self.text_names()[1]}, with a stride of {shared}"
            )
        cls, sep = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        head = np.concatenate([[cls], document.ids, [sep] * self.pair_separators])
        text, start = self._text_ids(document), 0
        while True:
            end = min(start + room, len(text))
            ids = np.concatenate([head, text[start:end], [sep]]).astype(np.int32)
            types = np.zeros(len(ids), np.int32)
            types[len(head) :] = 1
            new = end - start - (shared if start else 0)
            yield QuestionWindow(ids, types, len(head), start, end - start, max(new, 1))
            if end == len(text) or self.options.overflow == "truncate":
                return
            start = end - shared

    def window_tokens(self, document: Any, window: QuestionWindow) -> np.ndarray:
        tokens = np.full(len(window.input_ids), -1, np.int32)
        asked = len(document.ids)
        tokens[1 : 1 + asked] = np.arange(asked)
        first = asked + window.first
        tokens[window.passage : window.passage + window.count] = np.arange(first, first + window.count)
        return tokens

    def token_types(self, windows: Sequence[QuestionWindow]) -> list[np.ndarray]:
        """Each window's token type ids, int32 (tokens,)."""
        return [window.token_type_ids for window in windows]


def shared_objects(values: Sequence[Any]) -> tuple[list[Any], pa.Array]:
    """The different objects among these, and each one's index among them, int32."""
    index_of = {identity: index for index, identity in enumerate(dict.fromkeys(map(id, values)))}
    different = {index_of[id(value)]: value for value in values}
    return [different[index] for index in range(len(different))], pa.array(
        [index_of[id(value)] for value in values], pa.int32()
    )
