"""The model of a run: its metadata for the driver, and its files on this machine."""

import contextlib
import hashlib
import os
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

from trbert_model.checkpoints.files import ABOUT_THE_MODEL, INDEX, counted_files
from trbert_model.errors import TRBertError
from trbert_model.tasks.base import Task
from trbert_model.terminal import get_logger

from .errors import StorageError, UsageError
from .storage import Storage, StoredFile

logger = get_logger(__name__)


@dataclass(frozen=True)
class ModelSource:
    """A model as the driver knows it.

    Attributes:
        uri: directory or URI as given in the options.
        directory: local directory with the files.
        digest: SHA-256 of the files that decide the results.
        window: window length in tokens.
        task: the task of the model's head.
        layers, reduction_layers: number of its layers, and those before which tokens are dropped.
    """

    uri: str
    directory: Path
    digest: str
    window: int
    task: Task
    layers: int = 0
    reduction_layers: tuple[int, ...] = ()


def fetch_model(uri: str) -> Path:
    """Return a local model directory: the path itself if it is local, otherwise a cached copy of the URI.

    Of a URI, only files that decide the results (`trbert_model.checkpoints.files.counted_files`) and tables about the
    model are fetched, so no pickled weights. The copy is in `$XDG_CACHE_HOME/trbert-pipeline`, by default below
    `~/.cache`, or, if that cannot be written, in the directory for temporary files.

    Raises:
        UsageError: there is no config.json, or the index of the weights is damaged, names files outside the model or
            names missing files.
        StorageError: the model cannot be read, or the copy cannot be stored.
    """
    storage = Storage(uri)
    if storage.is_local:
        directory = Path(storage.root)
        if not (directory / "config.json").is_file():
            raise UsageError(f"{uri}: not a model directory: no config.json there")
        return directory
    stored = {file.path: file for file in storage.files()}
    if "config.json" not in stored:
        raise UsageError(f"{uri}: not a model directory: no config.json there")
    try:
        names = counted_files(stored, storage.read(INDEX) if INDEX in stored else None, uri)
    except TRBertError as error:
        raise UsageError(str(error)) from error
    if missing := [name for name in names if name not in stored]:
        raise UsageError(f"{uri}: {INDEX} names {missing[:5]}, which are not there")
    # The calibration tables do not change the results, but speeds are chosen from them.
    files = [stored[name] for name in sorted({*names, *ABOUT_THE_MODEL} & stored.keys())]
    listing = "\n".join([uri, *(f"{file.path} {file.version}" for file in files)])
    name = hashlib.sha256(listing.encode()).hexdigest()[:32]
    cache = _users_cache()
    if cache is None or not (_is_whole(cache / name, files) or _is_writable(cache)):
        cache = _temporary_cache()
    directory = cache / name
    if not _is_whole(directory, files):
        with tempfile.TemporaryDirectory(dir=cache) as partial:
            whole = Path(partial) / "model"
            whole.mkdir()
            for file in files:
                (whole / file.path).parent.mkdir(parents=True, exist_ok=True)
                storage.fetch(file.path, whole / file.path)
            # Another process may have stored the same copy meanwhile.
            if not _is_whole(directory, files):
                with contextlib.suppress(OSError):
                    directory.rename(Path(partial) / "damaged")
                with contextlib.suppress(OSError):
                    whole.rename(directory)
            if not _is_whole(directory, files):
                raise StorageError(f"{directory}: the model's copy could not be put there whole")
    return directory


def _users_cache() -> Path | None:
    """The folder for copies in the user's cache; None if there is no home directory."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trbert-pipeline"
    except RuntimeError:
        return None


def _is_writable(directory: Path) -> bool:
    """Whether files can be created in a directory, which is created if it does not exist."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(directory, os.W_OK | os.X_OK)


def _temporary_cache() -> Path:
    """The user's own folder for copies in the directory for temporary files, shared by all processes.

    Raises:
        StorageError: it cannot be created, or another user could write there.
    """
    cache = Path(tempfile.gettempdir()) / f"trbert-pipeline-{os.getuid()}"
    try:
        cache.mkdir(mode=0o700, exist_ok=True)
        status = cache.lstat()
    except OSError as error:
        raise StorageError(f"{cache}: the model's copy cannot be put there: {error}") from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise StorageError(
            f"{cache}: is not a directory that only this user can write; remove it or set XDG_CACHE_HOME"
        )
    logger.warning("the user's cache cannot be written: the model is copied to %s (XDG_CACHE_HOME sets another)", cache)
    return cache


def _is_whole(directory: Path, files: list[StoredFile]) -> bool:
    """Whether a cached copy has all of these files, with the listed sizes (0: unknown).

    Cache cleaners may delete single files by their age. The contents are checked later, by the model's digest.
    """
    paths = [(directory / file.path, file.size) for file in files]
    return all(path.is_file() and size in (0, path.stat().st_size) for path, size in paths)
