"""Extractive question answering: question and context → windows → start and end logits → one answer per question.

All windows of a question share one softmax, in training too, so scores are comparable across windows. The first token
of each window stands for "no answer".
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Union

import numpy as np
import pyarrow as pa

from ..asking import AskingTask, QuestionWindow, shared_objects
from ..base import DEFAULTS, TaskOptions, lists
from ..text import BareTokenizer, spans_of, token_ids, token_offsets, whole_characters, without_spaces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ...configuration import TRBertConfig
    from ...modeling import TRBertPreTrainedModel
    from ...options import LabelledColumns
    from .labelled import LabelledQuestions

# Fields of a context in the Arrow column.
_CONTEXT = ("text", "ids", "starts", "ends")
_SPAN = pa.struct(
    [("answer", pa.string()), ("score", pa.float32()), ("start_char", pa.int32()), ("end_char", pa.int32())]
)


@dataclass(frozen=True)
class EncodedContext:
    """A tokenised context.

    Attributes:
        text: the context.
        ids: int32 (tokens,), token ids.
        starts, ends: int32 (tokens,), the characters of each token are `text[start:end]`.
    """

    text: str
    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, text: str, tokenizer: BareTokenizer) -> "EncodedContext":
        ids, offsets = token_offsets(tokenizer, text)
        return cls(text, ids, offsets[:, 0], offsets[:, 1])

    def tokens(self, start: int, end: int) -> tuple[int, int] | None:
        """First and last token of the characters `text[start:end]`; None if they have no token."""
        first = int(np.searchsorted(self.ends, start, side="right"))
        last = int(np.searchsorted(self.starts, end, side="left")) - 1
        return (first, last) if first <= last else None


@dataclass(frozen=True)
class EncodedQuestion:
    """Token ids of a question, int32 (tokens,), and its context, which several questions may share."""

    ids: np.ndarray
    context: EncodedContext


@dataclass(frozen=True)
class Span:
    """A possible answer: `context[start:end]`, in characters, and its probability."""

    start: int
    end: int
    score: float


@dataclass(frozen=True)
class Answer:
    """The most probable spans of a question, best first, and the probability that there is no answer."""

    spans: tuple[Span, ...]
    null_score: float

    def best(self, threshold: float | None) -> Span | None:
        """The best span; None if there is none, or if "no answer" is more probable by more than `threshold`."""
        if not self.spans or (threshold is not None and self.null_score - self.spans[0].score > threshold):
            return None
        return self.spans[0]


@dataclass
class QuestionAnsweringTask(AskingTask):
    """Turns questions into windows, and the windows' outputs into answers.

    Args:
        tokenizer: a fast tokenizer, kept as a `BareTokenizer`.
        max_positions: maximum tokens of a sequence.
        options: the default `stride` is a quarter of the tokens left for the passage, and at most 128.
        pair_separators: number of [SEP] tokens between a question and its passage.
    """

    tokenizer: Union["PreTrainedTokenizerBase", BareTokenizer]
    max_positions: int
    options: TaskOptions = DEFAULTS
    pair_separators: int = 1

    name = "question-answering"
    architecture = "TRBertForQuestionAnswering"
    text_options = ("question_column", "context_column")
    head_modules = ("qa_outputs",)
    labels_whole_documents = False

    @classmethod
    def of(cls, tokenizer: Any, config: "TRBertConfig", options: TaskOptions) -> "QuestionAnsweringTask":
        return cls(tokenizer, config.usable_positions, options.bare(), config.pair_separators)

    def __post_init__(self):
        self.max_answer_tokens, self.n_best = self.options.max_answer_tokens, self.options.n_best
        self.tokenizer = BareTokenizer.of(self.tokenizer)

    def _encode_questions(self, questions: Sequence[str]) -> list[np.ndarray]:
        return token_ids(self.tokenizer, [self._as_encoded(question) for question in questions])

    def _as_encoded(self, question: str) -> str:
        """The question with a space before it, if the first word then has the same tokens as within a passage."""
        if not self.tokenizer.spaces_count():
            return question
        return f" {question.lstrip()}" if question.strip() else ""

    def _encode_context(self, text: str) -> EncodedContext:
        return EncodedContext.of(text, self.tokenizer)

    def _encode_texts(self, texts: Sequence[str]) -> list[EncodedContext]:
        return [self._encode_context(text) for text in texts]

    def _document(self, question: np.ndarray, text: EncodedContext) -> EncodedQuestion:
        return EncodedQuestion(question, text)

    def _text_ids(self, document: EncodedQuestion) -> np.ndarray:
        return document.context.ids

    def nothing(self) -> EncodedQuestion:
        """A question without tokens about a context without tokens."""
        none = np.zeros(0, np.int32)
        return EncodedQuestion(none, EncodedContext("", none, none, none))

    def to_column(self, documents: Sequence[EncodedQuestion]) -> pa.Array:
        """struct<question, context>; a context that several questions share is stored once."""
        contexts, indices = shared_objects([document.context for document in documents])
        columns = [pa.array([context.text for context in contexts], pa.large_string())]
        columns += [lists([getattr(context, name) for context in contexts]) for name in _CONTEXT[1:]]
        shared = pa.DictionaryArray.from_arrays(indices, pa.StructArray.from_arrays(columns, names=list(_CONTEXT)))
        questions = lists([document.ids for document in documents])
        return pa.StructArray.from_arrays([questions, shared], names=["question", "context"])

    def from_column(self, column: pa.ChunkedArray) -> Iterator[EncodedQuestion]:
        for chunk in column.chunks:
            questions, shared = chunk.field("question"), chunk.field("context")
            contexts: dict[int, EncodedContext] = {}
            for question, index in zip(questions, shared.indices.to_pylist()):
                if index not in contexts:
                    text, *arrays = (shared.dictionary.field(name)[index] for name in _CONTEXT)
                    contexts[index] = EncodedContext(text.as_py(), *(array.values.to_numpy() for array in arrays))
                yield EncodedQuestion(question.values.to_numpy(), contexts[index])

    def token_spans(self, texts: tuple[str, ...], document: EncodedQuestion) -> np.ndarray:
        question, context = texts
        encoded = self._as_encoded(question)
        ids, offsets = token_offsets(self.tokenizer, encoded)
        offsets = np.clip(offsets + len(question) - len(encoded), 0, None)
        asked = spans_of(0, document.ids, ids, offsets)
        ends = np.where(document.context.ends <= len(context), document.context.ends, document.context.starts)
        told = np.stack([np.ones_like(ends), document.context.starts, ends], 1)
        return np.concatenate([asked, told])

    def window_outputs(self, output: Any, lengths: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Split a model output into each window's start and end logits, float32 (tokens,)."""
        bounds = np.cumsum(lengths)[:-1]
        starts, ends = (np.split(x.float().cpu().numpy(), bounds) for x in (output.start_logits, output.end_logits))
        return list(zip(starts, ends))

    def gathered(self, combined: list[Answer]) -> list[Answer]:
        """The answers as they are."""
        return combined

    @property
    def result_names(self) -> tuple[str, ...]:
        return (*_SPAN.names, "null_score", *(("spans",) if self.options.spans else ()))

    def result_columns(self, outputs: Sequence[Answer], documents: Iterable[EncodedQuestion]) -> dict[str, pa.Array]:
        """The answers as result columns.

        Returns:
            answer: string, null for no answer.
            score: float32, the answer's probability.
            start_char, end_char: int32, the answer's position in the context.
            null_score: float32, the probability of no answer.
            spans: all spans found, best first, if requested.
        """

        def row(span: Span | None, text: str) -> dict[str, Any]:
            if span is None:
                return dict.fromkeys(_SPAN.names)
            values = (text[span.start : span.end], span.score, span.start, span.end)
            return dict(zip(_SPAN.names, values, strict=True))

        best, every = [], []
        for answer, document in zip(outputs, documents, strict=True):
            text = document.context.text
            best.append(row(answer.best(self.options.no_answer_threshold), text))
            if self.options.spans:
                every.append([row(span, text) for span in answer.spans])
        chosen = pa.array(best, _SPAN)
        columns = {name: chosen.field(name) for name in _SPAN.names}
        columns["null_score"] = pa.array([answer.null_score for answer in outputs], pa.float32())
        if self.options.spans:
            columns["spans"] = pa.array(every, pa.list_(_SPAN))
        return columns

    def answer(self, outcome: dict[str, Any]) -> tuple[int, int, int] | None:
        return None if outcome["answer"] is None else (1, outcome["start_char"], outcome["end_char"])

    def counts(self, columns: dict[str, pa.Array]) -> dict[str, int]:
        """Questions by whether they have an answer."""
        none = columns["answer"].null_count
        counted = {"answered": len(columns["answer"]) - none, "no answer": none}
        return {name: count for name, count in counted.items() if count}

    @classmethod
    def model_class(cls) -> "type[TRBertPreTrainedModel]":
        from .head import TRBertForQuestionAnswering

        return TRBertForQuestionAnswering

    @classmethod
    def fresh_head(cls, config: "TRBertConfig") -> dict[str, Any]:
        return {}

    @classmethod
    def learnt_head(cls, uri: str, columns: "LabelledColumns", problem_type: str | None) -> dict[str, Any]:
        return {}

    def read_corpus(self, uri: str, columns: "LabelledColumns") -> "LabelledQuestions":
        from .labelled import LabelledQuestions

        return LabelledQuestions.read(uri, self, columns)

    def combine(
        self,
        document: EncodedQuestion,
        windows: Sequence[QuestionWindow],
        outputs: Sequence[tuple[np.ndarray, np.ndarray]],
    ) -> Answer:
        """Find the answer from the start and end logits of each window's tokens, float (tokens,) each."""
        context, logits = document.context, outputs
        starts = [np.asarray(s, np.float64) for s, _ in logits]
        ends = [np.asarray(e, np.float64) for _, e in logits]
        of_start = _log_sum([_scored(s, window) for s, window in zip(starts, windows)])
        of_end = _log_sum([_scored(e, window) for e, window in zip(ends, windows)])
        null = _log_sum([s[:1] for s in starts]) - of_start + _log_sum([e[:1] for e in ends]) - of_end
        found: dict[tuple[int, int], float] = {}
        for window, s, e in zip(windows, starts, ends):
            passage = slice(window.passage, window.passage + window.count)
            for first, last, log_probability in self._spans(s[passage] - of_start, e[passage] - of_end):
                start, end = context.starts[window.first + first], context.ends[window.first + last]
                span = without_spaces(context.text, int(start), int(end))
                if span[0] > span[1]:
                    continue
                # Windows overlap: a span found twice is one answer with both probabilities.
                found[span] = found.get(span, 0.0) + float(np.exp(log_probability))
        best = sorted(found.items(), key=lambda item: (-item[1], item[0]))[: self.n_best]
        spans = tuple(Span(start, whole_characters(context.text, end), score) for (start, end), score in best)
        return Answer(spans, float(np.exp(null)))

    def _spans(self, start: np.ndarray, end: np.ndarray) -> Iterator[tuple[int, int, float]]:
        """The best spans of a window: first and last token in the passage, log-probability."""
        if not len(start):
            return
        reach = min(self.max_answer_tokens, len(start))
        padded = np.concatenate([end, np.full(reach, -np.inf)])
        scores = start[:, None] + np.lib.stride_tricks.sliding_window_view(padded, reach)[: len(start)]
        count = min(2 * self.n_best, scores.size)
        for flat in np.argpartition(-scores, count - 1, axis=None)[:count]:
            first, length = divmod(int(flat), reach)
            if np.isfinite(scores[first, length]):
                yield first, first + length, float(scores[first, length])


def _scored(logits: np.ndarray, window: QuestionWindow) -> np.ndarray:
    """The logits in the softmax: the first token's ("no answer") and the passage's."""
    return np.concatenate([logits[:1], logits[window.passage : window.passage + window.count]])


def _log_sum(parts: Sequence[np.ndarray]) -> float:
    values = np.concatenate(parts)
    highest = values.max()
    return float(highest + np.log(np.exp(values - highest).sum()))
