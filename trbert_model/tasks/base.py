"""The interface of a task: how rows become windows, and how model outputs become results.

A new task is a folder beside the existing ones. A task's own module does not import torch, so that processes that only
tokenise start without it. Its head, losses and labelled data are in neighbouring modules, imported on first use.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa

from ..errors import ConfigurationError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from ..configuration import TRBertConfig
    from ..labelled import LabelledCorpus
    from ..modeling import TRBertPreTrainedModel
    from ..options import LabelledColumns
    from .text import BareTokenizer


@dataclass(frozen=True)
class TaskOptions:
    """Options for encoding documents and for the result columns. Each task uses the ones that apply to it.

    Attributes:
        overflow: "windows" splits documents longer than the model's positions, "truncate" scores only the beginning.
        stride: tokens that a window shares with the previous one. Default: depends on the task.
        probabilities: classification: output the probability of every label. Multi-label models always do.
        label_threshold: multi-label classification: lowest probability with which a label is assigned.
        max_answer_tokens: question answering: maximum tokens of a span.
        n_best: question answering: number of spans to find.
        spans: question answering: output all spans found.
        no_answer_threshold: question answering: output no answer if the probability of "no answer" exceeds the best
            span's by more than this. Default: always output the best span.
        tags: token classification: output a tag for every word, not entities.
    """

    overflow: str = "windows"
    stride: int | None = None
    probabilities: bool = False
    label_threshold: float = 0.5
    max_answer_tokens: int = 30
    n_best: int = 1
    spans: bool = False
    no_answer_threshold: float | None = None
    tags: bool = False

    def __post_init__(self):
        if self.overflow not in ("windows", "truncate"):
            raise ConfigurationError(f"overflow {self.overflow!r} is neither 'windows' nor 'truncate'")
        if self.stride is not None and self.stride < 0:
            raise ConfigurationError(f"stride {self.stride} must not be negative")
        if not 0 <= self.label_threshold <= 1:
            raise ConfigurationError(f"label_threshold {self.label_threshold} must be a probability from 0 to 1")
        for name in ("max_answer_tokens", "n_best"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} {getattr(self, name)} must be at least 1")

    def bare(self) -> "TaskOptions":
        """The options without those of a subclass. Readers do not need these, and unpickling them imports torch."""
        return TaskOptions(**{field.name: getattr(self, field.name) for field in dataclasses.fields(TaskOptions)})


@dataclass
class DocumentResults:
    """The model's results, one row per document.

    Attributes:
        outputs: the documents' outputs, as `Task.gathered` returns them.
        num_tokens: int64 (documents,), input tokens over all windows, with special tokens and tokens shared by windows.
        num_windows: int64 (documents,).
        kept_tokens: int64 (documents, reductions), tokens kept after each reduction, over all windows.
        exit_layers: float64 (documents,), after how many layers a document left, or on average its words: the mean over
            its windows, by tokens. Layers that it skipped count. All layers for models without exits.
        flops: float64 (documents,), FLOPs spent.
        dense_flops: float64 (documents,), FLOPs of the dense model on the same windows.
    """

    outputs: Any
    num_tokens: np.ndarray
    num_windows: np.ndarray
    kept_tokens: np.ndarray
    exit_layers: np.ndarray
    flops: np.ndarray
    dense_flops: np.ndarray

    def __len__(self) -> int:
        return len(self.num_tokens)

    @classmethod
    def concatenate(cls, parts: Sequence["DocumentResults"]) -> "DocumentResults":
        """Concatenate the documents of all parts, in order; at least one part."""

        def joined(name: str) -> Any:
            values = [getattr(part, name) for part in parts]
            return np.concatenate(values) if isinstance(values[0], np.ndarray) else [x for each in values for x in each]

        return cls(**{field.name: joined(field.name) for field in dataclasses.fields(cls)})


DEFAULTS = TaskOptions()


class Task(ABC):
    """Turns rows into windows, and model outputs into results. It is pickled to the readers.

    A document is what `encode_rows` makes of a row. A window is a sequence for the model: it has `input_ids`, int32
    (tokens,), and other attributes that the task needs.
    """

    name: ClassVar[str]
    # Class name of its models, as in `config.json`.
    architecture: ClassVar[str]
    # The options that name its text columns, in the order of a row's texts.
    text_options: ClassVar[tuple[str, ...]]
    # Modules of its head. A checkpoint with the weights of all of them has the head.
    head_modules: ClassVar[tuple[str, ...]]
    # Whether a document's label also holds for every piece of it and is predicted from the first token. Training can
    # then use crops, unlabelled documents and the input of the dense model's classifier.
    labels_whole_documents: ClassVar[bool]
    # Whether its windows begin with a question, which selectors can use.
    asks: ClassVar[bool]
    # What the exits of its models may read, of `exits.options.HEADS`.
    exit_heads: ClassVar[tuple[str, ...]] = ()

    @classmethod
    @abstractmethod
    def of(
        cls, tokenizer: "PreTrainedTokenizerBase | BareTokenizer", config: "TRBertConfig", options: TaskOptions
    ) -> "Task":
        """Create the task for a model with this configuration.

        Raises:
            ConfigurationError: an option does not fit the model.
        """

    @classmethod
    def check(cls, config: "TRBertConfig") -> None:
        """Raise ConfigurationError if the task does not support a saved model's configuration."""
        exits = config.exit_options
        if exits is not None and exits.head not in cls.exit_heads:
            allowed = f"only exits that read {' or '.join(cls.exit_heads)}" if cls.exit_heads else "no exits"
            raise ConfigurationError(f"exits: {exits.head!r} is not for {cls.name}, which has {allowed}")
        if config.gates is not None and not cls.labels_whole_documents:
            raise ConfigurationError(f"gates: they skip layers of whole documents, so they are not for {cls.name}")

    # Rows to windows.

    @abstractmethod
    def encode_rows(self, rows: Sequence[tuple[str, ...]]) -> tuple[list[Any], dict[int, str]]:
        """Tokenise rows of texts.

        Returns:
            One document per row, and the errors of the rows on which the tokenizer fails, by row index. The documents
            of these rows are empty.

        Raises:
            TokenizerError: the tokenizer fails on every text.
        """

    @abstractmethod
    def nothing(self) -> Any:
        """An empty document."""

    @abstractmethod
    def problem(self, document: Any) -> tuple[str, str] | None:
        """Why a document cannot be scored, as a reason and a sentence; None if it can be scored."""

    @abstractmethod
    def windows(self, document: Any) -> Iterator[Any]:
        """Split a document into windows, at least one."""

    @abstractmethod
    def token_types(self, windows: Sequence[Any]) -> list[np.ndarray] | None:
        """Each window's token type ids, int32 (tokens,); None if all are 0."""

    def extra_inputs(self, windows: Sequence[Any]) -> dict[str, np.ndarray]:
        """Further arguments of the model's `forward` for a batch of windows, each (total tokens, ...)."""
        return {}

    @abstractmethod
    def to_column(self, documents: Sequence[Any]) -> pa.Array:
        """Encode documents as an Arrow column, to send them from the readers to the actors."""

    @abstractmethod
    def from_column(self, column: pa.ChunkedArray) -> Iterator[Any]:
        """Decode the documents of a `to_column` column one by one, without copying the token ids."""

    @abstractmethod
    def token_spans(self, texts: tuple[str, ...], document: Any) -> np.ndarray:
        """Where a document's tokens are in its row's texts, int32 (tokens, 3).

        Args:
            texts: the row's texts, or their beginnings.

        Returns:
            For each token the index of its text, and start and end of the characters that it stands for, which are
            equal for a token beyond the texts. Tokens are in the order of the texts.
        """

    @abstractmethod
    def window_tokens(self, document: Any, window: Any) -> np.ndarray:
        """For each token of a window, the index of the document's token that it is, -1 for special tokens; int32."""

    def text_names(self) -> tuple[str, ...]:
        """The names of a row's texts."""
        return tuple(option.removesuffix("_column") for option in self.text_options)

    # Model outputs to results.

    @abstractmethod
    def window_outputs(self, output: Any, lengths: list[int]) -> list[Any]:
        """Split a model output into one output per window, without torch; lengths: tokens of each window."""

    @abstractmethod
    def combine(self, document: Any, windows: Sequence[Any], outputs: Sequence[Any]) -> Any:
        """Combine the outputs of a document's windows into the document's output."""

    @abstractmethod
    def gathered(self, combined: list[Any]) -> Any:
        """Convert the documents' outputs to an array or list with one entry per document."""

    @property
    @abstractmethod
    def result_names(self) -> tuple[str, ...]:
        """Names of the result columns."""

    @abstractmethod
    def result_columns(self, outputs: Any, documents: Iterable[Any]) -> dict[str, pa.Array]:
        """The documents' outputs as result columns, in the order of `result_names`."""

    @abstractmethod
    def counts(self, columns: dict[str, pa.Array]) -> dict[str, int]:
        """Number of documents with each result, from the result columns; empty if results cannot be counted."""

    def outcome(self, columns: dict[str, pa.Array], index: int) -> dict[str, Any]:
        """A document's values in the result columns, for people."""
        return {name: columns[name][index].as_py() for name in self.result_names}

    def answer(self, outcome: dict[str, Any]) -> tuple[int, int, int] | None:
        """Where the texts hold the answer in an `outcome`: the text's index, start and end; None if they do not."""
        return None

    def marks(self, outcome: dict[str, Any]) -> list[tuple[int, int, int, str]]:
        """Labelled pieces of the texts in an `outcome`: the text's index, start, end and label, in order."""
        return []

    # The parts that need torch.

    @classmethod
    @abstractmethod
    def model_class(cls) -> "type[TRBertPreTrainedModel]":
        """Class of the model with this task's head."""

    @classmethod
    @abstractmethod
    def fresh_head(cls, config: "TRBertConfig") -> dict[str, Any]:
        """Configuration fields that give a new model the same head as a model with this configuration."""

    @classmethod
    def saved_head(cls, raw: dict[str, Any], weights: "dict[str, Tensor]") -> dict[str, Any]:
        """Configuration fields for the head of a checkpoint; raw: its config.json, weights: its tensors."""
        return {}

    @classmethod
    @abstractmethod
    def learnt_head(cls, uri: str, columns: "LabelledColumns", problem_type: str | None) -> dict[str, Any]:
        """Configuration fields for a head that learns a labelled corpus.

        Args:
            problem_type: of a classifier, as in transformers. Default: inferred from the labels.

        Raises:
            InputError: the corpus cannot be read, or has too few labels to learn from.
        """

    @abstractmethod
    def read_corpus(self, uri: str, columns: "LabelledColumns") -> "LabelledCorpus":
        """Read a labelled corpus.

        Raises:
            InputError: it cannot be read, or has labels that the model does not have.
        """


def lists(arrays: Sequence[np.ndarray]) -> pa.ListArray:
    """Convert arrays of token ids to a list<int32> array."""
    offsets = np.concatenate([[0], np.cumsum([len(array) for array in arrays], dtype=np.int64)])
    values = np.concatenate([*arrays, np.zeros(0, np.int32)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values))
