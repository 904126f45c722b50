"""The pipeline's throughput compared with the bare engine's, and its actor's memory.

    python -m benchmarks.pipeline --model build/demo/model --corpus build/demo/corpus/held-out

Throughput: one actor with one torch thread scores the held-out documents. The engine alone, also with one thread,
scores the same documents before and after. Steady state lasts from the arrival of the first split at the actor until
the last split leaves it. Memory: the actor's resident memory, sampled twice a second, for the corpus once and repeated
ten times.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
from transformers.utils import logging as transformers_logging

from benchmarks.common import held_out_texts, machine, save, write_shards
from benchmarks.memory import RunMemory
from pipeline import ScoreConfig, score

SHARD_DOCUMENTS = 100
SPLIT_BYTES = 100_000  # about 45 documents, a few seconds of one thread

ENGINE_ALONE = """
import json, sys, time, torch
torch.set_num_threads(1)
from trbert_model.engine import Engine, EngineOptions
engine = Engine.from_pretrained(sys.argv[1], EngineOptions(dtype="float32", device="cpu"))
documents = engine.task.tokenize(json.load(sys.stdin))
engine.score(documents[:20])
started = time.perf_counter()
engine.score(documents)
print(len(documents) / (time.perf_counter() - started))
"""


def engine_alone(model: Path, texts: list[str]) -> float:
    """Documents per second of the engine in a separate process, without tokenisation."""
    command = [sys.executable, "-c", ENGINE_ALONE, str(model)]
    return float(subprocess.run(command, input=json.dumps(texts), capture_output=True, text=True, check=True).stdout)


def run_pipeline(model: Path, texts: list[str], times: int) -> dict[str, Any]:
    """Score the corpus, repeated `times` times, with one actor of one thread."""
    with TemporaryDirectory() as temporary:
        directory = Path(temporary)
        write_shards(directory / "in", pa.table({"text": texts * times}), SHARD_DOCUMENTS)
        with RunMemory() as memory:
            report = score(
                ScoreConfig(
                    input=str(directory / "in"),
                    output=str(directory / "out"),
                    model=str(model),
                    num_actors=1,
                    threads_per_actor=1,
                    gpus_per_actor=0.0,
                    dtype="float32",
                    split_bytes=SPLIT_BYTES,
                    progress_interval=60.0,
                )
            )
    assert report["documents"] == len(texts) * times, report["status"]
    return {
        "documents": report["documents"],
        "splits": report["splits"]["committed"],
        "documents_per_second": report["per_second_steady_state"]["documents"],
        "computing_share": report["actors"]["computing_share"],
        "seconds": report["seconds"],
        "busy_seconds": report["busy_seconds"],
        "actor_peak_mib": memory.peak("actor"),
        "actor_slope_mib_per_minute": memory.slope("actor"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the demo's model directory")
    parser.add_argument("--corpus", type=Path, required=True, help="the demo's held-out shards")
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    texts = held_out_texts(arguments.corpus)
    alone = [engine_alone(arguments.model, texts)]
    once = run_pipeline(arguments.model, texts, 1)
    alone.append(engine_alone(arguments.model, texts))
    ten = run_pipeline(arguments.model, texts, 10)
    alone.append(engine_alone(arguments.model, texts))
    engine = float(np.median(alone))
    result = {
        "machine": machine(),
        "engine_documents_per_second": alone,
        "once": once,
        "ten_times": ten,
        "pipeline_over_engine": {
            name: run["documents_per_second"] / engine for name, run in (("once", once), ("ten", ten))
        },
        "peak_memory_ten_over_once": ten["actor_peak_mib"] / once["actor_peak_mib"],
    }
    where, ratios = result["machine"], result["pipeline_over_engine"]
    table = "\n".join(
        [
            "| one actor, one torch thread | corpus once | ten times |",
            "|---|---:|---:|",
            f"| documents | {once['documents']:,} | {ten['documents']:,} |",
            f"| documents/s, steady state | {once['documents_per_second']:.1f} | {ten['documents_per_second']:.1f} |",
            f"| over the bare engine ({engine:.1f} documents/s) | {ratios['once']:.2f} | {ratios['ten']:.2f} |",
            f"| share of steady state computing | {once['computing_share']:.3f} | {ten['computing_share']:.3f} |",
            f"| actor's peak memory, MiB | {once['actor_peak_mib']:.0f} | {ten['actor_peak_mib']:.0f} |",
            # The short run is little longer than loading the model and stopping the actor.
            f"| slope over the last half, MiB/min | – | {ten['actor_slope_mib_per_minute']:.1f} |",
            "",
            f"{where['cores']} cores of {where['cpu']}, fp32, torch {where['torch']}, Ray {where['ray']}, "
            f"{where['date']}.",
        ]
    )
    save("pipeline", result, table)


if __name__ == "__main__":
    main()
