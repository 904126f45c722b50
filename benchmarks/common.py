"""Shared by the benchmarks: documents, a description of the machine, and results as JSON and as a table."""

import datetime
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

RESULTS = Path(__file__).parent / "results"


def held_out_texts(directory: Path) -> list[str]:
    """The decodable documents of the demo's held-out shards."""
    texts = []
    for path in sorted(directory.glob("*.parquet")):
        for raw in pq.read_table(path, columns=["text"])["text"].to_pylist():
            try:
                texts.append(raw.decode())
            except UnicodeDecodeError:
                continue  # the demo's one undecodable article; a scoring run quarantines it
    return texts


def repeated(items: list, count: int) -> list:
    """`count` items in a seeded random order, each repeated as often as needed."""
    order = np.random.default_rng(0).permutation(count)
    return [items[i % len(items)] for i in order]


def write_shards(directory: Path, table: pa.Table, rows: int) -> None:
    """Write a new directory of Parquet shards with this many rows each."""
    directory.mkdir(parents=True)
    for number, start in enumerate(range(0, len(table), rows)):
        pq.write_table(table.slice(start, rows), directory / f"{number:05d}.parquet")


def machine() -> dict[str, Any]:
    """The machine's CPU and the versions of the packages."""
    model = platform.processor() or platform.machine()
    flags: set[str] = set()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = dict(line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
        values = {key.strip(): value.strip() for key, value in lines.items()}
        model, flags = values.get("model name", model), set(values.get("flags", "").split())
    instructions = [name for name in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16") if name in flags]
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "instructions": instructions,
        "date": datetime.date.today().isoformat(),
        **{package: version(package) for package in ("torch", "transformers", "ray")},
    }


def described(machine: dict[str, Any]) -> str:
    """A machine in words: its cores, CPU and instructions, and whether it has AMX."""
    instructions = [*machine["instructions"], *([] if "amx_bf16" in machine["instructions"] else ["no AMX"])]
    return f"{machine['cores']} cores of {machine['cpu']} ({', '.join(instructions)})"


def save(name: str, result: dict[str, Any], table: str) -> None:
    """Write `results/<name>.json` and the table to `results/<name>.md`, and print the table."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(table + "\n")
    print(table)
