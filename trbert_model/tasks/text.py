"""Tokenisation of texts, shared by all tasks."""

import asyncio
import functools
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, Union

import numpy as np
import tokenizers

from ..errors import TokenizerError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Encoded = TypeVar("Encoded")

# Joiners, variation selectors and keycaps, which belong to the character before them but are no combining marks.
_EXTENDERS = {"\u200d", "\ufe0e", "\ufe0f", "\u20e3"}

# Exceptions that end or interrupt a process and are never caused by a text.
_NOT_OF_A_TEXT = (KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError, MemoryError)
_DETAIL_CHARACTERS = 500  # an error may quote the text
# The tokenizer's encoding of a text takes a kilobyte, however short the text is. A split may have half a million texts.
_TEXTS_AT_A_TIME = 4096

# Longer texts are tokenised in pieces to bound the tokenizer's working memory (some hundred bytes per token), which is
# 3 GB for 20 MB of Chinese otherwise. BERT's pre-tokenizer always splits before white space, punctuation and CJK
# characters, so pieces that begin there have the same tokens. Brackets are excluded: "[MASK]" is one token.
# Byte-level BPE and SentencePiece join a space to the word after it, and treat it differently from other white space
# and from several spaces. For them, only a single space between two words is sure to begin a token.
PIECE_CHARACTERS = 200_000
_SPACE = re.compile(r"(?<=\w) (?=\w)")
_PIECE_START = re.compile(r"[\s.,;:!?\u3001\u3002\uff0c\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")


def pieces(text: str, tokenizer: "BareTokenizer") -> Iterator[str]:
    """Split a text into consecutive pieces that give the same tokens as the whole text."""
    start, bert = 0, isinstance(tokenizer.backend_tokenizer.pre_tokenizer, tokenizers.pre_tokenizers.BertPreTokenizer)
    while next_piece := (_PIECE_START if bert else _SPACE).search(text, start + PIECE_CHARACTERS):
        yield text[start : next_piece.start()]
        start = next_piece.start()
    yield text[start:]


@dataclass(frozen=True)
class BareTokenizer:
    """The parts of a transformers fast tokenizer that tasks need, under the same names.

    It can be sent to processes that do not import transformers and torch, which takes seconds. A process that receives
    it with every split builds it only once.
    """

    backend_tokenizer: tokenizers.Tokenizer
    cls_token_id: int
    sep_token_id: int

    @classmethod
    def of(cls, tokenizer: Union["PreTrainedTokenizerBase", "BareTokenizer"]) -> "BareTokenizer":
        """From a fast tokenizer, disabling its truncation (of 128 tokens in sentence encoders) and padding in place."""
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        return cls(backend, tokenizer.cls_token_id, tokenizer.sep_token_id)

    def spaces_count(self) -> bool:
        """Whether a word has different tokens after a space than at the start of a text, as in byte-level BPE."""
        ids = self.backend_tokenizer.encode("a a", add_special_tokens=False).ids
        return ids[:1] != ids[-1:]

    def __reduce__(self) -> tuple[Any, ...]:
        return _built, (self.backend_tokenizer.to_str(), self.cls_token_id, self.sep_token_id)


@functools.lru_cache(maxsize=2)
def _built(serialized: str, cls_token_id: int, sep_token_id: int) -> BareTokenizer:
    return BareTokenizer(tokenizers.Tokenizer.from_str(serialized), cls_token_id, sep_token_id)


def token_ids(tokenizer: BareTokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Each text's token ids without special tokens, int32 (tokens,)."""
    encode, ids = tokenizer.backend_tokenizer.encode_batch_fast, list[np.ndarray]()
    for start in range(0, len(texts), _TEXTS_AT_A_TIME):
        for encoding in encode(list(texts[start : start + _TEXTS_AT_A_TIME]), add_special_tokens=False):
            ids.append(np.asarray(encoding.ids, dtype=np.int32))
    return ids


def token_offsets(tokenizer: BareTokenizer, text: str) -> tuple[np.ndarray, np.ndarray]:
    """A text's token ids, int32 (tokens,), and each token's first and last characters, int32 (tokens, 2)."""
    ids, offsets, start = [np.zeros(0, np.int32)], [np.zeros((0, 2), np.int32)], 0
    for piece in pieces(text, tokenizer):
        encoding = tokenizer.backend_tokenizer.encode_batch([piece], add_special_tokens=False)[0]
        ids.append(np.asarray(encoding.ids, np.int32))
        offsets.append(np.asarray(encoding.offsets, np.int32).reshape(-1, 2) + start)
        start += len(piece)
    return np.concatenate(ids), np.concatenate(offsets)


def spans_of(text: int, tokens: np.ndarray, ids: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Rows of `Task.token_spans` for tokens of the text with this index.

    Args:
        tokens: int32 (tokens,), token ids.
        ids, offsets: of the text or its beginning, from `token_offsets`. Its last tokens may be others if it was cut.
    """
    both = min(len(tokens), len(ids))
    same = int(np.cumprod(tokens[:both] == ids[:both]).sum())
    spans = np.zeros((len(tokens), 3), np.int32)
    spans[:, 0] = text
    spans[:same, 1:] = offsets[:same]
    return spans


def whole_characters(text: str, end: int) -> int:
    """Move an end past the marks that belong to the character before it.

    Tokenizers strip accents. If the text stores the last letter's accent as a separate character, the token's end
    leaves it out.
    """
    while end < len(text) and (unicodedata.combining(text[end]) or text[end] in _EXTENDERS):
        end += 1
    return end


def without_spaces(text: str, start: int, end: int) -> tuple[int, int]:
    """Remove the white space around a span, which some tokenizers include in tokens.

    The end is before the start if the span has only white space.
    """
    found = text[start:end]
    return end - len(found.lstrip()), start + len(found.rstrip())


def encode_apart(
    encode: Callable[[list[str]], list[Encoded]], texts: Sequence[str]
) -> tuple[list[Encoded | None], dict[int, str]]:
    """Encode texts in one call or, if that fails, one by one.

    A panic of the tokenizer counts as a failure, although its exception (pyo3's) is not an Exception.

    Returns:
        The encoded texts, None for those that failed, and the errors by text index.

    Raises:
        TokenizerError: the tokenizer fails even on "a".
    """
    try:
        return list(encode(list(texts))), {}
    except BaseException as error:  # noqa: BLE001 - see above
        failure = _said(error)
    encoded: list[Encoded | None] = []
    failures = {}
    for index, text in enumerate(texts):
        try:
            encoded += encode([text])
        except BaseException as error:  # noqa: BLE001
            failures[index] = failure = _said(error)
            encoded.append(None)
    try:
        encode(["a"])
    except BaseException as error:
        _said(error)
        raise TokenizerError(f"the tokenizer fails on every text: {failure}") from error
    return encoded, failures


def _said(error: BaseException) -> str:
    """An exception's type and message in one line. Exceptions that are never caused by a text are raised again."""
    if isinstance(error, _NOT_OF_A_TEXT):
        raise error
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:_DETAIL_CHARACTERS]
