"""Where to reduce: predictions of the dense model when it sees only the tokens that its own guide ranks highest.

    python -m benchmarks.guide --data DIR --work build/quality

It shows, without training, which layers to put selectors before: how often the reduced and the dense model predict the
same for a window, at each speed. The guide is computed from the gradient of the dense model's own prediction
(`training.teacher.guide`), which selectors can only approximate. What training the rest of the model gains is not
included.
"""

import argparse
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import machine, save
from benchmarks.corpora import prepare
from benchmarks.quality.runs import RUNS
from benchmarks.quality.workshop import Workshop
from trbert_model.calibration.measure import kept_fractions_for
from trbert_model.checkpoints.conversion import convert_checkpoint
from trbert_model.engine import Engine, EngineOptions
from trbert_model.engine.precision import computes_bfloat16
from trbert_model.flops import dense_flops, reduced_flops
from trbert_model.labelled import WindowDataset
from trbert_model.reduction.policies import TopTokensPolicy
from trbert_model.tasks.classification.losses import UNLABELLED
from trbert_model.training.teacher import guide, inputs_of

LAYERS = ((1, 2, 4), (0, 1, 3))
SPEEDUPS = (2.0, 3.0, 4.0)
BATCH = 8  # windows


def agreement(dense: Path, dataset: WindowDataset, indices: np.ndarray) -> list[dict[str, Any]]:
    """The percentage of windows with the dense model's label, one row for each choice of layers and speed-up."""
    models = {layers: convert_checkpoint(dense, reduction_layers=list(layers)).eval() for layers in LAYERS}
    lengths = np.array([len(dataset.windows[index].input_ids) for index in indices])
    settings = [
        (layers, speedup, torch.tensor(kept_fractions_for(speedup, models[layers].config, lengths)))
        for layers in LAYERS
        for speedup in SPEEDUPS
    ]
    agreed, flops = np.zeros(len(settings)), np.zeros(len(settings))
    for start in range(0, len(indices), BATCH):
        batch = dataset.collate([[int(index)] for index in indices[start : start + BATCH]])
        batch["labels"].fill_(UNLABELLED)  # the guide must not depend on the correct labels
        tokens = batch["cu_seqlens"].diff().long()
        with torch.autocast("cpu", torch.bfloat16, enabled=computes_bfloat16()):
            signals, scores = guide(models[LAYERS[0]], batch, dataset.losses)
            for i, (layers, _, fractions) in enumerate(settings):
                model = models[layers]
                counts = (tokens[:, None] * fractions).round().long().clamp(min=1)
                with torch.no_grad():
                    output = model(**inputs_of(batch), selection_policy=TopTokensPolicy(counts, scores[list(layers)]))
                labels = signals[:, : model.config.num_labels].argmax(-1)
                agreed[i] += int((output.logits.argmax(-1) == labels).sum())
                flops[i] += reduced_flops(
                    model.config, tokens.numpy(), torch.stack(output.kept_tokens, 1).numpy()
                ).sum()
    whole = dense_flops(models[LAYERS[0]].config, lengths).sum()
    return [
        {
            "layers": layers,
            "speedup": speedup,
            "agreement": 100 * float(agreed[i] / len(indices)),
            "flops_speedup": float(whole / flops[i]),
        }
        for i, (layers, speedup, _) in enumerate(settings)
    ]


def measured(workshop: Workshop, name: str, limit: int) -> dict[str, Any]:
    """Measure each corpus of a run with its own dense model, on documents that it was not trained on."""
    run = RUNS[name]
    rows: list[list[dict[str, Any]]] = []
    windows = []
    for corpus in run.corpora:
        dense = workshop.dense(corpus)
        engine = Engine.from_pretrained(dense, EngineOptions(dtype="float32", reduce=False))
        part = "dev" if workshop.file(corpus, "dev").exists() else "test"
        dataset = workshop.read(corpus, part, engine).dataset()
        indices = np.random.default_rng(0).permutation(len(dataset.windows))[:limit]
        rows.append(agreement(dense, dataset, indices))
        windows.append(len(indices))
        logging.info("%s, %d windows: %s", corpus, len(indices), rows[-1])
    joined = []
    for same in zip(*rows):
        means = {
            key: float(np.average([row[key] for row in same], weights=windows))
            for key in ("agreement", "flops_speedup")
        }
        joined.append({**same[0], **means})
    return {"windows": sum(windows), "rows": joined}


def markdown(result: dict[str, Any]) -> str:
    speeds = " | ".join(f"agree at {speedup:g}×" for speedup in SPEEDUPS)
    lines = [
        f"| corpus | windows | selectors in front of layers | {speeds} |",
        "|---|---:|---|" + "---:|" * len(SPEEDUPS),
    ]
    for name, found in result["corpora"].items():
        for layers in LAYERS:
            cells = [f"{row['agreement']:.1f}%" for row in found["rows"] if tuple(row["layers"]) == layers]
            lines.append(f"| {name} | {found['windows']:,} | {', '.join(map(str, layers))} | {' | '.join(cells)} |")
    where = result["machine"]
    lines += ["", f"{result['dtype']}, torch {where['torch']}, {where['cpu']}, {where['date']}."]
    return "\n".join(lines)


def main() -> None:
    names = ["20news", "imdb", "hyperpartisan"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory of the corpora's Parquet files")
    parser.add_argument("--work", type=Path, default=Path("build/quality"), help="as benchmarks.quality's")
    parser.add_argument("--corpora", nargs="*", choices=names, default=names, help="%(default)s")
    parser.add_argument("--windows", type=int, default=1000, help="of each dense model's documents (%(default)s)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    prepare(arguments.data, arguments.work / "corpora")
    workshop = Workshop(arguments.work, "float32")
    corpora = {name: measured(workshop, name, arguments.windows) for name in arguments.corpora}
    dtype = "bfloat16" if computes_bfloat16() else "fp32"
    result = {"machine": machine(), "dtype": dtype, "corpora": corpora}
    save("guide", result, markdown(result))


if __name__ == "__main__":
    main()
