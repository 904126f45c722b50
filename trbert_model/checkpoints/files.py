"""A saved model's directory: which of its files count, and their digest.

A digest names what is loaded: nothing but the files that count is opened, whatever else lies in the directory and
wherever their entries point, and a directory that changes meanwhile is refused. What has been loaded has memory of its
own: files that are overwritten later change nothing in it, where weights mapped into memory would follow them.
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

if TYPE_CHECKING:  # what only the names of files are asked of starts without torch
    from torch import Tensor

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"  # which of several files holds which weight
_SUFFIXES = (".json", ".safetensors", ".txt")
# Of these, the ones that say something about the model and change nothing in its results.
ABOUT_THE_MODEL = ("training.json", "calibration.json")


def model_digest(directory: str | Path) -> str:
    """SHA-256 over the names, sizes and contents of the files that count.

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
    """The files of a model directory that decide its results, by their names below it: all JSON, safetensors and text
    files in it but those about the model, and the weights in folders below that its index names. Links are followed.

    Raises:
        CheckpointError: it cannot be listed; the index is damaged, names files outside, others than safetensors or
            some that are not there.
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


def counted_files(names: Iterable[str], index: bytes | None, place: str) -> list[str]:
    """The files that count, of a directory with files of these names and this index, sorted.

    Raises:
        CheckpointError: the index is damaged, or names files outside the directory or others than safetensors.
    """
    inside = {name for name in names if "/" not in name and name.endswith(_SUFFIXES) and name not in ABOUT_THE_MODEL}
    return sorted(inside | set(_weights(inside, index, place)))


def _weights(names: Iterable[str], index: bytes | None, place: str) -> list[str]:
    """The weights' files, as transformers chooses them: one file goes before an index."""
    if WEIGHTS in names:
        return [WEIGHTS]
    if index is None:
        return []
    try:
        named = list(json.loads(index)["weight_map"].values())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{place}: {INDEX} is damaged ({type(error).__name__}: {error})") from error
    if bad := [name for name in named if not isinstance(name, str) or not name.endswith(".safetensors")]:
        raise CheckpointError(f"{place}: {INDEX} names {bad[:5]}; only safetensors are read")
    if outside := [name for name in named if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts]:
        raise CheckpointError(f"{place}: {INDEX} names {outside[:5]}, outside the directory")
    return sorted({str(PurePosixPath(name)) for name in named})


@dataclass(frozen=True)
class SavedFiles:
    """A model directory, the names of its files that count, and their digest."""

    directory: Path
    names: list[str]
    digest: str

    def weights(self) -> "dict[str, Tensor]":
        """All tensors.

        Raises:
            CheckpointError: there are none, or a file is no safetensors file.
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
                tensors.update(load_file(self.directory / name, backend="pread"))  # "mmap" would follow the file
            except Exception as error:
                raise CheckpointError(f"{self.directory / name}: cannot be read as safetensors: {error}") from error
        return tensors


@contextlib.contextmanager
def saved_files(directory: Path) -> Iterator[SavedFiles]:
    """The files of a model directory, to be read before this ends.

    Raises:
        CheckpointError: there is no config.json, a file cannot be read, or they have changed in the end.
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
    """What tells one version of each file that counts from another; None for one that has just gone."""
    signature: dict[str, tuple[int, ...] | None] = {}
    for name in model_files(directory):
        signature[name] = None
        with contextlib.suppress(FileNotFoundError):
            found = os.stat(directory / name)
            signature[name] = (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    return signature
