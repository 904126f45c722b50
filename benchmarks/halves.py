"""Token reduction and documents that leave, alone and together, on the demo's held-out articles.

    python -m benchmarks.halves --corpus build/demo/corpus --models "on the demo's model=build/demo/exits" \
        "on its dense mode (DeeBERT)=build/demo/deebert"

Models with exits (docs/early-exits.md says how they are trained) are recorded once for each choice of the selectors'
thresholds, which keep given fractions of training articles. What every threshold of the exits gives follows from that
(`ExitRecording`). The held-out articles are divided in two at random. The best thresholds for each FLOPs speed-up on
each half are measured on the other half, so every article is measured once. Differences are to the first model with all
tokens in all layers.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.common import described, machine, save
from trbert_model.calibration.exits import exit_schedules, thresholds_for
from trbert_model.calibration.measure import (
    cutoffs_for,
    keep_logits,
    kept_fractions_for,
    schedules,
    thresholds_of,
)
from trbert_model.checkpoints.loading import load_model
from trbert_model.engine import Engine, EngineOptions
from trbert_model.engine.options import DTYPES
from trbert_model.exits.policies import NO_EXITS
from trbert_model.exits.recording import ExitRecording
from trbert_model.options import LabelledColumns
from trbert_model.reduction.policies import ThresholdPolicy
from trbert_model.scores import Scores

TARGETS = (2.0, 3.0, 4.0, 5.0)
TOKENS = (1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0)  # speed-ups of the selectors alone
TRAINING_DOCUMENTS = 200


class Trial(NamedTuple):
    """Scores, FLOPs and dense FLOPs of all documents with some thresholds, and which kinds of these are at work."""

    scores: Scores
    flops: np.ndarray
    dense_flops: np.ndarray
    tokens: bool
    exits: bool


def trials_of(engine: Engine, corpus: Any, training: Sequence[Any]) -> list[Trial]:
    config, task = engine.config, engine.task
    assert config.exit_options is not None
    reductions = len(config.reduction_layers)
    chosen: list[tuple[float, ...]] = [(0.0,) * reductions]
    if reductions:
        lengths = np.array([len(w.input_ids) for document in training for w in task.windows(document)])
        first = keep_logits(engine, training)
        for speedup in TOKENS:
            for exponents in schedules(reductions):
                fractions = kept_fractions_for(speedup, config, lengths, exponents)
                chosen.append(tuple(thresholds_of(cutoffs_for(engine, training, fractions, first))))
    trials = []
    for number, tokens in enumerate(chosen):
        recording = ExitRecording()
        engine.score(corpus.documents, ThresholdPolicy(tokens), NO_EXITS, exit_recording=recording)
        grid = [0.0, *thresholds_for(recording.uncertainties(), np.linspace(0.03, 0.97, 16).tolist())]
        layers, depth = config.exit_options.layers, config.num_hidden_layers
        for exits in dict.fromkeys(each for threshold in grid for each in exit_schedules(threshold, layers, depth)):
            results = recording.results(task, config, corpus.documents, exits)
            scores = corpus.scores(results) * 100
            trials.append(Trial(scores, results.flops, results.dense_flops, any(tokens), any(exits)))
        print(f"  {number + 1} of {len(chosen)} choices of tokens", flush=True)
    return trials


def point(trials: list[Trial], halves: list[np.ndarray], target: float, dense: Scores) -> dict[str, Any] | None:
    """The best trial with this speed-up on each half, measured on the other half; None if it is out of reach."""
    columns = [np.zeros(len(halves[0]) + len(halves[1])) for _ in range(4)]
    for chosen_on, other in (halves, halves[::-1]):
        fast = [each for each in trials if each.dense_flops[chosen_on].sum() >= target * each.flops[chosen_on].sum()]
        if not fast:
            return None
        best = max(fast, key=lambda each: (each.scores[chosen_on].value, -each.flops[chosen_on].sum()))
        for column, values in zip(
            columns, (best.scores.numerators, best.scores.denominators, best.flops, best.dense_flops), strict=True
        ):
            column[other] = values[other]
    scores, flops, dense_flops = Scores(*columns[:2]), *columns[2:]
    return {
        "asked": target,
        "flops": float(dense_flops.sum() / flops.sum()),
        "metric": scores.value,
        "difference": scores.value - dense.value,
        "interval": scores.interval(dense),
    }


def fastest(trials: list[Trial], halves: list[np.ndarray], least: float) -> float:
    """The FLOPs speed-up at this accuracy or more, chosen on each half and measured on the other."""
    flops = dense_flops = 0.0
    for chosen_on, other in (halves, halves[::-1]):
        good = [each for each in trials if each.scores[chosen_on].value >= least]
        best = min(good, key=lambda each: each.flops[chosen_on].sum())
        flops, dense_flops = flops + best.flops[other].sum(), dense_flops + best.dense_flops[other].sum()
    return float(dense_flops / flops)


def markdown(result: dict[str, Any]) -> str:
    lines = ["| system | asked | FLOPs | accuracy | difference (95%) |", "|---|---:|---:|---:|---:|"]
    for name, points in result["systems"].items():
        for each in points:
            low, high = each["interval"]
            lines.append(
                f"| {name} | {each['asked']:g}× | {each['flops']:.2f}× | {each['metric']:.2f} | "
                f"{each['difference']:+.2f} ({low:+.2f} to {high:+.2f}) |"
            )
    where = result["machine"]
    lines += ["", f"{described(where)}, {result['dtype']}, torch {where['torch']}, {where['date']}."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="the demo's corpus")
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=DIRECTORY")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="(%(default)s)")
    arguments = parser.parse_args()
    systems: dict[str, list[dict[str, Any]]] = {}
    dense, halves = Scores(np.zeros(0), np.zeros(0)), list[np.ndarray]()
    for entry in arguments.models:
        name, _, directory = entry.partition("=")
        model, tokenizer = load_model(directory)
        engine = Engine(model, tokenizer, EngineOptions(device="cpu", dtype=arguments.dtype))
        columns = LabelledColumns()
        corpus = engine.task.read_corpus(str(arguments.corpus / "evaluation.parquet"), columns)
        training = engine.task.read_corpus(str(arguments.corpus / "train.parquet"), columns).documents
        trials = trials_of(engine, corpus, training[:TRAINING_DOCUMENTS])
        if not halves:
            dense = trials[0].scores
            order = np.random.default_rng(0).permutation(len(corpus.documents))
            halves = [order[: len(order) // 2], order[len(order) // 2 :]]
        kinds = {
            "tokens are dropped": [each for each in trials if not each.exits],
            "documents leave": [each for each in trials if not each.tokens],
            "both": trials,
        }
        for kind, own in kinds.items() if engine.config.reduction_layers else [("documents leave", trials)]:
            points = (point(own, halves, target, dense) for target in TARGETS)
            systems[f"{kind}, {name}"] = [each for each in points if each is not None]
            for loss in (0.0, 0.25, 0.5):
                speedup = fastest(own, halves, dense.value - loss)
                print(f"{kind}, {name}: {speedup:.2f}x at a loss of at most {loss} where chosen", flush=True)
    result = {"machine": machine(), "dtype": arguments.dtype, "systems": systems}
    save("halves", result, markdown(result))


if __name__ == "__main__":
    main()
