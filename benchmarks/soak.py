"""Half an hour of scoring: does the memory of any process grow?

    python -m benchmarks.soak --model build/demo/model --corpus build/demo/corpus/held-out

Scores the held-out documents repeatedly, in shards of 100, from and to a real S3 server on loopback, with one actor,
until --stop-after ends the run. The resident memory of every process is sampled every two seconds. The slope is that of
the last half. Only memory is measured, not speed, so other work may run at the same time.
"""

import argparse
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa

from benchmarks.common import held_out_texts, machine, save
from benchmarks.memory import RunMemory
from pipeline import ScoreConfig, score
from pipeline.commit import parquet_bytes
from pipeline.storage import Storage
from tests.integration.s3_server import S3Server

SHARD_DOCUMENTS = 100
SPLIT_BYTES = 100_000
DOCUMENTS_PER_MINUTE = 3000  # more than two cores can score, so that --stop-after ends the run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the demo's model directory")
    parser.add_argument("--corpus", type=Path, required=True, help="the demo's held-out shards")
    parser.add_argument("--minutes", type=float, default=30.0)
    arguments = parser.parse_args()
    texts = held_out_texts(arguments.corpus)
    with TemporaryDirectory() as temporary:
        server = S3Server(Path(temporary))
        try:
            os.environ.update(server.environment)
            bucket = server.bucket("soak")
            corpus = Storage(f"{bucket}/in")
            for number in range(int(arguments.minutes * DOCUMENTS_PER_MINUTE / SHARD_DOCUMENTS)):
                some = [texts[(number * SHARD_DOCUMENTS + i) % len(texts)] for i in range(SHARD_DOCUMENTS)]
                corpus.write(f"{number:05d}.parquet", parquet_bytes(pa.table({"text": some})))
            config = ScoreConfig(
                input=corpus.uri,
                output=f"{bucket}/out",
                model=str(arguments.model),
                num_actors=1,
                threads_per_actor=1,
                gpus_per_actor=0.0,
                dtype="float32",
                split_bytes=SPLIT_BYTES,
                progress_interval=60.0,
                stop_after=f"{arguments.minutes:g}m",
            )
            with RunMemory(interval=2.0) as memory:
                report = score(config)
        finally:
            server.stop()
    assert report["exit_code"] == 4, report["status"]
    roles = [role for role, samples in memory.samples.items() if len(samples) > 10]
    result = {
        "machine": machine(),
        "minutes": report["seconds"]["wall"] / 60,
        "documents": report["documents"],
        "splits": report["splits"]["committed"],
        "processes": {role: {"peak_mib": memory.peak(role), "slope": memory.slope(role)} for role in roles},
        "samples": {role: [(round(t), round(size, 1)) for t, size in memory.samples[role][::15]] for role in roles},
    }
    where = result["machine"]
    rows = [
        f"| {role} | {memory.peak(role):,.0f} | {memory.slope(role):+.2f} |"
        for role in sorted(roles, key=lambda role: -memory.peak(role))
    ]
    table = "\n".join(
        [
            f"{result['minutes']:.0f} minutes, {result['documents']:,} documents in {result['splits']:,} splits",
            "",
            "| processes | peak, MiB | slope over the last half, MiB/min |",
            "|---|---:|---:|",
            *rows,
            "",
            f"{where['cores']} cores of {where['cpu']}, torch {where['torch']}, Ray {where['ray']}, {where['date']}.",
        ]
    )
    save("soak", result, table)


if __name__ == "__main__":
    main()
