"""The model files in a directory, and their digest.

The digest identifies exactly what is loaded: only the model files are opened, whatever else the directory contains and
whatever paths they name, and loading fails if they change meanwhile. Weights are read instead of memory-mapped, so
overwriting the files later does not change a loaded model.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from ..errors import CheckpointError

if TYPE_CHECKING:  # processes that only need file names start without torch
    from torch import Tensor

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"  # maps each weight to one of several files
_SUFFIXES = (".json", ".safetensors", ".txt")
# Files with these suffixes that describe the model but do not affect its results.
ABOUT_THE_MODEL = ("training.json", "calibration.json")


def model_digest(directory: str | Path) -> str:
    """SHA-256 over the names, sizes and contents of the model files.

    Raises:
        CheckpointError: see `model_files`.
    """
    return _digest(Path(directory), model_files(directory))


def _digest(directory: Path, names: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for name in names:
        digest.update(os.fsencode(f"{name}\0{(directory / name).stat().st_size}\0"))
        with (directory / name).open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def model_files(directory: str | Path) -> list[str]:
    """The files of a model directory that affect its results, as sorted relative paths.

    These are the JSON, safetensors and text files directly in the directory, except `ABOUT_THE_MODEL`, and the weights
    in subdirectories that its index names. Links are followed.

    Raises:
        CheckpointError: the directory cannot be listed, or its index is damaged or names missing files, files outside
            the directory, or files other than safetensors.
    """
    directory = Path(directory)
    try:
        names = [path.name for path in directory.iterdir() if path.is_file()]
        index = (directory / INDEX).read_bytes() if INDEX in names else None
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be read: {error.strerror}") from error
    counted = counted_files(names, index, str(directory))
    if missing := [name for name in counted if name not in names and not (directory / name).is_file()]:
        raise CheckpointError(f"{directory}: {INDEX} names {missing[:5]}, which are not there")
    return counted


def counted_files(names: Iterable[str], index: bytes | None, directory: str) -> list[str]:
    """The model files of a directory with these files and this index, sorted; see `model_files`.

    Args:
        names: relative paths of the directory's files.
        index: contents of the index of weights, None if there is none.
        directory: the directory's name, for error messages.

    Raises:
        CheckpointError: the index is damaged, or names files outside the directory or other than safetensors.
    """
    inside = {name for name in names if "/" not in name and name.endswith(_SUFFIXES) and name not in ABOUT_THE_MODEL}
    return sorted(inside | set(_weights(inside, index, directory)))


def _weights(names: Iterable[str], index: bytes | None, directory: str) -> list[str]:
    """The weight files, chosen as in transformers: a single file takes precedence over an index."""
    if WEIGHTS in names:
        return [WEIGHTS]
    if index is None:
        return []
    try:
        named = list(json.loads(index)["weight_map"].values())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{directory}: {INDEX} is damaged ({type(error).__name__}: {error})") from error
    if bad := [name for name in named if not isinstance(name, str) or not name.endswith(".safetensors")]:
        raise CheckpointError(f"{directory}: {INDEX} names {bad[:5]}; only safetensors are read")
    if outside := [name for name in named if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts]:
        raise CheckpointError(f"{directory}: {INDEX} names {outside[:5]}, outside the directory")
    return sorted({str(PurePosixPath(name)) for name in named})


@dataclass(frozen=True)
class SavedFiles:
    """A model directory, the relative paths of its model files, and their digest."""

    directory: Path
    names: list[str]
    digest: str

    def weights(self) -> "dict[str, Tensor]":
        """Read all tensors.

        Raises:
            CheckpointError: there are no weights, or a file is not a safetensors file.
        """
        from safetensors.torch import load_file

        index = (self.directory / INDEX).read_bytes() if INDEX in self.names else None
        names = _weights(self.names, index, str(self.directory))
        if not names:
            if any(self.directory.glob("*.bin")) or any(self.directory.glob("*.pt")):
                raise CheckpointError(
                    f"{self.directory}: only pickled weights there, which are not read; save them as safetensors first"
                )
            raise CheckpointError(f"{self.directory}: no {WEIGHTS} there")
        tensors: dict[str, Tensor] = {}
        for name in names:
            try:
                tensors.update(load_file(self.directory / name, backend="pread"))  # "mmap" sees later changes
            except Exception as error:
                raise CheckpointError(f"{self.directory / name}: cannot be read as safetensors: {error}") from error
        return tensors


@contextlib.contextmanager
def saved_files(directory: Path) -> Iterator[SavedFiles]:
    """The model files of a directory, to be read within the context.

    Raises:
        CheckpointError: there is no config.json, a file cannot be read, or the files changed within the context.
    """
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory}: no config.json there; a model is a directory with config.json and weights")
    try:
        before = _signature(directory)
        files = SavedFiles(directory, list(before), _digest(directory, before))
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be read: {error.strerror} ({error.filename})") from error
    yield files
    if _signature(directory) != before:
        raise CheckpointError(f"{directory}: its files changed while it was loaded; load it again")


def _signature(directory: Path) -> dict[str, tuple[int, ...] | None]:
    """Inode, size and times of each model file, to detect changes; None for a file that was just removed."""
    signature: dict[str, tuple[int, ...] | None] = {}
    for name in model_files(directory):
        signature[name] = None
        with contextlib.suppress(FileNotFoundError):
            status = os.stat(directory / name)
            signature[name] = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return signature
