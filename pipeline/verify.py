"""Verification that an output holds every row of its input exactly once, by reading all of its objects."""

import hashlib
import json
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trbert_model.options import option
from trbert_model.terminal import printable

from .commit import METADATA, embedded_rejects, holds, output_identity
from .corpus import IDENTITY, MARKERS, OBJECT_NAME, QUARANTINE, Shard, find_input, read_corpus
from .deaths import DEATHS
from .errors import StorageError, UsageError
from .manifest import SUCCESS, Marker, named_objects, newest, read_copy, read_manifest, read_markers
from .schema import Types, common_type, plain, recorded_types, shown
from .storage import Storage

_AT_ONCE = 16  # shards checked at a time
_AGAIN = "delete it and run again"


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
    """The result of a verification: counts of rows, and a line in `problems` for each faulty shard, object or file."""

    shards: int = 0
    rows: int = 0  # of the input's readable shards
    results: int = 0
    quarantined: int = 0
    missing: int = 0
    doubled: int = 0
    extra: int = 0
    problems: list[str] = field(default_factory=list)
    schemas: dict[str, pa.Schema] = field(default_factory=dict)  # of the objects that could be read, by path

    @property
    def holds(self) -> bool:
        return not self.problems


def verify(config: VerifyConfig) -> Verification:
    """Check an output, or a compacted copy of one, against its input, row by row.

    Every object is read completely: its checksum is compared with that in the marker, and its (shard, row) pairs are
    counted.

    Raises:
        UsageError: the output or the input does not exist.
        StorageError: something that exists cannot be read.
    """
    output = Storage(config.output)
    recorded = output_identity(output)
    copy = None if recorded else read_copy(output)
    if recorded is None and copy is None:
        raise UsageError(f"{config.output}: not the output of a scoring run: no {IDENTITY} there")
    uri = config.input or (recorded or copy["output"])["input"]  # type: ignore[index]
    location = find_input(Storage(uri))
    root, shards = location.root, read_corpus(location).shards
    files = {file.path for file in output.files()}
    if copy is not None:
        return _verify_copy(copy, shards, root, output, files)

    found = Verification(shards=len(shards))
    markers = {}
    for path, marker in read_markers(output, sorted(f for f in files if f.startswith(f"{MARKERS}/"))):
        if marker is None:
            found.problems.append(f"damaged: {path}: no whole marker; {_AGAIN}")
        else:
            markers[path] = marker
    complete = [shard for shard in shards if shard.marker in markers]
    pending = [shard for shard in shards if shard.marker not in markers]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        checked = list(pool.map(lambda shard: _check_shard(shard, markers[shard.marker], root, output), complete))
        missing = list(pool.map(lambda shard: _check_pending(shard, root, files), pending))
    for part in checked + missing:
        for name in ("rows", "results", "quarantined", "missing", "doubled", "extra"):
            setattr(found, name, getattr(found, name) + getattr(part, name))
        found.problems += part.problems
        found.schemas |= part.schemas
    _check_types(found, recorded_types(output))
    _check_files(files, markers, shards, found)
    _check_manifest(output, markers, shards, found)
    return found


def _input_rows(shard: Shard, root: Storage) -> int:
    """The number of rows in a shard, from its Parquet footer."""
    with root.open(shard.path) as file, root.errors("read", shard.path):
        return pq.ParquetFile(file).metadata.num_rows


def _check_pending(shard: Shard, root: Storage, files: set[str]) -> Verification:
    """Report an incomplete shard: all of its rows count as missing, even if some of its splits exist."""
    try:
        rows = _input_rows(shard, root)
    except StorageError as error:
        return Verification(problems=[f"missing: {shard.path}: it cannot be read ({error})"])
    splits = sum(path.startswith(f"{shard.key}-{shard.version}-") for path in files)
    existing = f", {splits} splits of it are there" if splits else ""
    problem = f"missing: {shard.path}: not complete, {rows} rows{existing}; the next run finishes it"
    return Verification(rows=rows, missing=rows, problems=[problem])


class _Rows:
    """The row numbers of a shard that are in its objects."""

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = [np.zeros(0, np.int64)]

    def add(self, rows: np.ndarray) -> None:
        self._parts.append(rows)

    def compare(self, path: str, expected: int, found: Verification) -> None:
        """Report missing, doubled and extra rows, where rows 0 to `expected` - 1 are expected."""
        seen, times = np.unique(np.concatenate(self._parts), return_counts=True)
        inside = (seen >= 0) & (seen < expected)
        missing = np.setdiff1d(np.arange(expected), seen)
        doubled, extra = seen[times > 1], seen[~inside]
        found.missing, found.doubled = found.missing + len(missing), found.doubled + len(doubled)
        found.extra += len(extra)
        for what, rows in (("missing", missing), ("doubled", doubled), ("extra", extra)):
            if len(rows):
                found.problems.append(f"{what}: {path}: rows {_ranges(rows.tolist())}")


def _check_shard(shard: Shard, marker: Marker, root: Storage, output: Storage) -> Verification:
    """Check a shard with a marker: each of its rows must be in its objects once, and the marker must match them."""
    found = Verification(rows=_input_rows(shard, root))
    rows, strange = _Rows(), 0
    counts = Counter[str]()
    for index, split in enumerate(marker["splits"]):
        if split["object"] != shard.object(index):
            found.problems.append(f"damaged: {shard.marker}: names {split['object']} as split {index}; {_AGAIN}")
        data, table = _read_object(output, split["object"], split["sha256"], found)
        recorded = _QuarantineMetadata(data)
        if table is not None:
            strange += _count(table, shard.path, rows)
            counts["results"] += table.num_rows
            if (table.num_rows, recorded.quarantined) != (split["results"], split["quarantined"]):
                found.problems.append(
                    f"damaged: {shard.marker}: its counts of split {index} are not its objects'; {_AGAIN}"
                )
        if split["quarantined"] or recorded.quarantined:
            name = f"{QUARANTINE}/{split['object']}"
            data, table = _read_object(output, name, split.get("quarantine_sha256") or "", found)
            if table is None:
                continue
            strange += _count(table, shard.path, rows)
            counts["quarantined"] += table.num_rows
            if recorded.rejected is not None and not holds(data, recorded.rejected):
                found.problems.append(f"damaged: {name}: not the rows that its results object has put aside; {_AGAIN}")
    found.results, found.quarantined = counts["results"], counts["quarantined"]
    found.extra += strange
    totals = {"rows": found.rows, "results": counts["results"], "quarantined": counts["quarantined"]}
    if not found.problems and any(marker[name] != total for name, total in totals.items()):
        found.problems.append(f"damaged: {shard.marker}: its counts are not its objects'; {_AGAIN}")
    rows.compare(shard.path, found.rows, found)
    if strange:
        found.problems.append(f"extra: {shard.path}: its objects hold {strange} rows of other shards")
    return found


class _QuarantineMetadata:
    """The metadata of a results object about its split's quarantined rows.

    Attributes:
        quarantined: number of rows.
        rejected: the rows; None if an older version wrote the object or it is damaged, which its checksum shows.
    """

    def __init__(self, data: bytes | None):
        self.quarantined, self.rejected = 0, None
        try:
            counts = json.loads(pq.read_schema(pa.BufferReader(data)).metadata[METADATA]) if data else {}
            self.quarantined = counts.get("quarantined", 0)
            self.rejected = embedded_rejects(counts) if "rejected" in counts else None
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError):
            pass


def _read_object(output: Storage, name: str, sha256: str, found: Verification) -> tuple[bytes | None, pa.Table | None]:
    """Read an object: its bytes and its `shard` and `row` columns. Problems are added to `found`."""
    data = output.read_if_there(name)
    if data is None:
        found.problems.append(f"missing: {name}: the object is gone; the next run computes it again")
        return None, None
    if sha256 and hashlib.sha256(data).hexdigest() != sha256:
        found.problems.append(f"damaged: {name}: its checksum is not its marker's; {_AGAIN}")
    try:
        table = pq.read_table(pa.BufferReader(data), columns=["shard", "row"])
        found.schemas[name] = pq.read_schema(pa.BufferReader(data))
        return data, table
    except (pa.ArrowException, OSError) as error:
        found.problems.append(f"damaged: {name}: {error}; {_AGAIN}")
        return data, None


def _check_types(found: Verification, recorded: Types) -> None:
    """Check that the results and the quarantined rows have one schema each, so that readers can read them as a whole.

    Args:
        recorded: the types of the kept columns that the output records.
    """
    for in_quarantine in (False, True):
        objects = {
            path: {field.name: plain(field.type) for field in schema}
            for path, schema in sorted(found.schemas.items())
            if path.startswith(f"{QUARANTINE}/") == in_quarantine
        }
        counts: dict[str, Counter[pa.DataType]] = defaultdict(Counter)
        for types in objects.values():
            for name, kind in types.items():
                counts[name][kind] += 1
        expected = {name: common_type(kinds) for name, kinds in counts.items()}
        if not in_quarantine:
            expected.update(recorded)
        for path, types in objects.items():
            for name, kind in expected.items():
                if types.get(name) != kind:
                    has = shown(types[name]) if name in types else "missing"
                    found.problems.append(
                        f"damaged: {path}: column {name!r} is {has} where the output has {shown(kind)}; {_AGAIN}"
                    )


def _count(table: pa.Table, path: str, rows: _Rows) -> int:
    """Add a table's rows of this shard to `rows`; returns how many rows are of other shards."""
    mine = table["shard"].to_numpy(zero_copy_only=False) == path
    rows.add(table["row"].to_numpy()[mine])
    return int((~mine).sum())


def _check_files(files: set[str], markers: dict[str, Marker], shards: list[Shard], found: Verification) -> None:
    """Report as extra what readers of the prefix or the quarantine would see but no current shard's marker names."""
    present = {shard.marker for shard in shards} & markers.keys()
    keys = {shard.key for shard in shards}
    begun = {f"{shard.key}-{shard.version}" for shard in shards if shard.marker not in present}
    named = present.union(*(named_objects(markers[path]) for path in present))
    gone = {marker["shard"]: marker for marker in newest(m for p, m in markers.items() if _key(p) not in keys)}
    for path, marker in gone.items():
        found.extra += marker["rows"]
        found.problems.append(f"extra: {path}: no longer in the input, {marker['rows']} rows (--delete-removed)")
        named |= {Shard(path, marker["version"], marker["size"]).marker, *named_objects(marker)}
    ours = {SUCCESS, IDENTITY, DEATHS}
    for path in sorted(files - named - ours):
        first = path.split("/")[0]
        if first.startswith(("_", ".")) and first not in (MARKERS, QUARANTINE):
            continue  # leases, run reports, and other files that readers ignore
        key = _key(path)
        if path.rpartition("/")[2].rpartition("-")[0] in begun:
            continue  # splits of an incomplete shard, which is already reported
        if key is None:
            found.problems.append(f"extra: {path}: not of this pipeline; no run deletes it")
        elif key in keys:
            found.problems.append(f"extra: {path}: not of its shard's present version; the next run deletes it")
        else:
            found.problems.append(f"extra: {path}: no longer in the input (--delete-removed)")


def _key(path: str) -> str | None:
    """The shard key in the name of an object or marker; None for other files."""
    folder, _, name = path.rpartition("/")
    match = OBJECT_NAME.match(name)
    return match["key"] if match and folder in ("", MARKERS, QUARANTINE) else None


def _check_manifest(output: Storage, markers: dict[str, Marker], shards: list[Shard], found: Verification) -> None:
    """Check that `_SUCCESS` holds the existing markers."""
    try:
        manifest = read_manifest(output)
    except StorageError as error:
        if not isinstance(error.__cause__, ValueError):
            raise
        found.problems.append(f"damaged: {error}")
        return
    if manifest is None:
        found.problems.append(f"missing: {SUCCESS}: no run has called this output complete")
        return
    present = {shard.path: shard.marker for shard in shards}
    existing = {marker["shard"]: marker for marker in newest(markers.values())}
    existing |= {path: markers[marker] for path, marker in present.items() if marker in markers}
    in_manifest = {marker["shard"]: marker for marker in manifest["shards"]}
    if wrong := sorted(path for path in {*existing, *in_manifest} if existing.get(path) != in_manifest.get(path)):
        what = f"{', '.join(wrong[:5])}{' and more' if len(wrong) > 5 else ''}"
        found.problems.append(f"damaged: {SUCCESS}: its shards are not the markers': {what}; {_AGAIN}")
    elif any(
        manifest.get(n) != sum(marker[n] for marker in in_manifest.values()) for n in ("rows", "results", "quarantined")
    ):
        found.problems.append(f"damaged: {SUCCESS}: its counts are not its shards'; {_AGAIN}")


def _verify_copy(
    copy: dict[str, Any], shards: list[Shard], root: Storage, output: Storage, files: set[str]
) -> Verification:
    """Check a compacted copy: its parts must be intact, and hold every row of the current input exactly once."""
    found = Verification(shards=len(shards))
    rows = {shard.path: _Rows() for shard in shards}
    removed = set(copy.get("removed", ()))
    for part in copy["parts"]:
        _, table = _read_object(output, part["object"], part["sha256"], found)
        if table is None:
            continue
        if table.num_rows != part["rows"]:
            found.problems.append(
                f"damaged: {part['object']}: {table.num_rows} rows where {SUCCESS} says {part['rows']}"
            )
        for path in table["shard"].unique().to_pylist():
            if path in rows:
                _count(table, path, rows[path])
            elif path not in removed:
                found.problems.append(f"extra: {part['object']}: rows of {path}, which is no longer in the input")
        if part["object"].startswith(f"{QUARANTINE}/"):
            found.quarantined += table.num_rows
        else:
            found.results += table.num_rows
    _check_types(found, {})
    versions = {each["shard"]: each["version"] for each in copy.get("shards", ())}
    for shard in shards:
        expected = _input_rows(shard, root)
        found.rows += expected
        if versions.get(shard.path, shard.version) != shard.version:
            found.problems.append(f"stale: {shard.path}: rewritten since; score and compact again")
        rows[shard.path].compare(shard.path, expected, found)
    for path in sorted(files - {SUCCESS} - {part["object"] for part in copy["parts"]}):
        if path.startswith(f"{QUARANTINE}/") or not path.startswith(("_", ".")):
            found.problems.append(f"extra: {path}: not of this copy")
    return found


def _ranges(rows: list[int]) -> str:
    """Format row numbers as ranges: 3, 7-9, … (at most 20)."""
    parts: list[list[int]] = []
    for row in rows:
        if parts and row == parts[-1][1] + 1:
            parts[-1][1] = row
        else:
            parts.append([row, row])
    texts = [f"{first}-{last}" if last > first else str(first) for first, last in parts]
    return ", ".join(texts[:20]) + (f" and {len(texts) - 20} more ranges" if len(texts) > 20 else "")


def summary(found: Verification) -> str:
    """Format a verification for a terminal."""
    problems = f"{len(found.problems)} problems: the output does not hold every row exactly once"
    head = "the output holds every row exactly once" if found.holds else problems
    return printable(
        "\n".join(
            [
                head,
                f"  input     {found.shards:,} shards, {found.rows:,} rows",
                f"  output    {found.results:,} results and {found.quarantined:,} quarantined rows of complete shards",
                f"  rows      {found.missing:,} missing, {found.doubled:,} doubled, {found.extra:,} extra",
                *("  " + problem.replace("\n", "\\n") for problem in found.problems[:100]),
                *([f"  … and {len(found.problems) - 100} more"] if len(found.problems) > 100 else []),
            ]
        )
    )
