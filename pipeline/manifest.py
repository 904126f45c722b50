"""`_SUCCESS`: that an output is complete, and a manifest of everything in it. Also how markers are read.

It is deleted before a run writes its first object and written, by a PUT that replaces nothing, when every row of every
shard of the corpus is a result or quarantined: who finds it finds a complete output.
"""

import json
import time
from collections.abc import Iterable, Iterator
from typing import Any

from .corpus import MARKERS
from .errors import PipelineError, StorageError
from .storage import Storage

SUCCESS = "_SUCCESS"

Marker = dict[str, Any]  # as `commit.write_marker` makes it
_OF_A_MARKER = {"shard", "written", "rows", "results", "quarantined", "splits"}


def read_markers(output: Storage, paths: Iterable[str]) -> Iterator[tuple[str, Marker]]:
    """Markers with their paths.

    Raises:
        StorageError: one cannot be read or is damaged; names it.
    """
    for path, data in output.read_many(paths):
        try:
            marker = _entries(data, _OF_A_MARKER)
        except ValueError as error:
            raise StorageError(f"{output.uri}/{path}: a damaged marker: {error}") from error
        yield path, marker


def _entries(data: bytes, names: set[str]) -> dict[str, Any]:
    """A JSON object that has these entries; else a ValueError."""
    values = json.loads(data)
    if not isinstance(values, dict) or not names <= values.keys():
        raise ValueError(f"{', '.join(sorted(names))} are not all there")
    return values


def newest(markers: Iterable[Marker]) -> list[Marker]:
    """One marker a shard: between a new version's marker and the removal of the old one both are there."""
    found: dict[str, Marker] = {}
    for marker in markers:
        if marker["shard"] not in found or marker["written"] > found[marker["shard"]]["written"]:
            found[marker["shard"]] = marker
    return [found[shard] for shard in sorted(found)]


def read_manifest(output: Storage) -> dict[str, Any] | None:
    """The manifest of a complete output; None if it is not complete."""
    try:
        return _entries(output.read(SUCCESS), {"shards"})
    except ValueError as error:
        raise StorageError(f"{output.uri}/{SUCCESS}: damaged: {error}; delete it and run again") from error
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise


def complete_markers(output: Storage) -> list[Marker]:
    """The newest marker of every complete shard: from the manifest where there is one, else one by one."""
    if manifest := read_manifest(output):
        return manifest["shards"]
    paths = [file.path for file in output.files(MARKERS)]
    try:
        return newest(marker for _, marker in read_markers(output, paths))
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):  # a run has just replaced one of them
            paths = [file.path for file in output.files(MARKERS)]
            return newest(marker for _, marker in read_markers(output, paths))
        raise


def write_manifest(
    output: Storage, identity: dict[str, Any], known: dict[str, Marker], removed: list[str], run_id: str
) -> dict[str, Any]:
    """Write `_SUCCESS`. To be called when the output is complete and no older one is there.

    Args:
        identity: what the output is bound to.
        known: markers by their paths that need not be read again.
        removed: shards with results here that are no longer in the corpus.
    """
    paths = [file.path for file in output.files(MARKERS)]
    unknown = dict(read_markers(output, [path for path in paths if path not in known]))
    markers = newest(known.get(path) or unknown[path] for path in paths)
    totals = {count: sum(marker[count] for marker in markers) for count in ("rows", "results", "quarantined")}
    manifest = {
        **{"format": 1, "run": run_id, "written": time.time(), **totals},
        **{"output": identity, "removed": removed, "shards": markers},
    }
    data = json.dumps(manifest, separators=(",", ":")).encode()
    if not output.create(SUCCESS, data) and output.read(SUCCESS) != data:
        raise PipelineError(f"{output.uri}/{SUCCESS}: another run wrote it meanwhile; run again")
    return manifest
