"""A corpus of very many shards: planning it, and seeing that it is finished.

    python -m benchmarks.limits --model build/demo/model

Fills a real S3 server on loopback with 100,000 one-row shards, then runs jobs/score.py as a user would and measures
the command's wall-clock and its own peak resident memory: a dry run (the plan); a run that is stopped at its first
breath (the plan, Ray, the pipeline's start and end); and, with the shards' results, markers and `_SUCCESS` put in
place, a run that has nothing to do, with `_SUCCESS` and without it (then every marker is read).
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fsspec
import pyarrow as pa

from benchmarks.common import machine, save
from pipeline import ScoreConfig
from pipeline.commit import bind_output, parquet_bytes
from pipeline.corpus import list_shards
from pipeline.manifest import SUCCESS, write_manifest
from pipeline.run import _identity
from pipeline.storage import Storage, model_digest
from tests.integration.s3_server import S3Server

SECONDS, MIB = 60.0, 2048.0  # the limits
# No limit is stated for this one: it is what a run has to do that follows one that died between the last marker and
# `_SUCCESS`.
REBUILT = "recognised from its markers, `_SUCCESS` made anew"


def put_all(place: Storage, files: dict[str, bytes]) -> None:
    """Many small objects, many at a time."""
    fs, root = fsspec.core.url_to_fs(place.uri)
    names = list(files)
    for start in range(0, len(names), 2000):
        fs.pipe({f"{root}/{name}": files[name] for name in names[start : start + 2000]})


def finish(config: ScoreConfig) -> None:
    """Put in place what a run over the whole corpus leaves: a result object and a marker a shard, `_SUCCESS`."""
    output = Storage(config.output)
    data = parquet_bytes(pa.table({"shard": ["x"], "row": [0], "label": ["a"]}))
    results, markers = {}, {}
    for shard in list_shards(Storage(config.input)):
        split = {"object": shard.object(0), "results": 1, "quarantined": 0, "sha256": "0" * 64, "bytes": len(data)}
        totals = {"rows": 1, "results": 1, "quarantined": 0}
        marker = {"shard": shard.path, "version": shard.version, "size": shard.size, **totals, "splits": [split]}
        results[shard.object(0)] = data
        markers[shard.marker] = json.dumps({**marker, "run": "benchmark", "written": time.time()}).encode()
    identity = _identity(config, model_digest(Path(config.model)))
    bind_output(output, identity, overwrite=False)
    put_all(output, results)
    put_all(output, markers)
    write_manifest(output, identity, {}, [], "benchmark")


def run(config: ScoreConfig, *arguments: str, expected: int) -> dict[str, Any]:
    """jobs/score.py as a process: seconds, the driver's peak MiB (not that of Ray's processes), exit code."""
    places = ["--input", config.input, "--output", config.output, "--model", config.model]
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "jobs/score.py", *places, *arguments],
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
    """Put the corpus in place; the options of the runs over it."""
    config = ScoreConfig(input=f"{bucket}/in", output=f"{bucket}/out", model=str(model.absolute()), dtype="float32")
    data = parquet_bytes(pa.table({"text": ["one short text"]}))
    put_all(
        Storage(config.input),
        dict.fromkeys((f"part={i // 1000:03d}/{i:06d}.parquet" for i in range(shards)), data),
    )
    return config


def measure(config: ScoreConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """The runs, one after the other, by what they do.

    Raises:
        AssertionError: one ended with another exit code than it should.
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
    """Write the figures that are there."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the demo's model directory")
    parser.add_argument("--shards", type=int, default=100_000)
    arguments = parser.parse_args()
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
