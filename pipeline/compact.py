"""Copy a complete output's many objects into few large ones, under a prefix of their own.

The output keeps its own objects, because a rerun must be able to replace a shard's objects without touching other
shards' rows. The copy has its own `_SUCCESS`, which is written last.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from trbert_model.options import option

from .commit import parquet_bytes
from .corpus import QUARANTINE
from .errors import PipelineError, ShardError, UsageError
from .lock import OutputLock
from .manifest import SUCCESS, read_manifest
from .schema import Column, Types, known_types, target_types
from .stopping import StopRequest
from .storage import Storage


@dataclass(frozen=True)
class CompactConfig:
    """The options of a compaction."""

    output: str = option("", "the complete output of a scoring run")
    into: str = option("", "an empty prefix for the compacted copy")
    target_bytes: int = option(128 << 20, "bytes of results in one object, about")

    def __post_init__(self):
        for name in ("output", "into"):
            if not getattr(self, name):
                raise UsageError(f"{name} is required")
        if self.target_bytes < 1:
            raise UsageError(f"target_bytes {self.target_bytes} must be at least 1")


def compact(config: CompactConfig, stop: StopRequest | None = None) -> dict[str, Any]:
    """Copy a complete output into few large objects.

    Object names are derived from the contents, so an interrupted compaction is finished by running it again. The output
    is locked meanwhile, so that no scoring run changes it.

    Returns:
        The copy's manifest.

    Raises:
        UsageError: the output is not complete, `into` holds other files, or one prefix is inside the other.
        OutputBusyError: another run is using the output.
        PipelineError: an object does not match its marker, or has columns of types that other objects do not have.
        StoppedError: stopped by a signal; run it again to finish.
    """
    stop = stop or StopRequest(grace=0.0)
    return stop.run(lambda: _compact(config, stop))


def _compact(config: CompactConfig, stop: StopRequest) -> dict[str, Any]:
    output, into = Storage(config.output), Storage(config.into)
    roots = [os.path.realpath(each.root) if each.is_local else each.root for each in (output, into)]
    prefixes = [f"{storage.protocol}:{root}/" for storage, root in zip((output, into), roots)]
    if prefixes[0].startswith(prefixes[1]) or prefixes[1].startswith(prefixes[0]):
        raise UsageError(f"output {config.output} and into {config.into} lie inside each other; keep them apart")
    with OutputLock(output, f"compaction-{secrets.token_hex(3)}", stop=stop):
        manifest = read_manifest(output)
        if manifest is None:
            raise UsageError(f"{config.output}: not complete: no {SUCCESS} there; jobs/score.py finishes it")
        splits = [split for marker in manifest["shards"] for split in marker["splits"]]
        contents = json.dumps([[split["object"], split["sha256"]] for split in splits])
        digest = hashlib.sha256(contents.encode()).hexdigest()[:12]
        present = {file.path for file in into.files()}
        ours = {SUCCESS} | {path for path in present if path.endswith(f"-{digest}.parquet")}
        if strange := sorted(present - ours):
            raise UsageError(f"{config.into}: holds something else ({strange[0]}); choose an empty prefix")
        asked = manifest["output"]
        types = known_types(
            output, [*filter(None, [asked.get("id_column")]), *asked.get("keep_columns", ())], stop.check
        )
        parts = []
        for number, group in enumerate(_groups(splits, config.target_bytes)):
            stop.check()
            name = f"part-{number:05d}-{digest}.parquet"
            parts.append(_copy(output, into, group, name, types))
            if quarantined := [split for split in group if split["quarantined"]]:
                parts.append(_copy_quarantine(output, into, quarantined, f"{QUARANTINE}/{name}"))
        copy = {
            **{"format": 1, "source": output.uri, "source_run": manifest["run"], "output": manifest["output"]},
            **{count: manifest[count] for count in ("rows", "results", "quarantined")},
            "removed": manifest["removed"],
            "shards": [{name: marker[name] for name in ("shard", "version", "rows")} for marker in manifest["shards"]],
            "parts": parts,
        }
        data = json.dumps(copy, indent=1).encode()
        if not into.create(SUCCESS, data) and into.read(SUCCESS) != data:
            raise UsageError(f"{config.into}: {SUCCESS} there is another compaction's; choose an empty prefix")
    return copy


def _groups(splits: list[dict[str, Any]], target: int) -> Iterator[list[dict[str, Any]]]:
    """Group consecutive splits, each group just reaching `target` bytes of results except for the last."""
    group: list[dict[str, Any]] = []
    size = 0
    for split in splits:
        group.append(split)
        size += split["bytes"]
        if size >= target:
            yield group
            group, size = [], 0
    if group:
        yield group


def _copy(output: Storage, into: Storage, group: list[dict[str, Any]], name: str, types: Types) -> dict[str, Any]:
    """Write the group's results as one object, its kept columns of these types, and return its manifest entry."""
    objects = {split["object"]: split["sha256"] for split in group}
    tables = []
    for path, table in zip(objects, _checked(output, objects)):
        kept = {column: Column(table[column].type, table[column].null_count == table.num_rows) for column in types}
        try:
            targets = target_types(kept, types)
            for column, kind in targets.items():
                values = pa.nulls(table.num_rows, kind) if kept[column].is_empty else table[column].cast(kind)
                table = table.set_column(table.column_names.index(column), column, values)
        except (ShardError, pa.ArrowException) as error:  # of an output of an older version
            raise PipelineError(f"{output.uri}/{path}: {error}; see jobs/verify.py") from error
        tables.append(table)
    return _write(into, name, tables, sum(split["results"] for split in group))


def _copy_quarantine(output: Storage, into: Storage, group: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """Write the group's quarantined rows as one object and return its manifest entry."""
    objects = {f"{QUARANTINE}/{split['object']}": split.get("quarantine_sha256") or "" for split in group}
    return _write(into, name, _checked(output, objects), sum(split["quarantined"] for split in group))


def _checked(output: Storage, objects: dict[str, str]) -> list[pa.Table]:
    """Read objects, given with their checksums; an older version's markers have none ("") for quarantined rows."""
    tables = []
    for sha256, (path, data) in zip(objects.values(), output.read_many(objects)):
        if sha256 and hashlib.sha256(data).hexdigest() != sha256:
            raise PipelineError(f"{output.uri}/{path}: its checksum is not its marker's; see jobs/verify.py")
        tables.append(pq.read_table(pa.BufferReader(data)).replace_schema_metadata(None))
    return tables


def _write(into: Storage, name: str, tables: list[pa.Table], rows: int) -> dict[str, Any]:
    table = pa.concat_tables(tables)
    if table.num_rows != rows:
        raise PipelineError(
            f"{into.uri}/{name}: {table.num_rows} rows where the markers say {rows}; see jobs/verify.py"
        )
    data = parquet_bytes(table)
    if not into.create(name, data) and into.read(name) != data:
        raise UsageError(f"{into.uri}/{name}: other rows are there (another target_bytes?); choose an empty prefix")
    return {"object": name, "rows": rows, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
