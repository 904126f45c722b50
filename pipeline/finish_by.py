"""The speed of a run that should finish by a time: the operating point of the splits that are begun next.

The points are those of the model's calibration table that `max_drop` allows, by rising speed. The run begins at the
first one. From the splits that it has scored, it estimates when it would end at each point, and

- if it would be late, it goes to the slowest point at which it would not be, or to the fastest if there is none;
- if a slower point would leave clearly more time than is needed, it goes back to that;
- otherwise it stays. Between the two bounds it never changes, so that it does not go back and forth.

If the actors wait for the readers, a faster point would cost accuracy and gain no time, so it stays then, too.
"""

import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trbert_model.calibration.table import OperatingPoint
from trbert_model.terminal import clock

from .choice import Expectation, kept_drift, thresholds_version
from .report import SplitStats, timestamp

_RESERVE = 0.05  # share of the time left that an estimate must leave to count as in time
_AHEAD = 0.2  # the same for going back to a slower point
_LEAST_SPLITS = 3  # to measure a point
_REMEMBERED = 256  # splits
_BUSY = 0.8  # share of their time that actors compute, below which they wait for the readers
_RECENT_SPLITS, _RECENT_SECONDS = 10, 60.0  # what counts as recent: so many mean splits, and at least so long


@dataclass(frozen=True)
class ScoredSplit:
    """A scored split.

    Attributes:
        point: the operating point, numbered as in `SpeedControl.points`.
        actor: the actor that scored it.
        start, end: when, in seconds since the epoch.
        size: its share of the bytes of its shard.
    """

    point: int
    actor: str
    start: float
    end: float
    size: float


@dataclass(frozen=True)
class Choice:
    """What the control decided, and when.

    Attributes:
        time: seconds since the epoch.
        splits: how many splits were scored by then.
        estimate: when the run will end, in seconds since the epoch; None if that is not known yet.
        point: the operating point of the splits that are begun next.
        why: the reason, for people.
    """

    time: float
    splits: int
    estimate: float | None
    point: int
    why: str


class SpeedControl:
    """Chooses the operating point for the splits of a run that are begun next.

    Args:
        points: the allowed points, by rising speed. The run begins at the first one.
        deadline: when the run should have ended, in seconds since the epoch.
        started: when it began.
        why: the reason for the first point, for people.

    Attributes:
        point: the current point.
        late: whether the run will be late by the last estimate.
        choices: what was decided, in order.
    """

    def __init__(self, points: Sequence[OperatingPoint], deadline: float, started: float, why: str):
        self.points, self.deadline = points, deadline
        self.point, self.late = 0, False
        self.choices = [Choice(started, 0, None, 0, why)]
        self._scored: deque[ScoredSplit] = deque(maxlen=_REMEMBERED)  # without the first one of each actor
        self._actors: set[str] = set()
        self._count, self._since_change = 0, 0  # splits
        self._lock = threading.Lock()

    def add(self, split: ScoredSplit) -> None:
        """Record a scored split."""
        with self._lock:
            if split.actor in self._actors:
                self._scored.append(split)
            self._actors.add(split.actor)  # an actor's first split takes longer
            self._count += 1
            self._since_change += split.point == self.point

    def steer(self, now: float, left: float, under_way: int, actors: int) -> Choice | None:
        """Choose the point of the splits that are begun from now on.

        Args:
            now: the present, in seconds since the epoch.
            left: bytes that are not scored yet.
            under_way: number of splits in progress.
            actors: number of actors at most.

        Returns:
            The choice if it is another one, or if the run will now be late or no longer so; otherwise None.
        """
        with self._lock:
            if left <= 0:
                return None
            workers, busy = self._activity(now, under_way, actors)
            costs = self._costs() if self._count > actors else []  # while actors start, there seem to be too few
            ends = [now + left * cost / (workers * busy) for cost in costs]
            point, why = self._decide(now, ends, busy)
            estimate = ends[point] if ends else None
            late = now >= self.deadline if estimate is None else estimate > self.deadline
            if self.late and not late and estimate is not None:
                late = not self._leaves(_RESERVE, now, estimate)
            if point == self.point and late == self.late:
                return None
            if point == self.point:
                why = why if late else "in time again"
            if point != self.point:
                self._since_change = 0
            self.point, self.late = point, late
            choice = Choice(now, self._count, estimate, point, why)
            self.choices.append(choice)
            return choice

    def _decide(self, now: float, ends: list[float], busy: float) -> tuple[int, str]:
        """The point to go on with, and why; ends: when the run would end at each point, empty if not known yet."""
        point, last = self.point, len(self.points) - 1
        if not ends:
            return (last, "the time is over") if now >= self.deadline else (point, "")
        here = f"at {name_of(self.points[point])} it would end at {local(ends[point])}"
        if not self._leaves(_RESERVE, now, ends[point]):
            if point == last:
                return point, f"{here}, and max_drop allows nothing faster"
            if busy < _BUSY:
                return point, f"{here}, but the actors wait for the readers: a faster speed would not help"
            in_time = [p for p in range(point + 1, last + 1) if self._leaves(_RESERVE, now, ends[p])]
            if in_time:
                return in_time[0], here
            return last, f"{here}, and even at {name_of(self.points[last])} at {local(ends[last])}"
        if self._since_change >= _LEAST_SPLITS:
            ahead = [p for p in range(point) if self._leaves(_AHEAD, now, ends[p])]
            if ahead:
                slower = name_of(self.points[ahead[0]])
                return ahead[0], f"{here}, and even at {slower} at {local(ends[ahead[0]])}"
        return point, here

    def _leaves(self, share: float, now: float, end: float) -> bool:
        """Whether an estimated end leaves at least this share of the time that is left."""
        return end - now <= (1 - share) * (self.deadline - now)

    def _costs(self) -> list[float]:
        """An actor's seconds per byte at each point; empty if no point is measured yet.

        The point measured last is the reference, from which the table's ratio of speeds leads to the others. One that
        this run has measured counts as no faster than it was, so that a table that promises too much leads to no
        going back and forth.
        """
        groups = defaultdict(list)
        for split in self._scored:
            groups[split.point].append(split)
        measured = {
            point: sum(split.end - split.start for split in group) / size
            for point, group in groups.items()
            if len(group) >= _LEAST_SPLITS and (size := sum(split.size for split in group)) > 0
        }
        reference = next((split.point for split in reversed(self._scored) if split.point in measured), None)
        if reference is None:
            return []
        speeds = [point.measured_speedup for point in self.points]
        scaled = [measured[reference] * speeds[reference] / speed for speed in speeds]
        return [cost if p == reference else max(cost, measured.get(p, 0.0)) for p, cost in enumerate(scaled)]

    def _activity(self, now: float, under_way: int, actors: int) -> tuple[int, float]:
        """How many actors score splits, and the share of their time in which they do, both of late."""
        if not self._scored:
            return max(under_way, 1), 1.0
        mean = sum(split.end - split.start for split in self._scored) / len(self._scored)
        since = now - max(_RECENT_SPLITS * mean, _RECENT_SECONDS)
        by_actor = defaultdict(list)
        for split in self._scored:
            if split.end >= since:
                by_actor[split.actor].append((split.start, split.end))
        spans = [sorted(group) for group in by_actor.values()]
        busy = sum(end - start for group in spans for start, end in group)
        waited = sum(max(later[0] - earlier[1], 0.0) for group in spans for earlier, later in zip(group, group[1:]))
        share = busy / (busy + waited) if busy else 1.0
        return max(min(max(len(spans), under_way), actors), 1), share


class FinishBy:
    """A run's speed control, and what the run's report says of it.

    Args:
        asked: the option.
        expectation: the points, see `choice.pick_range`.
        deadline: the time that `asked` means, in seconds since the epoch.
        started: when the run began.
    """

    def __init__(self, asked: str, expectation: Expectation, deadline: float, started: float):
        self.asked, self.expectation = asked, expectation
        self.points = (expectation.point, *expectation.faster)
        self.control = SpeedControl(self.points, deadline, started, expectation.asked)
        self._totals = [SplitStats() for _ in self.points]
        self._published: Counter[str | None] = Counter()  # splits, by thresholds version
        self._rows: Counter[str | None] = Counter()

    def add(self, split: ScoredSplit, stats: SplitStats, version: str | None, rows: int) -> None:
        """Record a scored split.

        Args:
            version, rows: of the results that the output holds. If the split was scored twice, these may come from the
                other time, at another point.
        """
        self.control.add(split)
        self._totals[split.point] += stats
        self._published[version] += 1
        self._rows[version] += rows

    def line(self, choice: Choice) -> str:
        """A choice for people."""
        end = "" if choice.estimate is None else f"; estimated end {local(choice.estimate)}"
        return f"finish by {local(self.control.deadline)}: {name_of(self.points[choice.point])} ({choice.why}){end}"

    def shown(self) -> str:
        """The state for a progress line."""
        late = ", late" if self.control.late else ""
        return f"{name_of(self.points[self.control.point])} to finish by {local(self.control.deadline)}{late}"

    def report(self, finished: float, complete: bool) -> dict[str, Any]:
        """The entry of the run's report."""
        control = self.control
        late = finished - control.deadline
        outcome = f"{clock(late)} late" if late > 0 else f"in time, {clock(-late)} before"
        return {
            "asked": self.asked,
            "deadline": timestamp(control.deadline),
            "in_time": complete and late <= 0,
            "late_seconds": round(max(late, 0.0), 3),
            "outcome": outcome if complete or late > 0 else "not complete",
            "points": [
                {
                    "name": name_of(point),
                    "thresholds_version": version,
                    "expected": point.as_dict(),
                    "splits": self._published[version],
                    "documents": self._rows[version],
                    "kept_fractions": _kept(total),
                    "flops_speedup": total.dense_flops / total.flops if total.flops else None,
                }
                for point, total in zip(self.points, self._totals)
                for version in [thresholds_version(point)]
            ],
            "choices": [
                asdict(choice)
                | {"time": timestamp(choice.time), "estimate": choice.estimate and timestamp(choice.estimate)}
                | {"point": name_of(self.points[choice.point])}
                | {"thresholds_version": thresholds_version(self.points[choice.point])}
                for choice in control.choices
            ],
        }

    def warnings(self, finished: float) -> list[str]:
        """That the run was late, and kept fractions that differ from the table's, for each point by itself."""
        late = finished - self.control.deadline
        found = [f"{clock(late)} later than finish_by {self.asked}"] if late > 0 else []
        for point, total in zip(self.points, self._totals):
            expectation = Expectation("", point, self.expectation.corpus, self.expectation.documents)
            found += [f"at {name_of(point)}, {warning}" for warning in kept_drift(_kept(total), expectation)]
        return found


def name_of(point: OperatingPoint) -> str:
    """A point's speed, for people."""
    return f"{point.flops_speedup:.2f}x"


def local(seconds: float) -> str:
    """A time of this machine's clock, for people."""
    return time.strftime("%a %H:%M:%S", time.localtime(seconds))


def _kept(total: SplitStats) -> list[float]:
    return [kept / total.tokens for kept in total.kept_tokens] if total.tokens else []
