"""The model of a run: its metadata for the driver, and its files on this machine."""

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
    model are fetched, so no pickled weights.

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
            # Another process may have stored the same copy meanwhile.
            if not _is_whole(directory, files):
                with contextlib.suppress(OSError):
                    directory.rename(Path(partial) / "damaged")
                with contextlib.suppress(OSError):
                    whole.rename(directory)
            if not _is_whole(directory, files):
                raise StorageError(f"{directory}: the model's copy could not be put there whole")
    return directory


def _is_whole(directory: Path, files: list[StoredFile]) -> bool:
    """Whether a cached copy has all of these files, with the listed sizes (0: unknown).

    Cache cleaners may delete single files by their age. The contents are checked later, by the model's digest.
    """
    paths = [(directory / file.path, file.size) for file in files]
    return all(path.is_file() and size in (0, path.stat().st_size) for path, size in paths)
