"""Texts as token ids and words.

A word is what the tokenizer's pre-tokenizer makes of a text, before it is divided into tokens. In a labelled corpus,
words may be those of the corpus. White space belongs to no word. A word's first token answers for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from ..text import BareTokenizer, pieces, whole_characters, without_spaces

NO_WORD = -1  # of special tokens, and of tokens for white space


@dataclass(frozen=True)
class EncodedText:
    """A tokenised text with its words. Each word has at least one token.

    Attributes:
        ids: int32 (tokens,), token ids.
        words: int32 (tokens,), the index of each token's word, or NO_WORD.
        starts, ends: int32 (words,), the characters of each word are `text[start:end]`.
    """

    ids: np.ndarray
    words: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    @cached_property
    def heads(self) -> np.ndarray:
        """The index of each word's first token, int64 (words,)."""
        words, first = np.unique(self.words, return_index=True)
        return first[words != NO_WORD]


def nothing() -> EncodedText:
    """A text without tokens."""
    return EncodedText(*[np.zeros(0, np.int32)] * 4)


def encode(tokenizer: BareTokenizer, text: str, most: int | None = None) -> EncodedText:
    """Tokenise a text.

    Args:
        most: number of tokens to keep.
    """
    ids, offsets, groups = (values[:most] for values in _tokens(tokenizer, text, most))
    spans, before = [], 0
    for start, end in _extents(offsets, groups).tolist():
        start, end = without_spaces(text, max(start, before), end)
        # A mark after a letter may be a word of its own for the tokenizer; for us it belongs to the letter's.
        before = end = whole_characters(text, end) if start < end else max(end, before)
        spans.append((min(start, end), end))
    starts, ends = np.array(spans, np.int32).reshape(-1, 2).T
    visible = starts < ends
    words = np.where(visible, np.cumsum(visible) - 1, NO_WORD).astype(np.int32)
    return EncodedText(ids, words[groups], starts[visible], ends[visible])


def encode_words(
    tokenizer: BareTokenizer, text: str, spans: Sequence[tuple[int, int]]
) -> tuple[EncodedText, np.ndarray]:
    """Tokenise a text with known words.

    A token belongs to the word in which it begins. The tokens are those of `encode`, unless a word would then have
    none, such as the second word of "cannot", can|not. The text is then divided where this word begins.

    Args:
        spans: start and end character of each word, in order and not overlapping.

    Returns:
        The text, and the indices of its words in `spans`, int64 (words,). Words for which the tokenizer has no token
        (a zero-width space, for example) are left out.
    """
    given = np.array([i for i, (start, end) in enumerate(spans) if start < end], np.int64)
    starts, ends = np.array([spans[i] for i in given], np.int64).reshape(-1, 2).T
    ids, words = _words_of(tokenizer, text, starts, ends, [])
    missing = np.setdiff1d(np.arange(len(given)), words)
    if len(missing):
        ids, words = _words_of(tokenizer, text, starts, ends, starts[missing].tolist())
    kept = np.unique(words[words != NO_WORD])
    renumbered = np.where(words == NO_WORD, NO_WORD, np.searchsorted(kept, words)).astype(np.int32)
    return EncodedText(ids, renumbered, starts[kept].astype(np.int32), ends[kept].astype(np.int32)), given[kept]


def _words_of(
    tokenizer: BareTokenizer, text: str, starts: np.ndarray, ends: np.ndarray, cuts: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids, and the index of the word in which each token begins; the text's parts are tokenised on their own."""
    ids, words = [np.zeros(0, np.int32)], [np.zeros(0, np.int64)]
    for begin, end in pairwise([0, *cuts, len(text)]):
        part, offsets, groups = _tokens(tokenizer, text[begin:end])
        extents = _extents(offsets, groups)[groups, 1].tolist()
        first = np.array([_first_visible(text[begin:end], *each) for each in zip(offsets[:, 0].tolist(), extents)])
        found = np.searchsorted(starts, first.astype(np.int64) + begin, side="right") - 1
        known = (found >= 0) & (first >= 0)
        known[known] = first[known] + begin < ends[found[known]]
        ids.append(part)
        words.append(np.where(known, found, NO_WORD))
    return np.concatenate(ids), np.concatenate(words)


def _first_visible(text: str, start: int, end: int) -> int:
    """The first character of `text[start:end]` that is no white space; -1 if there is none."""
    while start < end and text[start].isspace():
        start += 1
    return start if start < end else -1


def _tokens(tokenizer: BareTokenizer, text: str, most: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokenise a text, or at least its first tokens.

    Returns:
        Token ids, int32 (tokens,); each token's first and end character, int32 (tokens, 2); and the index of its word
        as the pre-tokenizer has it, counted without gaps, int64 (tokens,).
    """
    ids, offsets, words = [np.zeros(0, np.int32)], [np.zeros((0, 2), np.int32)], [np.zeros(0, np.int64)]
    start, count, first = 0, 0, 0
    for piece in pieces(text, tokenizer):
        encoding = tokenizer.backend_tokenizer.encode_batch([piece], add_special_tokens=False)[0]
        if encoding.ids:
            ids.append(np.asarray(encoding.ids, np.int32))
            offsets.append(np.asarray(encoding.offsets, np.int32).reshape(-1, 2) + start)
            words.append(np.unique(_known(encoding.word_ids), return_inverse=True)[1].reshape(-1) + first)
            first, count = int(words[-1][-1]) + 1, count + len(encoding.ids)
        start += len(piece)
        if most is not None and count >= most:
            break
    return np.concatenate(ids), np.concatenate(offsets), np.concatenate(words)


def _known(word_ids: Sequence[int | None]) -> np.ndarray:
    return np.array([-1 if word is None else word for word in word_ids], np.int64)


def _extents(offsets: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """First and end character of each group of tokens, (groups, 2)."""
    if not len(groups):
        return np.zeros((0, 2), np.int32)
    bounds = np.flatnonzero(np.diff(groups, prepend=-1))
    return np.stack([offsets[bounds, 0], np.maximum.reduceat(offsets[:, 1], bounds)], 1)
