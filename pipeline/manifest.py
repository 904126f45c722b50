"""`_SUCCESS`: that an output is complete, and a manifest of everything in it. Also how markers are read.

It is deleted before a run changes anything and written, by a PUT that replaces nothing, when every row of every shard
of the corpus is a result or quarantined. A run that was paused meanwhile may still write one that is no longer true, so
runs and readers believe it only if it names the markers that are there.
"""

import json
import time
from collections.abc import Iterable, Iterator
from typing import Any

from .corpus import MARKERS, QUARANTINE, Shard
from .errors import PipelineError, StorageError
from .storage import Storage

SUCCESS = "_SUCCESS"

Marker = dict[str, Any]  # as `commit.write_marker` makes it
_OF_A_MARKER = {"shard", "version", "size", "written", "rows", "results", "quarantined", "splits"}


def read_markers(output: Storage, paths: Iterable[str]) -> Iterator[tuple[str, Marker | None]]:
    """Markers with their paths; None for one that is damaged.

    Raises:
        StorageError: one cannot be read; names it.
    """
    for path, data in output.read_many(paths):
        try:
            yield path, _entries(data, _OF_A_MARKER)
        except ValueError:
            yield path, None


def _entries(data: bytes, names: set[str]) -> dict[str, Any]:
    """A JSON object that has these entries; else a ValueError."""
    values = json.loads(data)
    if not isinstance(values, dict) or not names <= values.keys():
        raise ValueError(f"{', '.join(sorted(names))} are not all there")
    return values


def marker_path(marker: Marker) -> str:
    """Where a marker lies."""
    return Shard(marker["shard"], marker["version"], marker["size"]).marker


def named_objects(marker: Marker) -> set[str]:
    """Everything that a complete shard has, beside its marker."""
    names = {split["object"] for split in marker["splits"]}
    return names | {f"{QUARANTINE}/{split['object']}" for split in marker["splits"] if split["quarantined"]}


def newest(markers: Iterable[Marker]) -> list[Marker]:
    """One marker a shard, the one of the latest run: between a new version's marker and the removal of the old one
    both are there, and a run that was paused may write an old one late. Runs are ordered by their leases' numbers;
    markers of before there were such have none."""
    found: dict[str, Marker] = {}
    for marker in markers:
        if marker["shard"] not in found or _order(marker) > _order(found[marker["shard"]]):
            found[marker["shard"]] = marker
    return [found[shard] for shard in sorted(found)]


def _order(marker: Marker) -> tuple[int, float]:
    return marker.get("epoch", 0), marker["written"]


def read_manifest(output: Storage) -> dict[str, Any] | None:
    """What `_SUCCESS` says; None if it is not there. Whether it is true, its caller finds out."""
    data = output.read_if_there(SUCCESS)
    try:
        return _entries(data, {"shards"}) if data is not None else None
    except ValueError as error:
        raise StorageError(f"{output.uri}/{SUCCESS}: damaged: {error}; run again to write it anew") from error


def complete_markers(output: Storage) -> list[Marker]:
    """The newest marker of every complete shard: from the manifest where it names what is there, else one by one.

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
            # A run may just have replaced one of them; then look again.
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
    """Write `_SUCCESS`. To be called when the output is complete and no older one is there.

    Args:
        identity: what the output is bound to.
        markers: one a shard, those of `removed` too.
        removed: shards with results here that are no longer in the corpus.
        epoch: the run's number.
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
