"""The corpus: its shards with their versions, and what their objects in an output are called."""

import hashlib
import re
from dataclasses import dataclass

from .errors import UsageError
from .storage import Storage, StoredFile, glob_root

MARKERS = "_shards"
QUARANTINE = "_quarantine"
RUNS = "_runs"
IDENTITY = "_output.json"

# Names are a slug for people plus a hash of the whole path, so that no shard's name can leave the output prefix,
# collide with another's, or hold a character that some reader of the output treats specially.
OBJECT_NAME = re.compile(r"(?P<key>.+-[0-9a-f]{16})-(?P<version>[0-9a-f]{12})(-(?P<index>\d{6}))?\.(parquet|json)$")


@dataclass(frozen=True)
class Shard:
    """One Parquet file of the corpus: its path below the input, version and bytes."""

    path: str
    version: str
    size: int

    @property
    def key(self) -> str:
        """What its objects in the output are called, without version and index."""
        name = self.path.rsplit("/", 1)[-1].removesuffix(".parquet")
        slug = re.sub(r"[^A-Za-z0-9.-]+", "-", name).strip(".-")[:60] or "shard"
        return f"{slug}-{hashlib.sha256(self.path.encode(errors='surrogateescape')).hexdigest()[:16]}"

    @property
    def marker(self) -> str:
        """Where its completeness is recorded."""
        return f"{MARKERS}/{self.key}-{self.version}.json"

    def object(self, index: int) -> str:
        """Where the results of one of its splits go; its quarantined rows go to the same name below _quarantine."""
        return f"{self.key}-{self.version}-{index:06d}.parquet"


def list_shards(storage: Storage) -> list[Shard]:
    """The Parquet files of a corpus: a file, everything below a prefix, or what a glob matches.

    Names that begin with '_' or '.', in any directory, are other programs' markers and temporary files: not shards.

    Raises:
        UsageError: there is none, or one whose name is not UTF-8.
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
    """What shard paths are relative to: the prefix, a single file's directory, a glob's fixed part."""
    storage = Storage(input_uri)
    if "*" in input_uri:
        return glob_root(storage.uri)
    if storage.uri.endswith(".parquet") and not storage.fs.isdir(storage.root):
        return storage.uri.rsplit("/", 1)[0] if "/" in storage.uri else "."
    return storage.uri


def _is_shard(file: StoredFile) -> bool:
    parts = [part for part in file.path.split("/") if part not in (".", "..")]  # of keys, where they mean nothing
    return file.path.endswith(".parquet") and not any(part.startswith(("_", ".")) for part in parts)
