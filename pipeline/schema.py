"""The one type that each kept column has in an output, whatever types the shards store it as.

A run settles the types before it writes its first object, from the footers of the shards it is to score, and records
them in the output. Later runs keep to them and read no footers. A type is widened only if no value changes by it; a
shard whose column cannot be brought to the output's type is unreadable.
"""

import base64
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .corpus import OBJECT_NAME, SCHEMA, Shard
from .errors import ShardError, StorageError
from .partitions import Partitions
from .storage import Storage, is_passing

ARROW_SCHEMA = b"ARROW:schema"

_AT_ONCE = 64  # footers
_BETWEEN_CHECKS = 1024
_TAIL_BYTES = 64 << 10  # most footers are smaller; a larger one takes a second request
_DIGITS = {8: 3, 16: 5, 32: 10, 64: 20}  # of an integer with this many bits
_MOST_DIGITS = 38  # of a decimal that DuckDB and Spark can read

NO_PARTITIONS = Partitions()

Types = Mapping[str, pa.DataType]  # by column name


@dataclass
class Settled:
    """What the footers of shards say about the types of some columns.

    Attributes:
        types: by column, the type that all shards can be brought to except for those in `conflicts`; the type null if
            the column holds nothing but nulls. Columns that no readable shard has are left out.
        conflicts: by path, why a shard cannot be brought to these types.
    """

    types: dict[str, pa.DataType] = field(default_factory=dict)
    conflicts: dict[str, str] = field(default_factory=dict)


def open_parquet(source: Any, **options: Any) -> pq.ParquetFile:
    """Open a Parquet file, INT96 timestamps in microseconds, as DuckDB and Spark read them.

    By default, pyarrow reads them in nanoseconds, in which dates after 2262 silently become others. They stay
    nanoseconds if the file's own Arrow schema says that they were.

    Raises:
        pa.ArrowException, OSError: the file is damaged or cannot be read.
    """
    options["arrow_extensions_enabled"] = True  # UUID and JSON columns keep their logical types
    parquet = pq.ParquetFile(source, **options)
    columns = [parquet.schema.column(i) for i in range(len(parquet.schema))]
    if not any(column.physical_type == "INT96" for column in columns) or "ns" in map(_unit, _stored(parquet).values()):
        return parquet
    return pq.ParquetFile(source, coerce_int96_timestamp_unit="us", **options | {"metadata": parquet.metadata})


@dataclass(frozen=True)
class Column:
    """A column of a file: its type, and whether the footer says that it holds no values, only nulls or no rows."""

    type: pa.DataType
    is_empty: bool


def columns_of(parquet: pq.ParquetFile, names: Iterable[str]) -> dict[str, Column]:
    """The columns with these names that a file has, with their Parquet types where pyarrow reads them as others."""
    types = dict(zip(parquet.schema_arrow.names, parquet.schema_arrow.types))
    columns = {name: Column(types[name], parquet.metadata.num_rows == 0) for name in names if name in types}
    for i in range(len(parquet.schema)):
        leaf = parquet.schema.column(i)
        if (name := leaf.path) not in columns or pa.types.is_nested(types[name]):
            continue
        kind = types[name]
        if leaf.logical_type.type == "ENUM":  # read as binary
            kind = pa.string()
        elif leaf.physical_type == "INT96":  # read without its time zone, if not in nanoseconds
            kind = pa.timestamp(kind.unit, getattr(_stored(parquet).get(name), "tz", None))
        chunks = (parquet.metadata.row_group(group).column(i) for group in range(parquet.num_row_groups))
        columns[name] = Column(kind, all(_is_null(chunk) for chunk in chunks))
    return columns


def _is_null(chunk: pq.ColumnChunkMetaData) -> bool:
    """Whether a flat column's chunk is known to hold nothing but nulls."""
    statistics = chunk.statistics
    return chunk.num_values == 0 or (
        statistics is not None and statistics.has_null_count and statistics.null_count == chunk.num_values
    )


def _stored(parquet: pq.ParquetFile) -> dict[str, pa.DataType]:
    """The types in the Arrow schema that pyarrow stores in the footers it writes; empty if there is none."""
    stored = (parquet.metadata.metadata or {}).get(ARROW_SCHEMA)
    schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(stored))) if stored else pa.schema([])
    return dict(zip(schema.names, schema.types))


def _unit(kind: pa.DataType) -> str | None:
    return kind.unit if pa.types.is_timestamp(kind) else None


def plain(kind: pa.DataType) -> pa.DataType:
    """The type as which an output stores values of this type.

    Dictionaries become their values' type; large types and views become plain strings, binaries and lists; all fields
    may be null. Their values are the same, and not every reader tells such types apart.
    """
    types = pa.types
    if types.is_dictionary(kind):
        return plain(kind.value_type)
    if types.is_large_string(kind) or types.is_string_view(kind):
        return pa.string()
    if types.is_large_binary(kind) or types.is_binary_view(kind):
        return pa.binary()
    if types.is_fixed_size_list(kind):
        return pa.list_(plain(kind.value_type), kind.list_size)
    if _is_list(kind):
        return pa.list_(plain(kind.value_type))
    if types.is_struct(kind):
        return pa.struct([(child.name, plain(child.type)) for child in kind.fields])
    if types.is_map(kind):
        return pa.map_(plain(kind.key_type), plain(kind.item_type))
    if types.is_decimal(kind) and kind.precision <= _MOST_DIGITS:
        return pa.decimal128(kind.precision, kind.scale)
    return kind


def _is_list(kind: pa.DataType) -> bool:
    types = pa.types
    return (
        types.is_list(kind)
        or types.is_large_list(kind)
        or types.is_list_view(kind)
        or types.is_large_list_view(kind)
        or types.is_fixed_size_list(kind)
    )


def widened(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """The narrowest type that can hold the values of two plain types; None if there is none.

    Integers become floats only by a cast that fails at a value that the float cannot hold. Decimals never become
    floats, and timestamps with and without time zone stay apart.
    """
    types = pa.types
    if one == other or types.is_null(other):
        return one
    if types.is_null(one):
        return other
    if isinstance(one, pa.BaseExtensionType) or isinstance(other, pa.BaseExtensionType):
        return widened(getattr(one, "storage_type", one), getattr(other, "storage_type", other))
    if types.is_struct(one) and types.is_struct(other):
        fields = {child.name: child.type for child in one.fields}
        for child in other.fields:
            fields[child.name] = widened(fields.get(child.name, pa.null()), child.type)
        return None if None in fields.values() else pa.struct(list(fields.items()))
    if types.is_map(one) and types.is_map(other):
        key, item = widened(one.key_type, other.key_type), widened(one.item_type, other.item_type)
        return None if key is None or item is None else pa.map_(key, item)
    if _is_list(one) and _is_list(other):
        value = widened(one.value_type, other.value_type)
        return None if value is None else pa.list_(value)
    if types.is_timestamp(one) and types.is_timestamp(other) and one.tz and other.tz:
        tz = one.tz if one.tz == other.tz else "UTC"  # the instants are the same
        one, other = pa.timestamp(one.unit, tz), pa.timestamp(other.unit, tz)
    if types.is_decimal(one) or types.is_decimal(other):
        one, other = (pa.decimal128(_DIGITS[k.bit_width], 0) if types.is_integer(k) else k for k in (one, other))
        if not (types.is_decimal(one) and types.is_decimal(other)):
            return None
    try:
        pair = [pa.schema([("", kind)]) for kind in (one, other)]
        wide = pa.unify_schemas(pair, promote_options="permissive").field(0).type
    except (pa.ArrowTypeError, pa.ArrowInvalid):
        return None
    if types.is_decimal(wide) and wide.precision > max(_MOST_DIGITS, one.precision, other.precision):
        return None
    return wide


def common_type(counts: Counter[pa.DataType]) -> pa.DataType | None:
    """The type that the most frequent of these plain types and all that go with it can be brought to."""
    common = None
    for kind, _ in counts.most_common():
        wide = kind if common is None else widened(common, kind)
        if wide is not None and not _differ_by_case(wide):
            common = wide
    return common


def target_types(columns: Mapping[str, Column], known: Types) -> dict[str, pa.DataType]:
    """The types to bring a shard's columns to.

    Args:
        known: the output's types; a column that has none gets the plain type of its own, or string if it is null.

    Raises:
        ShardError: a column cannot be brought to the output's type; names the column and both types.
    """
    targets = {}
    for name, column in columns.items():
        source = plain(column.type)
        target = known.get(name, source)
        wide = widened(target, source)
        what = f"column {name!r} is {shown(column.type)}"
        if twice := _differ_by_case(source):
            raise ShardError(f"{what}, whose fields {twice} differ only by case: Spark and DuckDB cannot read both")
        if column.is_empty or pa.types.is_null(target):
            wide = target if not pa.types.is_null(target) else source
        elif wide is None:
            raise ShardError(
                f"{what}, which cannot become {shown(target)}, its type in this output; "
                "convert it in the shard, or do not keep the column"
            )
        elif wide != target:
            raise ShardError(
                f"{what}, which is wider than {shown(target)}, its type in this output; "
                "convert it in the shard, do not keep the column, or score all shards anew with --overwrite"
            )
        targets[name] = wide
    return strings_for_nulls(targets)


def cast_columns(batch: pa.RecordBatch, columns: Mapping[str, Column], targets: Types) -> pa.RecordBatch:
    """Cast a shard's columns to the types that `target_types` gave.

    Args:
        batch: rows of the shard, perhaps with more columns.
        columns: the columns in the shard, for messages.

    Raises:
        ShardError: a value does not fit; names the column and both types.
    """
    if not targets:
        return batch.select([])
    cast = []
    for name, target in targets.items():
        values = batch.column(name)
        if values.null_count == len(values):
            values = pa.nulls(len(values), target)
        elif values.type != target:
            try:
                values = values.cast(target)
            except pa.ArrowException as error:
                what = f"column {name!r} is {shown(columns[name].type)}"
                raise ShardError(
                    f"{what} and holds a value that does not fit {shown(target)}, its type in this output: {error}"
                ) from error
        cast.append(values)
    return pa.RecordBatch.from_arrays(cast, schema=pa.schema(list(targets.items())))


def shown(kind: pa.DataType) -> str:
    """A type as text, without the details of extension types."""
    return kind.extension_name if isinstance(kind, pa.BaseExtensionType) else str(kind)


def _differ_by_case(kind: pa.DataType) -> list[str]:
    """Names of fields anywhere in a type that differ only by case from others of the same struct."""
    if pa.types.is_struct(kind):
        names = [child.name for child in kind.fields]
        if twice := same_but_for_case(names):
            return twice
    children = [kind.field(i).type for i in range(kind.num_fields)]
    return next((twice for child in children if (twice := _differ_by_case(child))), [])


def same_but_for_case(names: Iterable[str]) -> list[str]:
    """Those of these names that differ only by case from another one, sorted."""
    alike = defaultdict(set)
    for name in names:
        alike[name.lower()].add(name)
    return sorted(name for group in alike.values() if len(group) > 1 for name in group)


def settle_types(
    input: Storage,
    shards: Sequence[Shard],
    columns: Sequence[str],
    known: Types,
    partitions: Partitions = NO_PARTITIONS,
    check: Callable[[], None] = lambda: None,
) -> Settled:
    """Settle the types of columns from the footers of shards.

    If a column's types have no common one, those that most shards have decide, together with all that go with them.
    Shards in which a column holds no values do not count, unless no shard has any. Shards that cannot be read are left
    to the readers, which report them.

    Args:
        known: types that the output has already, which are not widened.
        partitions: the partition columns among them.
        check: called between requests; raises if the run should stop.

    Raises:
        StorageError: the input's storage does not answer.
    """
    settled = Settled(dict(known))
    if not columns:
        return settled
    filled, empty = ({name: Counter[pa.DataType]() for name in columns} for _ in range(2))
    paths: dict[tuple, list[str]] = defaultdict(list)  # of the shards, by their columns
    for shard, found in _read_columns(input, shards, columns, partitions.typed(known), check):
        paths[tuple(found.items())].append(shard.path)
        for name, column in found.items():
            if not _differ_by_case(column.type):
                (empty if column.is_empty else filled)[name][plain(column.type)] += 1
    for name in columns:
        if name not in known and (kind := common_type(filled[name]) or common_type(empty[name])) is not None:
            settled.types[name] = kind
    for group, of_group in paths.items():
        try:
            target_types(dict(group), settled.types)
        except ShardError as error:
            settled.conflicts |= dict.fromkeys(of_group, str(error))
    return settled


def _read_columns(
    input: Storage,
    shards: Sequence[Shard],
    names: Sequence[str],
    partitions: Partitions,
    check: Callable[[], None],
) -> Iterator[tuple[Shard, dict[str, Column]]]:
    """Read the shards' columns from their footers, in the given order. Shards that cannot be read are left out."""

    def read(shard: Shard) -> dict[str, Column] | None:
        try:
            tail = input.read_range(shard.path, max(0, shard.size - _TAIL_BYTES), shard.size)
            length = 8 + int.from_bytes(tail[-8:-4], "little")  # of the footer, its length and "PAR1"
            if len(tail) < length <= shard.size:
                tail = input.read_range(shard.path, shard.size - length, shard.size)
            parquet = open_parquet(pa.BufferReader(b"PAR1" + tail[-length:]))
            values = partitions.scalars(shard.partition, parquet.schema_arrow.names)
            partition = {
                name: Column(value.type, not value.is_valid) for name, value in values.items() if name in names
            }
            return columns_of(parquet, names) | partition
        except StorageError as error:
            if error.__cause__ is not None and is_passing(error.__cause__):
                raise
        except (pa.ArrowException, OSError, ValueError):
            pass
        return None

    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="footer") as pool:
        for start in range(0, len(shards), _BETWEEN_CHECKS):
            check()
            some = shards[start : start + _BETWEEN_CHECKS]
            for shard, found in zip(some, pool.map(read, some)):
                if found is not None:
                    yield shard, found


def settle_output(
    output: Storage,
    input: Storage,
    shards: Sequence[Shard],
    columns: Sequence[str],
    partitions: Partitions = NO_PARTITIONS,
    check: Callable[[], None] = lambda: None,
) -> Types:
    """The types of an output's kept columns: as recorded; those that are not, from `shards`, and record them.

    An output of an older version records none: its objects have them. Columns that hold nothing but nulls are strings.

    Args:
        shards: the shards that the run is to score.
        partitions, check: as for `settle_types`.

    Raises:
        StorageError: the input or the output cannot be read, or the output cannot be written.
    """
    recorded = recorded_types(output)
    types = known_types(output, columns, check)
    if missing := [name for name in columns if name not in types]:
        settled = settle_types(input, shards, missing, {}, partitions, check).types
        types |= strings_for_nulls(settled)
    if types != recorded:
        record_types(output, types)
    return types


def strings_for_nulls(types: Types) -> dict[str, pa.DataType]:
    """The types of columns as they are written: those that hold nothing but nulls are strings."""
    return {name: pa.string() if pa.types.is_null(kind) else kind for name, kind in types.items()}


def known_types(
    output: Storage, columns: Sequence[str], check: Callable[[], None] = lambda: None
) -> dict[str, pa.DataType]:
    """The types of an output's kept columns: as recorded, or as its objects have them if it is of an older version."""
    if not columns or (recorded := recorded_types(output)):
        return recorded if columns else {}
    files = [file for file in output.files() if "/" not in file.path and file.path.endswith(".parquet")]
    objects = [Shard(file.path, file.version, file.size) for file in files if OBJECT_NAME.match(file.path)]
    return settle_types(output, objects, columns, {}, check=check).types


def is_outgrown(
    output: Storage,
    input: Storage,
    shards: Sequence[Shard],
    columns: Sequence[str],
    partitions: Partitions = NO_PARTITIONS,
    check: Callable[[], None] = lambda: None,
) -> bool:
    """Whether the shards' columns would have other types in a new output than the recorded ones, which are narrower."""
    if not (recorded := recorded_types(output)):
        return False
    types = settle_types(input, shards, columns, {}, partitions, check).types
    return any(widened(recorded[name], kind) != recorded[name] for name, kind in types.items() if name in recorded)


def recorded_types(output: Storage) -> dict[str, pa.DataType]:
    """The types of the kept columns that an output records; empty if it is new or of an older version.

    Raises:
        StorageError: they are damaged or cannot be read.
    """
    data = output.read_if_there(SCHEMA)
    if data is None:
        return {}
    try:
        schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(json.loads(data)["arrow"])))
    except (ValueError, KeyError, TypeError, pa.ArrowException, OSError) as error:
        raise StorageError(f"{output.uri}/{SCHEMA}: damaged: {error}") from error
    return dict(zip(schema.names, schema.types))


def record_types(output: Storage, types: Types) -> None:
    """Record the types of an output's kept columns: for people, and as an Arrow schema for later runs."""
    schema = pa.schema(list(types.items()))
    values = {
        "columns": {name: shown(kind) for name, kind in types.items()},
        "arrow": base64.b64encode(schema.serialize()).decode(),
    }
    output.write(SCHEMA, json.dumps(values, indent=1).encode())
