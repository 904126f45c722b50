"""The corpus: its shards with their versions, and the names of their objects in an output."""

import hashlib
import posixpath
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from fsspec.utils import glob_translate

from .errors import StorageError, UsageError
from .partitions import Partitions, Values, partition_types, path_values
from .storage import Storage, StoredFile
from .tables import Snapshot, find_tables, read_table, table_at

MARKERS = "_shards"
QUARANTINE = "_quarantine"
RUNS = "_runs"
SAMPLES = "_samples"
IDENTITY = "_output.json"
SCHEMA = "_schema.json"

MAGIC = b"PAR1"  # the first bytes of a Parquet file

_GLOB = re.compile(r"[*?[{]")
_ENDING = re.compile(r"\.[A-Za-z_]\w*$")

# A name is a readable slug plus a hash of the whole path, so that it cannot leave the output prefix, collide with
# another shard's name, or contain a character that some reader of the output treats specially.
OBJECT_NAME = re.compile(r"(?P<key>.+-[0-9a-f]{16})-(?P<version>[0-9a-f]{12})(-(?P<index>\d{6}))?\.(parquet|json)$")


@dataclass(frozen=True)
class Shard:
    """One Parquet file of the corpus.

    Attributes:
        path: its path below the input root.
        version: a hash that changes when the file changes (see `StoredFile`).
        size: its size in bytes.
        partition: values of its partition columns (see `partitions.py`).
    """

    path: str
    version: str
    size: int
    partition: Values = field(default=(), compare=False)

    @property
    def key(self) -> str:
        """The name of its objects in the output, without version and index."""
        name = self.path.rsplit("/", 1)[-1].removesuffix(".parquet")
        slug = re.sub(r"[^A-Za-z0-9.-]+", "-", name).strip(".-")[:60] or "shard"
        return f"{slug}-{hashlib.sha256(self.path.encode(errors='surrogateescape')).hexdigest()[:16]}"

    @property
    def marker(self) -> str:
        """The path of the marker that records that the shard is complete."""
        return f"{MARKERS}/{self.key}-{self.version}.json"

    def object(self, index: int) -> str:
        """The name of a split's results object; its quarantined rows have the same name below `_quarantine`."""
        return f"{self.key}-{self.version}-{index:06d}.parquet"


@dataclass(frozen=True)
class Location:
    """Where an input's files are.

    Attributes:
        uri: the input as given.
        root: the prefix, a single file's directory, or a glob's fixed part; paths of shards are relative to it.
        patterns: globs of which files match one, relative to the root and without braces; empty for all files.
        file: the only file, if the input is one.
    """

    uri: str
    root: Storage
    patterns: tuple[str, ...] = ()
    file: Storage | None = None

    def includes(self, folder: str) -> bool:
        """Whether files in a folder (a path below the root, empty for the root) may be part of the input.

        A glob may match the folder, one around it, or files below it.
        """
        parts = [part for part in folder.split("/") if part]
        if self.file is not None:
            return parts[:1] in ([], [self.file.uri.rpartition("/")[2]])
        matching = [_matching(pattern.split("/"), parts) for pattern in self.patterns]
        return not matching or any(matching)


@dataclass(frozen=True)
class Corpus:
    """The shards of an input, sorted by path, and its partition columns."""

    shards: list[Shard]
    partitions: Partitions


def find_input(storage: Storage) -> Location:
    """Find out whether an input is a file, a prefix or a glob.

    A file or folder whose name has glob characters takes precedence over what its name would match.

    Raises:
        UsageError: a pattern is invalid.
        StorageError: a transient error persists.
    """
    kind = storage.kind()
    if kind == "file" or (kind is None and storage.uri.endswith(".parquet") and not _GLOB.search(storage.uri)):
        return Location(storage.uri, storage.parent or storage.at("/"), file=storage)
    if kind is not None or not _GLOB.search(storage.uri):
        return Location(storage.uri, storage)
    scheme, separator, path = ("", "", storage.uri) if storage.is_local else storage.uri.partition("://")
    first, *parts = path.split("/")
    fixed = scheme + separator + first
    while parts and (not _GLOB.search(parts[0]) or storage.at(f"{fixed}/{parts[0]}").kind() is not None):
        fixed = f"{fixed}/{parts.pop(0)}"
    patterns = tuple(_without_braces("/".join(parts)))
    for pattern in patterns:
        if any("**" in part and part != "**" for part in pattern.split("/")):
            raise UsageError(f"{storage.uri}: in a pattern, ** stands for whole folders: /**/")
    return Location(storage.uri, storage.at(fixed or "/"), patterns)


def read_corpus(location: Location, columns: Iterable[str] = ()) -> Corpus:
    """List the Parquet files of an input: a single file, all files below a prefix, or the matches of a glob.

    Of folders that match a glob, all files are listed, unless the glob matches Parquet files. Files are Parquet if
    their names end in `.parquet`. Without an ending, or with one that the input spells out, their first bytes decide.
    Of Delta and Iceberg tables, the present files are listed (see `tables.py`).

    Names that begin with "_" or "." are other programs' markers and temporary files, and are skipped, as in Spark.

    Args:
        columns: the columns that will be read; `Corpus.partitions` has those of them that are partition columns.

    Raises:
        UsageError: there are no Parquet files, a name is not UTF-8, or a table cannot be read.
        StorageError: the input cannot be listed.
    """
    columns = tuple(columns)
    files, folders, paths = _list(location)
    tables = _read_tables(location, files, paths, columns)
    shards = _shards(location, files, tables, columns)
    if not shards and folders:
        files, paths = _list_folders(location, folders)
        tables = _read_tables(location, files, paths, columns)
        shards = _shards(location, files, tables, columns)
    root = location.root.uri
    if not shards:
        raise UsageError(f"{location.uri}: no Parquet files there ({len(files)} other files)")
    for shard in shards:
        try:
            shard.path.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"{root}: the name {shard.path!a} is not UTF-8; rename it") from error
    outer = () if any(not table.prefix for table in tables) else path_values(root, columns)
    types = partition_types([outer, *(shard.partition for shard in shards)])
    for table in tables:
        types |= table.snapshot.types
    return Corpus(shards, Partitions(types, outer))


def list_shards(storage: Storage) -> list[Shard]:
    """The shards of an input, without the values of partition columns. Raises the same as `read_corpus`."""
    return read_corpus(find_input(storage)).shards


def input_root(input_uri: str) -> str:
    """The URI that shard paths are relative to: the prefix, a single file's directory, or a glob's fixed part."""
    return find_input(Storage(input_uri)).root.uri


@dataclass(frozen=True)
class _Table:
    """A table in the input, whose files have the `prefix`, or around it: then `outer` is the root's path below it."""

    prefix: str
    outer: str
    snapshot: Snapshot


def _list(location: Location) -> tuple[list[StoredFile], list[str], Iterable[str]]:
    """The input's files, the folders that match its patterns, and the paths of all that was listed."""
    root, patterns = location.root, location.patterns
    if location.file is not None:
        return location.file.files(), [], ()
    if not patterns:
        files = root.files()
        return files, [], (file.path for file in files)
    depth = max(pattern.count("/") + 1 for pattern in patterns)
    stem = posixpath.commonprefix([re.split(r"[*?[/]", pattern, maxsplit=1)[0] for pattern in patterns])
    entries = root.entries(None if any("**" in pattern for pattern in patterns) else depth, stem)
    globs = [re.compile(glob_translate(pattern)) for pattern in patterns]
    matching = {path: entry for path, entry in entries.items() if path and any(glob.match(path) for glob in globs)}
    files = [file for file in matching.values() if file is not None]
    return files, [path for path, file in matching.items() if file is None], entries


def _list_folders(location: Location, folders: list[str]) -> tuple[list[StoredFile], Iterable[str]]:
    """The files below folders, and the paths of all that was listed."""
    found = {}
    for folder in folders:
        for file in location.root.at(f"{location.root.uri}/{folder}").files():
            found[f"{folder}/{file.path}"] = replace(file, path=f"{folder}/{file.path}")
    return list(found.values()), found


def _shards(location: Location, files: list[StoredFile], tables: list[_Table], columns: tuple[str, ...]) -> list[Shard]:
    """Those of the files that are shards, sorted by path."""
    present: list[tuple[StoredFile, Values]] = []
    unknown: list[StoredFile] = []
    for file in files:
        table = next((table for table in tables if file.path.startswith(table.prefix)), None)
        if table is not None:
            values = table.snapshot.files.get(table.outer + file.path.removeprefix(table.prefix))
            if values is not None:
                present.append((file, path_values(table.prefix.rstrip("/"), columns) + values))
        elif _is_hidden(file.path):
            continue
        elif file.path.endswith(".parquet"):
            present.append((file, path_values(posixpath.dirname(file.path), columns)))
        elif file.size > len(MAGIC) and _may_be_parquet(file.path, location):
            unknown.append(file)
    starts = location.root.read_many([file.path for file in unknown], len(MAGIC))
    parquet = [file for file, (_, start) in zip(unknown, starts) if start == MAGIC]
    present += [(file, path_values(posixpath.dirname(file.path), columns)) for file in parquet]
    shards = [Shard(file.path, file.version, file.size, values) for file, values in present]
    return sorted(shards, key=lambda shard: shard.path)


def _read_tables(
    location: Location, files: list[StoredFile], paths: Iterable[str], columns: tuple[str, ...]
) -> list[_Table]:
    """The tables in the listing and the one that the root is in, inner ones first.

    Raises:
        StorageError: a file that a table's log names is missing.
    """
    root = location.root
    inside = {path: kind for path, kind in find_tables(paths).items() if not _is_hidden(path)}
    tables = [
        _Table(path and f"{path}/", "", read_table(root.at(f"{root.uri}/{path}") if path else root, kind, columns))
        for path, kind in sorted(inside.items(), reverse=True)
    ]
    if "" not in inside:
        around, outer = root, ""
        while True:
            if (kind := table_at(around)) is not None:
                tables.append(_Table("", outer, read_table(around, kind, columns)))
                break
            name = around.uri.rpartition("/")[2]
            if ("=" not in name and name != "data") or (parent := around.parent) is None:
                break
            around, outer = parent, f"{name}/{outer}"
    listed = {file.path for file in files}
    for table in tables if location.file is None and not location.patterns else ():
        for name in table.snapshot.files:
            path = table.prefix + name.removeprefix(table.outer)
            if name.startswith(table.outer) and path not in listed:
                raise StorageError(f"{root.uri}/{path}: the table's log names it, but it is not there")
    return tables


def _is_hidden(path: str) -> bool:
    """Whether Spark ignores a file: a part of its path begins with "." or, unless it is a partition, with "_"."""
    parts = [part for part in path.split("/") if part not in (".", "..")]  # ordinary parts of an object key
    return any(part.startswith(".") or (part.startswith("_") and "=" not in part) for part in parts)


def _may_be_parquet(path: str, location: Location) -> bool:
    """Whether a file that does not end in `.parquet` can be a shard: it has no ending, or the input spells it out."""
    if path.endswith("/") or not path:  # an object that stands for a folder
        return False
    ending = _ENDING.search(path)
    return ending is None or location.file is not None or any(p.endswith(ending[0]) for p in location.patterns)


def _without_braces(pattern: str) -> Iterator[str]:
    """Expand the alternatives in braces: `{a,b}c` becomes `ac` and `bc`. Braces without a comma are ordinary."""
    match = re.search(r"\{([^{}]*,[^{}]*)\}", pattern)
    if match is None:
        yield pattern
        return
    for alternative in match[1].split(","):
        yield from _without_braces(pattern[: match.start()] + alternative + pattern[match.end() :])


def _matching(pattern: list[str], parts: list[str]) -> bool:
    """Whether a path, or one that continues it, may match a pattern, or one around it does."""
    for glob, part in zip(pattern, parts):
        if glob == "**":
            return True
        if not re.match(glob_translate(glob), part):
            return False
    return True
