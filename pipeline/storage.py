"""Where files live: one class over fsspec for local paths and object stores.

Credentials come from the environment or the usual AWS configuration, read inside each process: a Storage pickles as
its URI alone, and its errors name places, never credentials.
"""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import fsspec
from botocore.exceptions import BotoCoreError, ClientError

from .errors import PipelineError, StorageError, UsageError

# Files of a model directory; whatever else lies there (pickled weights, optimizer states) is not fetched.
_MODEL_FILES = (".json", ".safetensors", ".txt")


@dataclass(frozen=True)
class StoredFile:
    """A listed file: its path below the listed root, bytes, and what tells one version of it from another."""

    path: str
    size: int
    version: str


class Storage:
    """A prefix in some file system.

    Args:
        uri: a local path or any fsspec URI. `memory://` is refused: it is one process's own.
    """

    def __init__(self, uri: str):
        protocol = uri.split("://", 1)[0] if "://" in uri else "file"
        if protocol in ("file", "local"):  # absolute: Ray's workers have working directories of their own
            uri = os.path.abspath(os.path.expanduser(uri.removeprefix(f"{protocol}://")))
        self.uri = uri.rstrip("/") if uri.strip("/") else uri
        if protocol == "memory":
            raise UsageError(f"{uri}: memory:// is private to one process and cannot be shared with Ray's workers")
        if "@" in urlsplit(uri).netloc:
            raise UsageError(
                "credentials do not belong in a URI: put them into the environment or the AWS configuration"
            )
        self.protocol = protocol
        self._fs: fsspec.AbstractFileSystem | None = None
        self._root = ""

    def __getstate__(self) -> dict[str, Any]:
        return {"uri": self.uri}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["uri"])  # type: ignore[misc]

    def __repr__(self) -> str:
        return f"Storage({self.uri!r})"

    @property
    def fs(self) -> fsspec.AbstractFileSystem:
        """The file system, made on first use in each process."""
        if self._fs is None:
            try:
                # Listings change while a run writes, so none may be cached.
                options = {"use_listings_cache": False} if self.protocol in ("s3", "s3a") else {}
                fs, root = fsspec.core.url_to_fs(self.uri, **options)
            except (ValueError, ImportError) as error:
                raise UsageError(f"{self.uri}: {error}") from error
            self._fs, self._root = fs, root.rstrip("/") if root != "/" else root
        return self._fs

    @property
    def root(self) -> str:
        """The prefix in the file system's own terms."""
        return self._root if self._fs or self.fs else ""

    @property
    def is_local(self) -> bool:
        return self.protocol in ("file", "local")

    def location(self, path: str) -> str:
        """A path below the prefix → its full path in the file system."""
        return f"{self.root}/{path}" if path else self.root

    @contextlib.contextmanager
    def errors(self, action: str, path: str = "") -> Iterator[None]:
        """Turn what file systems raise into a StorageError that names the place."""
        try:
            yield
        except PipelineError:
            raise
        except (OSError, ValueError, BotoCoreError, ClientError) as error:
            place = f"{self.uri}/{path}" if path else self.uri
            reason = " ".join(str(error).split()) or type(error).__name__
            raise StorageError(f"{place}: cannot {action}: {reason}") from error

    def files(self, below: str = "") -> list[StoredFile]:
        """All files under a path below the prefix, in the order of their paths; none if there is nothing."""
        with self.errors("list", below):
            try:
                # S3 lists empty prefixes and missing ones alike; local paths raise.
                found = self.fs.find(self.location(below), detail=True)
            except FileNotFoundError:
                return []
        return sorted((self._stored_file(name, info) for name, info in found.items()), key=lambda file: file.path)

    def glob(self) -> list[StoredFile]:
        """The files that the prefix, read as a pattern, matches."""
        fixed = self.location("").split("*", 1)[0].rsplit("/", 1)[0]
        with self.errors("list"):
            found = self.fs.glob(self.root, detail=True)
        files = {name: info for name, info in found.items() if info["type"] == "file"}
        return sorted((self._stored_file(n, i, base=fixed) for n, i in files.items()), key=lambda file: file.path)

    def _stored_file(self, name: str, info: dict[str, Any], base: str | None = None) -> StoredFile:
        base = self.root if base is None else base
        path = name[len(base) :].lstrip("/") or name.rsplit("/", 1)[-1]
        return StoredFile(path, info["size"] or 0, _version(info))

    def version(self, path: str) -> str:
        """The present version of a file below the prefix, as `files` would give it."""
        with self.errors("read", path):
            return _version(self.fs.info(self.location(path)))

    def open(self, path: str) -> IO[bytes]:
        """Open a file below the prefix for reading."""
        with self.errors("read", path):
            return self.fs.open(self.location(path), "rb")

    def read(self, path: str) -> bytes:
        """A whole file below the prefix."""
        with self.errors("read", path):
            return self.fs.cat_file(self.location(path))

    def write(self, path: str, data: bytes) -> None:
        """Write a whole file at once, replacing an older one: readers see the old or the new, never a part."""
        with self.errors("write", path):
            if self.is_local:
                with _beside(self.location(path), data) as temporary:
                    os.replace(temporary, self.location(path))
            else:
                self.fs.pipe_file(self.location(path), data)

    def create(self, path: str, data: bytes) -> bool:
        """Write a whole file at once unless it exists; whether this call wrote it."""
        with self.errors("write", path):
            try:
                if self.is_local:
                    with _beside(self.location(path), data) as temporary:
                        os.link(temporary, self.location(path))
                else:
                    self.fs.pipe_file(self.location(path), data, mode="create")
            except OSError as error:
                if not _is_there_already(error):
                    raise
                return False
        return True

    def delete(self, paths: list[str]) -> None:
        """Delete files below the prefix; those already gone are no error."""
        with self.errors("delete"):
            for path in paths:
                with contextlib.suppress(FileNotFoundError):
                    self.fs.rm_file(self.location(path))

    def check_writable(self) -> None:
        """Write and delete a small file, so that a missing permission is found before work starts."""
        probe = f"_runs/.write-check-{os.getpid()}"
        self.write(probe, b"")
        self.delete([probe])


def _is_there_already(error: OSError) -> bool:
    """Whether a conditional write found the object there; s3fs says so only in the error's cause."""
    if isinstance(error, FileExistsError):
        return True
    cause = error.__cause__
    return isinstance(cause, ClientError) and cause.response["Error"]["Code"] == "PreconditionFailed"


@contextlib.contextmanager
def _beside(path: str, data: bytes) -> Iterator[str]:
    """A synced temporary file with `data` in the directory of `path`, hidden from readers, gone afterwards."""
    directory = os.path.dirname(path)
    os.makedirs(directory, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=directory, prefix="._", delete=False) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    try:
        os.chmod(file.name, 0o644)
        yield file.name
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(file.name)


def _version(info: dict[str, Any]) -> str:
    """Size and ETag, or modification time where there is none, as a short hash."""
    changed = info.get("ETag") or info.get("mtime") or info.get("LastModified") or info.get("updated")
    return hashlib.sha256(f"{info['size']}:{changed}".encode()).hexdigest()[:12]


def fetch_model(uri: str) -> Path:
    """A model directory on this machine: the path itself if it is local, else a cached copy of the URI.

    Raises:
        UsageError: there is no config.json at the URI.
        StorageError: it cannot be read.
    """
    storage = Storage(uri)
    if storage.is_local:
        directory = Path(storage.root)
        if not (directory / "config.json").is_file():
            raise UsageError(f"{uri}: not a model directory: no config.json there")
        return directory
    files = [file for file in storage.files() if "/" not in file.path and file.path.endswith(_MODEL_FILES)]
    if not any(file.path == "config.json" for file in files):
        raise UsageError(f"{uri}: not a model directory: no config.json there")
    listing = "\n".join([uri, *(f"{file.path} {file.version}" for file in files)])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trbert-pipeline"
    directory = cache / hashlib.sha256(listing.encode()).hexdigest()[:32]
    if not directory.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as partial:
            whole = Path(partial) / "model"
            whole.mkdir()
            for file in files:
                with storage.errors("read", file.path):
                    storage.fs.get_file(storage.location(file.path), str(whole / file.path))
            # Another process may have been faster; then its copy is the same and the rename fails.
            with contextlib.suppress(OSError):
                whole.rename(directory)
            if not directory.is_dir():
                raise StorageError(f"{directory}: the model's copy could not be put there")
    return directory


def model_digest(directory: Path) -> str:
    """SHA-256 over the files of a model directory that decide its results."""
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if path.is_file() and path.name.endswith(_MODEL_FILES) and path.name != "training.json":
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()
