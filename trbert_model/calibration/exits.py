"""Thresholds of exits and gates together with those of the selectors: which of them are worth measuring.

Documents that leave early are recorded once for each schedule of tokens, and the results with every threshold of the
exits follow from that (`ExitRecording`). Gates and halted words change what later layers see, so they are run, but only
with the schedules of tokens that were best without them.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..engine import Engine
from ..exits.options import NO_SKIPPING
from ..exits.policies import Asked, ExitThresholds
from ..exits.recording import ExitRecording
from ..labelled import LabelledCorpus
from ..reduction.policies import ThresholdPolicy, keep_all
from ..tasks.base import DocumentResults
from ..terminal import clock, get_logger
from .table import AS_FAST

logger = get_logger(__name__)

# Shares of the decisions that a threshold lets through.
_SIMULATED = tuple(np.linspace(0.03, 0.97, 16))
_HALTED = (0.2, 0.4, 0.6, 0.75, 0.9)
_SKIPPED = (0.15, 0.3, 0.5)
_NEARER = 3  # runs to come nearer to a speed-up by halting words
_STEP = 1.1  # between the speed-ups to find thresholds for


class Trial(NamedTuple):
    """All thresholds of a model, as from `operating_thresholds`, with their FLOPs speed-up and metric."""

    thresholds: tuple[float, ...]
    speedup: float
    metric: float


def exit_schedules(threshold: float, layers: Sequence[int], depth: int) -> list[tuple[float, ...]]:
    """Thresholds of exits after these layers: all the same; and twice as high in the upper half, as TOKEE's."""
    halves = tuple(threshold if layer < depth / 2 else min(2 * threshold, 1.0) for layer in layers)
    return list(dict.fromkeys([(threshold,) * len(layers), halves]))


def thresholds_for(values: np.ndarray, shares: Sequence[float], *, below: bool = True) -> list[float]:
    """Thresholds that have these shares of the values below them, or from them on; each between two values."""
    values = np.unique(values)  # many are alike where a model is sure
    if len(values) < 2:
        return []
    at = np.clip(np.round(np.multiply(shares if below else np.subtract(1, shares), len(values))).astype(int), 1, None)
    at = np.minimum(at, len(values) - 1)
    return sorted({float(threshold) for threshold in (values[at - 1] + values[at]) / 2 if threshold > 0})


def joint_thresholds(
    engine: Engine, corpus: LabelledCorpus, tokens: Sequence[Sequence[float]], speedups: Sequence[float]
) -> list[tuple[float, ...]]:
    """Thresholds of a model with exits or gates that are worth measuring: the best for each of several speed-ups.

    Args:
        tokens: the selectors' thresholds to try, besides keeping all tokens.
        speedups: those to find thresholds for. More are put between them.
    """
    config = engine.config
    exits, gates = config.exit_options, config.gate_options
    schedules = list(dict.fromkeys([(0.0,) * len(config.reduction_layers), *map(tuple, tokens)]))
    trials: list[Trial] = []
    started = time.monotonic()

    def run(schedule: tuple[float, ...], done: int, total: int, **further: Any) -> None:
        trials.extend(_trials(engine, corpus, schedule, **further))
        left = clock((time.monotonic() - started) * (total - done) / done)
        logger.info("tokens with exits: %d of %d · ETA %s", done, total, left)

    for number, schedule in enumerate(schedules, 1):
        run(schedule, number, len(schedules))
    halts = exits is not None and exits.halts
    if halts or gates is not None:
        observed = _Observer()
        engine.score(corpus.documents, keep_all, observed)
        best = {trial.thresholds[: len(config.reduction_layers)] for trial in best_trials(trials, sorted(speedups))}
        uncertain = thresholds_for(observed.all(observed.uncertainties), _HALTED) if halts else []
        skipping = thresholds_for(observed.all(observed.probabilities), _SKIPPED, below=False)
        pairs = [
            (schedule, gate)
            for schedule in schedules
            if schedule in best or schedule == schedules[0]
            for gate in ([NO_SKIPPING] if halts else []) + (skipping if gates is not None else [])
        ]
        started = time.monotonic()
        for number, (schedule, gate) in enumerate(pairs, 1):
            run(schedule, number, len(pairs), gate=gate, halting=uncertain)
        if halts:
            values = observed.all(observed.uncertainties)
            trials.extend(_nearer(engine, corpus, tuple(trials), values, uncertain, speedups))
    steps = np.arange(np.ceil(np.log(max(speedups)) / np.log(_STEP)))
    return [trial.thresholds for trial in best_trials(trials, sorted({*speedups, *_STEP**steps}))]


def best_trials(trials: Sequence[Trial], speedups: Sequence[float]) -> list[Trial]:
    """For each of these speed-ups, the trial of the highest metric with at least that, the fastest of equals."""
    best: dict[Trial, None] = {}
    for speedup in speedups:
        fast = [trial for trial in trials if trial.speedup >= AS_FAST * speedup]
        if fast:
            best[max(fast, key=lambda trial: (trial.metric, trial.speedup))] = None
    return list(best)


def _trials(
    engine: Engine,
    corpus: LabelledCorpus,
    tokens: tuple[float, ...],
    gate: float = NO_SKIPPING,
    halting: Sequence[float] = (),
) -> Iterator[Trial]:
    """Every schedule of exits with the selectors' and the gates' thresholds; for halted words those in `halting`."""
    config, documents = engine.config, corpus.documents
    exits, policy = config.exit_options, ThresholdPolicy(tokens)
    last = (gate,) if config.gates is not None else ()

    def trial(schedule: tuple[float, ...], results: DocumentResults) -> Trial:
        speedup = float(results.dense_flops.sum() / results.flops.sum())
        return Trial((*tokens, *schedule, *last), speedup, 100 * corpus.scores(results).value)

    if exits is not None and not exits.halts:
        recording = ExitRecording()
        engine.score(documents, policy, ExitThresholds(gate=gate), exit_recording=recording)
        grid = [0.0, *thresholds_for(recording.uncertainties(), _SIMULATED)]
        for schedule in _every(grid, exits.layers, config.num_hidden_layers):
            yield trial(schedule, recording.results(engine.task, config, documents, schedule))
        return
    # TOKEE's schedule alone, since each one is run.
    layers = exits.layers if exits is not None else ()
    for threshold in halting or (0.0,):
        schedule = exit_schedules(threshold, layers, config.num_hidden_layers)[-1]
        yield trial(schedule, engine.score(documents, policy, ExitThresholds(schedule, gate)))


def _nearer(
    engine: Engine,
    corpus: LabelledCorpus,
    trials: Sequence[Trial],
    values: np.ndarray,
    tried: Sequence[float],
    speedups: Sequence[float],
) -> Iterator[Trial]:
    """Run thresholds of halted words that are nearer to these speed-ups than the best that are fast enough.

    Args:
        values: the uncertainties without halting; a threshold between two others has half of those between them below.
        tried: thresholds that were run before.
    """
    config = engine.config
    assert config.exit_options is not None
    reductions, layers = len(config.reduction_layers), config.exit_options.layers
    schedules = {exit_schedules(each, layers, config.num_hidden_layers)[-1]: each for each in tried}
    for speedup in sorted(speedups):
        for best in best_trials(trials, [speedup]):
            tokens, schedule = best.thresholds[:reductions], best.thresholds[reductions:]
            if not any(schedule):
                continue
            high = schedules[schedule]
            low = max((each for each in tried if each < high), default=0.0)
            for _ in range(_NEARER):
                between = np.sort(values[(values > low) & (values < high)])
                if len(between) < 2:
                    break
                middle = float(between[len(between) // 2])
                (found,) = _trials(engine, corpus, tokens, halting=(middle,))
                yield found
                low, high = (low, middle) if found.speedup >= AS_FAST * speedup else (middle, high)


def _every(grid: Sequence[float], layers: Sequence[int], depth: int) -> list[tuple[float, ...]]:
    return list(dict.fromkeys(each for threshold in grid for each in exit_schedules(threshold, layers, depth)))


class _Observer:
    """An exit policy that lets nothing leave or skip, and records uncertainties and the gates' probabilities."""

    def __init__(self) -> None:
        self.uncertainties: list[Tensor] = []
        self.probabilities: list[Tensor] = []

    @staticmethod
    def all(recorded: list[Tensor]) -> np.ndarray:
        return torch.cat([torch.zeros(0), *recorded]).numpy()

    def asks(self, exit: int) -> bool:
        return True

    def leaves(self, asked: Asked) -> Tensor:
        self.uncertainties.append(asked.uncertainty.cpu())
        return torch.zeros_like(asked.uncertainty, dtype=torch.bool)

    def asks_gate(self, layer: int) -> bool:
        return True

    def skips(self, layer: int, probability: Tensor, sequences: Tensor) -> Tensor:
        self.probabilities.append(probability.cpu())
        return torch.zeros_like(probability, dtype=torch.bool)
