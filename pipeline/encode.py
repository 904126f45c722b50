"""Shards → encoded splits: read each row group once, cut splits by text bytes, put bad rows aside, tokenise.

Every split becomes one row of the Ray Data pipeline (`rows.py`).
"""

import contextlib
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .corpus import Shard
from .documents import to_column
from .errors import ShardError, StorageError
from .ledger import DEATHS_OF_A_DOCUMENT, KILLED, NO_LEDGER, WHOLE, Care, Entry, LedgerClient
from .report import SplitStats
from .rows import error_table, split_table, stopped_table, to_ipc
from .storage import Storage

logger = logging.getLogger(__name__)

_GROUPS = 1000
_GROUP_BYTES = 512 << 20  # a reader that dies begins its group anew

REJECTED_SCHEMA = pa.schema(
    [("shard", pa.string()), ("row", pa.int64()), ("id", pa.string()), ("reason", pa.string()), ("detail", pa.string())]
)


@dataclass(frozen=True)
class EncodeOptions:
    """What the readers need to know of a run; pickles without credentials.

    task: the model's, as the driver has made it: readers need neither the model nor torch and transformers.
    """

    input: Storage
    task: Any
    text_columns: tuple[str, ...]  # the text's, or the question's and the context's
    id_column: str | None
    keep_columns: tuple[str, ...]
    split_bytes: int

    @property
    def passed_columns(self) -> list[str]:
        """Columns that go from the input to the results as they are."""
        return [*([self.id_column] if self.id_column else []), *self.keep_columns]


@dataclass
class RawSplit:
    """Consecutive rows of a shard: the good ones' texts, by text column, and passed columns; and the rejected ones."""

    index: int
    rows: int = 0
    text_bytes: int = 0
    row_numbers: list[int] = field(default_factory=list)
    texts: list[tuple[str, ...]] = field(default_factory=list)
    passed: list[pa.RecordBatch] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)


def read_shards(batch: pa.Table, options: EncodeOptions, ledger: LedgerClient = NO_LEDGER) -> Iterator[pa.Table]:
    """Ray Data stage: one row a group of shards (`shard_groups`) → one row a split, done splits left out."""
    for group in batch.to_pylist():
        for *what, done in json.loads(group["shards"]):
            shard = Shard(*what)
            try:
                with ledger.work(f"reading {shard.path} {shard.version}") as entry:
                    if entry.stop:
                        yield stopped_table(_base_row(shard, 0, 0))
                        return
                    yield from encode_shard(shard, frozenset(done), options, entry)
            except Exception as error:
                # A stage that raises would end the run for one shard's sake, one that yields nothing would lose it.
                logger.exception("shard %s cannot be encoded", shard.path)
                yield error_table(_base_row(shard, 0, 0), error)


def shard_groups(pending: list[tuple[Shard, frozenset[int]]]) -> list[dict[str, str]]:
    """Shards to score, with the indices of their splits that are there already, as rows for `read_shards`.

    Ray Data takes 2 to 3 ms to build a block of its source and more to start a task, so where there are thousands of
    shards they share some; large ones have their own. The largest come first, so that the run does not end on one
    actor.
    """
    groups: list[list[Any]] = []
    room, most = 0, -(-len(pending) // _GROUPS)
    for shard, done in sorted(pending, key=lambda item: (-item[0].size, item[0].path)):
        if not groups or room < shard.size or len(groups[-1]) == most:
            groups.append([])
            room = _GROUP_BYTES
        groups[-1].append([shard.path, shard.version, shard.size, sorted(done)])
        room -= shard.size
    return [{"shards": json.dumps(group)} for group in groups]


def encode_shard(shard: Shard, done: frozenset[int], options: EncodeOptions, entry: Entry) -> Iterator[pa.Table]:
    """A shard's splits, encoded; if it cannot be read (further), a last row with `error`: of index -1 if the shard
    itself is at fault, of the next split's index if its storage is, which another run may find working.

    The last split that has work is held back until the shard is read to its end, so that it can say how many there
    are; a shard without one yields a row of index -1 instead.
    """
    held: dict[str, Any] | None = None
    shard_rows, count, skipped = 0, 0, 0
    started, retries = time.perf_counter(), options.input.retries
    try:
        if WHOLE in entry.care.killers:
            raise ShardError(f"reading it killed its process {entry.care.deaths} times")
        entry.touch(WHOLE)
        with options.input.errors("read", shard.path):
            for split, shard_rows in cut_splits(shard, options):
                if entry.client.stopping():
                    yield stopped_table(_base_row(shard, shard_rows, split.index))
                    return
                count = split.index + 1
                if split.index in done:
                    skipped += split.rows
                else:
                    if held is not None:
                        entry.touch(None)  # it waits there until the actors want more
                        yield split_table(held)
                    stats = SplitStats(
                        text_bytes=split.text_bytes,
                        read_seconds=time.perf_counter() - started,
                        storage_retries=options.input.retries - retries,
                    )
                    held = _encode(split, shard, shard_rows, options, stats, entry) | {"skipped_rows": skipped}
                    skipped, retries = 0, options.input.retries
                started = time.perf_counter()
                entry.touch(WHOLE)
        if options.input.version(shard.path) != shard.version:
            raise _changed(shard)
    except (ShardError, StorageError, pa.ArrowException) as error:
        if held is not None:
            yield split_table(held)
        at_fault = -1 if _is_damage(error) else count
        yield error_table(_base_row(shard, shard_rows, at_fault), error)
        return
    entry.touch(None)
    last = held or _base_row(shard, shard_rows, -1)
    yield split_table(last | {"num_splits": count, "skipped_rows": last["skipped_rows"] + skipped})


def cut_splits(shard: Shard, options: EncodeOptions) -> Iterator[tuple[RawSplit, int]]:
    """A shard's rows in splits of at least `split_bytes` text bytes (the last one less), with the shard's row count.

    Where splits are cut depends on nothing but the shard and `split_bytes`: a rerun cuts the same ones.

    Raises:
        ShardError: not Parquet, or a column missing.
        StorageError: changed since it was listed.
    """
    with options.input.open(shard.path) as file:
        try:
            parquet = pq.ParquetFile(file, page_checksum_verification=True)
        except (pa.ArrowException, OSError) as error:
            if not _is_damage(error):
                raise
            raise ShardError(f"not a readable Parquet file: {error}") from error
        if options.input.version(shard.path) != shard.version:
            raise _changed(shard)
        columns = [*options.text_columns, *options.passed_columns]
        names = parquet.schema_arrow.names
        if missing := [column for column in dict.fromkeys(columns) if column not in names]:
            raise ShardError(
                f"no column {', '.join(map(repr, missing))}; its columns are {', '.join(map(repr, names))}"
            )
        if twice := [column for column in dict.fromkeys(columns) if names.count(column) > 1]:
            raise ShardError(f"column {', '.join(map(repr, twice))} is there {names.count(twice[0])} times")
        rows = parquet.metadata.num_rows
        split, row = RawSplit(0), 0
        for batch in parquet.iter_batches(batch_size=_batch_rows(parquet, options), columns=columns):
            columns_of_text = [
                (name, batch.column(name), _as_binary(batch.column(name))) for name in options.text_columns
            ]
            passed = batch.select(options.passed_columns)
            start = 0
            for i in range(batch.num_rows):
                size, text, reason, detail = _row_text(columns_of_text, i)
                if text is None:
                    identifier = passed.column(0)[i] if options.id_column else None
                    split.rejected.append(_rejected_row(shard.path, row, identifier, reason, detail))
                    split.passed.append(passed.slice(start, i - start))
                    start = i + 1
                else:
                    split.row_numbers.append(row)
                    split.texts.append(text)
                row, split.rows, split.text_bytes = row + 1, split.rows + 1, split.text_bytes + size
                if split.text_bytes >= options.split_bytes:
                    split.passed.append(passed.slice(start, i + 1 - start))
                    start = i + 1
                    yield split, rows
                    split = RawSplit(split.index + 1)
            split.passed.append(passed.slice(start))
        if row != rows:
            raise ShardError(f"it has {row} rows where its footer says {rows}")
        if split.rows:
            yield split, rows


def _row_text(columns: list[tuple[str, pa.Array, pa.Array | None]], i: int) -> tuple[int, tuple | None, str, str]:
    """A row's bytes of text and its texts; or None for them, with the reason why they cannot be scored.

    columns: names, columns as they came, and as binary ones if they hold text.
    """
    size, texts, refused = 0, [], ("", "")
    for name, column, binary in columns:
        what = name if len(columns) > 1 else "text"
        if binary is not None or not column[i].is_valid:
            raw = binary[i].as_py() if binary is not None else None
            size += len(raw) if raw is not None else 0
            text, *why = check_text(raw, what)
        else:
            text, *why = None, "wrong_type", f"the {what} is of type {column[i].type}"
        if text is None:
            refused = refused if any(refused) else (why[0], why[1])
        else:
            texts.append(text)
    return size, None if any(refused) else tuple(texts), *refused


def _changed(shard: Shard) -> StorageError:
    return StorageError(f"{shard.path}: it changed after it was listed; the next run will score the new version")


def _is_damage(error: BaseException | None) -> bool:
    """Whether a shard's content is at fault, and not its storage. pyarrow reports damage as its own exceptions or as
    a bare OSError without a number; what file systems and networks raise is more specific."""
    if isinstance(error, StorageError):
        error = error.__cause__
    kinds = (ShardError, pa.ArrowException, UnicodeDecodeError)  # the last one of column names
    return isinstance(error, kinds) or (type(error) is OSError and error.errno is None)


def _batch_rows(parquet: pq.ParquetFile, options: EncodeOptions) -> int:
    """Rows to decode at a time, so that a batch of long documents is about a split and not a row group."""
    metadata = parquet.metadata
    total = sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
    mean = total / max(metadata.num_rows, 1)
    return max(1, min(4096, int(options.split_bytes / max(mean, 1))))


def _as_binary(column: pa.Array) -> pa.Array | None:
    """A text-like column as large_binary, unvalidated; None for other types."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind):
        return column.cast(pa.large_binary())
    if pa.types.is_large_binary(kind):
        return column
    if pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):
        return pc.cast(pc.cast(column, pa.binary_view()), pa.large_binary())
    return None


def check_text(value: Any, what: str = "text") -> tuple[str | None, str, str]:
    """A document's text from a str, bytes or None; or None with the reason it cannot be scored, and the detail.

    what: its column's name, where there are several.
    """
    if value is None:
        return None, "null", f"the {what} is null"
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            return None, "undecodable", f"byte {error.start} of the {what} is not UTF-8: {error.reason}"
    if not isinstance(value, str):
        return None, "wrong_type", f"the {what} is of type {type(value).__name__}"
    if not value.strip():
        return None, "empty", f"the {what} is empty or white space"
    return value, "", ""


def killed_row(shard: str, row: int, identifier: pa.Scalar | None, what: str, care: Care) -> dict[str, Any]:
    """The quarantined row of a document that killed the processes that touched it."""
    times = f"{DEATHS_OF_A_DOCUMENT} times, of {care.deaths} deaths at its shard or split"
    detail = f"{what} it killed its process {times}"
    return _rejected_row(shard, row, identifier, KILLED, detail)


def rejected_table(rows: list[dict[str, Any]]) -> pa.Table:
    """Quarantined rows in their order."""
    return pa.Table.from_pylist(sorted(rows, key=lambda row: row["row"]), schema=REJECTED_SCHEMA)


def _rejected_row(shard: str, row: int, identifier: pa.Scalar | None, reason: str, detail: str) -> dict[str, Any]:
    name = None
    if identifier is not None and identifier.is_valid:
        try:
            name = str(identifier.as_py())
        except (ValueError, OverflowError):  # not UTF-8, or beyond Python's calendar
            name = _raw(identifier)
    return {"shard": shard, "row": row, "id": name, "reason": reason, "detail": detail}


def _raw(value: pa.Scalar) -> str:
    """A value that Python cannot hold, as bytes or as the number that it is stored as."""
    for kind in (pa.large_binary(), pa.int64()):
        with contextlib.suppress(pa.ArrowException):
            return repr(value.cast(kind).as_py())
    return f"a {value.type}"


def _encode(
    split: RawSplit,
    shard: Shard,
    shard_rows: int,
    options: EncodeOptions,
    stats: SplitStats,
    entry: Entry,
) -> dict[str, Any]:
    """Tokenise a split. A text that the tokenizer finds nothing in is rejected too, and one that kills it."""
    started, task = time.perf_counter(), options.task
    encoded = task.encode_rows(split.texts) if not entry.care.one_at_a_time else _encode_each(split, task, entry)
    # Without passed columns a record batch holds no rows, so the table is built from the row numbers up.
    documents = pa.table({"row": pa.array(split.row_numbers, pa.int64())})
    if options.passed_columns:
        passed = pa.Table.from_batches(split.passed)
        for name in dict.fromkeys(options.passed_columns):
            documents = documents.append_column(name, _plain(passed[name]))
    documents = documents.append_column("document", to_column(encoded))
    problems = [task.problem(document) for document in encoded]
    for position, problem in enumerate(problems):
        if problem is None:
            continue
        identifier = documents[options.id_column][position] if options.id_column else None
        row = split.row_numbers[position]
        if row in entry.care.killers:
            split.rejected.append(killed_row(shard.path, row, identifier, "tokenising", entry.care))
        else:
            split.rejected.append(_rejected_row(shard.path, row, identifier, *problem))
    documents = documents.filter(pa.array([problem is None for problem in problems], pa.bool_()))
    rejected = rejected_table(split.rejected)
    stats.count_bad(split.rejected)
    stats.tokenize_seconds = time.perf_counter() - started
    return _base_row(shard, shard_rows, split.index) | {
        "rows": split.rows,
        "payload": to_ipc(documents),
        "rejected": to_ipc(rejected),
        "stats": stats.to_json(),
    }


def _encode_each(split: RawSplit, task: Any, entry: Entry) -> list[Any]:
    """One row after the other, so that one that kills is found; nothing for those that have."""
    encoded = []
    for row, texts in zip(split.row_numbers, split.texts):
        if row in entry.care.killers:
            encoded += task.encode_rows([("",) * len(texts)])
        else:
            entry.touch(row)
            encoded += task.encode_rows([texts])
    entry.touch(WHOLE)
    return encoded


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Dictionaries decoded; views, large strings and columns of nothing but null (of no type, as pandas writes
    them) as strings: so that all shards' results have one schema whichever way a shard stores the same values."""
    if pa.types.is_dictionary(column.type):
        column = pa.chunked_array([chunk.dictionary_decode() for chunk in column.chunks], column.type.value_type)
    kind = column.type
    if pa.types.is_string_view(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind):
        return column.cast(pa.string())
    if pa.types.is_binary_view(kind):
        return column.cast(pa.binary())
    return column


def _base_row(shard: Shard, shard_rows: int, index: int) -> dict[str, Any]:
    return {
        "shard": shard.path,
        "version": shard.version,
        "size": shard.size,
        "shard_rows": shard_rows,
        "index": index,
        "rows": 0,
        "skipped_rows": 0,
        "stats": SplitStats().to_json(),
    }
