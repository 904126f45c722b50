"""File access: one class over fsspec for local paths and object stores.

Requests that fail for a transient reason (throttling, server errors, connection errors) are retried with exponential
backoff and full jitter for a limited time. All other errors, and those that persist, become a StorageError of one
line. Each process reads the credentials from the environment or the usual AWS configuration. A Storage pickles without
them, and its errors never contain them.
"""

import contextlib
import errno
import hashlib
import http.client
import io
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import urlsplit

import aiohttp
import botocore.exceptions
import botocore.parsers
import fsspec
from botocore.exceptions import BotoCoreError, ClientError
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

from trbert_model.terminal import get_logger

from .errors import PipelineError, StorageError, UsageError
from .stopping import StopRequest

logger = get_logger(__name__)

Result = TypeVar("Result")

# Longer than an S3 server takes to restart, but short enough to wait for if the endpoint is wrong.
RETRY_SECONDS = 180.0
_LONGEST_WAIT = 15.0  # maximum seconds between two attempts; jitter shortens them
_LISTING_ATTEMPTS = 4  # for each page, so that a listing of a thousand pages does not restart because of one
_FILES_AT_ONCE = 512

# S3's transient error codes, in addition to the statuses 409 (concurrent conditional writes), 429 and 5xx. Those in the
# second line have status 400 and are about a body that was truncated or damaged in transit.
_PASSING_CODES = {
    *("SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequestsException"),
    *("RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch"),
}
_EXPIRED_CODES = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"}
_PASSING_ERRORS = (
    *(ConnectionError, TimeoutError, http.client.IncompleteRead, aiohttp.ClientError),
    *(botocore.exceptions.HTTPClientError, botocore.exceptions.ConnectionError),
    *(botocore.parsers.ResponseParserError,),
)
_PASSING_NUMBERS = {
    *(errno.EBUSY, errno.EAGAIN, errno.EPIPE, errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ESTALE),
    getattr(errno, "EREMOTEIO", errno.EBUSY),
}

# Temporary files of local writes. A process that is killed while writing leaves its file behind. A file that has not
# changed for this many seconds is considered abandoned.
_TEMPORARY = "._trbert-"
_ABANDONED_SECONDS = 3600.0


@dataclass(frozen=True)
class StoredFile:
    """A listed file: its path below the listed root, its size in bytes, and a hash that identifies its version."""

    path: str
    size: int
    version: str


class Storage:
    """A prefix in a file system.

    Args:
        uri: a local path or any fsspec URI except `memory://`, which is private to one process.
        retry_seconds: how long to retry a request that fails for a transient reason, counted from its first attempt.
            The last attempt may end later.
        stop: nothing is retried after this stop request's grace. Not pickled.
        fence: called before each attempt to write, create or delete; raises an error to prevent it. Not pickled.

    Raises:
        UsageError: the URI is malformed, contains credentials or has the protocol `memory://`.
    """

    def __init__(
        self,
        uri: str,
        retry_seconds: float = RETRY_SECONDS,
        stop: StopRequest | None = None,
        fence: Callable[[], None] = lambda: None,
    ):
        protocol = uri.split("://", 1)[0] if "://" in uri else "file"
        if protocol == "file" and re.match(r"[a-z][a-z0-9+.-]+:/[^/]", uri):
            raise UsageError(f"{uri}: a URI has two slashes after its protocol (a local path of this name: ./{uri})")
        if protocol in ("file", "local"):  # absolute, since Ray's workers have other working directories
            uri = os.path.abspath(os.path.expanduser(uri.removeprefix(f"{protocol}://")))
        self.uri = uri.rstrip("/") if uri.strip("/") else uri
        if protocol == "memory":
            raise UsageError(f"{uri}: memory:// is private to one process and cannot be shared with Ray's workers")
        if protocol not in ("file", "local"):
            _check_authority(uri)
        self.protocol = protocol
        self.retry_seconds = retry_seconds
        self._stop, self._fence = stop or StopRequest(), fence
        self.retries = 0  # attempts beyond the first of each of this object's requests
        self._fs: fsspec.AbstractFileSystem | None = None
        self._root = ""

    def __getstate__(self) -> dict[str, Any]:
        return {"uri": self.uri, "retry_seconds": self.retry_seconds}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __repr__(self) -> str:
        return f"Storage({self.uri!r})"

    def fenced(self, fence: Callable[[], None]) -> "Storage":
        """A copy of this storage that writes and deletes only if `fence` allows it."""
        return Storage(self.uri, self.retry_seconds, self._stop, fence)

    def at(self, uri: str) -> "Storage":
        """A storage at another URI with the same retries, stop request and fence."""
        return Storage(uri, self.retry_seconds, self._stop, self._fence)

    @property
    def parent(self) -> "Storage | None":
        """The storage of the enclosing directory; None for a bucket or the root directory."""
        uri = self.uri.rpartition("/")[0].rstrip("/")
        return self.at(uri) if "/" in uri and ("://" in uri or self.is_local) else None

    @property
    def fs(self) -> fsspec.AbstractFileSystem:
        """The fsspec file system, created on first use in each process."""
        if self._fs is None:
            try:
                if self.is_local:  # url_to_fs would take the text after "::" in a path for another URL
                    fs, root = fsspec.filesystem("file"), self.uri
                else:
                    fs, root = fsspec.core.url_to_fs(self.uri, **self._options())
            except (ValueError, ImportError, OSError) as error:
                raise UsageError(f"{self.uri}: {error}") from error
            if self.is_s3:
                fs.retries = 1  # its own retries would multiply with ours, without a time limit
            self._fs, self._root = fs, root.rstrip("/") if root != "/" else root
        return self._fs

    @property
    def root(self) -> str:
        """The prefix as a path of the file system."""
        return self._root if self._fs or self.fs else ""

    @property
    def is_local(self) -> bool:
        return self.protocol in ("file", "local")

    @property
    def is_s3(self) -> bool:
        return self.protocol in ("s3", "s3a")

    def _options(self) -> dict[str, Any]:
        if not self.is_s3:
            return {}
        # Listings change while a run writes, so none may be cached.
        retries = {"mode": "standard", "total_max_attempts": _LISTING_ATTEMPTS}
        return {"use_listings_cache": False, "config_kwargs": {"retries": retries}}

    def location(self, path: str) -> str:
        """The full path in the file system of a path below the prefix."""
        return f"{self.root}/{path}" if path else self.root

    @contextlib.contextmanager
    def errors(self, action: str, path: str = "") -> Iterator[None]:
        """Turn errors of file systems into a StorageError that names the path."""
        try:
            yield
        except PipelineError:
            raise
        except (OSError, ValueError, BotoCoreError, ClientError, aiohttp.ClientError) as error:
            uri = f"{self.uri}/{path}" if path else self.uri
            raise StorageError(f"{uri}: cannot {action}: {_reason(error)}") from error

    def _call(self, action: str, path: str, request: Callable[[], Result]) -> Result:
        """Make a request, and retry it for `retry_seconds` while it fails for a transient reason."""

        def count(state: RetryCallState) -> None:
            self.retries += 1
            if state.attempt_number == 1 and state.outcome is not None:
                reason = _reason(state.outcome.exception())
                logger.warning(
                    "%s: cannot %s (%s); trying again for %g s", self.uri, action, reason, self.retry_seconds
                )

        out_of_time = stop_after_delay(self.retry_seconds)
        retrying = Retrying(
            retry=retry_if_exception(is_passing),
            wait=wait_random_exponential(multiplier=0.25, max=_LONGEST_WAIT),
            stop=lambda state: self._stop.grace_is_over or out_of_time(state),
            sleep=self._stop.wait_in_grace,
            before_sleep=count,
            reraise=True,
        )
        with self.errors(action, path):
            return retrying(request)

    def files(self, below: str = "") -> list[StoredFile]:
        """List all files under a path below the prefix, sorted by path. The list is empty if the path does not exist.

        Raises:
            StorageError: the path cannot be listed, or the bucket does not exist.
        """
        try:
            found = self._call("list", below, lambda: self.fs.find(self.location(below), detail=True))
        except StorageError as error:
            if isinstance(error.__cause__, FileNotFoundError) and self.is_local:
                return []
            raise
        if not found and self.is_s3:  # a missing bucket is listed as an empty one
            bucket = self.root.split("/", 1)[0]
            self._call("list", below, lambda: self.fs.call_s3("head_bucket", Bucket=bucket))
        found = self._regular(found)
        return sorted((self._stored_file(name, info) for name, info in found.items()), key=lambda file: file.path)

    def entries(self, depth: int | None = None, stem: str = "") -> dict[str, StoredFile | None]:
        """List files and directories (None) below the prefix, by path.

        Args:
            depth: levels of directories to list; None for all.
            stem: what the names in the first level begin with. Not all file systems leave others out.
        """
        options: dict[str, Any] = {"prefix": stem} if stem and self.fs.async_impl else {}
        found = self._call(
            "list", "", lambda: self.fs.find(self.root, maxdepth=depth, withdirs=True, detail=True, **options)
        )
        root = self.root.rstrip("/")
        directories = [name for name, info in found.items() if info["type"] == "directory"]
        entries: dict[str, StoredFile | None] = {name[len(root) :].removeprefix("/"): None for name in directories}
        files = (self._stored_file(name, info) for name, info in self._regular(found).items())
        return entries | {file.path: file for file in files}

    def kind(self, path: str = "") -> str | None:
        """What is at a path below the prefix: "file", "directory" or "other"; None if nothing is or access is denied.

        Raises:
            StorageError: a transient error persists.
        """
        location = self.location(path)
        try:
            kind = self._call("read", path, lambda: self.fs.info(location))["type"]
            if kind == "file" and not self.is_local:  # an object may be named like a prefix
                return "directory" if self._call("list", path, lambda: self.fs.isdir(location)) else "file"
            return kind
        except StorageError as error:
            if error.__cause__ is not None and is_passing(error.__cause__):
                raise
            return None

    def _regular(self, found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """The files of a listing, links with their targets' attributes. Opening a pipe would block."""
        files = {}
        for name, info in found.items():
            if info.get("islink"):  # the listing has the link's own type and time, `version` the target's
                try:
                    info = self.fs.info(name)
                except OSError:  # it leads nowhere or in circles: listed, so that it is reported
                    info = {**info, "type": "file"}
            if info["type"] == "file":
                files[name] = info
        return files

    def _stored_file(self, name: str, info: dict[str, Any], base: str | None = None) -> StoredFile:
        base = (self.root if base is None else base).rstrip("/")
        if name.rstrip("/") == base:  # a single file, or an object named like the prefix
            base = name.rpartition("/")[0].rstrip("/")
        # Remove only one slash: keys may have empty parts, which belong to the name.
        return StoredFile(name[len(base) :].removeprefix("/"), info["size"] or 0, _version(info))

    def listed(self, path: str) -> str | None:
        """The version of a file below the prefix in a new listing; None if it is not listed."""
        if self.is_s3:  # only keys that begin with the path, as its folder may be large
            found = self._call("list", path, lambda: self.fs.find(self.root, detail=True, prefix=path))
            files = [self._stored_file(name, info) for name, info in found.items()]
        else:
            files = self.files(path.rpartition("/")[0])
        return next((file.version for file in files if file.path == path), None)

    def version(self, path: str) -> str:
        """The current version of a file below the prefix, as in `files`."""
        return _version(self._call("read", path, lambda: self.fs.info(self.location(path))))

    def open(self, path: str) -> IO[bytes]:
        """Open a file below the prefix for reading."""
        location = self.location(path)
        if self.is_local:
            return self._call("read", path, lambda: self.fs.open(location, "rb"))
        # pyarrow requests exactly the bytes it needs, so reading ahead would be wasted.
        file = self._call("read", path, lambda: self.fs.open(location, "rb", cache_type="none"))
        return _RetryingFile(file, lambda request: self._call("read", path, request))  # type: ignore[return-value]

    def read(self, path: str, end: int | None = None) -> bytes:
        """Read a whole file below the prefix, or its first `end` bytes."""
        part = {} if end is None else {"start": 0, "end": end}
        return self._call("read", path, lambda: self.fs.cat_file(self.location(path), **part))

    def read_if_there(self, path: str) -> bytes | None:
        """Read a whole file below the prefix; None if it does not exist."""
        try:
            return self.read(path)
        except StorageError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise

    def read_many(self, paths: Iterable[str], end: int | None = None) -> Iterator[tuple[str, bytes]]:
        """Read whole files below the prefix, concurrently if the file system can. Yields them in the given order.

        Args:
            end: read only this many bytes of each.
        """
        paths = list(paths)
        for start in range(0, len(paths), _FILES_AT_ONCE):
            some = {self.location(path): path for path in paths[start : start + _FILES_AT_ONCE]}
            with self.errors("read"):
                # Not `cat`, which would take "[", "?" and "*" in the prefix for a pattern.
                contents = self.fs.cat_ranges(list(some), None if end is None else 0, end, on_error="return")
            for path, data in zip(some.values(), contents):
                yield path, data if isinstance(data, bytes) else self.read(path, end)

    def read_range(self, path: str, start: int, end: int) -> bytes:
        """Read the bytes of a file below the prefix from `start` to `end` (exclusive)."""
        return self._call("read", path, lambda: self.fs.cat_file(self.location(path), start=start, end=end))

    def fetch(self, path: str, to: Path) -> None:
        """Copy a file below the prefix to a local path."""
        self._call("read", path, lambda: self.fs.get_file(self.location(path), str(to)))

    def write(self, path: str, data: bytes) -> None:
        """Write or replace a file atomically: readers see the old or the new content, never a part."""

        def request() -> None:
            self._fence()
            if self.is_local:
                with _beside(self.location(path), data) as temporary:
                    os.replace(temporary, self.location(path))
            else:
                self.fs.pipe_file(self.location(path), data)

        self._call("write", path, request)

    def create(self, path: str, data: bytes) -> bool:
        """Write a file atomically unless it exists. Returns whether this call wrote it.

        False may also mean that this call wrote it and the response was lost. To find out, compare the contents.
        """

        def request() -> bool:
            self._fence()
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

        return self._call("write", path, request)

    def delete(self, paths: Iterable[str]) -> None:
        """Delete files below the prefix in the given order; missing files are ignored."""

        def request(location: str) -> None:
            self._fence()
            with contextlib.suppress(FileNotFoundError):
                self.fs.rm_file(location)

        for path in paths:
            self._call("delete", path, partial(request, self.location(path)))

    def sweep(self) -> int:
        """Remove temporary files that killed processes left below a local prefix. Returns how many."""
        if not self.is_local:
            return 0
        removed, before = 0, time.time() - _ABANDONED_SECONDS
        for directory, _, names in os.walk(self.root):
            for name in names:
                path = os.path.join(directory, name)
                # Another process may have deleted it, or we may lack the permission.
                with contextlib.suppress(OSError):
                    if name.startswith(_TEMPORARY) and os.lstat(path).st_mtime < before:
                        os.unlink(path)
                        removed += 1
        return removed


def is_same_place(one: Storage, other: Storage) -> bool:
    """Whether two prefixes are the same, also by links and different spellings of a local path."""
    if one.is_local and other.is_local:
        return os.path.realpath(one.root) == os.path.realpath(other.root)
    return (one.is_s3 or one.protocol, one.root) == (other.is_s3 or other.protocol, other.root)


def open_file(uri: str) -> IO[bytes]:
    """Open a file at any URI for reading, with the retries of a Storage.

    Raises:
        UsageError: the URI is invalid.
        StorageError: the file cannot be opened.
    """
    return Storage(uri).open("")


class _RetryingFile(io.RawIOBase):
    """A remote file, open for reading. `call` retries its reads, also those that return too few bytes."""

    def __init__(self, file: Any, call: Callable[[Callable[[], bytes]], bytes]):
        self._file, self._call, self._position = file, call, 0

    def read(self, size: int | None = -1) -> bytes:
        left = self._file.size - self._position
        wanted = left if size is None or size < 0 else max(0, min(size, left))

        def request() -> bytes:
            self._file.seek(self._position)
            data = self._file.read(wanted)
            if len(data) < wanted:
                raise ConnectionError(f"{len(data)} bytes came where {wanted} were asked for")
            return data

        data = self._call(request) if wanted else b""
        self._position += len(data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._file.size}[whence]
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()


def _check_authority(uri: str) -> None:
    """Refuse URIs without a bucket and URIs with credentials.

    A secret key may contain "/", and the part before it then looks like a host with a port that is not a number.
    """
    for part in uri.split("::"):
        try:
            url = urlsplit(part)
        except ValueError as error:
            raise UsageError(f"{uri}: {error}") from error
        host, _, port = url.netloc.partition(":")
        # Azure's URIs have the form abfs://container@account…; credentials would be a name and a secret, with a colon.
        named = url.scheme in ("abfs", "abfss", "wasb", "wasbs") and ":" not in url.netloc
        if ("@" in url.netloc and not named) or (port and not port.isdigit()):
            safe = f"{url.scheme}://…" + ("@" + part.rpartition("@")[2] if "@" in part else "")
            raise UsageError(
                f"{safe}: credentials do not belong in a URI: put them into the environment or the AWS configuration"
            )
        if url.scheme in ("s3", "s3a") and not host:
            raise UsageError(f"{uri}: it names no bucket")


def is_passing(error: BaseException) -> bool:
    """Whether a request that failed with this error may succeed if it is retried."""
    if (refusal := _refusal(error)) is not None:
        response = refusal.response
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return status in (409, 429) or status >= 500 or response["Error"].get("Code") in _PASSING_CODES
    return isinstance(error, _PASSING_ERRORS) or (isinstance(error, OSError) and error.errno in _PASSING_NUMBERS)


def _refusal(error: BaseException | None) -> ClientError | None:
    """The error response of an object store, if the error or its cause is one."""
    causes = (error, error.__cause__ if error else None)
    return next((each for each in causes if isinstance(each, ClientError)), None)


def _reason(error: BaseException | None) -> str:
    """Describe an error in one line, without secrets."""
    refusal = _refusal(error)
    code = (refusal.response.get("Error") or {}).get("Code") if refusal else None
    text = " ".join(str(error).split()) or type(error).__name__
    if code in _EXPIRED_CODES:
        text = f"the credentials have expired ({code}); renew them and run again"
    elif code in ("NoSuchBucket",) or (refusal and code == "404" and refusal.operation_name == "HeadBucket"):
        text = "there is no such bucket"
    elif isinstance(error, FileNotFoundError):
        text = "there is no such file"
    elif isinstance(error, botocore.exceptions.NoCredentialsError):
        text = "no credentials were found in the environment or the AWS configuration"
    elif code and code not in text:
        text = f"{text} ({code})"
    return _without_secrets(text)


def _without_secrets(text: str) -> str:
    """Mask user information and signatures in URLs, and the values of AWS credentials in the environment."""
    text = re.sub(r"//[^/@\s]+@", "//***@", text)
    text = re.sub(r"(?i)(X-Amz-(?:Signature|Credential|Security-Token)=)[^&\s\"']+", r"\1***", text)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        value = os.environ.get(name, "")
        if len(value) >= 8:  # a shorter value is not a real key, and would match inside words
            text = text.replace(value, "***")
    return text


def _is_there_already(error: OSError) -> bool:
    """Whether a conditional write failed because the object exists; s3fs reports this only in the error's cause."""
    if isinstance(error, FileExistsError):
        return True
    cause = error.__cause__
    return isinstance(cause, ClientError) and cause.response["Error"]["Code"] == "PreconditionFailed"


@contextlib.contextmanager
def _beside(path: str, data: bytes) -> Iterator[str]:
    """Write `data` to a synced temporary file in the directory of `path`, hidden from readers, and delete it later."""
    directory = os.path.dirname(path)
    os.makedirs(directory, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=directory, prefix=_TEMPORARY)
    try:
        with open(handle, "wb") as file:  # closing it may fail, too, if the disk is full
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        yield name
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def _version(info: dict[str, Any]) -> str:
    """A short hash of a file's size and its ETag, or its modification time if it has no ETag."""
    changed = info.get("ETag") or info.get("mtime") or info.get("LastModified") or info.get("updated")
    return hashlib.sha256(f"{info['size']}:{changed}".encode()).hexdigest()[:12]
