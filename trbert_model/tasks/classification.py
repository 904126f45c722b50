"""Document classification: texts → token ids → windows → window logits → one label a document."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Union

import numpy as np

from ..errors import ConfigurationError
from .text import BareTokenizer, check_overflow, pieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Window:
    """A piece of a document that fits the model's positions.

    input_ids: int32 (tokens,), [CLS] and [SEP] included; new_tokens: how many of its tokens no earlier window had,
    the weight of its logits in the document's.
    """

    input_ids: np.ndarray
    new_tokens: int


@dataclass
class ClassificationTask:
    """How documents become sequences, and sequences' outputs a document's.

    tokenizer: a fast BERT tokenizer, kept as a `BareTokenizer`; max_positions: tokens a sequence may have, [CLS] and
    [SEP] included; overflow: what becomes of longer documents, "windows" or "truncate"; stride: tokens a window shares
    with the one before it (the transformers tokenizers' meaning of the word), by default an eighth of a window.
    """

    tokenizer: Union["PreTrainedTokenizerBase", BareTokenizer]
    max_positions: int
    overflow: str = "windows"
    stride: int | None = None

    def __post_init__(self):
        check_overflow(self.overflow, self.stride)
        self.shared = (self.max_positions - 2) // 8 if self.stride is None else self.stride
        if self.shared >= self.max_positions - 2:
            raise ConfigurationError(
                f"stride {self.shared} must be less than the {self.max_positions - 2} tokens of a window"
            )
        self.tokenizer = BareTokenizer.of(self.tokenizer)

    def tokenize(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, int32 (tokens,), without special tokens; of the part that is scored if it is cut."""
        if self.overflow == "truncate":
            return self._first_tokens(texts)
        cut = [list(pieces(text)) for text in texts]
        ids = iter(self._encode([piece for of_text in cut for piece in of_text]))
        return [np.concatenate([next(ids) for _ in of_text]) for of_text in cut]

    def _first_tokens(self, texts: Sequence[str]) -> list[np.ndarray]:
        """As many tokens of each text as a sequence takes."""
        capacity = self.max_positions - 2
        cut = [pieces(text) for text in texts]
        documents = self._encode([next(of_text) for of_text in cut])
        for i, rest in enumerate(cut):
            # Hardly ever: a piece of white space, or of an endless word, has fewer tokens than a sequence takes.
            while len(documents[i]) < capacity and (piece := next(rest, None)) is not None:
                documents[i] = np.concatenate([documents[i], *self._encode([piece])])
        return [ids[:capacity] for ids in documents]

    def _encode(self, pieces: list[str]) -> list[np.ndarray]:
        encode = self.tokenizer.backend_tokenizer.encode_batch_fast
        return [np.asarray(encoding.ids, dtype=np.int32) for encoding in encode(pieces, add_special_tokens=False)]

    def windows(self, tokens: np.ndarray) -> Iterator[Window]:
        """A document's windows, from its token ids."""
        capacity = self.max_positions - 2
        cls, sep = [self.tokenizer.cls_token_id], [self.tokenizer.sep_token_id]
        start = 0
        while True:
            end = min(start + capacity, len(tokens))
            new = end - start - (self.shared if start else 0)
            # An empty document still is one window, of weight 1, so that every document has a result.
            yield Window(np.concatenate([cls, tokens[start:end], sep]).astype(np.int32), max(new, 1))
            if end == len(tokens) or self.overflow == "truncate":
                return
            start = end - self.shared

    def encode_rows(self, rows: Sequence[tuple[str, ...]]) -> list[np.ndarray]:
        """`tokenize` for rows of one text each."""
        return self.tokenize([text for (text,) in rows])

    def problem(self, document: np.ndarray) -> tuple[str, str] | None:
        """Why a document cannot be scored, as a reason and a sentence."""
        return None if len(document) else ("no_tokens", "the tokenizer finds no token in the text")

    def token_types(self, windows: Sequence[Window]) -> None:
        """All of a document's tokens are of BERT's first type."""
        return None

    def window_outputs(self, output: Any, lengths: list[int]) -> list[np.ndarray]:
        """A model's output → each window's logits, float32 (labels,)."""
        return list(output.logits.float().cpu().numpy())

    def combine(self, document: np.ndarray, windows: Sequence[Window], outputs: Sequence[np.ndarray]) -> np.ndarray:
        """The windows' mean logits, weighted by their new tokens, float64 (labels,)."""
        return np.average(np.asarray(outputs, np.float64), axis=0, weights=[window.new_tokens for window in windows])

    def gathered(self, combined: list[np.ndarray], num_labels: int) -> np.ndarray:
        """Documents' logits, float32 (documents, labels)."""
        return np.array(combined, np.float32).reshape(len(combined), num_labels)


def softmax(logits: np.ndarray) -> np.ndarray:
    """(documents, labels) → probabilities, float32, computed in float64."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return (shifted / shifted.sum(axis=1, keepdims=True)).astype(np.float32)
