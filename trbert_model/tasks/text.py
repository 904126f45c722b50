"""What all tasks do with texts before they become sequences."""

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Union

import tokenizers

from ..errors import ConfigurationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A longer text is tokenised in pieces, so that the tokenizer's working memory (some hundred bytes a token) is bounded:
# 3 GB for 20 MB of Chinese otherwise. They are cut before white space, punctuation and CJK characters, which BERT's
# pre-tokenizer always takes for words of their own, so the tokens are the same. No bracket: "[MASK]" is one token.
PIECE_CHARACTERS = 200_000
_CUT = re.compile(r"[\s.,;:!?\u3001\u3002\uff0c\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")


def pieces(text: str) -> Iterator[str]:
    """A text in pieces that are tokenised like the whole; one after the other they are the text."""
    start = 0
    while cut := _CUT.search(text, start + PIECE_CHARACTERS):
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

    def __reduce__(self) -> tuple[Any, ...]:
        return _built, (self.backend_tokenizer.to_str(), self.cls_token_id, self.sep_token_id)


@functools.lru_cache(maxsize=2)
def _built(serialized: str, cls_token_id: int, sep_token_id: int) -> BareTokenizer:
    return BareTokenizer(tokenizers.Tokenizer.from_str(serialized), cls_token_id, sep_token_id)


def check_overflow(overflow: str, stride: int | None) -> None:
    """Refuse what no model could honour."""
    if overflow not in ("windows", "truncate"):
        raise ConfigurationError(f"overflow {overflow!r} is neither 'windows' nor 'truncate'")
    if stride is not None and stride < 0:
        raise ConfigurationError(f"stride {stride} must not be negative")
