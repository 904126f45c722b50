"""Token classification: texts → tokens and words → windows → a tag for each word → entities.

A word is answered from its first token, by the window that sees it with the most context: in which this token is the
farthest from the nearer end.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Union

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...errors import ConfigurationError
from ..base import DEFAULTS, Task, TaskOptions, lists
from ..labels import check_label_names, label_names, saved_label_names
from ..text import BareTokenizer, encode_apart, spans_of, token_offsets
from .tags import TagSet
from .words import NO_WORD, EncodedText, encode, nothing

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from ...configuration import TRBertConfig
    from ...modeling import TRBertPreTrainedModel
    from ...options import LabelledColumns
    from .labelled import LabelledWords

# Fields of a document in the Arrow column.
_DOCUMENT = ("ids", "words", "starts", "ends")


@dataclass(frozen=True)
class TokenWindow:
    """A piece of a document that fits the model's positions.

    Attributes:
        input_ids: int32 (tokens,), with [CLS] and [SEP].
        words: int32 (tokens,), the index of each token's word within the window, -1 for [CLS], [SEP] and white space.
        first: index of the window's first token, after [CLS], in the document.
        heads: int64 (words that begin in the window,), indices of their first tokens in the window.
        first_word: index of the first of these words in the document.
    """

    input_ids: np.ndarray
    words: np.ndarray
    first: int
    heads: np.ndarray
    first_word: int


@dataclass(frozen=True)
class Tagging:
    """The tags of a document's words.

    Attributes:
        tags: int32 (words,), indices of tags, -1 for words that no window has, because the document was truncated.
        scores: float32 (words,), the tags' probabilities.
    """

    tags: np.ndarray
    scores: np.ndarray


@dataclass
class TokenClassificationTask(Task):
    """Turns documents into windows, and the windows' outputs into entities or tags.

    Args:
        tokenizer: a fast tokenizer, kept as a `BareTokenizer`.
        max_positions: maximum tokens of a sequence, with [CLS] and [SEP].
        tag_set: the model's tags.
        options: the default `stride` is a quarter of a window, and at most 128.
    """

    tokenizer: Union["PreTrainedTokenizerBase", BareTokenizer]
    max_positions: int
    tag_set: TagSet
    options: TaskOptions = DEFAULTS

    name = "token-classification"
    architecture = "TRBertForTokenClassification"
    text_options = ("text_column",)
    head_modules = ("classifier",)
    labels_whole_documents = False
    asks = False
    exit_heads = ("words",)

    @classmethod
    def of(cls, tokenizer: Any, config: "TRBertConfig", options: TaskOptions) -> "TokenClassificationTask":
        names = tuple(config.id2label[i] for i in range(config.num_labels))
        return cls(tokenizer, config.usable_positions, TagSet(names), options.bare())

    @classmethod
    def check(cls, config: "TRBertConfig") -> None:
        super().check(config)
        check_label_names(config)

    def __post_init__(self):
        self.overflow, self.capacity = self.options.overflow, self.max_positions - 2
        self.shared = min(128, self.capacity // 4) if self.options.stride is None else self.options.stride
        if self.shared >= self.capacity:
            raise ConfigurationError(f"stride {self.shared} must be less than the {self.capacity} tokens of a window")
        self.tokenizer = BareTokenizer.of(self.tokenizer)

    def encode(self, texts: Sequence[str]) -> list[EncodedText]:
        """Tokenise texts; with "truncate", only as much as is scored."""
        most = self.capacity if self.overflow == "truncate" else None
        return [encode(self.tokenizer, text, most) for text in texts]

    def encode_rows(self, rows: Sequence[tuple[str, ...]]) -> tuple[list[EncodedText], dict[int, str]]:
        documents, failures = encode_apart(self.encode, [text for (text,) in rows])
        return [self.nothing() if document is None else document for document in documents], failures

    def nothing(self) -> EncodedText:
        """A document without tokens."""
        return nothing()

    def problem(self, document: EncodedText) -> tuple[str, str] | None:
        """Why a document cannot be scored, as a reason and a sentence; None if it can be scored."""
        return None if len(document.ids) else ("no_tokens", "the tokenizer finds no token in the text")

    def windows(self, document: EncodedText) -> Iterator[TokenWindow]:
        """Split a document into windows. None of them begins within a word, if that is possible."""
        cls, sep = [self.tokenizer.cls_token_id], [self.tokenizer.sep_token_id]
        heads, start = document.heads, 0
        # Whether a window may begin with a token: it is a word's first, or of white space.
        bounds = (np.diff(document.words, prepend=NO_WORD) != 0) | (document.words == NO_WORD)
        while True:
            end = min(start + self.capacity, len(document.ids))
            words = document.words[start:end]
            low, high = np.searchsorted(heads, [start, end])
            first_word = int(words[words != NO_WORD].min(initial=low))
            yield TokenWindow(
                input_ids=np.concatenate([cls, document.ids[start:end], sep]).astype(np.int32),
                words=np.pad(np.where(words == NO_WORD, NO_WORD, words - first_word), 1, constant_values=NO_WORD),
                first=start,
                heads=heads[low:high] - start + 1,
                first_word=int(low),
            )
            if end == len(document.ids) or self.overflow == "truncate":
                return
            following = end - self.shared
            possible = start + 1 + np.flatnonzero(bounds[start + 1 : end + 1])
            if len(possible):  # otherwise a word is longer than the window
                last = int(np.searchsorted(possible, following, side="right")) - 1
                following = int(possible[max(last, 0)])
            start = following

    def token_types(self, windows: Sequence[TokenWindow]) -> None:
        """None: all token types are 0."""
        return None

    def extra_inputs(self, windows: Sequence[TokenWindow]) -> dict[str, np.ndarray]:
        """words: int64 (total tokens,), as in the windows."""
        return {"words": np.concatenate([window.words for window in windows]).astype(np.int64)}

    def to_column(self, documents: Sequence[EncodedText]) -> pa.Array:
        """struct<ids, words, starts, ends>, each list<int32>."""
        columns = [lists([getattr(document, name) for document in documents]) for name in _DOCUMENT]
        return pa.StructArray.from_arrays(columns, names=list(_DOCUMENT))

    def from_column(self, column: pa.ChunkedArray) -> Iterator[EncodedText]:
        for chunk in column.chunks:
            for values in zip(*(chunk.field(name) for name in _DOCUMENT)):
                yield EncodedText(*(each.values.to_numpy() for each in values))

    def token_spans(self, texts: tuple[str, ...], document: EncodedText) -> np.ndarray:
        (text,) = texts
        return spans_of(0, document.ids, *token_offsets(self.tokenizer, text))

    def window_tokens(self, document: EncodedText, window: TokenWindow) -> np.ndarray:
        count = len(window.input_ids) - 2
        return np.pad(np.arange(window.first, window.first + count, dtype=np.int32), 1, constant_values=-1)

    def window_outputs(self, output: Any, lengths: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Each token's best tag, int32 (tokens,), and its probability, float32 (tokens,), split by window."""
        best = output.logits.float().softmax(-1).max(-1)
        bounds = np.cumsum(lengths)[:-1]
        tags, scores = best.indices.cpu().numpy().astype(np.int32), best.values.cpu().numpy()
        return list(zip(np.split(tags, bounds), np.split(scores, bounds)))

    def combine(
        self,
        document: EncodedText,
        windows: Sequence[TokenWindow],
        outputs: Sequence[tuple[np.ndarray, np.ndarray]],
    ) -> Tagging:
        """Take each word's tag from the window that sees it with the most context."""
        count = len(document.starts)
        tags, scores = np.full(count, -1, np.int32), np.zeros(count, np.float32)
        context = np.full(count, -1)
        for window, (window_tags, window_scores) in zip(windows, outputs):
            heads, own = window.heads, slice(window.first_word, window.first_word + len(window.heads))
            nearer = np.minimum(heads, len(window.input_ids) - 1 - heads)
            better = nearer > context[own]
            tags[own] = np.where(better, window_tags[heads], tags[own])
            scores[own] = np.where(better, window_scores[heads], scores[own])
            context[own] = np.maximum(nearer, context[own])
        return Tagging(tags, scores)

    def gathered(self, combined: list[Tagging]) -> list[Tagging]:
        """The taggings as they are."""
        return combined

    @property
    def result_names(self) -> tuple[str, ...]:
        return ("tags",) if self.options.tags else ("entities",)

    def result_columns(self, outputs: Sequence[Tagging], documents: Iterable[EncodedText]) -> dict[str, pa.Array]:
        """The entities, or with the option `tags` the words' tags, in the order of the text.

        Returns:
            entities: list of label, start_char, end_char and score, the mean probability of its words' tags.
            tags: list of tag, start_char, end_char and score, its probability.
        """
        rows = [
            self._tags(tagging, document) if self.options.tags else self._entities(tagging, document)
            for tagging, document in zip(outputs, documents, strict=True)
        ]
        names, starts, ends, scores = (list(values) for values in zip(*rows)) if rows else ([], [], [], [])
        offsets = np.cumsum([0, *map(len, starts)])
        (name,) = self.result_names
        fields = [
            pa.array([each for of_row in names for each in of_row], pa.string()),
            *(pa.array(np.concatenate([*values, np.zeros(0, np.int32)]), pa.int32()) for values in (starts, ends)),
            pa.array(np.concatenate([*scores, np.zeros(0, np.float32)]), pa.float32()),
        ]
        label = "tag" if self.options.tags else "label"
        structs = pa.StructArray.from_arrays(fields, names=[label, "start_char", "end_char", "score"])
        return {name: pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), structs)}

    def _tags(self, tagging: Tagging, document: EncodedText) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
        read = tagging.tags >= 0
        names = [self.tag_set.names[tag] for tag in tagging.tags[read].tolist()]
        return names, document.starts[read], document.ends[read], tagging.scores[read]

    def _entities(
        self, tagging: Tagging, document: EncodedText
    ) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
        found = self.tag_set.entities(tagging.tags)
        first, last = np.array([each[1:] for each in found], np.int64).reshape(-1, 2).T
        sums = np.concatenate([[0.0], np.cumsum(tagging.scores, dtype=np.float64)])
        scores = (sums[last + 1] - sums[first]) / (last + 1 - first)
        return [each[0] for each in found], document.starts[first], document.ends[last], scores.astype(np.float32)

    def marks(self, outcome: dict[str, Any]) -> list[tuple[int, int, int, str]]:
        (name,) = self.result_names
        return [(0, each["start_char"], each["end_char"], next(iter(each.values()))) for each in outcome[name]]

    def counts(self, columns: dict[str, pa.Array]) -> dict[str, int]:
        """Number of entities with each label, or of words with each tag."""
        (name,) = self.result_names
        found = pc.value_counts(columns[name].flatten().field(0)).to_pylist()
        return {each["values"]: each["counts"] for each in found}

    @classmethod
    def model_class(cls) -> "type[TRBertPreTrainedModel]":
        from .head import TRBertForTokenClassification

        return TRBertForTokenClassification

    @classmethod
    def fresh_head(cls, config: "TRBertConfig") -> dict[str, Any]:
        return {"id2label": config.id2label, "label2id": config.label2id}

    @classmethod
    def saved_head(cls, raw: dict[str, Any], weights: "dict[str, Tensor]") -> dict[str, Any]:
        return saved_label_names(raw, weights["classifier.weight"].shape[0])

    @classmethod
    def learnt_head(cls, uri: str, columns: "LabelledColumns", problem_type: str | None) -> dict[str, Any]:
        from .labelled import RawWords

        return label_names(RawWords.read(uri, columns).names())

    def read_corpus(self, uri: str, columns: "LabelledColumns") -> "LabelledWords":
        from .labelled import LabelledWords

        return LabelledWords.read(uri, self, columns)
