"""The speed a run was asked for: thresholds from the model's calibration table, what they promise, and whether the
corpus has drifted away from what was measured."""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trbert_model.calibration import Calibration, OperatingPoint, calibration_key, read_calibration
from trbert_model.errors import TRBertError

from .config import ScoreConfig
from .corpus import RUNS
from .errors import StorageError, UsageError
from .model import Model
from .storage import Storage

# Of documents that changed their label between two runs' corpora, beyond what chance explains.
_LABEL_DRIFT = 0.05


@dataclass(frozen=True)
class Expectation:
    """What a table promises: what was asked for, the point it was answered with, and what that was measured on."""

    asked: str
    point: OperatingPoint
    corpus: str
    documents: int

    def as_dict(self) -> dict[str, Any]:
        values = {"asked": self.asked, "corpus": self.corpus, "documents": self.documents, **self.point.as_dict()}
        return json.loads(json.dumps(values))  # as a stored report has it

    def __str__(self) -> str:
        point = self.point
        low, high = point.drop_interval
        thresholds = ", ".join(f"{threshold:.4g}" for threshold in point.thresholds)
        return (
            f"{self.asked}: thresholds {thresholds}; expect {point.flops_speedup:.2f}x fewer FLOPs than dense, "
            f"{point.measured_speedup:.2f}x faster, {point.drop:+.2f} points lost ({low:+.2f} to {high:+.2f}; on "
            f"{self.documents:,} documents of {self.corpus})"
        )


def choose(config: ScoreConfig, model: Model) -> tuple[ScoreConfig, Expectation | None]:
    """Fill in the thresholds that `speedup` or `max_drop` ask for, and say what is to be expected of a run.

    The dtype must be a real one. Without a choice the expectation is that of the model's own thresholds, and None
    where nobody has measured it.

    Raises:
        UsageError: there is no table for this model, dtype and window, or nothing in it that keeps the promise.
    """
    if not config.reduce:
        return config, None
    if config.speedup is not None or config.max_drop is not None:
        expectation = pick(model, config.dtype, speedup=config.speedup, max_drop=config.max_drop)
        return (
            dataclasses.replace(config, speedup=None, max_drop=None, thresholds=expectation.point.thresholds),
            expectation,
        )
    table = _table(model, config.dtype)
    if table is None:
        return config, None
    thresholds = config.thresholds or table.default.thresholds
    asked = "the thresholds given" if config.thresholds else "the model's own thresholds"
    for point in (table.default, *table.points):
        if point.thresholds == thresholds:
            return config, Expectation(asked, point, table.corpus, table.documents)
    return config, None


def pick(model: Model, dtype: str, *, speedup: float | None, max_drop: float | None) -> Expectation:
    """What a model's table has for one of the two.

    Raises:
        UsageError: there is no table for this model, dtype and window, or nothing in it that keeps the promise.
    """
    asked = f"max_drop {max_drop:g}" if speedup is None else f"speedup {speedup:g}"
    table = _table(model, dtype)
    if table is None:
        raise UsageError(
            f"{asked}: {model.uri} has no calibration table for {dtype} and windows of {model.window} tokens; "
            f"make it with: python jobs/evaluate.py --model {model.uri} --dtype {dtype} --corpus LABELLED.parquet"
        )
    try:
        return Expectation(asked, table.pick(speedup=speedup, max_drop=max_drop), table.corpus, table.documents)
    except TRBertError as error:
        raise UsageError(str(error)) from error


def _table(model: Model, dtype: str) -> Calibration | None:
    try:
        return read_calibration(model.directory, calibration_key(model.digest, dtype, model.window))
    except TRBertError as error:
        raise UsageError(str(error)) from error


def kept_drift(kept_fractions: Sequence[float], expectation: Expectation | None) -> list[str]:
    """Warnings where a corpus keeps more or fewer tokens than the documents of the table did."""
    if expectation is None:
        return []
    point = expectation.point
    return [
        f"reduction {reduction} kept {100 * kept:.1f}% of tokens, outside the {100 * low:.1f}% to {100 * high:.1f}% of "
        f"the documents of {expectation.corpus}: the corpus differs from the one the table was made with"
        for reduction, (kept, (low, high)) in enumerate(zip(kept_fractions, point.kept_spread))
        if not low <= kept <= high
    ]


def label_drift(labels: dict[str, int], before: dict[str, int]) -> list[str]:
    """A warning if labels have other shares than in the last run, by more than chance and a twentieth of documents."""
    now, then = sum(labels.values()), sum(before.values())
    if not now or not then:
        return []
    moved, chance = 0.0, 0.0
    largest, largest_move = "", 0.0
    for label in sorted({*labels, *before}):
        share, old = labels.get(label, 0) / now, before.get(label, 0) / then
        pooled = (labels.get(label, 0) + before.get(label, 0)) / (now + then)
        moved += abs(share - old) / 2
        chance += math.sqrt(pooled * (1 - pooled) * (1 / now + 1 / then)) / 2
        if abs(share - old) > abs(largest_move):
            largest, largest_move = label, share - old
    if moved <= _LABEL_DRIFT + 2 * chance:
        return []
    return [
        f"label shares have moved by {100 * moved:.1f}% of documents since the last run, {largest!r} by "
        f"{100 * largest_move:+.1f} points"
    ]


def last_labels(output: Storage, digest: str) -> dict[str, int]:
    """Label counts of the newest report of a run that scored documents with this model; empty if there is none."""
    for file in reversed(output.files(RUNS)):
        try:
            report = json.loads(output.read(f"{RUNS}/{file.path.rsplit('/', 1)[-1]}"))
        except (ValueError, StorageError):  # a report is no part of the results: one that is damaged stops nothing
            continue
        if isinstance(report, dict) and report.get("documents") and report.get("model", {}).get("digest") == digest:
            return report.get("labels", {})
    return {}
