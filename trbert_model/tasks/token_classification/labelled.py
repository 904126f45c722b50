"""Words with their tags, for training and evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ...errors import InputError
from ...labelled import LabelledCorpus, WindowDataset, class_names, read_table, read_texts
from ...options import LabelledColumns
from ...scores import Scores
from ...terminal import get_logger
from ..base import DocumentResults
from .losses import IGNORED, WordLosses
from .metrics import Entity, entity_counts, entity_scores
from .tags import OUTSIDE
from .task import TokenClassificationTask
from .words import EncodedText, encode_words

logger = get_logger(__name__)

STARTS = "starts"
# Further names of the columns, where there is none of the given name: those of Hugging Face's examples and data sets.
_TAGS, _SPANS = "ner_tags", "entities"
# Names of a span's fields, as tools and data sets have them.
_START, _END = ("start", "start_char", "start_offset", "begin"), ("end", "end_char", "end_offset")
_LABEL = ("label", "type", "entity", "entity_type", "entity_group", "tag")

Span = tuple[int, int]  # start and end character


@dataclass(frozen=True)
class RawWords:
    """Texts with tags for words, or with labels for spans of characters.

    Attributes:
        texts: the documents.
        words: start and end character of each word of each text; None if labels are for spans.
        tags: each text's tags, one per word; names, or class ids if the file has no names for them, IGNORED if unknown.
        spans: each text's spans with their labels, sorted; None if there are words.
        class_names: names of the class ids, as the `datasets` library writes them into a file; empty if there are none.
    """

    uri: str
    texts: list[str]
    words: list[list[Span]] | None = None
    tags: list[list[str | int]] | None = None
    spans: list[list[tuple[int, int, str]]] | None = None
    class_names: tuple[str, ...] = ()

    @classmethod
    def read(cls, uri: str, columns: LabelledColumns) -> "RawWords":
        """Read Parquet files, with tokens and tags if they have both, else with texts and spans.

        Raises:
            InputError: a file cannot be read, columns are missing, or a row is wrong: tokens and tags of different
                number, a token that is not where it should be, spans that overlap or are outside of the text. The
                message names file and row.
        """
        tokens, text = columns.tokens_column, columns.text_column
        tag_names, span_names = (columns.tags_column, _TAGS), (columns.spans_column, _SPANS)
        table = read_table(uri, (), (tokens, text, STARTS, *tag_names, *span_names))
        tags, spans = (next((n for n in names if n in table.column_names), None) for names in (tag_names, span_names))
        if tokens in table.column_names and tags is not None:
            return cls._with_tags(uri, table, tokens, tags, text)
        if text in table.column_names and spans is not None:
            return cls._with_spans(uri, table, text, spans)
        raise InputError(
            f"{uri}: it needs columns {tokens!r} and {tag_names[0]!r} (or {_TAGS!r}), or {text!r} and "
            f"{span_names[0]!r} (or {_SPANS!r}); of these it has {table.column_names}"
        )

    @classmethod
    def _with_tags(cls, uri: str, table: pa.Table, tokens: str, tags: str, text: str) -> "RawWords":
        names = class_names(table.schema, tags)
        nothing = [None] * table.num_rows
        given = [table[tokens].to_pylist(), table[tags].to_pylist()]
        placed = {text, STARTS} <= set(table.column_names)
        given += [table[text].to_pylist(), table[STARTS].to_pylist()] if placed else [nothing, nothing]
        found: list[tuple[str, list[Span], list[str | int]]] = []
        for row, (row_tokens, row_tags, row_text, starts) in enumerate(zip(*given)):
            try:
                where = _words(row_tokens, row_text, starts)
                found.append((*where, _tags(row_tags, row_tokens, names)))
            except (ValueError, TypeError) as error:
                raise InputError(f"{uri}, row {row}: {error}") from error
        texts, words, values = (list(each) for each in zip(*found))
        return cls(uri, texts, words, values, class_names=names)

    @classmethod
    def _with_spans(cls, uri: str, table: pa.Table, text: str, spans: str) -> "RawWords":
        if table[text].null_count:
            row = table[text].is_null().to_pylist().index(True)
            raise InputError(
                f"{uri}, row {row}: it has no {text!r}, as {table[text].null_count} rows; remove them first"
            )
        texts, found = read_texts(table, text, uri), []
        for row, (of_text, values) in enumerate(zip(texts, table[spans].to_pylist())):
            try:
                found.append(_spans(of_text, values))
            except (ValueError, TypeError) as error:
                raise InputError(f"{uri}, row {row}: {error}") from error
        return cls(uri, texts, spans=found)

    def names(self) -> list[str]:
        """The tags to learn: class names, or those that occur, sorted, and each I- of a B-, since spans may be longer.

        Raises:
            InputError: there is only one tag.
        """
        if self.spans is not None:
            types = sorted({label for of_text in self.spans for *_, label in of_text})
            names = [OUTSIDE, *(f"{prefix}-{kind}" for kind in types for prefix in "BI")]
        elif self.class_names:
            names = list(self.class_names)
        else:
            values = {tag for of_text in self.tags or () for tag in of_text} - {IGNORED}
            ids = [value for value in values if isinstance(value, int)]
            texts = {value for value in values if isinstance(value, str)}
            names = [*map(str, sorted(ids)), *sorted(texts | {f"I-{each[2:]}" for each in texts if each[:2] == "B-"})]
        if len(names) < 2:
            raise InputError(f"{self.uri}: it has fewer than two different tags")
        return names

    def indices(self, names: Sequence[str]) -> list[list[int]]:
        """Each text's tags, one per word, as indices in `names`.

        Class ids without names that are not all names of the model's labels are indices.

        Raises:
            InputError: a tag is not in `names`.
        """
        rows = self.tags or []
        values = {tag for row in rows for tag in row} - {IGNORED}
        index: dict[str | int, int] = {name: i for i, name in enumerate(names)}
        if values and all(isinstance(value, int) for value in values):
            named = {str(value) for value in values} <= set(names)
            index = {value: index[str(value)] for value in values} if named else {i: i for i in range(len(names))}
        if unknown := sorted(map(str, values - set(index))):
            raise InputError(f"{self.uri}: tags {unknown[:5]} are none of the model's: {list(names)[:5]}…")
        index[IGNORED] = IGNORED
        return [[index[tag] for tag in row] for row in rows]

    def span_indices(
        self, document: EncodedText, spans: Sequence[tuple[int, int, str]], names: Sequence[str]
    ) -> tuple[np.ndarray, int]:
        """The tags of a tokenised text's words, int64 (words,): a span's are those that overlap it.

        Returns:
            The tags, and the number of spans that do not begin and end with words.

        Raises:
            InputError: a label is none of the model's.
        """
        index = {name: i for i, name in enumerate(names)}
        tags = np.full(len(document.starts), index.get(OUTSIDE, IGNORED), np.int64)
        inexact, free = 0, 0
        for start, end, label in spans:
            begins, inside = (
                next((index[name] for name in choices if name in index), None)
                for choices in ((f"B-{label}", f"I-{label}", label), (f"I-{label}", f"B-{label}", label))
            )
            if begins is None or inside is None:
                raise InputError(f"{self.uri}: the label {label!r} is none of the model's: {list(names)[:5]}…")
            first = max(int(np.searchsorted(document.ends, start, side="right")), free)
            free = max(int(np.searchsorted(document.starts, end, side="left")), first)
            tags[first:free] = inside
            tags[first : min(first + 1, free)] = begins
            exact = first < free and (document.starts[first], document.ends[free - 1]) == (start, end)
            inexact += not exact
        return tags, inexact


def _words(tokens: Any, text: Any, starts: Any) -> tuple[str, list[Span]]:
    """A row's text and the characters of its words; without their starts, the words are joined by spaces."""
    if tokens is None or any(not isinstance(token, str) for token in tokens):
        raise ValueError("its tokens must be a list of strings, without nulls")
    if text is None or starts is None:
        ends = np.cumsum([len(token) + 1 for token in tokens], dtype=np.int64) - 1
        return " ".join(tokens), [(int(end) - len(token), int(end)) for token, end in zip(tokens, ends)]
    if not isinstance(text, str):
        raise ValueError("its text must be a string")
    if len(starts) != len(tokens):
        raise ValueError(f"it has {len(tokens)} tokens and {len(starts)} starts")
    spans, free = [], 0
    for number, (token, start) in enumerate(zip(tokens, starts)):
        if not isinstance(start, int) or start < free or not text.startswith(token, start):
            raise ValueError(f"token {number}, {token!r:.40}, is not at {start} of its text, after the token before it")
        free = start + len(token)
        spans.append((start, free))
    return text, spans


def _tags(tags: Any, tokens: Sequence[str], names: Sequence[str]) -> list[str | int]:
    if tags is None or len(tags) != len(tokens):
        raise ValueError(f"it has {len(tokens)} tokens and {'no' if tags is None else len(tags)} tags")
    found: list[str | int] = []
    for tag in tags:
        if not isinstance(tag, str | int) or isinstance(tag, bool):
            raise ValueError(f"the tag {tag!r} is neither a string nor a class id")
        if isinstance(tag, int) and names and tag != IGNORED:
            if not 0 <= tag < len(names):
                raise ValueError(f"there is no class {tag} in {list(names)[:5]}")
            tag = names[tag]
        found.append(tag)
    return found


def _spans(text: str, values: Any) -> list[tuple[int, int, str]]:
    """A row's spans, sorted."""
    if values is None:
        raise ValueError("it has no spans; an empty list says that a text has none")
    spans = []
    for value in values:
        if not isinstance(value, dict):
            raise ValueError(f"the span {value!r} must be a struct with start, end and label")
        start, end, label = (
            next((value[name] for name in names if value.get(name) is not None), None)
            for names in (_START, _END, _LABEL)
        )
        if not isinstance(start, int) or not isinstance(end, int) or label is None:
            raise ValueError(f"the span {value!r} needs a start, an end and a label")
        if not 0 <= start < end <= len(text):
            raise ValueError(f"the span {start} to {end} ({label}) is empty or outside of its {len(text)} characters")
        spans.append((start, end, str(label)))
    spans.sort()
    for (_, end, label), (start, other_end, other) in zip(spans, spans[1:]):
        if start < end:
            raise ValueError(f"the spans of {label} and {other} overlap, at {start} to {min(end, other_end)}")
    return spans


@dataclass(frozen=True)
class LabelledWords(LabelledCorpus):
    """Tokenised documents and the tags of their words.

    Attributes:
        documents: the documents.
        tags: int64 (words,) each, indices of tags, IGNORED if unknown.
        metric: "f1", of entities, if tags have prefixes (B-, I-); otherwise "accuracy", over words.
    """

    documents: list[EncodedText]
    tags: list[np.ndarray]
    task: TokenClassificationTask

    @property
    def metric(self) -> str:  # type: ignore[override]
        return "f1" if self.task.tag_set.has_prefixes else "accuracy"

    @classmethod
    def read(cls, uri: str, task: TokenClassificationTask, columns: LabelledColumns) -> "LabelledWords":
        """Read and tokenise labelled Parquet files.

        Words of the corpus for which the tokenizer has no token are left out.

        Raises:
            InputError: as in `RawWords.read`, or a tag is none of the model's.
        """
        raw, names = RawWords.read(uri, columns), task.tag_set.names
        if raw.words is not None:
            encoded = [encode_words(task.tokenizer, text, spans) for text, spans in zip(raw.texts, raw.words)]
            rows = zip(raw.indices(names), encoded)
            return cls([each for each, _ in encoded], [np.array(row, np.int64)[kept] for row, (_, kept) in rows], task)
        documents = task.encode(raw.texts)
        tags, inexact = [], 0
        for document, spans in zip(documents, raw.spans or []):
            of_document, count = raw.span_indices(document, spans, names)
            tags.append(of_document)
            inexact += count
        if inexact:
            logger.warning("%s: %d spans do not begin and end with words; all words they touch count", uri, inexact)
        return cls(documents, tags, task)

    def all_scores(self, results: DocumentResults) -> dict[str, Scores]:
        """As in `LabelledCorpus`, over all entities and words of the documents, as seqeval computes them."""
        scores = {}
        if self.task.tag_set.has_prefixes:
            scores = entity_scores(self._entity_counts(results))
        right, words = self._word_counts(results).T.astype(np.float64)
        return scores | {"accuracy": Scores(right, words)}

    def _pairs(self, results: DocumentResults) -> list[tuple[np.ndarray, np.ndarray]]:
        """Predicted and right tags of each document's words, without those that have no label."""
        return [
            (tagging.tags[tags != IGNORED], tags[tags != IGNORED]) for tagging, tags in zip(results.outputs, self.tags)
        ]

    def _entity_counts(self, results: DocumentResults) -> np.ndarray:
        """`entity_counts` of each document, int64 (documents, 3)."""
        found: list[tuple[list[Entity], ...]] = [
            tuple(self.task.tag_set.entities(tags) for tags in pair) for pair in self._pairs(results)
        ]
        return np.array([entity_counts(predicted, right) for predicted, right in found])

    def _word_counts(self, results: DocumentResults) -> np.ndarray:
        """Words with the right tag and all words of each document, int64 (documents, 2)."""
        return np.array(
            [((predicted == right).sum(), len(right)) for predicted, right in self._pairs(results)], np.int64
        )

    def dataset(self, classifier_input_weight: float = 0.0) -> "WordWindows":
        return WordWindows(self)


class WordWindows(WindowDataset):
    """Each window is an example, since it has tags of its own."""

    losses = WordLosses()

    def __init__(self, corpus: LabelledWords):
        super().__init__(corpus.documents, corpus.task)
        self.labels: list[np.ndarray] = []
        for tags, first, end in zip(corpus.tags, self.first_window, self.first_window[1:]):
            for window in self.windows[first:end]:
                labels = np.full(len(window.input_ids), IGNORED, np.int64)
                labels[window.heads] = tags[window.first_word : window.first_word + len(window.heads)]
                self.labels.append(labels)

    def __len__(self) -> int:
        return len(self.windows)

    def target(self, index: int) -> list[int]:
        return self.labels[index].tolist()

    def __getitem__(self, index: int) -> list[int]:
        return [index]

    def targets(self, examples: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        indices = [index for example in examples for index in example]
        answers = [np.zeros(len(self.windows[index].input_ids), bool) for index in indices]
        for mask, index in zip(answers, indices):
            mask[self.windows[index].heads] = True
        labels = np.concatenate([self.labels[index] for index in indices])
        return {"labels": torch.from_numpy(labels), "answers": torch.from_numpy(np.concatenate(answers))}
