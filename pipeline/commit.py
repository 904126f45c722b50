"""The storage protocol's writing side: splits published under deterministic keys, markers, and reading by markers.

A split's results object is its commit: one atomic PUT that never replaces an object, so whoever computed the split
first wins, and retries and reruns can neither double a row nor show half of one. It carries the split's quarantined
rows in its metadata too. Their own object is written after it and from it, whoever wrote it and however often, so that
the two always are one computation's. A results object is written for every split, even one without results, so the keys
that exist are the checkpoint.
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

from .corpus import IDENTITY, MARKERS, OBJECT_NAME, QUARANTINE, Shard
from .deaths import DEATHS
from .errors import PipelineError, StorageError, UsageError
from .ledger import NO_LEDGER, WHOLE, LedgerClient
from .manifest import SUCCESS, Marker, complete_markers, named_objects
from .plan import deletion_order
from .report import SplitStats
from .rows import ErrorKind, error_table, from_ipc, split_table, to_ipc
from .storage import Storage

METADATA = b"trbert.split"
_AT_ONCE = 16  # splits looked at at a time


@dataclass(frozen=True)
class Committed:
    """A published split: its results object, rows of each kind, the object's SHA-256 and bytes, and the SHA-256 of the
    object with its quarantined rows (None if it has none; "" if an older version has written it)."""

    object: str
    results: int
    quarantined: int
    sha256: str
    bytes: int
    quarantine_sha256: str | None = ""


def publish_splits(
    batch: pa.Table, output: Storage, ledger: LedgerClient = NO_LEDGER, identity_key: str = ""
) -> pa.Table:
    """Ray Data stage: scored splits → what was published of them; a split that failed passes through."""
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
    """Write a split's results and quarantined rows, unless they are there already.

    Returns what the output now holds, which is another writer's work where that came first.
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
        output.write(name, data)  # damaged, or left by a run with other options: no split of this output
    return _settled(output, name, data, identity_key)


def settle_split(output: Storage, name: str, identity_key: str = "") -> Committed | None:
    """What a results object that is there already holds, its quarantined rows written too if they were not yet.

    None if it is no whole split of this output: damaged, made with other options, or, written by an older version, its
    quarantined rows are gone.
    """
    try:
        return _settled(output, name, output.read(name), identity_key)
    except StorageError:
        raise
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError, _NotOursError):
        return None


class _NotOursError(Exception):
    """A results object that is none of this output."""


def _settled(output: Storage, name: str, data: bytes, identity_key: str) -> Committed:
    parquet = pq.ParquetFile(pa.BufferReader(data))
    counts = json.loads(parquet.schema_arrow.metadata[METADATA])
    if counts.get("identity", identity_key) != identity_key:
        raise _NotOursError
    quarantined, sha256 = counts["quarantined"], None
    if quarantined:
        path = f"{QUARANTINE}/{name}"
        there = output.read_if_there(path)
        if "rejected" in counts:
            rejected = embedded_rejects(counts)
            if there is None or not holds(there, rejected):
                there = parquet_bytes(rejected)
                output.write(path, there)
        elif there is None or pq.ParquetFile(pa.BufferReader(there)).metadata.num_rows != quarantined:
            raise _NotOursError
        sha256 = hashlib.sha256(there).hexdigest()
    digest = hashlib.sha256(data).hexdigest()
    return Committed(name, parquet.metadata.num_rows, quarantined, digest, len(data), sha256)


def embedded_rejects(counts: dict[str, Any]) -> pa.Table:
    """The quarantined rows that a results object carries."""
    compressed = base64.b64decode(counts["rejected"])
    return from_ipc(pa.decompress(compressed, counts["rejected_bytes"], "zstd", asbytes=True))


def holds(data: bytes | None, rejected: pa.Table) -> bool:
    """Whether an object with quarantined rows holds exactly these."""
    try:
        return pq.read_table(pa.BufferReader(data)).equals(rejected)
    except (pa.ArrowException, OSError):
        return False


def settle_done(
    output: Storage, pending: Iterable[tuple[Shard, frozenset[int]]], identity_key: str
) -> dict[tuple[str, int], Committed]:
    """What an earlier run has left of shards that are not complete, by shard path and split index; what is no whole
    split is deleted, to be computed again."""

    def settle(item: tuple[Shard, int]) -> tuple[tuple[str, int], Committed | None]:
        shard, index = item
        committed = settle_split(output, shard.object(index), identity_key)
        if committed is None:
            output.delete([shard.object(index)])
        return (shard.path, index), committed

    items = [(shard, index) for shard, done in pending for index in sorted(done)]
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="settle") as pool:
        return {place: committed for place, committed in pool.map(settle, items) if committed is not None}


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
    found: Iterable[str] = (),
) -> Marker:
    """Record that a shard is complete, then delete what else the output holds of it.

    found: the files of its key that were there before, as `Plan.superseded` has them.
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
    output.delete(sorted(set(found) - named_objects(marker) - {shard.marker}, key=deletion_order))
    return marker


def bind_output(
    output: Storage, identity: dict[str, Any], *, overwrite: bool, defaults: dict[str, Any] | None = None
) -> None:
    """Record what an output is made with, or check that it is the same.

    defaults: what an output did that was made by a version without these options.

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
    """The error for an output that was made with something else."""
    return UsageError(
        f"{output.uri}: made with {'; '.join(differences)}. Choose another output or the same settings, "
        "or replace it with --overwrite"
    )


def output_identity(output: Storage) -> dict[str, Any] | None:
    """What an output records of its model and options; None where there is none yet."""
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
    """In words, what an output was made with and a run is not."""
    names = sorted(set(recorded) | set(identity))
    return [
        f"{name} {recorded.get(name)!r} where this run has {identity.get(name)!r}"
        for name in names
        if recorded.get(name) != identity.get(name)
    ]


def identity_key(identity: dict[str, Any], defaults: dict[str, Any]) -> str:
    """What an output is made with in 16 characters, for its objects to say. Options at their defaults do not count, so
    that a version with more options gives the same."""
    values = {name: json.dumps(value) for name, value in identity.items()}
    chosen = {
        name: value for name, value in values.items() if value != json.dumps(defaults.get(name, ...), default=str)
    }
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:16]


def clear_output(output: Storage) -> None:
    """Remove `_SUCCESS`, markers, results, quarantine and what is known of deaths, and what they were made with last.
    Run reports stay."""
    ours = [file.path for file in output.files() if _is_ours(file.path)]
    output.delete([SUCCESS, *sorted(ours, key=deletion_order), DEATHS, IDENTITY])


def _is_ours(path: str) -> bool:
    folder, _, name = path.rpartition("/")
    return folder in ("", MARKERS, QUARANTINE) and OBJECT_NAME.match(name) is not None


def open_output(uri: str, *, quarantine: bool = False) -> pa.dataset.Dataset:
    """The complete shards' results (or quarantined rows) of an output as one pyarrow dataset.

    It goes by the markers, so a shard appears, or changes to its new version, as a whole. Reading the prefix's
    top-level *.parquet files directly also sees the splits of shards that are not complete yet.

    Raises:
        UsageError: no shard is complete there.
    """
    output = Storage(uri)
    markers = complete_markers(output)
    if not markers:
        raise UsageError(f"{uri}: no complete shard there")
    folder = f"{QUARANTINE}/" if quarantine else ""
    splits = [split for marker in markers for split in marker["splits"]]
    names = [folder + split["object"] for split in splits if split["quarantined"] or not quarantine]
    if not names:
        return pyarrow.dataset.dataset(pa.table({name: [] for name in ("shard", "row", "id", "reason", "detail")}))
    # Not the output's own file system object: that one leaves retries to Storage.
    fs, root = (output.fs, output.root) if output.is_local else fsspec.core.url_to_fs(output.uri)
    return pyarrow.dataset.dataset([f"{root}/{name}" for name in names], format="parquet", filesystem=fs)
