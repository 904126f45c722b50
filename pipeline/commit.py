"""Publish splits under deterministic names, write markers, and read an output by its markers.

A split's results object is its commit. It is written by one atomic PUT that never replaces a valid split, so the first
writer wins, and retries and reruns can neither duplicate rows nor expose part of a split. Every split gets a results
object, even one without results, so the objects that exist are the checkpoint.

The results object also carries the split's quarantined rows in its metadata. Their own object is written afterwards and
always from this metadata, so that both objects come from the same computation.
"""

import base64
import dataclasses
import hashlib
import json
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq

from .corpus import IDENTITY, MARKERS, OBJECT_NAME, QUARANTINE, SCHEMA, Shard
from .deaths import DEATHS
from .errors import PipelineError, StorageError, UsageError
from .ledger import NO_LEDGER, WHOLE, LedgerClient
from .manifest import SUCCESS, Marker, complete_markers, named_objects, read_copy
from .plan import deletion_order
from .report import SplitStats
from .rows import REJECTED_SCHEMA, ErrorKind, error_table, from_ipc, split_table, to_ipc
from .schema import Types
from .storage import Storage

METADATA = b"trbert.split"
VERSION = "trbert.thresholds_version"  # metadata of results that may have been scored at several operating points
_AT_ONCE = 16  # splits settled in parallel


@dataclass(frozen=True)
class Committed:
    """A published split.

    Attributes:
        object: name of its results object.
        results, quarantined: number of rows of each kind.
        sha256, bytes: SHA-256 and size of the results object.
        quarantine_sha256: SHA-256 of the object with its quarantined rows; None if it has none, "" if an older version
            wrote it.
        thresholds_version: that of its rows, with `finish_by`; otherwise None.
    """

    object: str
    results: int
    quarantined: int
    sha256: str
    bytes: int
    quarantine_sha256: str | None = ""
    thresholds_version: str | None = None


def publish_splits(
    batch: pa.Table, output: Storage, ledger: LedgerClient = NO_LEDGER, identity_key: str = ""
) -> pa.Table:
    """Ray Data stage: publish scored splits and set `committed` in their rows; failed splits pass through."""
    rows = []
    for i in range(batch.num_rows):
        row = batch.slice(i, 1).drop_columns(["payload", "rejected"]).to_pylist()[0]
        if row["error"] is not None or row["index"] < 0:
            rows.append(split_table(row))
            continue
        started, retries = time.perf_counter(), output.retries
        shard = Shard(row["shard"], row["version"], row["size"])
        try:
            with ledger.work(f"writing {shard.path} {shard.version} {row['index']}") as entry:
                if WHOLE in entry.care.killers:
                    raise PipelineError(f"writing it killed its process {entry.care.deaths} times")
                entry.touch(WHOLE)
                results, rejected = from_ipc(batch["payload"][i]), from_ipc(batch["rejected"][i])
                committed = publish(output, shard, row["index"], results, rejected, identity_key)
        except PipelineError as error:
            kind = ErrorKind.OUTPUT if isinstance(error, StorageError) else ErrorKind.WORK
            rows.append(error_table(row, error, kind))
            continue
        stats = SplitStats.from_json(row["stats"])
        stats.result_bytes, stats.commit_seconds = committed.bytes, time.perf_counter() - started
        stats.storage_retries += output.retries - retries
        committed_json = json.dumps(dataclasses.asdict(committed))
        rows.append(split_table(row | {"stats": stats.to_json(), "committed": committed_json}))
    return pa.concat_tables(rows)


def publish(
    output: Storage, shard: Shard, index: int, results: pa.Table, rejected: pa.Table, identity_key: str = ""
) -> Committed:
    """Write a split's results and quarantined rows, unless the output already holds the split.

    Returns:
        What the output now holds: another writer's split if that was published first.

    Raises:
        StorageError: the output cannot be read or written.
    """
    name = shard.object(index)
    counts = {"results": results.num_rows, "quarantined": rejected.num_rows, "identity": identity_key}
    if rejected.num_rows:
        plain = to_ipc(rejected)
        compressed = pa.compress(plain, "zstd", asbytes=True)
        counts |= {"rejected": base64.b64encode(compressed).decode(), "rejected_bytes": len(plain)}
    metadata = {**(results.schema.metadata or {}), METADATA: json.dumps(counts).encode()}
    data = parquet_bytes(results.replace_schema_metadata(metadata))
    if not output.create(name, data):
        if (committed := settle_split(output, name, identity_key)) is not None:
            return committed
        output.write(name, data)  # the existing object is damaged, or from a run with other options
    return _settled(output, name, data, identity_key)


def settle_split(output: Storage, name: str, identity_key: str = "", types: Types | None = None) -> Committed | None:
    """Read a results object that exists, and write its quarantined rows if their object is missing or different.

    Returns:
        None if the object is not a complete split of this output: it is damaged, was made with other options, or was
        written by an older version and its quarantined rows are missing or its columns are not of these types.

    Raises:
        StorageError: the output cannot be read or written.
    """
    try:
        return _settled(output, name, output.read(name), identity_key, types)
    except StorageError:
        raise
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError, _NotOursError):
        return None


class _NotOursError(Exception):
    """A results object is not a complete split of this output."""


def _settled(output: Storage, name: str, data: bytes, identity_key: str, types: Types | None = None) -> Committed:
    parquet = pq.ParquetFile(pa.BufferReader(data))
    if any(parquet.schema_arrow.field(column).type != kind for column, kind in (types or {}).items()):
        raise _NotOursError
    counts = json.loads(parquet.schema_arrow.metadata[METADATA])
    if counts.get("identity", identity_key) != identity_key:
        raise _NotOursError
    quarantined, sha256 = counts["quarantined"], None
    if quarantined:
        path = f"{QUARANTINE}/{name}"
        existing = output.read_if_there(path)
        if "rejected" in counts:
            rejected = embedded_rejects(counts)
            if existing is None or not holds(existing, rejected):
                existing = parquet_bytes(rejected)
                output.write(path, existing)
        elif existing is None or pq.ParquetFile(pa.BufferReader(existing)).metadata.num_rows != quarantined:
            raise _NotOursError
        sha256 = hashlib.sha256(existing).hexdigest()
    digest = hashlib.sha256(data).hexdigest()
    version = parquet.schema_arrow.metadata.get(VERSION.encode(), b"").decode() or None
    return Committed(name, parquet.metadata.num_rows, quarantined, digest, len(data), sha256, version)


def embedded_rejects(counts: dict[str, Any]) -> pa.Table:
    """Decode the quarantined rows in a results object's metadata entry `METADATA`."""
    compressed = base64.b64decode(counts["rejected"])
    return from_ipc(pa.decompress(compressed, counts["rejected_bytes"], "zstd", asbytes=True))


def holds(data: bytes | None, rejected: pa.Table) -> bool:
    """Whether an object with quarantined rows holds exactly these rows; False if it is damaged."""
    try:
        return pq.read_table(pa.BufferReader(data)).equals(rejected)
    except (pa.ArrowException, OSError):
        return False


def settle_done(
    output: Storage,
    pending: Iterable[tuple[Shard, frozenset[int]]],
    identity_key: str,
    types: Types | None = None,
) -> dict[tuple[str, int], Committed]:
    """Take over the splits that an earlier run published for incomplete shards.

    Objects that are not complete splits of this output are deleted, so that the splits are computed again.

    Args:
        types: the types of the kept columns in the output.

    Returns:
        The published splits, by shard path and split index.
    """

    def settle(item: tuple[Shard, int]) -> tuple[tuple[str, int], Committed | None]:
        shard, index = item
        committed = settle_split(output, shard.object(index), identity_key, types)
        if committed is None:
            output.delete([shard.object(index)])
        return (shard.path, index), committed

    items = [(shard, index) for shard, done in pending for index in sorted(done)]
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="settle") as pool:
        return {key: committed for key, committed in pool.map(settle, items) if committed is not None}


def parquet_bytes(table: pa.Table) -> bytes:
    """A table as a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def write_marker(
    output: Storage,
    shard: Shard,
    splits: list[Committed],
    run_id: str,
    *,
    epoch: int = 0,
    identity_key: str = "",
    superseded: Iterable[str] = (),
) -> Marker:
    """Record that a shard is complete, then delete its other files.

    Args:
        superseded: the files of its key that existed before, as in `Plan.superseded`; those that the marker names stay.
    """
    marker = {
        "shard": shard.path,
        "version": shard.version,
        "size": shard.size,
        "rows": sum(split.results + split.quarantined for split in splits),
        "results": sum(split.results for split in splits),
        "quarantined": sum(split.quarantined for split in splits),
        "splits": [dataclasses.asdict(split) for split in splits],
        "run": run_id,
        "epoch": epoch,
        "identity": identity_key,
        "written": time.time(),
    }
    output.write(shard.marker, json.dumps(marker, indent=1).encode())
    output.delete(sorted(set(superseded) - named_objects(marker) - {shard.marker}, key=deletion_order))
    return marker


def bind_output(
    output: Storage, identity: dict[str, Any], *, overwrite: bool, defaults: dict[str, Any] | None = None
) -> None:
    """Record the identity of a new output, or check that an existing output has the same one.

    Args:
        overwrite: clear an output with another identity and record this one.
        defaults: values of the options that an output of an older version does not record.

    Raises:
        UsageError: the output was made with another model or other options and `overwrite` is not set.
    """
    recorded = output_identity(output)
    if differences := identity_differences({**(defaults or {}), **(recorded or identity)}, identity):
        if not overwrite:
            raise refusal(output, differences)
        clear_output(output)
    if recorded is None or differences:
        output.write(IDENTITY, json.dumps(identity, indent=1, sort_keys=True).encode())


def refusal(output: Storage, differences: list[str]) -> UsageError:
    """The error for an output that was made with another model or other options."""
    return UsageError(
        f"{output.uri}: made with {'; '.join(differences)}. Choose another output or the same settings, "
        "or replace it with --overwrite"
    )


def output_identity(output: Storage) -> dict[str, Any] | None:
    """Read the identity that an output records (its input, model and options); None if it has none yet.

    Raises:
        StorageError: it is damaged or cannot be read.
    """
    if not any(file.path == IDENTITY for file in output.files(IDENTITY)):
        return None
    try:
        identity = json.loads(output.read(IDENTITY))
        if not isinstance(identity, dict):
            raise ValueError("it is no mapping")
        return identity
    except ValueError as error:
        raise StorageError(f"{output.uri}/{IDENTITY}: damaged: {error}") from error


def identity_differences(recorded: dict[str, Any], identity: dict[str, Any]) -> list[str]:
    """Describe each setting that differs between an output's recorded identity and a run's."""
    names = sorted(set(recorded) | set(identity))
    return [
        f"{name} {recorded.get(name)!r} where this run has {identity.get(name)!r}"
        for name in names
        if recorded.get(name) != identity.get(name)
    ]


def identity_key(identity: dict[str, Any], defaults: dict[str, Any]) -> str:
    """Hash an identity to 16 characters, which are stored in the output's objects.

    Options at their defaults are left out, so that a version with more options computes the same key.
    """
    values = {name: json.dumps(value) for name, value in identity.items()}
    chosen = {
        name: value for name, value in values.items() if value != json.dumps(defaults.get(name, ...), default=str)
    }
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:16]


def clear_output(output: Storage) -> None:
    """Delete `_SUCCESS`, markers, results, quarantined rows, recorded deaths and types and, last, the identity.

    Run reports stay.
    """
    ours = [file.path for file in output.files() if _is_ours(file.path)]
    output.delete([SUCCESS, *sorted(ours, key=deletion_order), DEATHS, SCHEMA, IDENTITY])


def _is_ours(path: str) -> bool:
    folder, _, name = path.rpartition("/")
    return folder in ("", MARKERS, QUARANTINE) and OBJECT_NAME.match(name) is not None


def open_output(uri: str, *, quarantine: bool = False) -> pa.dataset.Dataset:
    """Open the results (or quarantined rows) of an output's complete shards as one pyarrow dataset.

    The objects to read come from the markers, so a shard appears, or changes to its new version, as a whole. Reading
    the prefix's top-level *.parquet files directly also returns splits of shards that are not complete yet. Compacted
    copies can be opened, too.

    Raises:
        UsageError: the output has no complete shard.
        StorageError: a marker is damaged or cannot be read.
    """
    output = Storage(uri)
    copy, folder = read_copy(output), f"{QUARANTINE}/" if quarantine else ""
    if copy is not None:
        objects = [part["object"] for part in copy["parts"]]
        names = [name for name in objects if name.startswith(f"{QUARANTINE}/") == quarantine]
    else:
        markers = complete_markers(output)
        if not markers:
            raise UsageError(f"{uri}: no complete shard there")
        splits = [split for marker in markers for split in marker["splits"]]
        names = [folder + split["object"] for split in splits if split["quarantined"] or not quarantine]
    if not names:
        return pyarrow.dataset.dataset(REJECTED_SCHEMA.empty_table())
    # Not `output.fs` for remote outputs: its own retries are off, because Storage retries instead.
    fs, root = (output.fs, output.root) if output.is_local else fsspec.core.url_to_fs(output.uri)
    return pyarrow.dataset.dataset([f"{root}/{name}" for name in names], format="parquet", filesystem=fs)
