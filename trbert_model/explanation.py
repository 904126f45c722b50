"""A document with the number of layers that computed each of its tokens, as HTML and as text.

Does not import torch, so that the driver of a run can show documents without a model.
"""

import functools
import secrets
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .terminal import printable

if TYPE_CHECKING:
    from jinja2 import Environment

    from .tasks.base import Task

_MOST_ENTITIES = 50  # in a terminal
NOT_READ = -1  # the layers of a token that is in no window, because the document was truncated
_NO_TOKEN = -2
_LABELS = {"label", "tag"}  # fields with the label of an entity and the tag of a word


@dataclass
class Recording:
    """Which layers computed the tokens of some documents, see `Engine.score`.

    Attributes:
        documents: indices of the documents to record.
        windows: of each of them, its windows in order, with the number of layers that computed each of their tokens,
            int16 (tokens,).
    """

    documents: Collection[int]
    windows: dict[int, list[tuple[Any, np.ndarray]]] = field(default_factory=dict)


class Run(NamedTuple):
    """Consecutive characters whose tokens were computed by equally many layers; None: no token.

    If they are the answer's or an entity's, `in_answer` is true. The last ones of an entity have its label.
    """

    text: str
    layers: int | None
    in_answer: bool
    label: str = ""


class Level(NamedTuple):
    """A number of layers after which tokens leave, the tokens that left then, and those computed by as many or more."""

    layers: int
    tokens: int
    at_least: int


@dataclass(frozen=True)
class ExplainedText:
    """A text and its tokens.

    Attributes:
        name: what the text is, such as "context".
        text: the text, or its beginning.
        starts, ends: the characters of each token are `text[start:end]`.
        layers: number of layers that computed each token, or NOT_READ. For a token in several windows, the highest.
        answer: start and end of the answer, if this text holds it.
        left_out: number of further characters, which are not in `text`.
        entities: start, end and label of each entity or tagged word, in order.
    """

    name: str
    text: str
    starts: list[int]
    ends: list[int]
    layers: list[int]
    answer: tuple[int, int] | None = None
    left_out: int = 0
    entities: list[tuple[int, int, str]] = field(default_factory=list)

    def runs(self) -> list[Run]:
        """The text in pieces. White space between two tokens of one piece belongs to it."""
        layers = np.full(len(self.text), _NO_TOKEN)
        tokens = list(zip(self.starts, self.ends, self.layers))
        for start, end, count in tokens:  # several may stand for one character, in byte-level BPE
            layers[start:end] = np.maximum(layers[start:end], count)
        for (_, end, count), (start, _, following) in pairwise(tokens):
            if count == following and self.text[end:start].isspace():
                layers[end:start] = count
        marked = np.zeros(len(self.text), np.int64)  # the number of the answer or entity, from 1
        for number, (start, end, _) in enumerate([(*self.answer, "")] if self.answer else self.entities, 1):
            marked[start:end] = number
        labels = {min(end, len(self.text)): label for _, end, label in self.entities}
        changes = np.flatnonzero((np.diff(layers) != 0) | (np.diff(marked) != 0)) + 1
        bounds = [0, *changes.tolist(), len(self.text)] if self.text else [0]
        return [
            Run(
                self.text[start:end],
                None if layers[start] == _NO_TOKEN else int(layers[start]),
                bool(marked[start]),
                labels.get(end, "") if marked[start] else "",
            )
            for start, end in pairwise(bounds)
        ]


@dataclass(frozen=True)
class Explanation:
    """A document, its result, and how many layers computed each of its tokens. It shows itself in notebooks.

    Attributes:
        texts: its texts with their tokens.
        outcome: its result, by column.
        num_layers: layers of the model.
        reduction_layers: the layers before which tokens were dropped; empty for the dense model.
        num_tokens, num_windows: of all windows, with special tokens and tokens that windows share.
        kept_tokens: tokens kept by each reduction, counted in the same way.
    """

    texts: list[ExplainedText]
    outcome: dict[str, Any]
    num_layers: int
    reduction_layers: list[int]
    num_tokens: int
    num_windows: int
    kept_tokens: list[int]

    @classmethod
    def of(
        cls,
        task: "Task",
        texts: tuple[str, ...],
        document: Any,
        windows: list[tuple[Any, np.ndarray]],
        outcome: dict[str, Any],
        *,
        num_layers: int,
        reduction_layers: tuple[int, ...],
        lengths: tuple[int, ...] | None = None,
    ) -> "Explanation":
        """Combine a document with its windows and their layers, as in a `Recording`.

        Args:
            texts: the row that the document was made of, or the beginnings of its texts.
            outcome: from `Task.outcome`.
            lengths: numbers of characters of the whole texts. Default: of `texts`.
        """
        spans = task.token_spans(texts, document)
        layers = np.full(len(spans), NOT_READ)
        for window, computed in windows:
            tokens = task.window_tokens(document, window)
            np.maximum.at(layers, tokens[tokens >= 0], computed[tokens >= 0])
        explained = []
        answer, marks = task.answer(outcome), task.marks(outcome)
        for i, (name, text) in enumerate(zip(task.text_names(), texts)):
            own = (spans[:, 0] == i) & (spans[:, 1] < spans[:, 2])
            starts, ends = spans[own, 1].tolist(), spans[own, 2].tolist()
            span = answer[1:] if answer is not None and answer[0] == i else None
            left_out = lengths[i] - len(text) if lengths else 0
            entities = [mark[1:] for mark in marks if mark[0] == i and mark[1] < len(text)]
            explained.append(ExplainedText(name, text, starts, ends, layers[own].tolist(), span, left_out, entities))
        return cls(
            texts=explained,
            outcome=outcome,
            num_layers=num_layers,
            reduction_layers=list(reduction_layers),
            num_tokens=sum(len(computed) for _, computed in windows),
            num_windows=len(windows),
            kept_tokens=[sum(int((counts > layer).sum()) for _, counts in windows) for layer in reduction_layers],
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Explanation":
        """From the result of `dataclasses.asdict`, also after it was JSON."""
        texts = [
            ExplainedText(
                **{**text, "answer": text["answer"] and tuple(text["answer"])}
                | {"entities": [tuple(each) for each in text.get("entities", [])]}
            )
            for text in values["texts"]
        ]
        return cls(**{**values, "texts": texts})

    @property
    def levels(self) -> list[Level]:
        """The numbers of layers that can have computed a token, lowest first."""
        counts = [count for text in self.texts for count in text.layers]
        left = {count for count in counts if count != NOT_READ}  # with exits, after any layer
        return [
            Level(layers, counts.count(layers), sum(count >= layers for count in counts))
            for layers in sorted({*self.reduction_layers, *left, self.num_layers})
        ]

    def facts(self) -> list[tuple[str, str]]:
        """The result and the numbers of tokens, as names and values."""
        tokens = f"{self.num_tokens:,} in {self.num_windows:,} window{'s' * (self.num_windows != 1)}"
        if self.reduction_layers:
            tokens += "; kept " + ", then ".join(f"{count:,}" for count in self.kept_tokens)
        return [*((name.replace("_", " "), plain(value)) for name, value in self.outcome.items()), ("tokens", tokens)]

    def to_text(self) -> str:
        """The document for a terminal, with the tokens that all layers computed in [brackets]."""
        lines = [f"{name:13} {value}" for name, value in self.facts()]
        lines += [
            f"{'' if i else 'computed by':13} {layers} of {self.num_layers} layers: {tokens:,} tokens"
            for i, (layers, tokens, _) in enumerate(self.levels)
        ]
        for text in self.texts:
            lines += [
                f"{'' if i else 'found':13} {' '.join(text.text[start:end].split())} ({label})"
                for i, (start, end, label) in enumerate(text.entities[:_MOST_ENTITIES])
            ]
            if (more := len(text.entities) - _MOST_ENTITIES) > 0:
                lines.append(f"{'':13} … and {more:,} more")
            lines += ["", f"{text.name} ([computed by all layers]):"]
            lines.append(
                "".join(_bracketed(run.text) if run.layers == self.num_layers else run.text for run in text.runs())
            )
            if text.left_out:
                lines.append(f"… and {text.left_out:,} more characters")
        return printable("\n".join(lines))

    def __str__(self) -> str:
        return self.to_text()

    def to_html(self, title: str = "Surviving tokens") -> str:
        """A page of its own, without references to other files."""
        return templates().get_template("explanation_page.html").render(explanation=self, title=title)

    def _repr_html_(self) -> str:
        macros: Any = templates().get_template("explanation.html").module
        # Radio buttons of one name exclude each other, and a notebook may show several explanations.
        return str(macros.style()) + str(macros.shown(self, f"tokens-{secrets.token_hex(4)}"))


@functools.cache
def templates(*directories: Path) -> "Environment":
    """The HTML templates of this package, and of further directories. Values are escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    places = [*directories, Path(__file__).parent / "templates"]
    return Environment(
        loader=FileSystemLoader(places),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _bracketed(text: str) -> str:
    """Brackets around a text, inside of white space at its ends."""
    inner = text.strip()
    return text.replace(inner, f"[{inner}]", 1) if inner else text


def plain(value: Any) -> str:
    """A value of a result column as text. Entities and tags are counted."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {plain(each)}" for name, each in value.items())
    if isinstance(value, list) and value and all(isinstance(each, dict) and _LABELS & each.keys() for each in value):
        counted = Counter(next(each[name] for name in each if name in _LABELS) for each in value)
        return ", ".join(f"{label} {count:,}" for label, count in counted.most_common())
    if isinstance(value, list):
        return ", ".join(plain(each) for each in value) or "none"
    return "none" if value is None else str(value)
