"""Thresholds for a given speed-up, and the measurement of a calibration table."""

import contextlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..configuration import TRBertConfig
from ..engine import Engine
from ..engine.options import operating_thresholds
from ..errors import ConfigurationError
from ..exits.policies import ExitPolicy
from ..flops import dense_flops, reduced_flops
from ..labelled import LabelledCorpus
from ..reduction.policies import keep_all
from ..reduction.state import Candidates, SelectionPolicy
from ..tasks.base import DocumentResults
from ..terminal import clock, get_logger
from .exits import joint_thresholds
from .table import SPEEDUPS, Calibration, OperatingPoint, pareto_front

logger = get_logger(__name__)


def schedules(reductions: int) -> list[tuple[float, ...]]:
    """Exponents e of the kept fractions r^e to try, one tuple per schedule.

    The kept fractions fall evenly, later, and in the third schedule later still, or earlier if there are more than
    three reductions. The paper's two selectors were trained with (1, 2). If the first reduction keeps more, selectors
    after more layers make the choice; with five reductions, those after the first ones are deep enough.
    """
    even = np.arange(1, reductions + 1, dtype=float)
    if reductions == 1:
        return [(1.0,)]
    return [tuple(even), tuple(even - 0.5), tuple(even**1.5 if reductions <= 3 else even**0.65)]


def kept_fractions_for(
    speedup: float, config: TRBertConfig, lengths: np.ndarray, exponents: Sequence[float] | None = None
) -> list[float]:
    """Kept fractions r^e with which sequences of these lengths cost 1/speedup of the dense model's FLOPs.

    Args:
        lengths: (sequences,), in tokens.
        exponents: e of each reduction. Default: 1, 2, …

    Raises:
        ConfigurationError: keeping one token after each reduction still costs more than that.
    """
    powers = np.arange(1, len(config.reduction_layers) + 1) if exponents is None else np.asarray(exponents)
    dense = dense_flops(config, lengths).sum()

    def speedup_at(r: float) -> float:
        kept = np.maximum(np.round(np.outer(lengths, r**powers)), 1)
        return float(dense / reduced_flops(config, lengths, kept).sum())

    if not len(powers) or speedup_at(0.0) < speedup:
        raise ConfigurationError(
            f"a FLOPs speed-up of {speedup} is out of reach with reduction layers {config.reduction_layers}: "
            f"keeping one token after each gives {speedup_at(0.0):.2f}; reduce earlier (layer 0 is allowed)"
        )
    low, high = 0.0, 1.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if speedup_at(middle) > speedup else (low, middle)
    return [float(low**power) for power in powers]


@dataclass(frozen=True)
class KeepLogits:
    """The keep logits of one reduction over a set of documents.

    Attributes:
        falling: fp32, the keep logits of all tokens that are not fixed, in descending order.
        tokens: number of tokens in the documents.
        fixed: number of fixed tokens.
    """

    falling: Tensor
    tokens: int
    fixed: int

    def cutoff_for(self, fraction: float) -> float:
        """The cutoff above which `fraction` of all tokens are kept, fixed tokens included."""
        if not len(self.falling):
            return 0.0
        keep = min(max(round(fraction * self.tokens) - self.fixed, 1), len(self.falling) - 1)
        return float(self.falling[keep - 1 : keep + 1].mean())


def keep_logits(engine: Engine, documents: Sequence[Any], cutoffs: Sequence[float] = ()) -> KeepLogits:
    """The keep logits of the first reduction without a cutoff in `cutoffs`, after applying those cutoffs."""
    recorder = _Recorder(cutoffs)
    results = engine.score(documents, recorder)
    falling = torch.cat(recorder.logits).sort(descending=True).values
    return KeepLogits(falling, int(results.num_tokens.sum()), recorder.fixed)


def cutoffs_for(
    engine: Engine, documents: Sequence[Any], fractions: Sequence[float], first: KeepLogits | None = None
) -> list[float]:
    """Keep-logit cutoffs, one per reduction, that keep these fractions of the documents' tokens.

    The reductions are processed in order, because a selector's input depends on the reductions before it.

    Args:
        first: `keep_logits` of the first reduction, if known. It does not depend on the fractions.
    """
    cutoffs: list[float] = []
    for fraction in fractions:
        logits = first if first is not None and not cutoffs else keep_logits(engine, documents, cutoffs)
        cutoffs.append(logits.cutoff_for(fraction))
    return cutoffs


class _Recorder:
    """A selection policy that applies cutoffs at the first reductions and records the next one's keep logits."""

    def __init__(self, cutoffs: Sequence[float]):
        self.cutoffs = list(cutoffs)
        self.logits: list[Tensor] = []
        self.fixed = 0

    def __call__(self, candidates: Candidates) -> Tensor:
        if candidates.reduction < len(self.cutoffs):
            return candidates.logits >= self.cutoffs[candidates.reduction]
        if candidates.reduction == len(self.cutoffs):
            self.logits.append(candidates.logits[~candidates.fixed].cpu())
            self.fixed += int(candidates.fixed.sum())
        return torch.zeros_like(candidates.fixed)  # the output of later layers is not used


def thresholds_of(cutoffs: Sequence[float]) -> list[float]:
    """Convert keep-logit cutoffs to keep probabilities, as in `TRBertConfig.selector_thresholds`."""
    return torch.sigmoid(torch.tensor(list(cutoffs))).tolist()


def calibrate(
    engine: Engine,
    corpus: LabelledCorpus,
    *,
    key: str,
    name: str,
    speedups: Sequence[float] = SPEEDUPS,
) -> Calibration:
    """Measure the dense model, the default thresholds, and the thresholds of each schedule for each speed-up.

    For models with exits or gates, their thresholds are chosen together with those of the tokens (`joint_thresholds`).

    Speed-ups that cannot be reached are skipped. The engine must have reduction enabled. Only time in the model is
    counted, dense and reduced on the same documents in the same process.
    """
    config, documents = engine.config, corpus.documents
    dense, dense_seconds = _timed(engine, documents, keep_all)
    best = corpus.scores(dense) * 100
    windows = np.array([len(w.input_ids) for document in documents for w in engine.task.windows(document)])

    def measure(thresholds: Sequence[float]) -> OperatingPoint:
        results, seconds = _timed(engine, documents, *engine.policies(thresholds))
        scores = corpus.scores(results) * 100
        own = results.kept_tokens / results.num_tokens[:, None]
        return OperatingPoint(
            thresholds=tuple(float(t) for t in thresholds),
            kept_fractions=tuple((results.kept_tokens.sum(0) / results.num_tokens.sum()).tolist()),
            kept_spread=tuple((float(low), float(high)) for low, high in np.percentile(own, [5, 95], axis=0).T),
            flops_speedup=float(results.dense_flops.sum() / results.flops.sum()),
            measured_speedup=dense_seconds / seconds,
            metric=scores.value,
            metric_interval=scores.interval(),
            drop=best.value - scores.value,
            drop_interval=best.interval(scores),
            other_metrics=_other_metrics(corpus, results),
        )

    wanted = []
    for speedup in speedups:
        for exponents in schedules(len(config.reduction_layers)):
            with contextlib.suppress(ConfigurationError):  # out of reach
                wanted.append(kept_fractions_for(speedup, config, windows, exponents))
    points: list[OperatingPoint] = []
    first = keep_logits(engine, documents) if wanted else None
    candidates: Iterable[Sequence[float]] = (
        thresholds_of(cutoffs_for(engine, documents, fractions, first)) for fractions in wanted
    )
    total = len(wanted)
    if config.exits is not None or config.gates is not None:
        candidates = joint_thresholds(engine, corpus, list(candidates), speedups)
        total = len(candidates)
    started = time.monotonic()
    for thresholds in candidates:
        points.append(measure(thresholds))
        done = len(points)
        logger.info(
            "%d of %d: %.2fx %.2f%% (dense %.2f%%) · ETA %s",
            *(done, total, points[-1].flops_speedup, points[-1].metric, best.value),
            clock((time.monotonic() - started) * (total - done) / done),
        )
    return Calibration(
        key=key,
        corpus=name,
        documents=len(documents),
        metric=corpus.metric,
        dense_metric=best.value,
        default=measure(operating_thresholds(config)),
        points=tuple(pareto_front(points)),
        dense_other_metrics=_other_metrics(corpus, dense),
    )


def _other_metrics(corpus: LabelledCorpus, results: DocumentResults) -> dict[str, float]:
    return {name: 100 * value for name, value in corpus.measure(results).items() if name != corpus.metric}


def _timed(
    engine: Engine, documents: Sequence[Any], policy: SelectionPolicy, exit_policy: ExitPolicy | None = None
) -> tuple[DocumentResults, float]:
    before = engine.statistics.model_seconds
    results = engine.score(documents, policy, exit_policy)
    return results, engine.statistics.model_seconds - before
