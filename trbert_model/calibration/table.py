"""The calibration table of a model, which commands read without torch.

A model directory's `calibration.json` holds one table for each model digest, dtype and window length that it was
measured with. `jobs/evaluate.py` writes it, and `jobs/score.py --speedup/--max-drop` chooses from it.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any

from ..errors import CheckpointError, ConfigurationError

FILE = "calibration.json"
SPEEDUPS = (1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0)
CONFIDENCE = 0.95  # of --max-drop, by default
# Speed-ups whose ratio is at least this count as equal.
AS_FAST = 0.99


@dataclass(frozen=True)
class OperatingPoint:
    """Speed and accuracy on the labelled documents with one set of thresholds.

    Attributes:
        thresholds: keep probabilities, one per reduction, then those of exits and gates, as in `EngineOptions`.
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

    def change(self) -> str:
        """How the metric changes from the dense model's, as `change_of` says it."""
        return change_of(self.drop, self.drop_interval)

    def largest_drop(self, confidence: float) -> float:
        """The upper end of the drop's interval of this confidence, which is 0 for the measured drop itself.

        That of the 95% interval was measured. Others are taken to lie as in a normal distribution.
        """
        normal = NormalDist()
        share = normal.inv_cdf((1 + confidence) / 2) / normal.inv_cdf((1 + 0.95) / 2)
        return self.drop + share * (self.drop_interval[1] - self.drop)

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

    def pick(
        self, *, speedup: float | None = None, max_drop: float | None = None, confidence: float = CONFIDENCE
    ) -> OperatingPoint:
        """Choose the most accurate point with at least a given speed-up, or the fastest with at most a given drop.

        Args:
            speedup: lowest FLOPs speed-up.
            max_drop: highest drop, in percentage points.
            confidence: of the interval of paired documents that must not reach beyond `max_drop`.

        Raises:
            ConfigurationError: no point qualifies; the message names the nearest one.
        """
        if speedup is not None:
            fast = [point for point in self.points if point.flops_speedup >= speedup * AS_FAST]
            if fast:
                return min(fast, key=lambda point: point.drop)
            raise ConfigurationError(
                f"speedup {speedup:g} is beyond the calibration table, which ends at "
                f"{self.points[-1].flops_speedup:.2f}x"
            )
        good = [point for point in self.points if point.largest_drop(confidence) <= (max_drop or 0.0)]
        if good:
            return good[-1]
        least = min(self.points, key=lambda point: point.largest_drop(confidence))
        raise ConfigurationError(
            f"max_drop {max_drop:g}: at {100 * confidence:g}% confidence, {least.largest_drop(confidence):.2f} points "
            f"may be lost even at {least.flops_speedup:.2f}x ({least.drop:.2f} measured, on {self.documents:,} "
            "documents); measure on more documents, choose a lower max_drop_confidence (0 goes by the measured drop), "
            "or run the dense model with --no-reduce"
        )


def change_of(drop: float, drop_interval: Sequence[float]) -> str:
    """A drop in percentage points, and its interval, as a change with a sign: losses are negative."""
    low, high = drop_interval
    return f"{-drop:+.2f} points ({-high:+.2f} to {-low:+.2f})"


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


def pareto_front(points: Sequence[OperatingPoint]) -> list[OperatingPoint]:
    """The points that no other point of the same or a higher speed beats in metric, by rising FLOPs speed-up."""
    front: list[OperatingPoint] = []
    for point in sorted(points, key=lambda point: (-point.flops_speedup, -point.metric)):
        if front and point.metric <= front[-1].metric:
            continue
        while front and point.flops_speedup >= AS_FAST * front[-1].flops_speedup:
            front.pop()
        front.append(point)
    return front[::-1]
