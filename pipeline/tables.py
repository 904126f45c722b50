"""Delta Lake and Iceberg tables: which of a folder's files hold the table's present rows.

Their folders also hold files whose rows have been deleted or rewritten; only a table's log tells. The logs are read
through deltalake and pyiceberg, which an extra installs, and through `Storage`, so with its credentials and retries.
"""

import gzip
import io
import re
import tempfile
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import unquote

import pyarrow as pa

from .errors import PipelineError, UsageError
from .partitions import Values
from .storage import Storage

DELTA, ICEBERG, HUDI = "_delta_log", "metadata", ".hoodie"
_EXTRA = "pip install 'trbert-pipeline[tables]'"

_VERSION = re.compile(r"v?(\d+)(-.*)?(\.gz(ip)?)?\.metadata\.json(\.gz)?")  # of Iceberg's metadata files
_GZIP = b"\x1f\x8b"
_METADATA = re.compile(rf"(.*/)?{ICEBERG}/{_VERSION.pattern}")
_LOG = re.compile(rf"((?:.*?/)?)({re.escape(DELTA)}|{re.escape(HUDI)})(/.*)?")


@dataclass(frozen=True)
class Snapshot:
    """The present files of a table.

    Attributes:
        files: by path below the table, the values of its partition columns, as far as they are not in the files.
        types: the types of these columns.
    """

    files: dict[str, Values]
    types: dict[str, pa.DataType] = field(default_factory=dict)


def find_tables(paths: Iterable[str]) -> dict[str, str]:
    """The tables in a listing: the kind (`DELTA`, `ICEBERG` or `HUDI`) by path, which is empty for the listed root."""
    found = {}
    for path in paths:
        if (DELTA in path or HUDI in path) and (match := _LOG.fullmatch(path)):
            found[match[1].rstrip("/")] = match[2]
        elif path.endswith((".metadata.json", ".metadata.json.gz")) and (match := _METADATA.fullmatch(path)):
            found.setdefault((match[1] or "").rstrip("/"), ICEBERG)  # a Delta table may have Iceberg's metadata, too
    return found


def table_at(storage: Storage) -> str | None:
    """The kind of the table whose root this is, if it is one."""
    for log in (DELTA, HUDI):
        if storage.kind(log) == "directory":
            return log
    if storage.kind(ICEBERG) != "directory":
        return None
    return find_tables(f"{ICEBERG}/{path}" for path in storage.at(f"{storage.uri}/{ICEBERG}").entries(1)).get("")


def read_table(storage: Storage, kind: str, columns: Collection[str]) -> Snapshot:
    """Read the log of a table.

    Args:
        storage: the table's root.
        kind: its kind, as in `find_tables`.
        columns: the columns that will be read.

    Raises:
        UsageError: the package that reads it is not installed, or its files alone do not hold its rows.
        StorageError: the log cannot be read.
    """
    if kind == HUDI:
        raise UsageError(f"{storage.uri}: a Hudi table, which cannot be read; export its rows as Parquet files")
    name, read = ("Delta", _read_delta) if kind == DELTA else ("Iceberg", _read_iceberg)
    try:
        return read(storage, columns)
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        raise UsageError(
            f"{storage.uri}: the log of this {name} table must be read, as the folder may also hold deleted rows, and "
            f"{package} is not installed: {_EXTRA}"
        ) from error
    except PipelineError:
        raise
    except Exception as error:  # these packages raise whatever they meet, such as KeyError for a damaged log
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]  # a backtrace may follow
        raise UsageError(f"{storage.uri}: the log of this {name} table cannot be read: {reason[0]}") from error


def _refuse(storage: Storage, name: str, what: str, remedy: str) -> NoReturn:
    raise UsageError(f"{storage.uri}: this {name} table has {what}, which cannot be applied; {remedy}")


def _read_delta(storage: Storage, columns: Collection[str]) -> Snapshot:
    from deltalake import DeltaTable
    from deltalake.exceptions import DeltaError

    with tempfile.TemporaryDirectory(prefix="trbert-delta-") as copy:
        _copy_log(storage, Path(copy) / DELTA)
        table = DeltaTable(copy)
        if (mode := table.metadata().configuration.get("delta.columnMapping.mode", "none")) != "none":
            _refuse(storage, "Delta", f"column mapping (by {mode})", "write it again without")
        if "deletionVectors" in (table.protocol().reader_features or ()):
            try:  # only those outside the log are read, and these are not in the copy
                vectors = any(batch.num_rows for batch in pa.RecordBatchReader.from_stream(table.deletion_vectors()))
            except DeltaError:
                vectors = True
            if vectors:
                _refuse(storage, "Delta", "deletion vectors", "REORG TABLE … APPLY (PURGE) writes their files again")
        actions = pa.table(table.get_add_actions())
    paths = [unquote(path) for path in actions["path"].to_pylist()]
    if outside := next((path for path in paths if path.startswith("/") or "://" in path), None):
        _refuse(storage, "Delta", f"files outside its folder ({outside})", "a shallow clone has to be a deep one")
    if "partition" not in actions.column_names:
        return Snapshot(dict.fromkeys(paths, ()))
    partition = actions["partition"].combine_chunks()
    types = {column.name: column.type for column in partition.type if column.name in columns}
    texts = [[(name, text) for text in partition.field(name).cast(pa.string()).to_pylist()] for name in types]
    return Snapshot(dict(zip(paths, zip(*texts) if texts else [()] * len(paths))), types)


def _copy_log(storage: Storage, to: Path) -> None:
    """Copy a Delta log, from its last checkpoint on, to a local directory."""
    names = {file.path.removeprefix(f"{DELTA}/") for file in storage.files(DELTA)}
    first = ""
    if "_last_checkpoint" in names:
        checkpoint = re.search(rb'"version"\s*:\s*(\d+)', storage.read(f"{DELTA}/_last_checkpoint"))
        first = f"{int(checkpoint[1]):020d}" if checkpoint else ""
        first = first if any(name.startswith(f"{first}.checkpoint") for name in names) else ""
    needed = sorted(name for name in names if not name[0].isdigit() or name >= first)
    needed = [name for name in needed if not name.rpartition("/")[2].startswith(".")]  # checksums and temporary files
    for path, data in storage.read_many(f"{DELTA}/{name}" for name in needed):
        file = to / path.removeprefix(f"{DELTA}/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)


def _read_iceberg(storage: Storage, columns: Collection[str]) -> Snapshot:
    from pyiceberg.catalog.noop import NoopCatalog
    from pyiceberg.manifest import FileFormat
    from pyiceberg.serializers import FromByteStream
    from pyiceberg.table import Table

    location = _newest_metadata(storage)
    # Not StaticTable, which imports whatever class the table's own properties name as its FileIO.
    data = storage.read(location)
    data = gzip.decompress(data) if data.startswith(_GZIP) else data  # pyiceberg goes by one of the names it may have
    metadata = FromByteStream.table_metadata(io.BytesIO(data))
    io_ = _iceberg_io(storage, metadata.location)
    for column in columns:
        named = {f.field_id for schema in metadata.schemas for f in schema.fields if f.name == column}
        names = {f.name for schema in metadata.schemas for f in schema.fields if f.field_id in named}
        if len(named) > 1 or len(names) > 1:
            what = f"files in which the column {column!r} has another name or is another column"
            _refuse(storage, "Iceberg", what, "rewrite its data files")
    files: dict[str, Values] = {}
    for task in Table(("table",), metadata, location, io_, NoopCatalog("none")).scan().plan_files():
        if deletes := sorted({delete.content.name.lower() for delete in task.delete_files}):
            what = f"delete files ({', '.join(deletes)})".replace("_", " ")
            _refuse(storage, "Iceberg", what, "rewrite_data_files applies them")
        if task.file.file_format != FileFormat.PARQUET:
            _refuse(storage, "Iceberg", f"files in {task.file.file_format.value}", "rewrite them as Parquet")
        files[_below(storage, metadata.location, task.file.file_path)] = ()
    return Snapshot(files)


def _newest_metadata(storage: Storage) -> str:
    """The path of a table's metadata file with the highest version; without its catalog, nothing else tells."""
    versions: dict[int, list[str]] = {}
    for path in storage.at(f"{storage.uri}/{ICEBERG}").entries(1):
        if match := _VERSION.fullmatch(path):
            versions.setdefault(int(match[1]), []).append(path)
    newest = versions[max(versions)]
    if len(newest) > 1:
        raise UsageError(
            f"{storage.uri}: only its catalog knows the present one of {', '.join(sorted(newest))} in {ICEBERG}/; "
            "remove the others"
        )
    return f"{ICEBERG}/{newest[0]}"


def _below(storage: Storage, table: str, location: str) -> str:
    """The path below the table of a file that its metadata names by the URI of its place."""
    bare, root = (re.sub(r"^[a-z0-9]+:(//)?", "", uri) for uri in (location, table.rstrip("/") + "/"))
    if not bare.startswith(root):
        _refuse(storage, "Iceberg", f"files outside its folder ({location})", "copy them into it")
    return bare.removeprefix(root)


def _iceberg_io(storage: Storage, table: str) -> Any:
    """pyiceberg's interface to files, for reading those of one table through its Storage."""
    from pyiceberg.io import FileIO, InputFile

    class StoredInput(InputFile):
        def _path(self) -> str:
            return _below(storage, table, self.location)

        def __len__(self) -> int:
            return len(storage.read(self._path()))

        def exists(self) -> bool:
            return storage.kind(self._path()) == "file"

        def open(self, seekable: bool = True) -> Any:
            return io.BytesIO(storage.read(self._path()))

    class StoredFiles(FileIO):
        def new_input(self, location: str) -> InputFile:
            return StoredInput(location)

        # Nothing that plans a scan writes. Should a version of pyiceberg do so, the table stays as it is.
        def new_output(self, location: str) -> NoReturn:
            raise io.UnsupportedOperation(f"{location}: tables are only read")

        def delete(self, location: Any) -> NoReturn:
            raise io.UnsupportedOperation(f"{location}: tables are only read")

    return StoredFiles()
