"""What an output really holds, against the corpus and an undisturbed run: nothing lost, doubled, wrong or partial.

Everything is read from the S3 server itself, past the proxy, and told apart by (shard, row): ids prove nothing.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import s3fs

from pipeline import open_output
from tests.integration.s3_server import S3Server

QUARANTINE, MARKERS, SUCCESS = "_quarantine", "_shards", "_SUCCESS"
EXACT = ("label", "num_tokens", "num_windows", "kept_tokens", "id", "source")
SCORE_TOLERANCE = 1e-4  # what batch composition may change

Place = tuple[str, int]  # (shard, row)
Rows = dict[Place, list[dict[str, Any]]]  # a list: more than one is what must not be


@dataclass
class Findings:
    """What is wrong with an output, each with its place."""

    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    partial: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return any(self.counts().values())

    def counts(self) -> dict[str, int]:
        return {name: len(places) for name, places in vars(self).items()}

    def __str__(self) -> str:
        lines = [f"{name}: {place}" for name, places in vars(self).items() for place in places[:20]]
        return "\n".join(lines) or "nothing"


@dataclass
class Contents:
    """An output as readers of its prefix see it, or as readers by its markers do."""

    results: Rows = field(default_factory=dict)
    quarantined: Rows = field(default_factory=dict)
    objects: dict[str, str] = field(default_factory=dict)  # Parquet objects with their SHA-256
    json: dict[str, dict[str, Any]] = field(default_factory=dict)  # shards' markers and `_SUCCESS`
    partial: list[str] = field(default_factory=list)  # objects that cannot be read

    def add(self, table: pa.Table, *, quarantined: bool) -> None:
        rows = self.quarantined if quarantined else self.results
        for row in table.to_pylist():
            rows.setdefault((row["shard"], row["row"]), []).append(row)


def top_names(server: S3Server, bucket: str, prefix: str) -> set[str]:
    """What lies at the top of an output: its results objects, and beside them `_SUCCESS` and other files."""
    listing = {"Bucket": bucket, "Prefix": f"{prefix}/", "Delimiter": "/"}
    pages = server.client.get_paginator("list_objects_v2").paginate(**listing)
    return {item["Key"].removeprefix(f"{prefix}/") for page in pages for item in page.get("Contents", [])}


def result_keys(server: S3Server, bucket: str, prefix: str) -> set[str]:
    """The results objects of an output: the Parquet files at its top."""
    return only_results(top_names(server, bucket, prefix))


def only_results(names: set[str]) -> set[str]:
    return {name for name in names if name.endswith(".parquet") and "/" not in name}


def read_prefix(server: S3Server, bucket: str, prefix: str) -> Contents:
    """What lies at a prefix, object by object: for results what `pandas.read_parquet` and its like would read."""
    contents = Contents()
    names = top_names(server, bucket, prefix)
    for folder in (QUARANTINE, MARKERS):
        names |= {f"{folder}/{name}" for name in top_names(server, bucket, f"{prefix}/{folder}")}
    for name in sorted(names):
        is_json = name.startswith(MARKERS) or name == SUCCESS
        if not is_json and not name.endswith(".parquet"):
            continue
        data = server.client.get_object(Bucket=bucket, Key=f"{prefix}/{name}")["Body"].read()
        try:
            if is_json:
                contents.json[name] = json.loads(data)
                continue
            contents.objects[name] = hashlib.sha256(data).hexdigest()
            contents.add(pq.read_table(pa.BufferReader(data)), quarantined=name.startswith(QUARANTINE))
        except (pa.ArrowException, OSError, ValueError) as error:
            contents.partial.append(f"{name}, {len(data)} bytes: {error}")
    return contents


def read_by_markers(server: S3Server, uri: str) -> Contents:
    """What `open_output` gives: complete shards only."""
    contents = Contents()
    with _environment(server.environment):
        for quarantined in (False, True):
            contents.add(open_output(uri, quarantine=quarantined).to_table(), quarantined=quarantined)
    return contents


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """The server's environment for this process's s3fs, which keeps file systems and would hand them to later users."""
    before = dict(os.environ)
    s3fs.S3FileSystem.clear_instance_cache()
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        s3fs.S3FileSystem.clear_instance_cache()


def verify(server: S3Server, bucket: str, prefix: str, rows: Mapping[str, int], reference: Contents) -> Findings:
    """Compare an output that is said to be complete with the input's rows (shard → how many) and an undisturbed run's
    output."""
    contents = read_prefix(server, bucket, prefix)
    findings = Findings(partial=contents.partial)
    compare_rows(contents, rows, reference, findings, "prefix")
    try:
        by_markers = read_by_markers(server, f"s3://{bucket}/{prefix}")
    except (ValueError, OSError) as error:
        findings.lost.append(f"everything, by markers: {error}")
    else:
        compare_rows(by_markers, rows, reference, findings, "markers")
    compare_files(contents, reference, findings)
    return findings


def compare_files(contents: Contents, reference: Contents, findings: Findings) -> None:
    """The same objects and markers as in the reference; markers and `_SUCCESS` that tell what is there."""
    ours, its = {*contents.objects, *contents.json}, {*reference.objects, *reference.json}
    findings.wrong += [f"{name} is missing" for name in sorted(its - ours)]
    findings.wrong += [f"{name} is one too many" for name in sorted(ours - its)]
    markers = [marker for name, marker in contents.json.items() if name != SUCCESS]
    for marker in markers:
        for split in marker["splits"]:
            if contents.objects.get(split["object"]) != split["sha256"]:
                findings.wrong.append(f"{split['object']} is not what the marker of {marker['shard']} says")
    # Without it the output is not complete, which a run that ended with 0 said it was.
    manifest = contents.json.get(SUCCESS, {"shards": []})["shards"]
    if sorted(manifest, key=_shard) != sorted(markers, key=_shard):
        findings.wrong.append(f"{SUCCESS} is not there or does not hold the markers that are there")


def compare_rows(
    contents: Contents, rows: Mapping[str, int], reference: Contents, findings: Findings, way: str
) -> None:
    """Every row of the input once, as a result or quarantined, and as the reference has it."""
    expected = {(shard, row) for shard, count in rows.items() for row in range(count)}
    found: dict[Place, int] = {}
    for part in (contents.results, contents.quarantined):
        for place, copies in part.items():
            found[place] = found.get(place, 0) + len(copies)
    for place in sorted(expected | set(found)):
        where = f"{place[0]} row {place[1]}, by {way}"
        if place not in expected:
            findings.wrong.append(f"{where}: not in the input")
        elif place not in found:
            findings.lost.append(where)
        elif found[place] > 1:
            findings.doubled.append(f"{where}: {found[place]} times")
        else:
            difference = _difference(contents, reference, place)
            findings.wrong += [f"{where}: {difference}"] if difference else []


def _difference(contents: Contents, reference: Contents, place: Place) -> str:
    """In words, how a row that is there once is not the reference's; empty if it is."""
    (kind, row), (its_kind, its_row) = _row(contents, place), _row(reference, place)
    if kind != its_kind:
        return f"a {kind} row, where the undisturbed run has a {its_kind} row"
    if kind == "quarantined":
        return "" if row["reason"] == its_row["reason"] else f"{row['reason']} instead of {its_row['reason']}"
    for name in EXACT:
        if row[name] != its_row[name]:
            return f"{name} {row[name]!r} instead of {its_row[name]!r}"
    near = abs(row["score"] - its_row["score"]) <= SCORE_TOLERANCE
    return "" if near else f"score {row['score']} instead of {its_row['score']}"


def _shard(marker: dict[str, Any]) -> str:
    return marker["shard"]


def _row(contents: Contents, place: Place) -> tuple[str, dict[str, Any]]:
    if rows := contents.results.get(place):
        return "result", rows[0]
    return "quarantined", contents.quarantined[place][0]
