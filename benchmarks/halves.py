"""Models at several speeds on the demo's held-out articles, with thresholds chosen on other articles.

    python -m benchmarks.halves --corpus build/demo/corpus/evaluation.parquet \
        --models "token reduction=build/demo/model" "documents leave=build/demo/deebert" "both=build/demo/exits"

The articles are divided in two at random. Thresholds chosen on each half are measured on the other, so every article is
measured once. Differences are to the first model without reduction and exits. docs/results.md says how the models with
exits are trained.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import described, machine, save
from trbert_model.calibration.measure import bootstrap_interval, calibrate
from trbert_model.checkpoints.loading import load_model
from trbert_model.engine import Engine, EngineOptions
from trbert_model.engine.options import DTYPES
from trbert_model.errors import ConfigurationError
from trbert_model.options import LabelledColumns
from trbert_model.reduction.policies import keep_all
from trbert_model.tasks.classification.labelled import LabelledTexts

SPEEDUPS = (1.5, 2.0, 3.0, 4.0, 4.5, 5.0)


def halves_of(corpus: LabelledTexts) -> list[LabelledTexts]:
    order = np.random.default_rng(0).permutation(len(corpus.documents))
    parts = (order[: len(order) // 2], order[len(order) // 2 :])
    return [LabelledTexts([corpus.documents[i] for i in rows], corpus.targets[rows], corpus.task) for rows in parts]


def measure(name: str, directory: Path, corpus_uri: str, dtype: str, dense: np.ndarray | None) -> dict[str, Any]:
    """A model's points; dense: the scores to compare with, in the order of the halves. Default: its own."""
    model, tokenizer = load_model(directory)
    engine = Engine(model, tokenizer, EngineOptions(device="cpu", dtype=dtype))
    corpus = engine.task.read_corpus(corpus_uri, LabelledColumns())
    assert isinstance(corpus, LabelledTexts)
    halves = halves_of(corpus)
    tables = [calibrate(engine, half, key="", name=name, speedups=SPEEDUPS) for half in halves]
    if dense is None:
        dense = 100 * np.concatenate([half.scores(engine.score(half.documents, keep_all)) for half in halves])
    points = []
    for speedup in SPEEDUPS:
        try:
            chosen = [table.pick(speedup=speedup) for table in tables[::-1]]
        except ConfigurationError:  # beyond a table
            break
        found = [engine.score(half.documents, *engine.policies(each.thresholds)) for half, each in zip(halves, chosen)]
        scores = 100 * np.concatenate([half.scores(results) for half, results in zip(halves, found)])
        points.append(
            {
                "asked": speedup,
                "flops": sum(each.dense_flops.sum() for each in found) / sum(each.flops.sum() for each in found),
                "metric": float(scores.mean()),
                "difference": float((scores - dense).mean()),
                "interval": bootstrap_interval(scores - dense),
            }
        )
    return {"points": points, "dense": dense.tolist()}


def markdown(result: dict[str, Any]) -> str:
    lines = ["| model | asked | FLOPs | accuracy | difference (95%) |", "|---|---:|---:|---:|---:|"]
    for name, model in result["models"].items():
        for point in model["points"]:
            low, high = point["interval"]
            lines.append(
                f"| {name} | {point['asked']:g}× | {point['flops']:.2f}× | "
                f"{point['metric']:.2f} | {point['difference']:+.2f} ({low:+.2f} to {high:+.2f}) |"
            )
    where = result["machine"]
    lines += ["", f"{described(where)}, {result['dtype']}, torch {where['torch']}, {where['date']}."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True, help="the labelled held-out articles")
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=DIRECTORY")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="(%(default)s)")
    arguments = parser.parse_args()
    models: dict[str, Any] = {}
    dense = None
    for entry in arguments.models:
        name, _, directory = entry.partition("=")
        models[name] = measure(name, Path(directory), arguments.corpus, arguments.dtype, dense)
        dense = np.array(models[name].pop("dense"))
    result = {"machine": machine(), "dtype": arguments.dtype, "models": models}
    save("halves", result, markdown(result))


if __name__ == "__main__":
    main()
