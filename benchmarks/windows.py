"""Longer windows or more windows: dense SQuAD models with 512 and with 1,024 positions, on long contexts.

    python -m benchmarks.windows --data DIRECTORY --work build/quality

Both models continue from the dense model that `benchmarks.quality --runs squad` fine-tuned, for one more epoch on the
same questions with contexts of 1,500 tokens. The second has an extended position table, so they differ only in their
windows. Both answer the same held-out questions, in turns of a few questions each.
"""

import argparse
import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import machine, save
from benchmarks.corpora import prepare
from benchmarks.measure import measure
from benchmarks.quality.runs import NONE
from benchmarks.quality.workshop import Workshop
from trbert_model.engine import Engine, EngineOptions
from trbert_model.options import LabelledColumns
from trbert_model.tasks.base import DocumentResults
from trbert_model.training import train

POSITIONS = (512, 1024)
PARTS = ("test-1500", "test-6000")
BLOCK = 5  # questions per turn


def trained(workshop: Workshop, positions: int) -> Path:
    """The model with this many positions, trained if it does not exist."""
    output = workshop.work / "runs" / f"squad-windows-{positions}"
    if not (output / "training.json").exists():
        dense = workshop.dense("squad")
        options: dict[str, Any] = {**NONE, "fine_tune_epochs": 1.0, "speedup": None, "speed_range": None}
        if positions > POSITIONS[0]:
            options["max_positions"] = positions
        config = workshop.config("squad", dense, output, evaluated=False, **options)
        train(dataclasses.replace(config, train=str(workshop.file("squad", "train-1500"))))
    return output


def compare(engines: dict[int, Engine], questions: Path) -> dict[str, Any]:
    """Measure all models on the same questions."""
    corpus = engines[POSITIONS[0]].task.read_corpus(
        str(questions), LabelledColumns()
    )  # not yet split into windows, so usable with every model
    systems: dict[str, Any] = {str(positions): engine.score for positions, engine in engines.items()}
    seconds, parts, _ = measure(systems, corpus.documents, BLOCK, lambda: 0.0)
    results = {name: DocumentResults.concatenate(parts[name]) for name in systems}
    scores = {name: corpus.all_scores(found) for name, found in results.items()}
    rows = {}
    for name, found in results.items():
        f1, short = scores[name]["f1"] * 100, scores[str(POSITIONS[0])]["f1"] * 100
        rows[name] = {
            "f1": f1.value,
            "exact_match": 100 * scores[name]["exact_match"].value,
            "difference": f1.value - short.value,
            "interval": f1.interval(short),
            "seconds": seconds[name],
            "windows": int(found.num_windows.sum()),
            "tokens": int(found.num_tokens.sum()),
            "flops": float(found.flops.sum()),
        }
    return {"questions": len(corpus.documents), "models": rows}


def markdown(result: dict[str, Any]) -> str:
    lines = [
        "| contexts | questions | positions | windows | tokens | questions/s | F1 | exact match | beside 512 (95%) |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, measured in result["corpora"].items():
        for positions, row in measured["models"].items():
            low, high = row["interval"]
            beside = f"{row['difference']:+.2f} ({low:+.2f} to {high:+.2f})" if int(positions) > POSITIONS[0] else "–"
            speed = measured["questions"] / row["seconds"]
            lines.append(
                f"| {name} | {measured['questions']} | {positions} | {row['windows']:,} | {row['tokens']:,} | "
                f"{speed:.2f} | {row['f1']:.2f} | {row['exact_match']:.2f} | {beside} |"
            )
    where = result["machine"]
    lines += ["", f"torch {where['torch']} with {result['threads']} threads, fp32, {where['cpu']}, {where['date']}."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory with the corpora, see corpora.prepare")
    parser.add_argument("--work", type=Path, default=Path("build/quality"), help="as benchmarks.quality's")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    prepare(arguments.data, arguments.work / "corpora")
    workshop = Workshop(arguments.work, "float32")
    options = EngineOptions(dtype="float32", device="cpu", reduce=False)
    engines = {positions: Engine.from_pretrained(trained(workshop, positions), options) for positions in POSITIONS}
    corpora = {part: compare(engines, workshop.file("squad", part)) for part in PARTS}
    result = {"machine": machine(), "threads": torch.get_num_threads(), "corpora": corpora}
    save("windows", result, markdown(result))


if __name__ == "__main__":
    main()
