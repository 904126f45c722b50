"""Thresholds and expected results from the model's calibration table, and warnings about corpus drift."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trbert_model.calibration.table import CONFIDENCE, Calibration, OperatingPoint, calibration_key, read_calibration
from trbert_model.errors import TRBertError

from .config import ScoreConfig
from .corpus import RUNS
from .errors import StorageError, UsageError
from .model import ModelSource
from .storage import Storage

# The fraction by which label shares may differ between two runs, beyond what chance explains.
_LABEL_DRIFT = 0.05
# By this factor a point must be faster than a slower one, by FLOPs and by time, to be of use to `finish_by`.
_FASTER = 1.01


@dataclass(frozen=True)
class Expectation:
    """What the calibration table predicts for a run.

    Attributes:
        asked: the option or thresholds that selected the point, in words.
        point: the operating point in the table.
        corpus: the name of the labelled documents that the point was measured on.
        documents: the number of these documents.
        faster: with `finish_by`, the faster points that `max_drop` allows, by rising speed.
    """

    asked: str
    point: OperatingPoint
    corpus: str
    documents: int
    faster: tuple[OperatingPoint, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        values = {"asked": self.asked, "corpus": self.corpus, "documents": self.documents, **self.point.as_dict()}
        return json.loads(json.dumps(values))  # tuples become lists, as in a stored report

    def __str__(self) -> str:
        point = self.point
        thresholds = ", ".join(f"{threshold:.4g}" for threshold in point.thresholds)
        return (
            f"{self.asked}: thresholds {thresholds}; expect {point.flops_speedup:.2f}x fewer FLOPs than dense, "
            f"{point.measured_speedup:.2f}x faster, {point.change()} on {self.documents:,} documents of {self.corpus}"
        )


def choose(config: ScoreConfig, model: ModelSource) -> tuple[ScoreConfig, Expectation | None]:
    """Replace `speedup` or `max_drop` with the thresholds they select, and look up what to expect of the run.

    With `finish_by`, these are the thresholds that the run begins with.

    `config.dtype` must not be "auto". If neither option is set, the expectation is that of the given thresholds or the
    model's own. It is None if the table does not contain them, and for the dense model.

    Raises:
        UsageError: the calibration file is damaged, or an option is set and there is no table for this model, dtype
            and window, or no point in it that satisfies the option.
    """
    if not config.reduce:
        return config, None
    if config.finish_by is not None:
        expectation = pick_range(model, config)
        thresholds = expectation.point.thresholds
        resolved = dataclasses.replace(config, finish_by=None, speedup=None, max_drop=None, thresholds=thresholds)
        return resolved, expectation
    if config.speedup is not None or config.max_drop is not None:
        expectation = pick(
            model,
            config.dtype,
            speedup=config.speedup,
            max_drop=config.max_drop,
            confidence=config.max_drop_confidence,
        )
        return (
            dataclasses.replace(config, speedup=None, max_drop=None, thresholds=expectation.point.thresholds),
            expectation,
        )
    table = _table(model, config.dtype)
    if table is None:
        return config, None
    given = config.thresholds or ()
    thresholds = (*given, *table.default.thresholds[len(given) :])  # those of exits may be left out
    asked = "the thresholds given" if config.thresholds else "the model's own thresholds"
    for point in (table.default, *table.points):
        if point.thresholds == thresholds:
            return config, Expectation(asked, point, table.corpus, table.documents)
    return config, None


def pick(
    model: ModelSource,
    dtype: str,
    *,
    speedup: float | None,
    max_drop: float | None,
    confidence: float = CONFIDENCE,
) -> Expectation:
    """Look up the operating point for a least FLOPs `speedup` or a `max_drop` in percentage points; the other is None.

    `confidence` is that of the interval that must not reach beyond `max_drop`, see `Calibration.pick`.

    Raises:
        UsageError: both are given, the calibration file is damaged, there is no table for this model, dtype and window,
            or no point in it satisfies the option.
    """
    if speedup is not None and max_drop is not None:
        raise UsageError("speedup and max_drop cannot go together: each of them decides the speed")
    asked = f"max_drop {max_drop:g}" if speedup is None else f"speedup {speedup:g}"
    table = _needed_table(model, dtype, asked)
    try:
        point = table.pick(speedup=speedup, max_drop=max_drop, confidence=confidence)
        return Expectation(asked, point, table.corpus, table.documents)
    except TRBertError as error:
        raise UsageError(str(error)) from error


def pick_range(model: ModelSource, config: ScoreConfig) -> Expectation:
    """Look up the operating points that a run with `finish_by` may use.

    It begins with the most accurate point of at least `speedup`; without one, with the model's own thresholds or, if
    `max_drop` does not allow these, with the slowest point it allows. Points are left out that the table measured no
    faster than a slower one.

    Raises:
        UsageError: as for `pick`, or `max_drop` does not allow the point of `speedup`.
    """
    confidence, max_drop = config.max_drop_confidence, config.max_drop or 0.0
    table = _needed_table(model, config.dtype, f"finish_by {config.finish_by}")
    try:
        table.pick(max_drop=max_drop, confidence=confidence)  # raises if there is none
        first = table.default if config.speedup is None else table.pick(speedup=config.speedup)
    except TRBertError as error:
        raise UsageError(str(error)) from error
    allowed = [point for point in table.points if point.largest_drop(confidence) <= max_drop]
    asked = "the model's own thresholds" if config.speedup is None else f"speedup {config.speedup:g}"
    if first.largest_drop(confidence) > max_drop:
        if config.speedup is not None:
            raise UsageError(
                f"{asked} and max_drop {max_drop:g} cannot both hold: at {first.flops_speedup:.2f}x and "
                f"{100 * confidence:g}% confidence, {first.largest_drop(confidence):.2f} points may be lost"
            )
        first, asked = allowed[0], f"the slowest thresholds within max_drop {max_drop:g}"
    points = [first]
    for point in allowed:
        last = points[-1]
        ratios = (point.flops_speedup / last.flops_speedup, point.measured_speedup / last.measured_speedup)
        if min(ratios) >= _FASTER:
            points.append(point)
    return Expectation(asked, first, table.corpus, table.documents, tuple(points[1:]))


def thresholds_version(point: OperatingPoint) -> str:
    """A short name of a point's thresholds, which is the same in all runs, outputs and tables."""
    return hashlib.sha256(json.dumps(point.thresholds).encode()).hexdigest()[:8]


def _needed_table(model: ModelSource, dtype: str, asked: str) -> Calibration:
    table = _table(model, dtype)
    if table is None:
        raise UsageError(
            f"{asked}: {model.uri} has no calibration table for {dtype} and windows of {model.window} tokens; "
            f"make it with: python jobs/evaluate.py --model {model.uri} --dtype {dtype} --corpus LABELLED.parquet"
        )
    return table


def _table(model: ModelSource, dtype: str) -> Calibration | None:
    try:
        return read_calibration(model.directory, calibration_key(model.digest, dtype, model.window))
    except TRBertError as error:
        raise UsageError(str(error)) from error


def kept_drift(kept_fractions: Sequence[float], expectation: Expectation | None) -> list[str]:
    """Warn about each reduction whose kept fraction is outside the 5th to 95th percentile of the table's documents."""
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
    """Warn if the label shares differ from those of the last run by more than `_LABEL_DRIFT` and chance."""
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
        f"label shares have moved by {100 * moved:.1f}% since the last run, {largest!r} by "
        f"{100 * largest_move:+.1f} points"
    ]


def last_labels(output: Storage, digest: str) -> dict[str, int]:
    """Label counts in the newest report of a run that scored documents with this model; empty if there is none."""
    for file in reversed(output.files(RUNS)):
        if not file.path.endswith(".json"):  # the page of a run
            continue
        try:
            report = json.loads(output.read(f"{RUNS}/{file.path.rsplit('/', 1)[-1]}"))
        except (ValueError, StorageError):  # reports are not part of the results, so skip damaged ones
            continue
        if isinstance(report, dict) and report.get("documents") and report.get("model", {}).get("digest") == digest:
            return report.get("labels", {})
    return {}
