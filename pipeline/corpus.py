"""The corpus: its shards with their versions, and the names of their objects in an output."""

import hashlib
import re
from dataclasses import dataclass

from .errors import UsageError
from .storage import Storage, StoredFile, glob_root

MARKERS = "_shards"
QUARANTINE = "_quarantine"
RUNS = "_runs"
IDENTITY = "_output.json"

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
    """

    path: str
    version: str
    size: int

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


def list_shards(storage: Storage) -> list[Shard]:
    """List the Parquet files of a corpus: a single file, all files below a prefix, or the matches of a glob.

    Files and directories whose names begin with "_" or "." are skipped: they are other programs' markers and temporary
    files.

    Raises:
        UsageError: there are no Parquet files, or a file's name is not UTF-8.
        StorageError: the input cannot be listed.
    """
    files = storage.glob() if "*" in storage.uri else storage.files()
    shards = [Shard(file.path, file.version, file.size) for file in files if _is_shard(file)]
    if not shards:
        raise UsageError(f"{storage.uri}: no Parquet files there ({len(files)} other files)")
    for shard in shards:
        try:
            shard.path.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"{storage.uri}: the name {shard.path!a} is not UTF-8; rename it") from error
    return shards


def input_root(input_uri: str) -> str:
    """The URI that shard paths are relative to: the prefix, a single file's directory, or a glob's fixed part."""
    storage = Storage(input_uri)
    if "*" in input_uri:
        return glob_root(storage.uri)
    if storage.uri.endswith(".parquet") and not storage.fs.isdir(storage.root):
        return storage.uri.rsplit("/", 1)[0] if "/" in storage.uri else "."
    return storage.uri


def _is_shard(file: StoredFile) -> bool:
    parts = [part for part in file.path.split("/") if part not in (".", "..")]  # ordinary parts of an object key
    return file.path.endswith(".parquet") and not any(part.startswith(("_", ".")) for part in parts)
