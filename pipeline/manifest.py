"""`_SUCCESS`, the manifest of a complete output, and the reading of markers.

A run deletes `_SUCCESS` before it changes anything. It creates the file, never replacing one, when every row of the
corpus is either a result or quarantined. A run that was paused may create one that is out of date, so runs and readers
use it only if it names the markers that exist.
"""

import json
import time
from collections.abc import Iterable, Iterator
from typing import Any

from .corpus import MARKERS, QUARANTINE, Shard
from .errors import PipelineError, StorageError, UsageError
from .storage import Storage

SUCCESS = "_SUCCESS"

Marker = dict[str, Any]  # as `commit.write_marker` makes it
_OF_A_MARKER = {"shard", "version", "size", "written", "rows", "results", "quarantined", "splits"}

_OF_A_COPY = {"parts", "output"}


def read_markers(output: Storage, paths: Iterable[str]) -> Iterator[tuple[str, Marker | None]]:
    """Read the markers at these paths. Yields each path with its marker, or with None if the marker is damaged.

    Raises:
        StorageError: a marker cannot be read; names it.
    """
    for path, data in output.read_many(paths):
        try:
            yield path, _entries(data, _OF_A_MARKER)
        except ValueError:
            yield path, None


def _entries(data: bytes, names: set[str]) -> dict[str, Any]:
    """Parse a JSON object; raises ValueError if it is none or lacks one of these names."""
    values = json.loads(data)
    if not isinstance(values, dict) or not names <= values.keys():
        raise ValueError(f"{', '.join(sorted(names))} are not all there")
    return values


def marker_path(marker: Marker) -> str:
    """The path of a marker in the output."""
    return Shard(marker["shard"], marker["version"], marker["size"]).marker


def named_objects(marker: Marker) -> set[str]:
    """The paths of the results and quarantine objects of a marker's shard."""
    names = {split["object"] for split in marker["splits"]}
    return names | {f"{QUARANTINE}/{split['object']}" for split in marker["splits"] if split["quarantined"]}


def newest(markers: Iterable[Marker]) -> list[Marker]:
    """The marker of the latest run for each shard, sorted by shard.

    A shard has two markers after a new version is marked and before the old marker is deleted. A run that was paused
    may also write an old marker late, so runs are ordered by `epoch`, their lease's number. Markers of older versions
    have no epoch.
    """
    found: dict[str, Marker] = {}
    for marker in markers:
        if marker["shard"] not in found or _order(marker) > _order(found[marker["shard"]]):
            found[marker["shard"]] = marker
    return [found[shard] for shard in sorted(found)]


def _order(marker: Marker) -> tuple[int, float]:
    return marker.get("epoch", 0), marker["written"]


def read_manifest(output: Storage) -> dict[str, Any] | None:
    """The content of `_SUCCESS`; None if it does not exist. The caller must check that it matches the markers.

    Raises:
        StorageError: it cannot be read or is damaged.
        UsageError: the output is a compacted copy.
    """
    data = output.read_if_there(SUCCESS)
    try:
        manifest = _entries(data, {"shards"}) if data is not None else None
    except ValueError as error:
        raise StorageError(f"{output.uri}/{SUCCESS}: damaged: {error}; run again to write it anew") from error
    if manifest is not None and manifest.keys() >= _OF_A_COPY:
        raise UsageError(f"{output.uri}: a compacted copy of {manifest.get('source')}; use that, or another prefix")
    return manifest


def read_copy(output: Storage) -> dict[str, Any] | None:
    """The manifest of a copy made by `jobs/compact.py`; None if the output is not such a copy."""
    data = output.read_if_there(SUCCESS)
    try:
        return _entries(data, _OF_A_COPY) if data is not None else None
    except ValueError:
        return None


def complete_markers(output: Storage) -> list[Marker]:
    """The newest marker of every complete shard, taken from `_SUCCESS` if that names exactly the existing markers.

    Raises:
        StorageError: a marker cannot be read or is damaged; names it.
    """
    for attempt in (1, 2):
        paths = [file.path for file in output.files(MARKERS)]
        manifest = read_manifest(output)
        if manifest is not None and {marker_path(marker) for marker in manifest["shards"]} == set(paths):
            return newest(manifest["shards"])
        try:
            return newest(_undamaged(output, paths))
        except StorageError as error:
            # A run may have deleted a marker after the listing: list again.
            if attempt == 2 or not isinstance(error.__cause__, FileNotFoundError):
                raise
    raise AssertionError


def _undamaged(output: Storage, paths: list[str]) -> Iterator[Marker]:
    for path, marker in read_markers(output, paths):
        if marker is None:
            raise StorageError(f"{output.uri}/{path}: a damaged marker; run again to write it anew")
        yield marker


def write_manifest(
    output: Storage,
    identity: dict[str, Any],
    markers: Iterable[Marker],
    removed: list[str],
    run_id: str,
    epoch: int = 0,
) -> dict[str, Any]:
    """Create `_SUCCESS` for a complete output that has none, and return its content.

    Args:
        identity: what the output was made with (`job.make_identity`).
        markers: of all shards, including those in `removed`.
        removed: shards that have results in the output and are no longer in the corpus.
        epoch: the number of the run's lease.

    Raises:
        PipelineError: another run created a different one meanwhile.
    """
    markers = newest(markers)
    totals = {count: sum(marker[count] for marker in markers) for count in ("rows", "results", "quarantined")}
    manifest = {
        **{"format": 1, "run": run_id, "epoch": epoch, "written": time.time(), **totals},
        **{"output": identity, "removed": removed, "shards": markers},
    }
    data = json.dumps(manifest, separators=(",", ":")).encode()
    if not output.create(SUCCESS, data) and output.read(SUCCESS) != data:
        raise PipelineError(f"{output.uri}/{SUCCESS}: another run wrote it meanwhile; run again")
    return manifest
