"""Extractive question answering: question and context → windows → start and end logits → one answer a question.

All positions of all windows of a question share one softmax, in training and here, so scores are comparable across
windows. The first token of each window stands for "no answer".
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Union

import numpy as np

from ..errors import ConfigurationError
from .text import BareTokenizer, check_overflow, pieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A window must have room for a passage beside its question.
_LEAST_CONTEXT_TOKENS = 16
# Joiners and selectors that belong to the character before them although they are no combining marks.
_EXTENDERS = {"\u200d", "\ufe0e", "\ufe0f", "\u20e3"}


@dataclass(frozen=True)
class EncodedContext:
    """A context, its token ids, int32 (tokens,), and the characters where each begins and ends, int32 (tokens,)."""

    text: str
    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    def tokens(self, start: int, end: int) -> tuple[int, int] | None:
        """The first and last token of the characters from `start` to before `end`; None if no token lies in them."""
        first = int(np.searchsorted(self.ends, start, side="right"))
        last = int(np.searchsorted(self.starts, end, side="left")) - 1
        return (first, last) if first <= last else None


@dataclass(frozen=True)
class EncodedQuestion:
    """A question's token ids, int32 (tokens,), and its context, which several questions may share."""

    ids: np.ndarray
    context: EncodedContext


@dataclass(frozen=True)
class QuestionWindow:
    """[CLS] question [SEP] passage [SEP].

    input_ids, token_type_ids: int32 (tokens,); passage: where the passage begins in the window; first: its first
    token's place among the context's tokens; count: its tokens; new_tokens: those that no earlier window had.
    """

    input_ids: np.ndarray
    token_type_ids: np.ndarray
    passage: int
    first: int
    count: int
    new_tokens: int


@dataclass(frozen=True)
class Span:
    """An answer: characters of the context, `context[start:end]`, and its probability."""

    start: int
    end: int
    score: float


@dataclass(frozen=True)
class Answer:
    """The most probable spans of a question, best first, and the probability that the context has no answer."""

    spans: tuple[Span, ...]
    null_score: float

    def best(self, threshold: float | None) -> Span | None:
        """The first span, or None where "no answer" is more probable than it by more than the threshold."""
        if not self.spans or (threshold is not None and self.null_score - self.spans[0].score > threshold):
            return None
        return self.spans[0]


@dataclass
class QuestionAnsweringTask:
    """How questions become sequences, and sequences' outputs answers.

    tokenizer: a fast BERT tokenizer, kept as a `BareTokenizer`; max_positions: tokens a sequence may have; overflow:
    what becomes of longer contexts, "windows" or "truncate"; stride: tokens a window shares with the one before it, by
    default a quarter of the room for the passage and at most 128; max_answer_tokens: of a span; n_best: spans to
    return.
    """

    tokenizer: Union["PreTrainedTokenizerBase", BareTokenizer]
    max_positions: int
    overflow: str = "windows"
    stride: int | None = None
    max_answer_tokens: int = 30
    n_best: int = 1

    def __post_init__(self):
        check_overflow(self.overflow, self.stride)
        for name in ("max_answer_tokens", "n_best"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} {getattr(self, name)} must be at least 1")
        self.tokenizer = BareTokenizer.of(self.tokenizer)

    def encode(self, questions: Sequence[str], contexts: Sequence[str]) -> list[EncodedQuestion]:
        """Token ids and offsets; a context that occurs more than once is tokenised once and shared."""
        encode = self.tokenizer.backend_tokenizer.encode_batch_fast
        ids = [np.asarray(each.ids, np.int32) for each in encode(list(questions), add_special_tokens=False)]
        known = {context: self._encode_context(context) for context in dict.fromkeys(contexts)}
        return [EncodedQuestion(question, known[context]) for question, context in zip(ids, contexts)]

    def _encode_context(self, text: str) -> EncodedContext:
        ids: list[np.ndarray] = []
        offsets: list[np.ndarray] = []
        start = 0
        for piece in pieces(text):
            encoding = self.tokenizer.backend_tokenizer.encode_batch([piece], add_special_tokens=False)[0]
            ids.append(np.asarray(encoding.ids, np.int32))
            offsets.append(np.asarray(encoding.offsets, np.int32).reshape(-1, 2) + start)
            start += len(piece)
        where = np.concatenate(offsets)
        return EncodedContext(text, np.concatenate(ids), where[:, 0], where[:, 1])

    def encode_rows(self, rows: Sequence[tuple[str, ...]]) -> list[EncodedQuestion]:
        """`encode` for rows of a question and a context each."""
        return self.encode([question for question, _ in rows], [context for _, context in rows])

    def problem(self, document: EncodedQuestion) -> tuple[str, str] | None:
        """Why a question cannot be answered, as a reason and a sentence."""
        if not len(document.ids) or not len(document.context.ids):
            what = "context" if len(document.ids) else "question"
            return "no_tokens", f"the tokenizer finds no token in the {what}"
        if self.room(document) <= self._shared(document):
            return "question_too_long", (
                f"the question's {len(document.ids)} tokens leave too little of {self.max_positions} positions for the "
                "context"
            )
        return None

    def _shared(self, question: EncodedQuestion) -> int:
        """Tokens that a question's windows share."""
        return min(128, self.room(question) // 4) if self.stride is None else self.stride

    def room(self, question: EncodedQuestion) -> int:
        """Tokens of the context that fit beside a question; less than 1 if the question is too long."""
        room = self.max_positions - 3 - len(question.ids)
        return room if room >= min(_LEAST_CONTEXT_TOKENS, self.max_positions // 4) else 0

    def windows(self, question: EncodedQuestion) -> Iterator[QuestionWindow]:
        """A question's windows over its context.

        Raises:
            ConfigurationError: the question leaves no room for a passage, or the stride is as long as the room.
        """
        room = self.room(question)
        shared = self._shared(question)
        if room < 1 or shared >= room:
            raise ConfigurationError(
                f"a question of {len(question.ids)} tokens leaves {max(room, 0)} of {self.max_positions} positions for "
                f"the context, with a stride of {shared}"
            )
        cls, sep = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        head = np.concatenate([[cls], question.ids, [sep]])
        total, start = len(question.context.ids), 0
        while True:
            end = min(start + room, total)
            ids = np.concatenate([head, question.context.ids[start:end], [sep]]).astype(np.int32)
            types = np.zeros(len(ids), np.int32)
            types[len(head) :] = 1
            new = end - start - (shared if start else 0)
            yield QuestionWindow(ids, types, len(head), start, end - start, max(new, 1))
            if end == total or self.overflow == "truncate":
                return
            start = end - shared

    def token_types(self, windows: Sequence[QuestionWindow]) -> list[np.ndarray]:
        """Each window's token types."""
        return [window.token_type_ids for window in windows]

    def window_outputs(self, output: Any, lengths: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
        """A model's output → each window's start and end logits, float32 (tokens,)."""
        bounds = np.cumsum(lengths)[:-1]
        starts, ends = (np.split(x.float().cpu().numpy(), bounds) for x in (output.start_logits, output.end_logits))
        return list(zip(starts, ends))

    def gathered(self, combined: list[Answer], num_labels: int) -> list[Answer]:
        """Questions' answers."""
        return combined

    def combine(
        self,
        document: EncodedQuestion,
        windows: Sequence[QuestionWindow],
        outputs: Sequence[tuple[np.ndarray, np.ndarray]],
    ) -> Answer:
        """The answer from start and end logits of each window's tokens, float (tokens,) each."""
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
                span = (int(context.starts[window.first + first]), int(context.ends[window.first + last]))
                # Windows overlap: the same characters found twice are one answer.
                found[span] = found.get(span, 0.0) + float(np.exp(log_probability))
        best = sorted(found.items(), key=lambda item: (-item[1], item[0]))[: self.n_best]
        spans = tuple(Span(start, whole_characters(context.text, end), score) for (start, end), score in best)
        return Answer(spans, float(np.exp(null)))

    def _spans(self, start: np.ndarray, end: np.ndarray) -> Iterator[tuple[int, int, float]]:
        """The best spans of a window: first and last token of the passage, log-probability."""
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


def whole_characters(text: str, end: int) -> int:
    """An end moved past the marks that belong to the character before it: tokenizers strip accents, and the last
    letter's would be cut off where the text holds them apart."""
    while end < len(text) and (unicodedata.combining(text[end]) or text[end] in _EXTENDERS):
        end += 1
    return end


def _scored(logits: np.ndarray, window: QuestionWindow) -> np.ndarray:
    """The positions that take part in the softmax: "no answer" and the passage."""
    return np.concatenate([logits[:1], logits[window.passage : window.passage + window.count]])


def _log_sum(parts: Sequence[np.ndarray]) -> float:
    values = np.concatenate(parts)
    highest = values.max()
    return float(highest + np.log(np.exp(values - highest).sum()))


# --- metrics, as SQuAD's official evaluation defines them -------------------------------------------------------------

_ARTICLES = re.compile(r"\b(a|an|the)\b", re.UNICODE)


def normalized(answer: str) -> str:
    """Lower case, without punctuation, articles and superfluous white space."""
    kept = "".join(character for character in answer.lower() if character not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", kept).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the prediction is one of the answers; no answers mean that "" is right."""
    return max((float(normalized(prediction) == normalized(answer)) for answer in answers or [""]), default=0.0)


def f1(prediction: str, answers: Sequence[str]) -> float:
    """The highest harmonic mean of word precision and recall over the answers; no answers mean that "" is right."""
    return max(_f1(prediction, answer) for answer in answers or [""])


def _f1(prediction: str, answer: str) -> float:
    found, wanted = normalized(prediction).split(), normalized(answer).split()
    if not found or not wanted:
        return float(found == wanted)
    shared = sum((Counter(found) & Counter(wanted)).values())
    if not shared:
        return 0.0
    precision, recall = shared / len(found), shared / len(wanted)
    return 2 * precision * recall / (precision + recall)
