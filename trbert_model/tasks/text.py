"""What all tasks do with texts before they become sequences."""

import re
from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from ..errors import ConfigurationError

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


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Switch off the truncation and padding a tokenizer was saved with (sentence encoders cut at 128 tokens)."""
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()


def check_overflow(overflow: str, stride: int | None) -> None:
    """Refuse what no model could honour."""
    if overflow not in ("windows", "truncate"):
        raise ConfigurationError(f"overflow {overflow!r} is neither 'windows' nor 'truncate'")
    if stride is not None and stride < 0:
        raise ConfigurationError(f"stride {stride} must not be negative")
