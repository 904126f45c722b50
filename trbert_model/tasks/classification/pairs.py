"""Classification of pairs: a question and a text → token ids → windows, each with the question → window logits.

The question is whatever text comes first: a claim, a search query, the premise of a pair of sentences.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ..asking import AskingTask, shared_objects
from ..base import lists
from ..text import spans_of, token_offsets
from .task import ClassificationTask


@dataclass(frozen=True)
class EncodedPair:
    """Token ids of a question and of the text that it is about, int32 (tokens,); pairs may share the text."""

    ids: np.ndarray
    text: np.ndarray


@dataclass
class PairClassificationTask(AskingTask, ClassificationTask):
    """Turns pairs into windows, and the windows' logits into the pairs' logits.

    Takes the arguments of `ClassificationTask`.

    Args:
        pair_separators: number of [SEP] tokens between a question and its passage.
    """

    pair_separators: int = 1

    text_options = ("question_column", "text_column")

    def _encode_texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        return self.tokenize(texts)

    def _document(self, question: np.ndarray, text: np.ndarray) -> EncodedPair:
        return EncodedPair(question, text)

    def _text_ids(self, document: EncodedPair) -> np.ndarray:
        return document.text

    def _default_stride(self, room: int) -> int:
        return room // 8  # as of texts alone

    def encode_all(self, rows: Sequence[tuple[str, ...]]) -> list[EncodedPair]:
        return self.encode([question for question, _ in rows], [text for _, text in rows])

    def nothing(self) -> EncodedPair:
        """A question without tokens about a text without tokens."""
        none = np.zeros(0, np.int32)
        return EncodedPair(none, none)

    def to_column(self, documents: Sequence[EncodedPair]) -> pa.Array:
        """struct<question, text>; a text that several questions share is stored once."""
        texts, indices = shared_objects([document.text for document in documents])
        questions = lists([document.ids for document in documents])
        shared = pa.DictionaryArray.from_arrays(indices, lists(texts))
        return pa.StructArray.from_arrays([questions, shared], names=["question", "text"])

    def from_column(self, column: pa.ChunkedArray) -> Iterator[EncodedPair]:
        for chunk in column.chunks:
            questions, shared = chunk.field("question"), chunk.field("text")
            texts: dict[int, np.ndarray] = {}
            for question, index in zip(questions, shared.indices.to_pylist()):
                if index not in texts:
                    texts[index] = shared.dictionary[index].values.to_numpy()
                yield EncodedPair(question.values.to_numpy(), texts[index])

    def token_spans(self, texts: tuple[str, ...], document: EncodedPair) -> np.ndarray:
        tokens = (document.ids, document.text)
        spans = [spans_of(i, tokens[i], *token_offsets(self.tokenizer, text)) for i, text in enumerate(texts)]
        return np.concatenate(spans)
