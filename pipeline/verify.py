"""Does an output hold every row of its input exactly once? The objects themselves tell, not what runs said of them."""

import hashlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from trbert_model.options import option

from .commit import output_identity
from .corpus import MARKERS, OBJECT_NAME, QUARANTINE, Shard, input_root, list_shards, make_plan
from .errors import StorageError, UsageError
from .manifest import SUCCESS, Marker, newest, read_manifest, read_markers
from .storage import Storage

_AT_ONCE = 16  # shards looked at at a time


@dataclass(frozen=True)
class VerifyConfig:
    """The options of a verification."""

    output: str = option("", "the output of a scoring run")
    input: str | None = option(None, "the corpus it was made from (default: the one the output records)")

    def __post_init__(self):
        if not self.output:
            raise UsageError("output is required")


@dataclass
class Verification:
    """What is there and what is wrong. Rows are counted; `problems` has a line for every shard, object or file."""

    shards: int = 0
    rows: int = 0  # of the input's readable shards
    results: int = 0
    quarantined: int = 0
    missing: int = 0
    doubled: int = 0
    extra: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        return not self.problems


def verify(config: VerifyConfig) -> Verification:
    """Check an output against its input, row by row.

    Every object is read whole: its checksum is compared with its marker's, and its (shard, row)s are counted.

    Raises:
        UsageError: there is no such output or input.
        StorageError: something cannot be read that is there.
    """
    output = Storage(config.output)
    recorded = output_identity(output)
    if recorded is None:
        raise UsageError(f"{config.output}: not the output of a scoring run: no _output.json there")
    uri = config.input or recorded["input"]
    root = Storage(input_root(uri))
    shards = list_shards(Storage(uri))
    plan = make_plan(shards, output)
    files = {file.path for file in output.files()}
    markers = {marker["shard"]: marker for marker in newest(_markers(output, files))}

    found = Verification(shards=len(shards))
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        complete = list(pool.map(lambda shard: _check_shard(shard, markers[shard.path], root, output), plan.complete))
        pending = list(pool.map(lambda item: _check_pending(item[0], len(item[1]), root), plan.pending))
    for part in complete + pending:
        for name in ("rows", "results", "quarantined", "missing", "doubled", "extra"):
            setattr(found, name, getattr(found, name) + getattr(part, name))
        found.problems += part.problems

    _check_files(files, markers, {shard.path for shard in shards}, found)
    _check_manifest(output, markers, found)
    return found


def _markers(output: Storage, files: set[str]) -> list[Marker]:
    return [marker for _, marker in read_markers(output, sorted(f for f in files if f.startswith(f"{MARKERS}/")))]


def _input_rows(shard: Shard, root: Storage) -> int:
    """A shard's row count, from its footer."""
    with root.open(shard.path) as file, root.errors("read", shard.path):
        return pq.ParquetFile(file).metadata.num_rows


def _check_pending(shard: Shard, splits: int, root: Storage) -> Verification:
    """A shard that is not complete: its rows are missing, whatever splits of it are there."""
    try:
        rows = _input_rows(shard, root)
    except StorageError as error:
        return Verification(problems=[f"missing: {shard.path}: it cannot be read ({error})"])
    there = f", {splits} splits of it are there" if splits else ""
    return Verification(
        rows=rows, missing=rows, problems=[f"missing: {shard.path}: not complete, {rows} rows{there}"] if rows else []
    )


def _check_shard(shard: Shard, marker: Marker, root: Storage, output: Storage) -> Verification:
    """A complete shard: every one of its rows must be in its objects once."""
    found = Verification(rows=_input_rows(shard, root))
    seen = Counter[int]()
    strange = 0
    for split in marker["splits"]:
        for folder in ("", f"{QUARANTINE}/") if split["quarantined"] else ("",):
            name = folder + split["object"]
            try:
                data = output.read(name)
            except StorageError as error:
                if not isinstance(error.__cause__, FileNotFoundError):
                    raise
                found.problems.append(f"missing: {name}: the object is gone")
                continue
            if not folder and hashlib.sha256(data).hexdigest() != split["sha256"]:
                found.problems.append(f"damaged: {name}: its checksum is not its marker's")
            try:
                table = pq.read_table(pa.BufferReader(data), columns=["shard", "row"])
            except (pa.ArrowException, OSError) as error:
                found.problems.append(f"damaged: {name}: {error}")
                continue
            mine = pc.equal(table["shard"], shard.path).to_numpy()
            strange += int((~mine).sum())
            seen.update(table["row"].to_numpy()[mine].tolist())
            if folder:
                found.quarantined += table.num_rows
            else:
                found.results += table.num_rows
    missing = [row for row in range(found.rows) if row not in seen]
    doubled = [row for row, times in seen.items() if times > 1]
    extra = [row for row in seen if not 0 <= row < found.rows]
    found.missing, found.doubled, found.extra = len(missing), len(doubled), len(extra) + strange
    for what, rows in (("missing", missing), ("doubled", doubled), ("extra", extra)):
        if rows:
            found.problems.append(f"{what}: {shard.path}: rows {_ranges(sorted(rows))}")
    if strange:
        found.problems.append(f"extra: {shard.path}: its objects hold {strange} rows of other shards")
    return found


def _check_files(files: set[str], markers: dict[str, Marker], shards: set[str], found: Verification) -> None:
    """Whatever readers of the prefix would see and the newest markers do not name is extra."""
    named = set()
    for path, marker in markers.items():
        named.add(Shard(path, marker["version"], marker["size"]).marker)
        if path not in shards:
            found.extra += marker["rows"]
            found.problems.append(f"extra: {path}: no longer in the input, {marker['rows']} rows (--delete-removed)")
        for split in marker["splits"]:
            named |= {split["object"], f"{QUARANTINE}/{split['object']}"}
    for path in sorted(files - named):
        folder, _, name = path.rpartition("/")
        if folder in ("", MARKERS, QUARANTINE) and (OBJECT_NAME.match(name) or name.endswith(".parquet")):
            found.problems.append(f"extra: {path}: not of a complete shard's present version; the next run cleans up")


def _check_manifest(output: Storage, markers: dict[str, Marker], found: Verification) -> None:
    manifest: dict[str, Any] | None = read_manifest(output)
    if manifest is None:
        found.problems.append(f"missing: {SUCCESS}: no run has called this output complete")
    elif {(m["shard"], m["version"]) for m in manifest["shards"]} != {
        (shard, marker["version"]) for shard, marker in markers.items()
    }:
        found.problems.append(f"damaged: {SUCCESS}: its shards are not the markers'")


def _ranges(rows: list[int]) -> str:
    """Row numbers for people: 3, 7-9, … (not all of very many)."""
    parts: list[list[int]] = []
    for row in rows:
        if parts and row == parts[-1][1] + 1:
            parts[-1][1] = row
        else:
            parts.append([row, row])
    texts = [f"{first}-{last}" if last > first else str(first) for first, last in parts]
    return ", ".join(texts[:20]) + (f" and {len(texts) - 20} more ranges" if len(texts) > 20 else "")


def summary(found: Verification) -> str:
    """A verification for a terminal."""
    problems = f"{len(found.problems)} problems: the output does not hold every row exactly once"
    head = "the output holds every row exactly once" if found.holds else problems
    return "\n".join(
        [
            head,
            f"  input     {found.shards:,} shards, {found.rows:,} rows",
            f"  output    {found.results:,} results and {found.quarantined:,} quarantined rows of complete shards",
            f"  rows      {found.missing:,} missing, {found.doubled:,} doubled, {found.extra:,} extra",
            *(f"  {problem}" for problem in found.problems[:100]),
            *([f"  … and {len(found.problems) - 100} more"] if len(found.problems) > 100 else []),
        ]
    )
