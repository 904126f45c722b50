"""Partition columns, whose values are in the names of a corpus's folders (`date=2026-01-01/`) or in a table's log."""

import datetime
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from urllib.parse import unquote

import pyarrow as pa

from .errors import ShardError, UsageError

NULL = "__HIVE_DEFAULT_PARTITION__"

Values = tuple[tuple[str, str | None], ...]  # names and values as text; None for null

_INTEGER = re.compile(r"-?[0-9]{1,19}")
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")


@dataclass(frozen=True)
class Partitions:
    """The partition columns of a corpus.

    Attributes:
        types: the type of each column, the same for all shards.
        outer: values in the names of the corpus's own directory and of those around it.
    """

    types: Mapping[str, pa.DataType] = field(default_factory=dict)
    outer: Values = ()

    def typed(self, types: Mapping[str, pa.DataType]) -> "Partitions":
        """The same columns with these types, as far as they are among them: an output keeps its types."""
        return replace(self, types={name: types.get(name, kind) for name, kind in self.types.items()})

    def scalars(self, values: Values, stored: Iterable[str]) -> dict[str, pa.Scalar]:
        """The partition columns of one shard.

        Args:
            values: those of the shard's path or of its table's log. They take precedence over the shard's own columns,
                as in Spark, pyarrow and DuckDB; `outer` does not.
            stored: the names of the shard's own columns.

        Raises:
            ShardError: a value is not of its column's type.
        """
        texts = {name: value for name, value in self.outer if name not in stored} | dict(values)
        scalars = {}
        for name, text in texts.items():
            try:
                scalars[name] = pa.scalar(text, pa.string()).cast(self.types[name])
            except pa.ArrowException as error:
                what = f"partition column {name!r} is {text!r} here"
                raise ShardError(f"{what}, which is not {self.types[name]}, its type in this output") from error
        return scalars


@lru_cache  # thousands of shards share a folder
def path_values(folder: str, columns: tuple[str, ...]) -> Values:
    """The values of these columns in the names of a path's folders, decoded.

    Raises:
        UsageError: a value is not UTF-8 once it is decoded.
    """
    found: dict[str, str | None] = {}
    for part in folder.split("/") if columns else ():
        name, equals, value = part.partition("=")
        if equals and (name := unquote(name)) in columns:
            try:
                found[name] = None if value == NULL else unquote(value, errors="strict")
            except UnicodeDecodeError as error:
                raise UsageError(f"{folder}: the value in {part!a} is not UTF-8; rename the folder") from error
    return tuple(found.items())


def partition_types(values: Iterable[Values]) -> dict[str, pa.DataType]:
    """The type of each column, from all of its values: int64, else date32, else string."""
    columns: dict[str, set[str]] = {}
    for row in values:
        for name, value in row:
            columns.setdefault(name, set()).update(() if value is None else (value,))
    return {name: _type(texts) for name, texts in columns.items()}


def _type(texts: set[str]) -> pa.DataType:
    if texts and all(_INTEGER.fullmatch(text) and -(2**63) <= int(text) < 2**63 for text in texts):
        return pa.int64()
    return pa.date32() if texts and all(_is_date(text) for text in texts) else pa.string()


def _is_date(text: str) -> bool:
    try:
        return _DATE.fullmatch(text) is not None and datetime.date.fromisoformat(text) is not None
    except ValueError:
        return False
