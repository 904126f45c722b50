"""The storage protocol's writing side: splits published under deterministic keys, markers, and reading by markers.

A split's quarantined rows are written first, then its results, each in one atomic PUT that never replaces an object:
whoever computed the split first wins, and retries and reruns can neither double a row nor show half of one. A results
object is written for every split, even one without results, so the keys that exist are the checkpoint.
"""

import dataclasses
import hashlib
import json
import time
from dataclasses import dataclass
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq

from .corpus import IDENTITY, MARKERS, OBJECT_NAME, QUARANTINE, Shard
from .errors import PipelineError, StorageError, UsageError
from .ledger import NO_LEDGER, WHOLE, LedgerClient
from .manifest import SUCCESS, complete_markers
from .report import SplitStats
from .rows import error_table, from_ipc, split_table
from .storage import Storage

_METADATA = b"trbert.split"


@dataclass(frozen=True)
class Committed:
    """A published split: its results object, rows of each kind, and the object's SHA-256 and bytes."""

    object: str
    results: int
    quarantined: int
    sha256: str
    bytes: int


def publish_splits(batch: pa.Table, output: Storage, ledger: LedgerClient = NO_LEDGER) -> pa.Table:
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
                committed = publish(output, shard, row["index"], results, rejected)
        except PipelineError as error:
            rows.append(error_table(row, error))
            continue
        stats = SplitStats.from_json(row["stats"])
        stats.result_bytes, stats.commit_seconds = committed.bytes, time.perf_counter() - started
        stats.storage_retries += output.retries - retries
        committed_json = json.dumps(dataclasses.asdict(committed))
        rows.append(split_table(row | {"stats": stats.to_json(), "committed": committed_json}))
    return pa.concat_tables(rows)


def publish(output: Storage, shard: Shard, index: int, results: pa.Table, rejected: pa.Table) -> Committed:
    """Write a split's quarantined rows and results, unless they are there already.

    Returns what the output now holds, which is another writer's work where that came first.
    """
    name = shard.object(index)
    if rejected.num_rows:
        output.create(f"{QUARANTINE}/{name}", parquet_bytes(rejected))
    counts = {"results": results.num_rows, "quarantined": rejected.num_rows}
    metadata = {**(results.schema.metadata or {}), _METADATA: json.dumps(counts).encode()}
    data = parquet_bytes(results.replace_schema_metadata(metadata))
    if not output.create(name, data):
        return inspect_object(output, name)
    return Committed(name, results.num_rows, rejected.num_rows, hashlib.sha256(data).hexdigest(), len(data))


def inspect_object(output: Storage, name: str) -> Committed:
    """What a results object that is there already holds.

    Raises:
        PipelineError: it is not a results object of this pipeline.
    """
    data = output.read(name)
    try:
        parquet = pq.ParquetFile(pa.BufferReader(data))
        counts = json.loads(parquet.schema_arrow.metadata[_METADATA])
    except (pa.ArrowException, KeyError, TypeError) as error:
        raise PipelineError(f"{output.uri}/{name}: not an object of this pipeline, or damaged: {error}") from error
    sha256 = hashlib.sha256(data).hexdigest()
    return Committed(name, parquet.metadata.num_rows, counts["quarantined"], sha256, len(data))


def parquet_bytes(table: pa.Table) -> bytes:
    """A table as a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def write_marker(
    output: Storage, shard: Shard, splits: list[Committed], run_id: str, superseded: list[str]
) -> dict[str, Any]:
    """Record that a shard is complete, then remove what the output holds of its older versions."""
    marker = {
        "shard": shard.path,
        "version": shard.version,
        "size": shard.size,
        "rows": sum(split.results + split.quarantined for split in splits),
        "results": sum(split.results for split in splits),
        "quarantined": sum(split.quarantined for split in splits),
        "splits": [dataclasses.asdict(split) for split in splits],
        "run": run_id,
        "written": time.time(),
    }
    output.write(shard.marker, json.dumps(marker, indent=1).encode())
    if superseded:
        output.delete(superseded)
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


def clear_output(output: Storage) -> None:
    """Remove `_SUCCESS`, markers, results and quarantine, and what they were made with last. Run reports stay."""
    ours = [file.path for file in output.files() if _is_ours(file.path)]
    output.delete([SUCCESS, *sorted(ours, key=lambda path: (not path.startswith(MARKERS), path)), IDENTITY])


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
