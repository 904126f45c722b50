"""The model of a run: what the driver knows of it, and its files on this machine."""

import contextlib
import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from trbert_model.checkpoints.files import ABOUT_THE_MODEL, INDEX, counted_files
from trbert_model.errors import TRBertError
from trbert_model.tasks.base import Task

from .errors import StorageError, UsageError
from .storage import Storage, StoredFile


@dataclass(frozen=True)
class Model:
    """A model as far as the driver needs it: where it was given, its local directory, digest, window length in tokens,
    and its task."""

    uri: str
    directory: Path
    digest: str
    window: int
    task: Task


def fetch_model(uri: str) -> Path:
    """A model directory on this machine: the path itself if it is local, else a cached copy of the URI.

    Whatever does not count (`trbert_model.checkpoints.files.counted_files`), as pickled weights, is not fetched.

    Raises:
        UsageError: there is no config.json at the URI, or its index of weights is damaged, names files outside the
            model or some that are not there.
        StorageError: it cannot be read.
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
    # The calibration tables count for nothing in the results, but speeds are chosen from them.
    files = [stored[name] for name in sorted({*names, *ABOUT_THE_MODEL} & stored.keys())]
    listing = "\n".join([uri, *(f"{file.path} {file.version}" for file in files)])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trbert-pipeline"
    directory = cache / hashlib.sha256(listing.encode()).hexdigest()[:32]
    if not _is_whole(directory, files):
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as partial:
            whole = Path(partial) / "model"
            whole.mkdir()
            for file in files:
                (whole / file.path).parent.mkdir(parents=True, exist_ok=True)
                storage.fetch(file.path, whole / file.path)
            # Another process may have been faster; then its copy is the same.
            if not _is_whole(directory, files):
                with contextlib.suppress(OSError):
                    directory.rename(Path(partial) / "damaged")
                with contextlib.suppress(OSError):
                    whole.rename(directory)
            if not _is_whole(directory, files):
                raise StorageError(f"{directory}: the model's copy could not be put there whole")
    return directory


def _is_whole(directory: Path, files: list[StoredFile]) -> bool:
    """Whether a copy has these files in their sizes, where the listing knows them. What tidies up caches goes by the
    files' age; contents are for the model's digest to tell."""
    paths = [(directory / file.path, file.size) for file in files]
    return all(path.is_file() and size in (0, path.stat().st_size) for path, size in paths)
