"""What all tasks do with texts before they become sequences."""

import asyncio
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, Union

import numpy as np
import tokenizers

from ..errors import TokenizerError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Encoded = TypeVar("Encoded")

# What ends or interrupts a process, and is never the fault of a text.
_NOT_OF_A_TEXT = (KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError, MemoryError)
_DETAIL_CHARACTERS = 500  # an error may cite the text
# What the tokenizer says of a text takes a kilobyte, however short it is: a split may have half a million of them.
_TEXTS_AT_A_TIME = 4096

# A longer text is tokenised in pieces, so that the tokenizer's working memory (some hundred bytes a token) is bounded:
# 3 GB for 20 MB of Chinese otherwise. They are cut before white space, punctuation and CJK characters, which BERT's
# pre-tokenizer always takes for words of their own, so the tokens are the same. No bracket: "[MASK]" is one token.
# Byte-level BPE and SentencePiece put a space with the word behind it and tell it from other white space and from
# several: only a single one between two words is sure to begin a token.
PIECE_CHARACTERS = 200_000
_SPACE = re.compile(r"(?<=\w) (?=\w)")
_CUT = re.compile(r"[\s.,;:!?\u3001\u3002\uff0c\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")


def pieces(text: str, tokenizer: "BareTokenizer") -> Iterator[str]:
    """A text in pieces that are tokenised like the whole; one after the other they are the text."""
    start, bert = 0, isinstance(tokenizer.backend_tokenizer.pre_tokenizer, tokenizers.pre_tokenizers.BertPreTokenizer)
    while cut := (_CUT if bert else _SPACE).search(text, start + PIECE_CHARACTERS):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


@dataclass(frozen=True)
class BareTokenizer:
    """What tasks need of a fast tokenizer of transformers, under its names. It travels to processes that do without
    transformers and torch, which take seconds to import; one that gets it with every piece of work builds it once.
    """

    backend_tokenizer: tokenizers.Tokenizer
    cls_token_id: int
    sep_token_id: int

    @classmethod
    def of(cls, tokenizer: Union["PreTrainedTokenizerBase", "BareTokenizer"]) -> "BareTokenizer":
        """Without the truncation and padding that it was saved with (sentence encoders cut at 128 tokens)."""
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        return cls(backend, tokenizer.cls_token_id, tokenizer.sep_token_id)

    def spaces_count(self) -> bool:
        """Whether a word has other tokens after a space than where a text begins: byte-level BPE."""
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


def encode_apart(
    encode: Callable[[list[str]], list[Encoded]], texts: Sequence[str]
) -> tuple[list[Encoded | None], dict[int, str]]:
    """Texts encoded together or, if that fails, one by one: None for those on which it fails, and why by their places.

    A tokenizer's panic is a failure like another, although its exception (pyo3's) is no Exception.

    Raises:
        TokenizerError: it fails on every text.
    """
    try:
        return list(encode(list(texts))), {}
    except BaseException as error:  # noqa: BLE001 - see above
        failure = _said(error)
    encoded: list[Encoded | None] = []
    failures = {}
    for place, text in enumerate(texts):
        try:
            encoded += encode([text])
        except BaseException as error:  # noqa: BLE001
            failures[place] = failure = _said(error)
            encoded.append(None)
    try:
        encode(["a"])
    except BaseException as error:
        _said(error)
        raise TokenizerError(f"the tokenizer fails on every text: {failure}") from error
    return encoded, failures


def _said(error: BaseException) -> str:
    """A failure's type and text in one line."""
    if isinstance(error, _NOT_OF_A_TEXT):
        raise error
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:_DETAIL_CHARACTERS]
