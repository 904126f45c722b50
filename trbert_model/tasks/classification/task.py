"""Document classification: texts → token ids → windows → window logits → a document's labels or numbers."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Union

import numpy as np
import pyarrow as pa

from ...errors import ConfigurationError
from ..base import DEFAULTS, Task, TaskOptions, lists
from ..labels import check_label_names, label_names, saved_label_names
from ..text import BareTokenizer, encode_apart, pieces, spans_of, token_ids, token_offsets
from .labellings import REGRESSION, SINGLE_LABEL, Labelling, check_problem_type, labelling_of, problem_type_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from ...configuration import TRBertConfig
    from ...modeling import TRBertPreTrainedModel
    from ...options import LabelledColumns
    from .labelled import LabelledTexts

# How the logits of a document's windows become the document's (`TRBertConfig.window_pooling`).
MEAN, LOG_SUM_EXP = POOLINGS = ("mean", "log-sum-exp")
# Fields of a configuration that say what a model reads and how it joins it.
_READING = ("text_pairs", "window_pooling")


@dataclass
class Window:
    """A piece of a document that fits the model's positions.

    Attributes:
        input_ids: int32 (tokens,), with [CLS] and [SEP].
        new_tokens: number of tokens that no earlier window has, at least 1: the weight of the window's logits.
        first: index of the window's first token, after [CLS], in the document.
        passage: index of the text's first token in the window.
    """

    passage: ClassVar[int] = 1

    input_ids: np.ndarray
    new_tokens: int
    first: int = 0


@dataclass
class ClassificationTask(Task):
    """Turns documents into windows, and the windows' logits into document logits.

    A document is its text's token ids, int32 (tokens,). `PairClassificationTask` has others.

    Args:
        tokenizer: a fast tokenizer, kept as a `BareTokenizer`.
        max_positions: maximum tokens of a sequence, with [CLS] and [SEP].
        labelling: converts logits to result columns.
        options: the default `stride` is an eighth of a window.
        window_pooling: one of `POOLINGS`.
    """

    tokenizer: Union["PreTrainedTokenizerBase", BareTokenizer]
    max_positions: int
    labelling: Labelling
    options: TaskOptions = DEFAULTS
    window_pooling: str = MEAN

    name = "classification"
    architecture = "TRBertForSequenceClassification"
    text_options: ClassVar[tuple[str, ...]] = ("text_column",)
    head_modules = ("classifier",)
    labels_whole_documents = True
    asks = False
    exit_heads = ("first", "attention")

    @classmethod
    def of(cls, tokenizer: Any, config: "TRBertConfig", options: TaskOptions) -> "ClassificationTask":
        options = options.bare()
        settings = (tokenizer, config.usable_positions, labelling_of(config, options), options, config.window_pooling)
        if not config.text_pairs:
            return cls(*settings)
        from .pairs import PairClassificationTask

        return PairClassificationTask(*settings, pair_separators=config.pair_separators)

    @classmethod
    def check(cls, config: "TRBertConfig") -> None:
        super().check(config)
        check_label_names(config)
        check_problem_type(config)
        if (config.exits or config.gates) is not None and problem_type_of(config) != SINGLE_LABEL:
            raise ConfigurationError(
                f"exits and gates need one label per document, whose entropy is an uncertainty; not "
                f"{problem_type_of(config)}"
            )
        if config.window_pooling not in POOLINGS:
            raise ConfigurationError(f"window_pooling {config.window_pooling!r} is none of {', '.join(POOLINGS)}")
        if config.window_pooling == LOG_SUM_EXP and problem_type_of(config) == REGRESSION:
            raise ConfigurationError(f"window_pooling {LOG_SUM_EXP!r} is for labels: numbers have no softmax")
        if config.window_pooling == LOG_SUM_EXP and config.exits is not None:
            raise ConfigurationError(
                f"exits: not with window_pooling {LOG_SUM_EXP!r}, which compares the logits of a document's windows; "
                "different exits have no common scale"
            )

    def __post_init__(self):
        self.overflow = self.options.overflow
        self.shared = (self.max_positions - 2) // 8 if self.options.stride is None else self.options.stride
        if self.shared >= self.max_positions - 2:
            raise ConfigurationError(
                f"stride {self.shared} must be less than the {self.max_positions - 2} tokens of a window"
            )
        self.tokenizer = BareTokenizer.of(self.tokenizer)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the labels, by index."""
        return self.labelling.labels

    def tokenize(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, int32 (tokens,), without special tokens; with "truncate", only those scored."""
        if self.overflow == "truncate":
            return self._first_tokens(texts)
        text_pieces = [list(pieces(text, self.tokenizer)) for text in texts]
        ids = iter(token_ids(self.tokenizer, [piece for of_text in text_pieces for piece in of_text]))
        return [np.concatenate([next(ids) for _ in of_text]) for of_text in text_pieces]

    def _first_tokens(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The first token ids of each text, as many as fit in one sequence."""
        capacity = self.max_positions - 2
        text_pieces = [pieces(text, self.tokenizer) for text in texts]
        documents = token_ids(self.tokenizer, [next(of_text) for of_text in text_pieces])
        for i, rest in enumerate(text_pieces):
            # Rare: only pieces of white space or of one endless word have fewer tokens than fit in a sequence.
            while len(documents[i]) < capacity and (piece := next(rest, None)) is not None:
                documents[i] = np.concatenate([documents[i], *token_ids(self.tokenizer, [piece])])
        return [ids[:capacity] for ids in documents]

    def windows(self, document: Any) -> Iterator[Any]:
        """Split a document into windows."""
        tokens: np.ndarray = document
        capacity = self.max_positions - 2
        cls, sep = [self.tokenizer.cls_token_id], [self.tokenizer.sep_token_id]
        start = 0
        while True:
            end = min(start + capacity, len(tokens))
            new = end - start - (self.shared if start else 0)
            # An empty document has one window, of weight 1, so that every document has a result.
            yield Window(np.concatenate([cls, tokens[start:end], sep]).astype(np.int32), max(new, 1), start)
            if end == len(tokens) or self.overflow == "truncate":
                return
            start = end - self.shared

    def encode_rows(self, rows: Sequence[tuple[str, ...]]) -> tuple[list[np.ndarray], dict[int, str]]:
        documents, failures = encode_apart(self.tokenize, [text for (text,) in rows])
        return [self.nothing() if document is None else document for document in documents], failures

    def encode_all(self, rows: Sequence[tuple[str, ...]]) -> list[Any]:
        """The documents of rows on none of which the tokenizer fails."""
        return self.tokenize([text for (text,) in rows])

    def nothing(self) -> Any:
        """A document without tokens."""
        return np.zeros(0, np.int32)

    def problem(self, document: Any) -> tuple[str, str] | None:
        """Why a document cannot be scored, as a reason and a sentence; None if it can be scored."""
        return None if len(document) else ("no_tokens", "the tokenizer finds no token in the text")

    def to_column(self, documents: Sequence[Any]) -> pa.Array:
        """list<int32>."""
        return lists(documents)

    def from_column(self, column: pa.ChunkedArray) -> Iterator[Any]:
        for chunk in column.chunks:
            for document in chunk:
                yield document.values.to_numpy()

    def token_spans(self, texts: tuple[str, ...], document: Any) -> np.ndarray:
        (text,) = texts
        return spans_of(0, document, *token_offsets(self.tokenizer, text))

    def window_tokens(self, document: Any, window: Any) -> np.ndarray:
        count = len(window.input_ids) - 2
        return np.concatenate([[-1], np.arange(window.first, window.first + count), [-1]]).astype(np.int32)

    def token_types(self, windows: Sequence[Any]) -> list[np.ndarray] | None:
        """None: all token types are 0."""
        return None

    def window_outputs(self, output: Any, lengths: list[int]) -> list[np.ndarray]:
        """Split a model output into each window's logits, float32 (labels,)."""
        return list(output.logits.float().cpu().numpy())

    def combine(self, document: Any, windows: Sequence[Any], outputs: Sequence[np.ndarray]) -> np.ndarray:
        """The windows' logits pooled, float64 (labels,).

        The mean is weighted by the windows' new tokens. It is also right for several labels: in training each window
        has all labels of its document, so its logits already describe the whole document.

        The log-sum-exp is that of the mean (Pinheiro and Collobert, CVPR 2015, with r = 1), so that it does not grow
        with the number of windows. For one label, it makes a single softmax over the logits of all windows.
        """
        logits = np.asarray(outputs, np.float64)
        if self.window_pooling == LOG_SUM_EXP:
            return np.logaddexp.reduce(logits, axis=0) - np.log(len(logits))
        return np.average(logits, axis=0, weights=[window.new_tokens for window in windows])

    def gathered(self, combined: list[np.ndarray]) -> np.ndarray:
        """The documents' logits, float32 (documents, labels)."""
        return np.array(combined, np.float32).reshape(len(combined), len(self.labels))

    @property
    def result_names(self) -> tuple[str, ...]:
        return self.labelling.names

    def result_columns(self, outputs: np.ndarray, documents: Iterable[Any]) -> dict[str, pa.Array]:
        return self.labelling.columns(outputs)

    def outcome(self, columns: dict[str, pa.Array], index: int) -> dict[str, Any]:
        found = super().outcome(columns, index)
        return found | {
            name: dict(zip(self.labels, found[name])) for name in ("probabilities", "scores") if name in found
        }

    def counts(self, columns: dict[str, pa.Array]) -> dict[str, int]:
        return self.labelling.counts(columns)

    @classmethod
    def model_class(cls) -> "type[TRBertPreTrainedModel]":
        from .head import TRBertForSequenceClassification

        return TRBertForSequenceClassification

    @classmethod
    def fresh_head(cls, config: "TRBertConfig") -> dict[str, Any]:
        fields = {name: getattr(config, name) for name in ("id2label", "label2id", *_READING)}
        return fields | {"problem_type": problem_type_of(config)}

    @classmethod
    def saved_head(cls, raw: dict[str, Any], weights: "dict[str, Tensor]") -> dict[str, Any]:
        fields = {name: raw[name] for name in _READING if name in raw} | {"problem_type": raw.get("problem_type")}
        return fields | saved_label_names(raw, weights["classifier.weight"].shape[0])

    @classmethod
    def learnt_head(cls, uri: str, columns: "LabelledColumns", problem_type: str | None) -> dict[str, Any]:
        from .labelled import RawTexts

        pairs = columns.question_column is not None
        raw = RawTexts.read(uri, columns, problem_type, pairs=pairs)
        names = label_names(raw.names(columns.label_column))
        return names | {"problem_type": raw.problem_type, "text_pairs": pairs}

    def read_corpus(self, uri: str, columns: "LabelledColumns") -> "LabelledTexts":
        from .labelled import LabelledTexts

        return LabelledTexts.read(uri, self, columns)
