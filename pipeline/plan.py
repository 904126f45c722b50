"""What a run has to do: the corpus's shards minus what the output already holds.

A shard is complete if its marker and every object that the marker names exist, and no other results of this version
do. Markers are taken from `_SUCCESS` if it names them; no other objects are opened.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .corpus import MARKERS, OBJECT_NAME, QUARANTINE, Shard
from .errors import StorageError
from .manifest import SUCCESS, Marker, marker_path, named_objects, read_manifest, read_markers
from .storage import Storage


@dataclass
class Plan:
    """What a run has to do.

    Attributes:
        pending: shards to score, each with the indices of the splits whose results already exist.
        complete: the other shards.
        markers: markers of the complete shards, by path.
        distrusted: paths of the markers of pending shards, which are out of date or were never valid.
        superseded: by shard key, files to delete when the shard is complete, unless its marker names them.
        removed: by shard key, files of shards that are no longer in the corpus. These lists and those of
            `superseded` are in `deletion_order`.
        manifest: content of `_SUCCESS`, if it describes exactly these complete shards.
        has_success: whether `_SUCCESS` exists.
    """

    pending: list[tuple[Shard, frozenset[int]]] = field(default_factory=list)
    complete: list[Shard] = field(default_factory=list)
    markers: dict[str, Marker] = field(default_factory=dict)
    distrusted: list[str] = field(default_factory=list)
    superseded: dict[str, list[str]] = field(default_factory=dict)
    removed: dict[str, list[str]] = field(default_factory=dict)
    manifest: dict[str, Any] | None = None
    has_success: bool = False


def deletion_order(path: str) -> tuple[int, str]:
    """Sort key for files to delete: markers first, then results, then quarantined rows.

    So no marker names an object that is deleted, and a process that dies between two deletions never leaves results
    without their quarantined rows.
    """
    return 0 if path.startswith(f"{MARKERS}/") else 2 if path.startswith(f"{QUARANTINE}/") else 1, path


def make_plan(shards: Sequence[Shard], output: Storage, identity_key: str | None = None) -> Plan:
    """Compare the shards with the files in the output.

    Args:
        identity_key: what the run would write into its objects (`commit.identity_key`). Markers with another key are
            not trusted; None trusts all.
    """
    files: dict[str, list[tuple[str, str, str, int | None]]] = {}  # shard key → (version, path, folder, index)
    existing = set()
    for file in output.files():
        folder, _, name = file.path.rpartition("/")
        match = OBJECT_NAME.match(name)
        existing.add(file.path)
        if match is None or folder not in ("", MARKERS, QUARANTINE):
            continue
        index = int(match["index"]) if match["index"] else None
        files.setdefault(match["key"], []).append((match["version"], file.path, folder, index))

    plan = Plan(has_success=SUCCESS in existing)
    manifest = _manifest(output) if plan.has_success else None
    markers = _markers(output, [shard.marker for shard in shards if shard.marker in existing], manifest)
    for shard in shards:
        mine = files.pop(shard.key, [])
        marker = markers.get(shard.marker)
        results = {
            path: index
            for version, path, folder, index in mine
            if version == shard.version and folder == "" and index is not None
        }
        named: set[str] = set()
        if marker is not None and _is_ours(marker, shard, identity_key):
            named = {shard.marker, *named_objects(marker)}
        if marker is not None and named and results.keys() <= named <= existing:
            plan.complete.append(shard)
            plan.markers[shard.marker] = marker
        else:
            named = set()
            plan.pending.append((shard, frozenset(results.values())))
            plan.distrusted += [shard.marker] if shard.marker in existing else []
        if old := [path for _, path, _, _ in mine if path not in named]:
            plan.superseded[shard.key] = sorted(old, key=deletion_order)
    plan.removed = {key: sorted((path for _, path, _, _ in mine), key=deletion_order) for key, mine in files.items()}
    if manifest is not None and _is_of(manifest, plan):
        plan.manifest = manifest
    return plan


def _manifest(output: Storage) -> dict[str, Any] | None:
    try:
        return read_manifest(output)
    except StorageError as error:
        if isinstance(error.__cause__, ValueError):  # damaged: it is deleted, like one that is out of date
            return None
        raise


def _markers(output: Storage, paths: list[str], manifest: dict[str, Any] | None) -> dict[str, Marker]:
    """The undamaged markers at these paths, by path; those that the manifest has are not read."""
    in_manifest = {marker_path(marker): marker for marker in manifest["shards"]} if manifest else {}
    known = {path: in_manifest[path] for path in paths if path in in_manifest}
    unknown = [path for path in paths if path not in in_manifest]
    return known | {path: marker for path, marker in read_markers(output, unknown) if marker is not None}


def _is_ours(marker: Marker, shard: Shard, identity_key: str | None) -> bool:
    """Whether a marker is for this shard and version, and was not written late by a run with other options."""
    others = identity_key is not None and marker.get("identity", identity_key) != identity_key
    return (marker["shard"], marker["version"]) == (shard.path, shard.version) and not others


def _is_of(manifest: dict[str, Any], plan: Plan) -> bool:
    """Whether no shard is pending and the manifest names the complete shards and, besides, only removed ones."""
    removed = set(manifest.get("removed", ()))
    in_manifest = {marker_path(marker) for marker in manifest["shards"] if marker["shard"] not in removed}
    return not plan.pending and in_manifest == {shard.marker for shard in plan.complete}
