"""Calibration: selector thresholds for a given speed-up, and the speed and accuracy measured with them.

A model directory's `calibration.json` holds one table for each model digest, dtype and window length that it was
measured with. `jobs/evaluate.py` writes it, and `jobs/score.py --speedup/--max-drop` chooses from it.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .configuration import TRBertConfig
from .engine import Engine
from .errors import CheckpointError, ConfigurationError
from .flops import dense_flops, reduced_flops
from .labelled import LabelledCorpus
from .reduction.policies import ThresholdPolicy, keep_all
from .reduction.state import Candidates, SelectionPolicy
from .tasks.base import DocumentResults
from .terminal import get_logger

logger = get_logger(__name__)

FILE = "calibration.json"
SPEEDUPS = (1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0)
# Speed-ups whose ratio is at least this count as equal.
_AS_FAST = 0.99


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


@dataclass(frozen=True)
class OperatingPoint:
    """Speed and accuracy on the labelled documents with one set of thresholds.

    Attributes:
        thresholds: keep probabilities, one per reduction.
        kept_fractions: of all documents together, one per reduction.
        kept_spread: 5th and 95th percentile of the kept fraction per document, one pair per reduction.
        flops_speedup, measured_speedup: over the dense model, all documents together.
        metric, metric_interval: in percent, with its 95% bootstrap interval.
        drop, drop_interval: loss against the dense model in percentage points, with its 95% bootstrap interval over
            paired documents.
        other_metrics: the task's other metrics, in percent.
    """

    thresholds: tuple[float, ...]
    kept_fractions: tuple[float, ...]
    kept_spread: tuple[tuple[float, float], ...]
    flops_speedup: float
    measured_speedup: float
    metric: float
    metric_interval: tuple[float, float]
    drop: float
    drop_interval: tuple[float, float]
    other_metrics: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "OperatingPoint":
        return cls(**{name: _tuples(value) for name, value in values.items()})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(each) for each in value) if isinstance(value, list) else value


@dataclass(frozen=True)
class Calibration:
    """A model's calibration table.

    Attributes:
        key: model digest, dtype and window length in tokens that it was measured with, see `calibration_key`.
        corpus: name of the labelled corpus.
        documents: number of documents in it.
        metric: name of the metric.
        dense_metric, dense_other_metrics: the dense model's metrics, in percent.
        default: the point of the model's own thresholds.
        points: the Pareto front of speed and metric, by rising FLOPs speed-up.
    """

    key: str
    corpus: str
    documents: int
    metric: str
    dense_metric: float
    default: OperatingPoint
    points: tuple[OperatingPoint, ...]
    dense_other_metrics: dict[str, float] = field(default_factory=dict)

    def pick(self, *, speedup: float | None = None, max_drop: float | None = None) -> OperatingPoint:
        """Choose the most accurate point with at least a given speed-up, or the fastest with at most a given drop.

        Args:
            speedup: lowest FLOPs speed-up.
            max_drop: highest drop, in percentage points.

        Raises:
            ConfigurationError: no point qualifies; the message names the nearest one.
        """
        if speedup is not None:
            fast = [point for point in self.points if point.flops_speedup >= speedup * _AS_FAST]
            if fast:
                return min(fast, key=lambda point: point.drop)
            raise ConfigurationError(
                f"speedup {speedup:g} is beyond the calibration table, which ends at "
                f"{self.points[-1].flops_speedup:.2f}x"
            )
        good = [point for point in self.points if point.drop <= (max_drop or 0.0)]
        if good:
            return good[-1]
        least = min(self.points, key=lambda point: point.drop)
        raise ConfigurationError(
            f"max_drop {max_drop:g}: the calibration table's smallest drop is {least.drop:.2f} points, at "
            f"{least.flops_speedup:.2f}x; --no-reduce runs the dense model"
        )


def calibration_key(digest: str, dtype: str, window: int) -> str:
    """The key of a calibration table: model digest (`checkpoints.files.model_digest`), dtype and tokens per window."""
    return f"{digest[:16]}-{dtype}-{window}"


def read_calibration(directory: str | Path, key: str) -> Calibration | None:
    """Read the table with this key from a model directory; None if there is none.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = Path(directory) / FILE
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text()).get(key)
        if values is None:
            return None
        points = tuple(OperatingPoint.from_json(point) for point in values.pop("points"))
        default = OperatingPoint.from_json(values.pop("default"))
        return Calibration(**values, default=default, points=points)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); make it anew with jobs/evaluate.py") from error


def with_table(directory: str | Path, table: Calibration) -> bytes:
    """The contents of the directory's `calibration.json` with a table added, or replaced if its key exists.

    Raises:
        CheckpointError: the existing file is damaged.
    """
    path = Path(directory) / FILE
    try:
        tables = json.loads(path.read_text()) if path.is_file() else {}
        tables[table.key] = dataclasses.asdict(table)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); remove it") from error
    return (json.dumps(tables, indent=1) + "\n").encode()


def calibrate(
    engine: Engine,
    corpus: LabelledCorpus,
    *,
    key: str,
    name: str,
    speedups: Sequence[float] = SPEEDUPS,
) -> Calibration:
    """Measure the dense model, the default thresholds, and the thresholds of each schedule for each speed-up.

    Speed-ups that cannot be reached are skipped. The engine must have reduction enabled. Only time in the model is
    counted, dense and reduced on the same documents in the same process.
    """
    config, documents = engine.config, corpus.documents
    dense, dense_seconds = _timed(engine, documents, keep_all)
    best = corpus.scores(dense)
    windows = np.array([len(w.input_ids) for document in documents for w in engine.task.windows(document)])

    def measure(thresholds: Sequence[float]) -> OperatingPoint:
        results, seconds = _timed(engine, documents, ThresholdPolicy(thresholds))
        scores = corpus.scores(results)
        own = results.kept_tokens / results.num_tokens[:, None]
        drop = 100 * (best - scores)
        return OperatingPoint(
            thresholds=tuple(float(t) for t in thresholds),
            kept_fractions=tuple((results.kept_tokens.sum(0) / results.num_tokens.sum()).tolist()),
            kept_spread=tuple((float(low), float(high)) for low, high in np.percentile(own, [5, 95], axis=0).T),
            flops_speedup=float(results.dense_flops.sum() / results.flops.sum()),
            measured_speedup=dense_seconds / seconds,
            metric=100 * float(scores.mean()),
            metric_interval=bootstrap_interval(100 * scores),
            drop=float(drop.mean()),
            drop_interval=bootstrap_interval(drop),
            other_metrics=_other_metrics(corpus, results),
        )

    points = []
    first = keep_logits(engine, documents)
    for speedup in speedups:
        for exponents in schedules(len(config.reduction_layers)):
            try:
                fractions = kept_fractions_for(speedup, config, windows, exponents)
            except ConfigurationError:
                continue  # out of reach
            points.append(measure(thresholds_of(cutoffs_for(engine, documents, fractions, first))))
            logger.info("%.2fx: %.2f%% (dense %.2f%%)", points[-1].flops_speedup, points[-1].metric, 100 * best.mean())
    return Calibration(
        key=key,
        corpus=name,
        documents=len(best),
        metric=corpus.metric,
        dense_metric=100 * float(best.mean()),
        default=measure(config.selector_thresholds),
        points=tuple(pareto_front(points)),
        dense_other_metrics=_other_metrics(corpus, dense),
    )


def _other_metrics(corpus: LabelledCorpus, results: DocumentResults) -> dict[str, float]:
    return {name: 100 * value for name, value in corpus.measure(results).items() if name != corpus.metric}


def _timed(engine: Engine, documents: Sequence[Any], policy: SelectionPolicy) -> tuple[DocumentResults, float]:
    before = engine.statistics.model_seconds
    results = engine.score(documents, policy)
    return results, engine.statistics.model_seconds - before


def pareto_front(points: Sequence[OperatingPoint]) -> list[OperatingPoint]:
    """The points that no other point of the same or a higher speed beats in metric, by rising FLOPs speed-up."""
    front: list[OperatingPoint] = []
    for point in sorted(points, key=lambda point: (-point.flops_speedup, -point.metric)):
        if front and point.metric <= front[-1].metric:
            continue
        while front and point.flops_speedup >= _AS_FAST * front[-1].flops_speedup:
            front.pop()
        front.append(point)
    return front[::-1]


def bootstrap_interval(values: np.ndarray, resamples: int = 2000) -> tuple[float, float]:
    """The 95% bootstrap interval of a mean over documents, with a fixed seed."""
    rng = np.random.default_rng(0)
    values = np.asarray(values, dtype=np.float64)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
