"""When a run changes its speed to finish by a time: never without need, and never to and fro."""

import heapq
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.choice import Expectation, thresholds_version
from pipeline.finish_by import FinishBy, ScoredSplit, SpeedControl
from pipeline.page import page
from pipeline.report import SplitStats, summary
from tests.pipeline.test_choice import point
from tests.pipeline.test_report import statistics

LOOK = 5.0  # seconds between two decisions


def points_of(speeds):
    return [point(speed, 0.1 * i, (0.1 * i, 0.1 * i)) for i, speed in enumerate(speeds)]


def simulate(speeds, true, seconds, splits, actors, noise=lambda: 1.0, wait=0.0):
    """A run of equal splits on a simulated clock.

    Args:
        speeds: the table's.
        true: the real speed at each point.
        seconds: the time that is given.
        noise: a factor on the time of each split.
        wait: seconds that an actor waits for the readers between two splits.

    Returns:
        The control, when the run ended, and the point of each split in the order of their begin.
    """
    control = SpeedControl(points_of(speeds), seconds, 0.0, "speedup 2")
    begun, done, free = [], 0, [(0.0, actor) for actor in range(actors)]
    under_way, now = [], 0.0
    control.steer(0.0, splits, 0, actors)
    looked = 0.0
    while done < splits:
        next_free = free[0][0] if free and len(begun) < splits else float("inf")
        next_end = under_way[0][0] if under_way else float("inf")
        now = min(next_free, next_end, looked + LOOK)
        if now == looked + LOOK:
            looked = now
            control.steer(now, splits - done, len(under_way), actors)
        elif now == next_end:
            end, actor, start, at = heapq.heappop(under_way)
            done += 1
            control.add(ScoredSplit(at, str(actor), start, end, 1.0))
            heapq.heappush(free, (now + wait, actor))
        else:
            _, actor = heapq.heappop(free)
            begun.append(control.point)
            heapq.heappush(under_way, (now + 10 * noise() / true[control.point], actor, now, control.point))
    return control, now, begun


@st.composite
def runs(draw):
    speeds = [1.5]
    for _ in range(draw(st.integers(0, 6))):
        speeds.append(speeds[-1] * draw(st.floats(1.02, 2)))
    return speeds, draw(st.integers(50, 400)), draw(st.integers(1, 8))


@given(runs(), st.floats(0.1, 2))
@settings(deadline=None, max_examples=150)
def test_a_run_is_as_slow_as_it_may_be_and_in_time(run, share):
    """The table is right: a run that can be in time is, and one that is in time without it never goes faster."""
    speeds, splits, actors = run
    slowest, fastest = (10 / speed * splits / actors for speed in (speeds[0], speeds[-1]))
    seconds = slowest * share
    control, end, begun = simulate(speeds, speeds, seconds, splits, actors)
    if share > 1.15:
        assert set(begun) == {0}
        assert len(control.choices) == 1
    warm_up = 4 * (10 / speeds[0] + LOOK)  # until the first point is measured
    if fastest + warm_up < 0.9 * seconds:
        assert end <= seconds
    if seconds < fastest * 0.9:
        assert end > seconds
        assert control.late
        assert control.point == len(speeds) - 1
        assert begun[len(begun) // 2 :].count(begun[-1]) > 0
    changes = sum(a != b for a, b in zip(begun, begun[1:]))
    assert changes <= 2 * len(speeds)


@given(runs(), st.floats(0.2, 1.5), st.integers(0, 1000), st.floats(0.5, 1.5))
@settings(deadline=None, max_examples=100)
def test_noise_and_a_table_that_is_wrong_lead_to_few_changes(run, share, seed, ratio):
    speeds, splits, actors = run
    generator = random.Random(seed)
    true = [speeds[0] * (speed / speeds[0]) ** ratio for speed in speeds]
    seconds = 10 / speeds[0] * splits / actors * share
    noise = lambda: generator.uniform(0.8, 1.2)  # noqa: E731
    control, end, begun = simulate(speeds, true, seconds, splits, actors, noise)
    assert set(begun) <= set(range(len(speeds)))
    assert sum(a != b for a, b in zip(begun, begun[1:])) <= 3 * len(speeds)
    assert len(control.choices) <= 8 * len(speeds)
    if share > 1.4:
        assert end <= seconds
        assert set(begun) == {0}


def test_a_run_goes_faster_when_it_would_be_late_and_back_when_it_is_ahead():
    speeds = [2.0, 3.0, 4.0]
    seconds = 10 / 3.3 * 200 / 2
    control, end, begun = simulate(speeds, speeds, seconds, 200, 2)
    assert end <= seconds
    assert begun[0] == 0
    assert 1 in begun
    whys = [choice.why for choice in control.choices]
    assert whys[0] == "speedup 2"
    assert "at 2.00x it would end at" in whys[1]
    assert control.choices[1].splits >= 3

    sudden = iter([2.0] * 30)  # the machine was busy for the first splits
    control, end, begun = simulate(speeds, speeds, 10 / 1.8 * 200 / 2, 200, 2, lambda: next(sudden, 1.0))
    assert {1, 0} <= set(begun)
    assert begun[-1] == 0


def test_no_accuracy_is_lost_where_the_readers_are_too_slow():
    """Actors that wait as long as they compute would not be done earlier at another speed."""
    speeds = [2.0, 4.0]
    control, end, begun = simulate(speeds, speeds, 500.0, 100, 1, wait=5.0)
    assert set(begun) == {0}
    assert end > 500
    assert control.late
    assert "the actors wait for the readers" in control.choices[-1].why


def test_a_time_that_is_past_means_the_fastest_speed_at_once():
    control = SpeedControl(points_of([2.0, 3.0]), 100.0, 200.0, "")
    choice = control.steer(200.0, 10.0, 0, 1)
    assert (choice.point, choice.why, control.late) == (1, "the time is over", True)
    assert control.steer(205.0, 10.0, 0, 1) is None, "nothing new"
    assert control.steer(205.0, 0.0, 0, 1) is None, "nothing left"


def test_what_happens_while_actors_start_decides_nothing():
    """Their first splits take longer, and those that have not started yet will help."""
    control = SpeedControl(points_of([2.0, 3.0]), 100.0, 0.0, "")
    for actor in range(8):
        control.add(ScoredSplit(0, str(actor), 0.0, 50.0, 1.0))
        assert control.steer(50.0, 40.0, 8, 8) is None
    for actor in range(8):
        control.add(ScoredSplit(0, str(actor), 50.0, 55.0, 1.0))
        assert control.steer(55.0, 40.0, 8, 8) is None, "8 actors need 5 seconds for each of 5 splits"
    choice = control.steer(55.0, 80.0, 8, 8)
    assert choice is not None
    assert choice.point == 1


def test_splits_without_bytes_and_without_time_are_no_measure():
    control = SpeedControl(points_of([2.0, 3.0]), 100.0, 0.0, "")
    for _ in range(9):
        control.add(ScoredSplit(0, "a", 1.0, 1.0, 0.0))
    assert control.steer(10.0, 10.0, 0, 1) is None
    for _ in range(9):
        control.add(ScoredSplit(0, "a", 1.0, 1.0, 5.0))
    assert control.steer(10.0, 10.0, 0, 1) is None


@pytest.fixture
def finish_by():
    first, second, third = points_of([2.0, 3.0, 4.0])
    finish_by = FinishBy("06:00", Expectation("speedup 2", first, "dev", 100, (second, third)), 1000.0, 0.0)
    version = thresholds_version(first)
    for i in range(4):
        stats = SplitStats(documents=4, tokens=100, kept_tokens=[60, 20], flops=1e9, dense_flops=2e9)
        finish_by.add(ScoredSplit(0, "a", 20.0 * i, 20.0 * (i + 1), 10.0), stats, version, 4)
    finish_by.control.steer(80.0, 1000.0, 1, 1)
    return finish_by


def test_the_report_says_what_was_chosen_when_and_at_which_thresholds(finish_by):
    report = finish_by.report(1060.0, True)
    assert json.loads(json.dumps(report)) is not None
    assert (report["in_time"], report["late_seconds"], report["outcome"]) == (False, 60.0, "0:01:00 late")
    assert [each["point"] for each in report["choices"]] == ["2.00x", "4.00x"]
    assert report["choices"][1]["time"] == "1970-01-01T00:01:20Z"
    assert report["choices"][1]["splits"] == 4
    assert [(each["splits"], each["documents"]) for each in report["points"]] == [(4, 16), (0, 0), (0, 0)]
    assert len({each["thresholds_version"] for each in report["points"]}) == 3
    assert finish_by.warnings(1060.0) == [
        "0:01:00 later than finish_by 06:00",
        "at 2.00x, reduction 0 kept 60.0% of tokens, outside the 20.0% to 50.0% of the documents of dev: the corpus "
        "differs from the one the table was made with",
    ]
    assert finish_by.report(990.0, True)["outcome"] == "in time, 0:00:10 before"
    assert finish_by.report(990.0, False)["in_time"] is False

    run = statistics().report(status="complete", exit_code=0, settings={"input": "in", "output": "out", "model": {}})
    run |= {"finish_by": report, "warnings": finish_by.warnings(1060.0)}
    assert "finish by   06:00 (1970-01-01T00:16:40Z): 0:01:00 late; 4 splits at 2.00x" in summary(run)
    text = page(run, [], [])
    assert "What was chosen when" in text
    assert report["points"][0]["thresholds_version"] in text
