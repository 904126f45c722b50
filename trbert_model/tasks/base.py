"""What a task is: everything that is said about one task and nothing else, so that another one is a folder beside it.

A task's own module knows no torch: processes that only tokenise start without it. Its head, losses and labelled data
lie beside it and are imported when they are asked for.
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
    from ..labelled import LabelledColumns, LabelledCorpus
    from ..modeling import TRBertPreTrainedModel
    from .text import BareTokenizer


@dataclass(frozen=True)
class TaskOptions:
    """How documents become sequences, and what is told of the results; each task takes what it knows.

    overflow: what becomes of documents longer than the positions, "windows" or "truncate"; stride: tokens a window
    shares with the one before it, a task's own number by default.
    Classification: probabilities: every label's are told (always where a document may have several labels);
    label_threshold: the probability from which on a label is one of a document's, where it may have several.
    Question answering: max_answer_tokens: of a span; n_best: spans to find; spans: tell all of them;
    no_answer_threshold: how much more probable than the best span "no answer" must be to be the answer (None: never).
    """

    overflow: str = "windows"
    stride: int | None = None
    probabilities: bool = False
    label_threshold: float = 0.5
    max_answer_tokens: int = 30
    n_best: int = 1
    spans: bool = False
    no_answer_threshold: float | None = None

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
        """Without what a subclass adds, which readers have no use for and would import torch to unpickle."""
        return TaskOptions(**{field.name: getattr(self, field.name) for field in dataclasses.fields(TaskOptions)})


@dataclass
class DocumentResults:
    """What the model found, one row a document.

    outputs: what the task makes of a document's windows, see its `gathered`;
    num_tokens: int64 (documents,), tokens the model was given over all windows, special and shared ones included;
    num_windows: int64 (documents,); kept_tokens: int64 (documents, reductions), tokens alive after each reduction;
    flops, dense_flops: float64 (documents,), spent, and what the dense model would have spent.
    """

    outputs: Any
    num_tokens: np.ndarray
    num_windows: np.ndarray
    kept_tokens: np.ndarray
    flops: np.ndarray
    dense_flops: np.ndarray

    def __len__(self) -> int:
        return len(self.num_tokens)

    @classmethod
    def concatenate(cls, parts: Sequence["DocumentResults"]) -> "DocumentResults":
        """The documents of all parts, in order; at least one part."""

        def joined(name: str) -> Any:
            values = [getattr(part, name) for part in parts]
            return np.concatenate(values) if isinstance(values[0], np.ndarray) else [x for each in values for x in each]

        return cls(**{field.name: joined(field.name) for field in dataclasses.fields(cls)})


DEFAULTS = TaskOptions()


class Task(ABC):
    """How documents become sequences, and what the model says of sequences becomes results. Pickles to readers.

    A document is what `encode_rows` makes of a row; a window has `input_ids`, int32 (tokens,), and what else the task
    needs to know of it.
    """

    name: ClassVar[str]
    # The class of its models, as `config.json` names it.
    architecture: ClassVar[str]
    # The options that name the columns with its texts, in the order of a row's texts.
    text_options: ClassVar[tuple[str, ...]]
    # A head's modules, and the weight that tells that a checkpoint has one.
    head_modules: ClassVar[tuple[str, ...]]
    # What is right about a document is right about every piece of it, and read from its first token: then training can
    # show pieces, documents that nobody has labelled, and what the dense model's classifier sees.
    labels_whole_documents: ClassVar[bool]
    # Its windows begin with a question, which selectors can know.
    asks: ClassVar[bool]

    @classmethod
    @abstractmethod
    def of(
        cls, tokenizer: "PreTrainedTokenizerBase | BareTokenizer", config: "TRBertConfig", options: TaskOptions
    ) -> "Task":
        """The task for a model with this configuration.

        Raises:
            ConfigurationError: an option that does not fit the model.
        """

    @classmethod
    def check(cls, config: "TRBertConfig") -> None:
        """Raises ConfigurationError where a saved model's configuration says what this task cannot do."""
        return

    # Rows to windows.

    @abstractmethod
    def encode_rows(self, rows: Sequence[tuple[str, ...]]) -> tuple[list[Any], dict[int, str]]:
        """Rows of texts → documents; and by their places the rows on which the tokenizer fails, with why, whose
        documents have nothing in them.

        Raises:
            TokenizerError: it fails on every text.
        """

    @abstractmethod
    def nothing(self) -> Any:
        """A document with nothing in it."""

    @abstractmethod
    def problem(self, document: Any) -> tuple[str, str] | None:
        """Why a document cannot be scored, as a reason and a sentence; None if it can."""

    @abstractmethod
    def windows(self, document: Any) -> Iterator[Any]:
        """A document's windows, at least one."""

    @abstractmethod
    def token_types(self, windows: Sequence[Any]) -> list[np.ndarray] | None:
        """Each window's token types, int32 (tokens,); None if all are 0."""

    @abstractmethod
    def to_column(self, documents: Sequence[Any]) -> pa.Array:
        """Documents as an Arrow column: what travels from the readers to the actors."""

    @abstractmethod
    def from_column(self, column: pa.ChunkedArray) -> Iterator[Any]:
        """What `to_column` was given, one after the other, without a copy of the token ids."""

    # The model's outputs to results.

    @abstractmethod
    def window_outputs(self, output: Any, lengths: list[int]) -> list[Any]:
        """A model's output for windows of these lengths → each window's, without torch."""

    @abstractmethod
    def combine(self, document: Any, windows: Sequence[Any], outputs: Sequence[Any]) -> Any:
        """A document's output from those of its windows."""

    @abstractmethod
    def gathered(self, combined: list[Any]) -> Any:
        """Documents' outputs as `DocumentResults.outputs`: an array or a list with one entry a document."""

    @property
    @abstractmethod
    def result_names(self) -> tuple[str, ...]:
        """The names of its result columns."""

    @abstractmethod
    def result_columns(self, outputs: Any, documents: Iterable[Any]) -> dict[str, pa.Array]:
        """Documents' outputs as its result columns, in their order."""

    @abstractmethod
    def counts(self, columns: dict[str, pa.Array]) -> dict[str, int]:
        """Of its result columns, how many documents have which result; empty where that says nothing."""

    # With torch.

    @classmethod
    @abstractmethod
    def model_class(cls) -> "type[TRBertPreTrainedModel]":
        """The model with its head."""

    @classmethod
    @abstractmethod
    def fresh_head(cls, config: "TRBertConfig") -> dict[str, Any]:
        """The fields of another model's configuration that give this one's head to a new model."""

    @classmethod
    def saved_head(cls, raw: dict[str, Any], weights: "dict[str, Tensor]") -> dict[str, Any]:
        """The fields of a configuration for the head that a checkpoint has; raw: its config.json."""
        return {}

    @classmethod
    @abstractmethod
    def learnt_head(cls, uri: str, columns: "LabelledColumns", problem_type: str | None) -> dict[str, Any]:
        """The fields of a configuration that a head needs for what a labelled corpus teaches.

        Args:
            problem_type: of a classifier, as transformers calls it; default: what the labels look like.

        Raises:
            InputError: the corpus cannot be read, or teaches nothing.
        """

    @abstractmethod
    def read_corpus(self, uri: str, columns: "LabelledColumns") -> "LabelledCorpus":
        """A labelled corpus.

        Raises:
            InputError: it cannot be read, or has labels that the model has not.
        """


def lists(arrays: Sequence[np.ndarray]) -> pa.ListArray:
    """Arrays of token ids as list<int32>."""
    offsets = np.concatenate([[0], np.cumsum([len(array) for array in arrays], dtype=np.int64)])
    values = np.concatenate([*arrays, np.zeros(0, np.int32)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values))
