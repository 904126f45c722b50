"""Corpora and machines at their limits.

    python -m benchmarks.limits --model build/demo/model
    python -m benchmarks.limits --case text --model MODEL

Without --case, it measures how very many shards are planned, and recognised as finished. It fills a real S3 server on
loopback with 100,000 one-row shards and runs jobs/score.py as a user would. It measures the command's wall-clock time
and its own peak resident memory: of a dry run (planning); of a run that is stopped at once (planning, Ray, the
pipeline's start and end); and, after creating the shards' results, markers and `_SUCCESS`, of a run that has nothing to
do, with `_SUCCESS` and without it (then every marker is read).

With --case, it executes a whole run on local paths, whose output `pipeline.verify` must find complete. It measures the
largest process of each kind, including shared memory. A tiny model is sufficient.

- shards: many shards of four rows
- text: one shard of 5 GB of text in many row groups; only the first tokens of each text are scored
- rows: one shard of a million tiny rows, a single split or two
- store: splits of 24 MB, or of 96 MB (`blocks`), through an object store of 80 MB
"""

import argparse
import functools
import itertools
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from benchmarks.common import machine, save
from benchmarks.memory import RunMemory
from pipeline import ScoreConfig, score
from pipeline.commit import bind_output, parquet_bytes
from pipeline.corpus import list_shards
from pipeline.job import make_identity
from pipeline.manifest import SUCCESS, write_manifest
from pipeline.ray_internals import listening_on_loopback
from pipeline.storage import Storage
from pipeline.verify import VerifyConfig, summary, verify
from tests.integration.s3_server import S3Server
from trbert_model.checkpoints.files import model_digest

SECONDS, MIB = 60.0, 2048.0  # the limits
# This run has no limits: it is only needed after a run that died between the last marker and `_SUCCESS`.
REBUILT = "recognised from its markers, `_SUCCESS` made anew"


def put_all(storage: Storage, files: dict[str, bytes]) -> None:
    """Write many small objects, in parallel."""
    fs, root = fsspec.core.url_to_fs(storage.uri)
    names = list(files)
    for start in range(0, len(names), 2000):
        fs.pipe({f"{root}/{name}": files[name] for name in names[start : start + 2000]})


def finish(config: ScoreConfig) -> None:
    """Create what a run over the whole corpus writes: one result object and one marker per shard, and `_SUCCESS`."""
    output = Storage(config.output)
    data = parquet_bytes(pa.table({"shard": ["x"], "row": [0], "label": ["a"]}))
    results, markers = {}, {}
    for shard in list_shards(Storage(config.input)):
        split = {"object": shard.object(0), "results": 1, "quarantined": 0, "sha256": "0" * 64, "bytes": len(data)}
        totals = {"rows": 1, "results": 1, "quarantined": 0}
        marker = {"shard": shard.path, "version": shard.version, "size": shard.size, **totals, "splits": [split]}
        results[shard.object(0)] = data
        markers[shard.marker] = {**marker, "run": "benchmark", "written": time.time()}
    identity = make_identity(config, model_digest(Path(config.model)))
    bind_output(output, identity, overwrite=False)
    put_all(output, results)
    put_all(output, {path: json.dumps(marker).encode() for path, marker in markers.items()})
    write_manifest(output, identity, markers.values(), [], "benchmark", 0)


def run(config: ScoreConfig, *arguments: str, expected: int) -> dict[str, Any]:
    """Run jobs/score.py as a process: seconds, peak MiB of the driver (without Ray's processes), exit code."""
    uris = ["--input", config.input, "--output", config.output, "--model", config.model]
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "jobs/score.py", *uris, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
    )
    assert process.stderr is not None
    last = process.stderr.read().decode().strip().splitlines()[-1:]
    _, status, usage = os.wait4(process.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    print(f"{' '.join(arguments) or 'run'}: exit code {code} {last}", file=sys.stderr)
    assert code == expected, (code, last)
    return {"seconds": time.monotonic() - started, "driver_mib": usage.ru_maxrss / 1024, "exit_code": code}


def fill(bucket: str, model: Path, shards: int) -> ScoreConfig:
    """Create the corpus, and return the options of the runs over it."""
    config = ScoreConfig(input=f"{bucket}/in", output=f"{bucket}/out", model=str(model.absolute()), dtype="float32")
    data = parquet_bytes(pa.table({"text": ["one short text"]}))
    put_all(
        Storage(config.input),
        dict.fromkeys((f"part={i // 1000:03d}/{i:06d}.parquet" for i in range(shards)), data),
    )
    return config


def measure(config: ScoreConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Execute the runs one after the other, and yield their names and measurements.

    Raises:
        AssertionError: a run has an unexpected exit code.
    """
    output = Storage(config.output)
    yield "planned: a dry run", run(config, "--dry-run", expected=0)
    yield "planned, Ray started, stopped at once", run(config, "--stop-after", "0.1s", "--stop-grace", "0", expected=4)
    output.delete([file.path for file in output.files()])
    finish(config)
    yield "recognised as finished", run(config, expected=0)
    output.delete([SUCCESS])
    yield REBUILT, run(config, expected=0)


def report(shards: int, runs: dict[str, dict[str, Any]]) -> None:
    """Write the measurements so far."""
    where = machine()
    table = "\n".join(
        [
            f"| {shards:,} shards | seconds | driver's peak memory, MiB |",
            "|---|---:|---:|",
            *(f"| {name} | {each['seconds']:.0f} | {each['driver_mib']:,.0f} |" for name, each in runs.items()),
            "",
            f"{where['cores']} cores of {where['cpu']}, Ray {where['ray']}, {where['date']}.",
        ]
    )
    limits = {"seconds": SECONDS, "mib": MIB}
    save("limits", {"machine": where, "shards": shards, "limits": limits, "runs": runs}, table)


KINDS = {"SplitPredictor": "an actor", "read_shards": "a reader", "publish_splits": "a writer", "ray::": "a worker"}
WORDS = "the good news of a game, a bad bank and fine sport. "


def write_shard(path: Path, texts: Iterator[str], group: int) -> None:
    """Write texts with ids, `group` per row group, without dictionaries and compression."""
    schema = pa.schema([("id", pa.int64()), ("text", pa.string())])
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        row = 0
        while some := list(itertools.islice(texts, group)):
            writer.write_table(pa.table({"id": range(row, row + len(some)), "text": some}, schema=schema))
            row += len(some)


def long_texts(count: int) -> Iterator[str]:
    """Distinct texts of one megabyte."""
    whole = WORDS * (2 * 10**6 // len(WORDS))
    return (f"{number} {whole[: 10**6]}" for number in range(count))


def run_whole(config: ScoreConfig, **ray_settings: Any) -> dict[str, Any]:
    """Score and verify a corpus: seconds, and MiB of the largest process of each kind.

    Args:
        ray_settings: resources that Ray should assume. Default: those of this machine.

    Raises:
        AssertionError: the run failed, or a row is missing or duplicated.
    """
    if ray_settings:
        with listening_on_loopback():
            ray.init(address="local", include_dashboard=False, logging_level=logging.WARNING, **ray_settings)
    try:
        with RunMemory(roles=KINDS) as memory:
            report = score(config)
    finally:
        ray.shutdown()
    found = verify(VerifyConfig(output=config.output))
    assert report["exit_code"] == 0, report["status"]
    assert found.holds, summary(found)
    largest = {"the driver": memory.peak("driver")} | {kind: memory.largest.get(kind, 0) for kind in KINDS.values()}
    return {"rows": found.rows, "splits": report["splits"]["committed"], **report["seconds"], "largest_mib": largest}


def many_shards(config: ScoreConfig, count: int) -> dict[str, Any]:
    for number in range(count):
        path = Path(config.input, f"part={number // 1000:03d}", f"{number:06d}.parquet")
        write_shard(path, iter(["good news", "a bad game", "", "the bank"]), 4)
    return run_whole(config)


def much_text(config: ScoreConfig, count: int) -> dict[str, Any]:
    write_shard(Path(config.input, "a.parquet"), long_texts(count), 50)
    return run_whole(replace(config, overflow="truncate"))


def many_rows(config: ScoreConfig, count: int) -> dict[str, Any]:
    write_shard(Path(config.input, "a.parquet"), (WORDS[: 4 + row % 12] for row in range(count)), 100_000)
    return run_whole(config)


def small_store(config: ScoreConfig, count: int, split_bytes: int = 24 * 10**6) -> dict[str, Any]:
    for number in range(4):
        write_shard(Path(config.input, f"{number}.parquet"), long_texts(count // 4), 16)
    config = replace(config, overflow="truncate", keep_columns=("text",), split_bytes=split_bytes, num_actors=1)
    return run_whole(replace(config, threads_per_actor=1), num_cpus=4, object_store_memory=80 * 10**6)


# Each case with its number of shards, texts or rows.
CASES: dict[str, tuple[Callable[[ScoreConfig, int], dict[str, Any]], int]] = {
    "shards": (many_shards, 20_000),
    "text": (much_text, 5_000),
    "rows": (many_rows, 1_000_000),
    "store": (small_store, 384),
    "blocks": (functools.partial(small_store, split_bytes=96 * 10**6), 384),
}


def run_case(name: str, model: Path, count: int | None) -> None:
    """Execute a case and write its measurements."""
    case, usual = CASES[name]
    with TemporaryDirectory() as temporary:
        config = ScoreConfig(input=f"{temporary}/in", output=f"{temporary}/out", model=str(model.absolute()))
        figures = case(replace(config, id_column="id", dtype="float32"), count or usual)
    where = machine()
    rows = [f"| {kind} | {mib:,.0f} |" for kind, mib in figures["largest_mib"].items()]
    head = f"{name}: {figures['rows']:,} rows in {figures['splits']:,} splits, {figures['wall']:.0f} seconds"
    shape = f"{where['cores']} cores of {where['cpu']}, Ray {where['ray']}, {where['date']}."
    table = "\n".join([head, "", "| the largest process | MiB |", "|---|---:|", *rows, "", shape])
    save(f"limits-{name}", {"machine": where, "case": name, **figures}, table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the demo's model directory")
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--case", choices=CASES, help="see above")
    parser.add_argument("--count", type=int, help="shards, texts or rows of the case")
    arguments = parser.parse_args()
    if arguments.case:
        return run_case(arguments.case, arguments.model, arguments.count)
    runs: dict[str, dict[str, Any]] = {}
    with TemporaryDirectory() as temporary:
        server = S3Server(Path(temporary))
        try:
            os.environ.update(server.environment)
            config = fill(server.bucket("limits"), arguments.model, arguments.shards)
            for name, figures in measure(config):
                runs[name] = figures
                report(arguments.shards, runs)
        finally:
            server.stop()
    if arguments.shards >= 100_000:
        limited = {name: each for name, each in runs.items() if name != REBUILT}
        over = [name for name, each in limited.items() if each["seconds"] > SECONDS or each["driver_mib"] > MIB]
        sys.exit(f"over {SECONDS:.0f} s or {MIB:.0f} MiB: {', '.join(over)}" if over else 0)


if __name__ == "__main__":
    main()
