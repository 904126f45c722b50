"""Read shards, divide them into splits by text bytes, quarantine bad rows and tokenise the others.

Each row group is read once. Every split becomes one row of the Ray Data pipeline (`rows.py`).
"""

import base64
import contextlib
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from trbert_model.tasks.base import Task
from trbert_model.terminal import get_logger

from .corpus import Shard
from .errors import ShardError, StorageError
from .highlights import choose_samples
from .ledger import DEATHS_OF_A_DOCUMENT, KILLED, NO_LEDGER, WHOLE, Care, Entry, LedgerClient
from .partitions import Partitions
from .report import SplitStats
from .rows import REJECTED_SCHEMA, error_table, split_table, stopped_table, to_ipc
from .schema import ARROW_SCHEMA, Column, Types, cast_columns, columns_of, open_parquet, target_types
from .storage import Storage, is_passing

logger = get_logger(__name__)

_GROUPS = 1000
_GROUP_BYTES = 512 << 20  # if a reader dies, its whole group is read again

# The footer does not tell how large decoded rows are: a dictionary stores a text once for all its rows,
# DELTA_BYTE_ARRAY stores only what differs from the previous text, and a mean says nothing about the longest row. So
# few rows are decoded at a time, fewer if the footer's mean is large. Small batches are combined, as each has a cost.
_ROWS_AT_A_TIME = 16
_BATCH_BYTES = 1 << 20
_BATCH_ROWS = 4096
# Bytes of each column of a large shard that are held in memory, unless a page is larger. By default, pyarrow keeps the
# stored bytes of all columns of all row groups until the end.
_READ_BYTES = 8 << 20

TOKENIZER_FAILED = "tokenizer_failed"  # a reason for quarantine


@dataclass(frozen=True)
class EncodeOptions:
    """What the readers need to know about a run; pickles without credentials.

    Attributes:
        task: the model's task, made by the driver, so that readers need neither the model nor torch and transformers.
        text_columns: the text column, or the question and context columns.
        passed_columns: the columns that are copied from the input to the results, `id_column` first.
        partitions: those of them whose values come from the shards' paths.
        whole_bytes: shards up to this size are read in one or two requests and held in memory; of larger ones,
            `_READ_BYTES` of each column.
        most_passed_bytes: the limit for the passed columns of one split, of which several copies are in memory.
        samples: number of documents of each shard to show in the run's page.
        types: the types of the passed columns in the output; those that it does not have yet are left out.
    """

    input: Storage
    task: Task
    text_columns: tuple[str, ...]
    id_column: str | None
    passed_columns: list[str]
    split_bytes: int
    partitions: Partitions = field(default_factory=Partitions)
    whole_bytes: int = 64 << 20
    most_passed_bytes: int = 2 << 30
    samples: float = 0
    types: Types = field(default_factory=dict)


@dataclass
class RawSplit:
    """Consecutive rows of a shard, not tokenised yet.

    Attributes:
        index: the split's index in the shard.
        rows, text_bytes: number of rows and their bytes of text, including rejected rows.
        row_numbers: numbers in the shard of the rows that are not rejected.
        texts, passed: texts, in the order of `text_columns`, and passed columns of these rows.
        passed_bytes: size of `passed`.
        rejected: the rejected rows, as in `REJECTED_SCHEMA`.
    """

    index: int
    rows: int = 0
    text_bytes: int = 0
    row_numbers: list[int] = field(default_factory=list)
    texts: list[tuple[str, ...]] = field(default_factory=list)
    passed: list[pa.RecordBatch] = field(default_factory=list)
    passed_bytes: int = 0
    rejected: list[dict[str, Any]] = field(default_factory=list)

    def pass_on(self, rows: pa.RecordBatch, most_bytes: int) -> None:
        """Add the passed columns of further rows.

        Raises:
            ShardError: the split now has more than `most_bytes` of passed columns.
        """
        if rows.num_rows or not self.passed:  # even without rows, the column types are needed
            self.passed.append(rows)
            self.passed_bytes += rows.nbytes
        if self.passed_bytes > most_bytes:
            raise ShardError(
                f"its id and kept columns hold more than {most_bytes >> 30} GiB beside {self.text_bytes} bytes "
                "of text in one split; keep fewer columns or choose fewer split_bytes"
            )


def read_shards(batch: pa.Table, options: EncodeOptions, ledger: LedgerClient = NO_LEDGER) -> Iterator[pa.Table]:
    """Ray Data stage: read groups of shards (rows of `shard_groups`) and yield one row per split that is not done."""
    for group in batch.to_pylist():
        for path, version, size, partition, done in json.loads(group["shards"]):
            shard = Shard(path, version, size, tuple((name, value) for name, value in partition))
            try:
                with ledger.work(f"reading {shard.path} {shard.version}") as entry:
                    if entry.stop:
                        yield stopped_table(_base_row(shard, 0, 0))
                        return
                    for table in encode_shard(shard, frozenset(done), options, entry):
                        with entry.waiting():  # until the actors ask for more
                            yield table
            except Exception as error:
                # Raising would end the run because of one shard, and yielding nothing would lose the shard.
                logger.exception("shard %s cannot be encoded", shard.path)
                yield error_table(_base_row(shard, 0, 0), error)


def shard_groups(pending: list[tuple[Shard, frozenset[int]]]) -> list[dict[str, str]]:
    """Group the shards to score, with the indices of their splits that are done, into rows for `read_shards`.

    Ray Data takes 2 to 3 ms to build a source block and more to start a task, so if there are thousands of shards,
    several share a group; large shards have their own. The largest come first, so that the run does not end with only
    one actor busy.
    """
    groups: list[list[Any]] = []
    room, most = 0, -(-len(pending) // _GROUPS)
    for shard, done in sorted(pending, key=lambda item: (-item[0].size, item[0].path)):
        if not groups or room < shard.size or len(groups[-1]) == most:
            groups.append([])
            room = _GROUP_BYTES
        groups[-1].append([shard.path, shard.version, shard.size, shard.partition, sorted(done)])
        room -= shard.size
    return [{"shards": json.dumps(group)} for group in groups]


def encode_shard(shard: Shard, done: frozenset[int], options: EncodeOptions, entry: Entry) -> Iterator[pa.Table]:
    """Encode a shard's splits that are not done, one table with one row each.

    The last of them is held back until the whole shard is read, so that its row can have `num_splits`. If all splits
    are done, a row of index -1 has it instead.

    If the shard cannot be read to its end, the last row has `error`. Its index is -1 if the shard itself is at fault,
    or that of the next split if its storage is at fault, which may work again in another run.
    """
    held: dict[str, Any] | None = None
    shard_rows, count, skipped = 0, 0, 0
    started, retries = time.perf_counter(), options.input.retries
    try:
        if WHOLE in entry.care.killers:
            raise ShardError(f"reading it killed its process {entry.care.deaths} times")
        entry.touch(WHOLE)
        with options.input.errors("read", shard.path):
            for split, shard_rows in split_shard(shard, options):
                if entry.stopping():
                    yield stopped_table(_base_row(shard, shard_rows, split.index))
                    return
                count = split.index + 1
                if split.index in done:
                    skipped += split.rows
                else:
                    if held is not None:
                        entry.touch(None)
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


def split_shard(shard: Shard, options: EncodeOptions) -> Iterator[tuple[RawSplit, int]]:
    """Divide a shard into splits of at least `split_bytes` text bytes, except for the last one.

    The boundaries depend only on the shard and `split_bytes`, so a rerun makes the same splits.

    Yields:
        A split and the shard's number of rows.

    Raises:
        ShardError: the shard is not valid Parquet or cannot be opened under the name it is listed under, a column is
            missing or duplicated, or the passed columns are too large or of types that the output cannot have.
        StorageError: the shard has changed since it was listed, or cannot be opened.
    """
    with _opened(shard, options.input) as file:
        try:
            parquet = _parquet_file(file, whole=shard.size <= options.whole_bytes)
        except (pa.ArrowException, OSError) as error:
            if not _is_damage(error):
                raise
            raise ShardError(f"not a readable Parquet file: {error}") from error
        names = parquet.schema_arrow.names
        fixed = options.partitions.scalars(shard.partition, names)
        columns = [*options.text_columns, *(name for name in options.passed_columns if name not in fixed)]
        if missing := [column for column in dict.fromkeys(columns) if column not in names]:
            raise ShardError(
                f"no column {', '.join(map(repr, missing))}; its columns are {', '.join(map(repr, names))}"
            )
        if twice := [column for column in dict.fromkeys(columns) if names.count(column) > 1]:
            raise ShardError(f"column {', '.join(map(repr, twice))} is there {names.count(twice[0])} times")
        stored = columns_of(parquet, options.passed_columns)
        partition = {name: Column(value.type, not value.is_valid) for name, value in fixed.items()}
        passed_columns = {name: partition.get(name) or stored[name] for name in options.passed_columns}
        targets = target_types(passed_columns, options.types)
        rows = parquet.metadata.num_rows
        split, row = RawSplit(0), 0
        for batch in _batches(parquet, columns, options.split_bytes):
            columns_of_text = [
                (name, batch.column(name), as_binary(batch.column(name))) for name in options.text_columns
            ]
            passed = cast_columns(_passed(batch, options.passed_columns, fixed), passed_columns, targets)
            start = 0
            for i in range(batch.num_rows):
                size, text, reason, detail = _row_text(columns_of_text, i)
                if text is None:
                    identifier = passed.column(0)[i] if options.id_column else None
                    split.rejected.append(_rejected_row(shard.path, row, identifier, reason, detail))
                    split.pass_on(passed.slice(start, i - start), options.most_passed_bytes)
                    start = i + 1
                else:
                    split.row_numbers.append(row)
                    split.texts.append(text)
                row, split.rows, split.text_bytes = row + 1, split.rows + 1, split.text_bytes + size
                if split.text_bytes >= options.split_bytes:
                    split.pass_on(passed.slice(start, i + 1 - start), options.most_passed_bytes)
                    start = i + 1
                    yield split, rows
                    split = RawSplit(split.index + 1)
            split.pass_on(passed.slice(start), options.most_passed_bytes)
        if row != rows:
            raise ShardError(f"it has {row} rows where its footer says {rows}")
        if split.rows:
            yield split, rows


def _passed(batch: pa.RecordBatch, names: list[str], fixed: dict[str, pa.Scalar]) -> pa.RecordBatch:
    """The passed columns of a batch, those in `fixed` with one value for all rows."""
    if not fixed:
        return batch.select(names)
    columns = [pa.repeat(fixed[name], len(batch)) if name in fixed else batch.column(name) for name in names]
    return pa.record_batch(columns, names=names)


def _row_text(columns: list[tuple[str, pa.Array, pa.Array | None]], i: int) -> tuple[int, tuple | None, str, str]:
    """Check a row's texts.

    Args:
        columns: of each text column, the name, the column, and the column as binary (None if it does not hold text).
        i: the row's index in these columns.

    Returns:
        The row's bytes of text, its texts (None if they cannot be scored), and the reason and detail for that.
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


def _opened(shard: Shard, storage: Storage) -> IO[bytes]:
    """Open a shard's file in the version that was listed.

    Servers and proxies may change an object's key by normalising "//" and "/../". Then every run fails to find the
    object, or finds another one.

    Raises:
        ShardError: it cannot be opened under the name it is listed under.
        StorageError: it cannot be opened for another reason, or has changed since it was listed.
    """
    try:
        file = storage.open(shard.path)
        if storage.version(shard.path) == shard.version:
            return file
        file.close()
        raise _changed(shard)
    except StorageError as error:
        cause = error.__cause__
        odd = any(part in ("", ".", "..") for part in shard.path.split("/"))
        lasting = cause is None or isinstance(cause, FileNotFoundError) or (odd and not is_passing(cause))
        if not lasting or storage.listed(shard.path) != shard.version:
            raise
        raise ShardError(f"listed under this name, but not to be had by it: {error}") from error


def _changed(shard: Shard) -> StorageError:
    return StorageError(f"{shard.path}: it changed after it was listed; the next run will score the new version")


def _is_damage(error: BaseException | None) -> bool:
    """Whether an error is due to a shard's contents rather than its storage.

    pyarrow reports damage as its own exceptions or as a plain OSError without errno. File systems and networks raise
    more specific errors.
    """
    if isinstance(error, StorageError):
        error = error.__cause__
    kinds = (ShardError, pa.ArrowException, UnicodeDecodeError)  # the last one if column names are not UTF-8
    return isinstance(error, kinds) or (type(error) is OSError and error.errno is None)


def _parquet_file(file: Any, whole: bool) -> pq.ParquetFile:
    """Open a shard so that dictionary columns are read as their value type.

    If the Arrow schema in the footer declares a column as a dictionary, Arrow reads it as one and, with every batch,
    holds all its values again, even those that Parquet does not store in a dictionary. Only that schema makes it do so,
    so the file is opened with another one in its footer.

    Raises:
        ShardError: the Arrow schema in the footer cannot be replaced.
        pa.ArrowException, OSError: the shard is damaged or cannot be read.
    """
    options: dict[str, Any] = {"pre_buffer": whole, "buffer_size": _READ_BYTES}
    options["page_checksum_verification"] = True
    parquet = open_parquet(file, **options)
    stored = (parquet.metadata.metadata or {}).get(ARROW_SCHEMA)
    kinds = parquet.schema_arrow.types
    if stored is None or not any(pa.types.is_dictionary(kind) for kind in kinds):
        return parquet
    plain = [kind.value_type if pa.types.is_dictionary(kind) else kind for kind in kinds]
    schema = pa.schema([column.with_type(kind) for column, kind in zip(parquet.schema_arrow, plain)])
    file.seek(-8, os.SEEK_END)  # the footer's length and "PAR1"
    length = int.from_bytes(file.read(4), "little")
    file.seek(-8 - length, os.SEEK_END)
    footer = file.read(length).replace(_thrift(stored), _thrift(base64.b64encode(schema.serialize())))
    alone = pa.BufferReader(b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1")
    parquet = open_parquet(file, metadata=pq.read_metadata(alone), **options)
    if any(pa.types.is_dictionary(kind) for kind in parquet.schema_arrow.types):
        raise ShardError("its footer holds an Arrow schema that cannot be replaced")
    return parquet


def _thrift(value: bytes) -> bytes:
    """Encode a string as in a Thrift footer: its length as a varint (7 bits per byte, lowest first), then its bytes."""
    length, groups = len(value), bytearray()
    while length > 127:
        groups.append(length & 127 | 128)
        length >>= 7
    return bytes([*groups, length]) + value


def _batches(parquet: pq.ParquetFile, columns: list[str], split_bytes: int) -> Iterator[pa.RecordBatch]:
    """Read all rows in batches of about `_BATCH_BYTES` decoded bytes at most, or of `_ROWS_AT_A_TIME` larger rows."""
    total = sum(parquet.metadata.row_group(group).total_byte_size for group in range(parquet.num_row_groups))
    mean = total / max(parquet.metadata.num_rows, 1)
    rows = max(1, min(_ROWS_AT_A_TIME, int(split_bytes / max(mean, 1))))
    small: list[pa.RecordBatch] = []
    size, most = 0, _BATCH_ROWS // rows
    # With so few rows at a time, waking threads takes ten times as long as decoding.
    for batch in parquet.iter_batches(batch_size=rows, columns=columns, use_threads=False):
        decoded = batch.get_total_buffer_size()
        if small and (len(small) == most or size + decoded > _BATCH_BYTES):
            yield _together(small)
            size = 0
        small.append(batch)
        size += decoded
    if small:
        yield _together(small)


def _together(batches: list[pa.RecordBatch]) -> pa.RecordBatch:
    """Concatenate batches, and clear the list to free their memory."""
    whole = batches[0] if len(batches) == 1 else pa.concat_batches(batches)
    batches.clear()
    return whole


def as_binary(column: pa.Array) -> pa.Array | None:
    """Cast a string or binary column to large_binary without validating it; None for other types."""
    if isinstance(column, pa.ExtensionArray):  # JSON
        column = column.storage
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind):
        return column.cast(pa.large_binary())
    if pa.types.is_large_binary(kind):
        return column
    if pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):
        return pc.cast(pc.cast(column, pa.binary_view()), pa.large_binary())
    return None


def check_text(value: Any, what: str = "text") -> tuple[str | None, str, str]:
    """Check whether a value is a text that can be scored.

    Args:
        value: a str, UTF-8 bytes, or anything else.
        what: the word for the value in the detail: the column's name if there are several text columns.

    Returns:
        The text, or None if it cannot be scored; then the reason and the detail, empty strings otherwise.
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
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return None, "undecodable", f"character {error.start} of the {what} is half of a surrogate pair"
    if not value.strip():
        return None, "empty", f"the {what} is empty or white space"
    return value, "", ""


def killed_row(shard: str, row: int, identifier: pa.Scalar | None, what: str, care: Care) -> dict[str, Any]:
    """The quarantined row of a document that killed the processes working on it, as in `REJECTED_SCHEMA`."""
    times = f"{DEATHS_OF_A_DOCUMENT} times, of {care.deaths} deaths at its shard or split"
    detail = f"{what} it killed its process, or kept it for longer than the document timeout, {times}"
    return _rejected_row(shard, row, identifier, KILLED, detail)


def rejected_table(rows: list[dict[str, Any]]) -> pa.Table:
    """Make a table of quarantined rows, sorted by row number."""
    return pa.Table.from_pylist(sorted(rows, key=lambda row: row["row"]), schema=REJECTED_SCHEMA)


def _rejected_row(shard: str, row: int, identifier: pa.Scalar | None, reason: str, detail: str) -> dict[str, Any]:
    return {"shard": shard, "row": row, "id": printed(identifier), "reason": reason, "detail": detail}


def printed(identifier: pa.Scalar | None) -> str | None:
    """A row's id as text; None if it has none."""
    if identifier is None or not identifier.is_valid:
        return None
    try:
        return str(identifier.as_py())
    except (ValueError, OverflowError):  # not UTF-8, or a date outside Python's range
        return _raw(identifier)


def _raw(value: pa.Scalar) -> str:
    """Represent a value that Python cannot, as its bytes or its stored integer."""
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
    """Tokenise a split. Rejects rows that the tokenizer fails on, that kill it, or that have a `Task.problem`."""
    started, task = time.perf_counter(), options.task
    careful = entry.care.one_at_a_time
    encoded, failures = _encode_each(split, task, entry) if careful else task.encode_rows(split.texts)
    # A record batch without columns has no rows, so the table starts from the row numbers.
    documents = pa.table({"row": pa.array(split.row_numbers, pa.int64())})
    if options.passed_columns:
        passed = pa.Table.from_batches(split.passed)
        for name in dict.fromkeys(options.passed_columns):
            documents = documents.append_column(name, passed[name])
    documents = documents.append_column("document", task.to_column(encoded))
    problems = [
        (TOKENIZER_FAILED, failures[position]) if position in failures else task.problem(document)
        for position, document in enumerate(encoded)
    ]
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
    good = [position for position, problem in enumerate(problems) if problem is None]
    share = math.ceil(options.samples * split.rows / max(shard_rows, 1))
    samples = choose_samples(split.texts, good, share, f"{shard.key} {shard.version} {split.index}")
    stats.tokenize_seconds = time.perf_counter() - started
    return _base_row(shard, shard_rows, split.index) | {
        "rows": split.rows,
        "payload": to_ipc(documents),
        "rejected": to_ipc(rejected),
        "stats": stats.to_json(),
        "highlights": json.dumps({"samples": samples}),
    }


def _encode_each(split: RawSplit, task: Task, entry: Entry) -> tuple[list[Any], dict[int, str]]:
    """Tokenise one row at a time, to find rows that kill the process. Those already known get an empty document."""
    encoded, failures = [], {}
    for position, (row, texts) in enumerate(zip(split.row_numbers, split.texts)):
        if row in entry.care.killers:
            encoded.append(task.nothing())
        else:
            entry.touch(row)
            (document,), failed = task.encode_rows([texts])
            encoded.append(document)
            if failed:
                failures[position] = failed[0]
    entry.touch(WHOLE)
    return encoded, failures


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
