"""The speed a run is asked for: what is picked from a table, what is refused, and when a corpus has drifted."""

import dataclasses
import json
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.choice import Expectation, choose, kept_drift, label_drift, last_labels, pick, thresholds_version
from pipeline.config import ScoreConfig
from pipeline.errors import UsageError
from pipeline.model import ModelSource
from pipeline.storage import Storage
from tests.conftest import classification_task
from trbert_model.calibration.table import Calibration, OperatingPoint, calibration_key, pareto_front, with_table

DIGEST = "0123456789abcdef0123"


def point(speedup: float, drop: float, thresholds: tuple[float, ...]) -> OperatingPoint:
    spread = ((0.2, 0.5), (0.1, 0.3))
    return OperatingPoint(thresholds, (0.3, 0.2), spread, speedup, speedup, 90 - drop, (80, 95), drop, (-1, 3))


@pytest.fixture
def model(tmp_path) -> ModelSource:
    """A model directory with a table for float32, and the digest it was made for."""
    table = Calibration(
        key=calibration_key(DIGEST, "float32", 512),
        corpus="dev.parquet",
        documents=1000,
        metric="accuracy",
        dense_metric=90.0,
        default=point(2.9, 1.0, (0.5, 0.5)),
        points=(point(2.0, 0.1, (0.2, 0.2)), point(3.1, 0.9, (0.4, 0.4)), point(5.0, 3.0, (0.7, 0.7))),
    )
    (tmp_path / "calibration.json").write_bytes(with_table(tmp_path, table))
    return ModelSource(str(tmp_path), tmp_path, DIGEST, 512, classification_task(512))


def config(**options) -> ScoreConfig:
    return ScoreConfig(**{"input": "in", "output": "out", "model": "m", "dtype": "float32"} | options)


@pytest.mark.parametrize(
    ("asked", "thresholds"),
    [
        ({"speedup": 3.0}, (0.4, 0.4)),
        ({"speedup": 1.0}, (0.2, 0.2)),
        ({"max_drop": 1.0, "max_drop_confidence": 0.0}, (0.4, 0.4)),
        ({"max_drop": 3.0}, (0.7, 0.7)),
        ({"max_drop": 50.0}, (0.7, 0.7)),
        ({"thresholds": (0.7, 0.7)}, (0.7, 0.7)),
    ],
)
def test_thresholds_come_from_the_table(model, asked, thresholds):
    chosen, expectation = choose(config(**asked), model)
    assert chosen.thresholds == thresholds
    assert (chosen.speedup, chosen.max_drop) == (None, None)
    assert expectation is not None
    assert expectation.point.thresholds == thresholds
    assert chosen.identity()["thresholds"] == list(thresholds)


def test_without_a_choice_the_models_own_thresholds_are_expected(model):
    chosen, expectation = choose(config(), model)
    assert chosen == config()
    assert expectation is not None
    assert expectation.point.flops_speedup == 2.9
    assert "the model's own thresholds: thresholds 0.5, 0.5; expect 2.90x fewer FLOPs" in str(expectation)
    assert "-1.00 points (-3.00 to +1.00) on 1,000 documents of dev.parquet" in str(expectation)
    for unmeasured in (config(dtype="bfloat16"), config(reduce=False), config(thresholds=(0.3, 0.3))):
        assert choose(unmeasured, model) == (unmeasured, None)


def test_thresholds_of_exits_that_are_left_out_are_the_models_own(tmp_path):
    table = Calibration("", "dev.parquet", 9, "accuracy", 90.0, point(2.9, 1.0, (0.5, 0.1)), (point(2, 0, (0.4, 0.1)),))
    table = dataclasses.replace(table, key=calibration_key(DIGEST, "float32", 512))
    (tmp_path / "calibration.json").write_bytes(with_table(tmp_path, table))
    source = ModelSource(str(tmp_path), tmp_path, DIGEST, 512, classification_task(512))
    for thresholds, speedup in (((0.4,), 2), ((0.4, 0.1), 2), ((0.5,), 2.9), (None, 2.9)):
        _, expectation = choose(config(thresholds=thresholds), source)
        assert expectation.point.flops_speedup == speedup
    for other in ((0.4, 0.2), (0.3,)):
        assert choose(config(thresholds=other), source)[1] is None


def test_what_no_table_can_promise_is_refused_with_the_command_that_makes_one(model, tmp_path):
    with pytest.raises(
        UsageError,
        match=r"speedup 3: .* no calibration table for bfloat16 and windows of 512 tokens; "
        r"make it with: python jobs/evaluate.py --model .* --dtype bfloat16 --corpus LABELLED.parquet",
    ):
        choose(config(speedup=3.0, dtype="bfloat16"), model)
    with pytest.raises(UsageError, match="speedup and max_drop cannot go together"):
        pick(ModelSource("m", tmp_path, "digest", 512, classification_task(512)), "float32", speedup=2, max_drop=1)
    with pytest.raises(UsageError, match=r"max_drop 0.5: .* no calibration table"):
        choose(config(max_drop=0.5), ModelSource("m", tmp_path, "another digest 01234", 512, classification_task(512)))
    with pytest.raises(UsageError, match=r"speedup 6 is beyond the calibration table, which ends at 5\.00x"):
        choose(config(speedup=6.0), model)
    (tmp_path / "calibration.json").write_text("{")
    with pytest.raises(UsageError, match=r"calibration.json: damaged"):
        choose(config(speedup=3.0), model)


@pytest.mark.parametrize(
    ("asked", "speeds"),
    [
        ({"max_drop": 3.0}, [2.9, 3.1, 5.0]),
        ({"max_drop": 1.0, "max_drop_confidence": 0.0}, [2.9, 3.1]),
        ({"max_drop": 0.5, "max_drop_confidence": 0.0}, [2.0]),
        ({"max_drop": 3.0, "speedup": 1.0}, [2.0, 3.1, 5.0]),
        ({"max_drop": 3.0, "speedup": 3.0}, [3.1, 5.0]),
        ({"max_drop": 3.0, "speedup": 5.0}, [5.0]),
    ],
)
def test_a_run_that_should_finish_by_a_time_may_use_the_faster_points_within_max_drop(model, asked, speeds):
    options = config(finish_by="06:00", **asked)
    chosen, expectation = choose(options, model)
    assert expectation is not None
    points = [expectation.point, *expectation.faster]
    assert [point.flops_speedup for point in points] == speeds
    assert all(point.largest_drop(options.max_drop_confidence) <= options.max_drop for point in points)
    assert chosen.thresholds == expectation.point.thresholds
    assert (chosen.finish_by, chosen.max_drop, chosen.speedup) == (None, None, None)
    assert len({thresholds_version(point) for point in points}) == len(points)


@given(
    st.lists(st.tuples(st.floats(1, 9), st.floats(1, 9), st.floats(-1, 9)), min_size=2, max_size=9),
    st.floats(0, 5),
    st.sampled_from([0.0, 0.5, 0.95]),
    st.none() | st.floats(1, 9),
)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_point_beyond_max_drop_is_ever_used(model, measured, max_drop, confidence, speedup):
    """Whatever a table holds: the first point is as asked, and each next one is faster."""
    made = [
        dataclasses.replace(
            point(flops, drop, (i / 10, 0.5)), measured_speedup=time, drop_interval=(drop - 1, drop + 1)
        )
        for i, (flops, time, drop) in enumerate(measured)
    ]
    key = calibration_key(DIGEST, "float32", 512)
    table = Calibration(key, "dev", 100, "accuracy", 90.0, made[0], tuple(pareto_front(made[1:])))
    (model.directory / "calibration.json").write_bytes(with_table(model.directory, table))
    options = config(finish_by="06:00", max_drop=max_drop, max_drop_confidence=confidence, speedup=speedup)
    allowed = {each.thresholds for each in made if each.largest_drop(confidence) <= max_drop}
    try:
        _, expectation = choose(options, model)
    except UsageError:
        reachable = speedup is None or any(each.flops_speedup >= speedup for each in table.points)
        assert not reachable or not all(each.thresholds in allowed for each in table.points)
        return
    assert expectation is not None
    points = [expectation.point, *expectation.faster]
    assert {each.thresholds for each in points} <= allowed
    for one, other in pairwise(points):
        assert other.flops_speedup > one.flops_speedup
        assert other.measured_speedup > one.measured_speedup
    if speedup is not None:
        assert points[0].flops_speedup >= 0.99 * speedup


def test_points_that_are_no_faster_by_the_clock_are_no_use_to_a_run_that_is_late(model, tmp_path):
    table = json.loads((tmp_path / "calibration.json").read_text())
    (values,) = table.values()
    values["points"][1]["measured_speedup"] = 2.0
    (tmp_path / "calibration.json").write_text(json.dumps(table))
    _, expectation = choose(config(finish_by="06:00", max_drop=3.0, speedup=2.0), model)
    assert expectation is not None
    assert [point.flops_speedup for point in expectation.faster] == [5.0]


def test_a_time_that_no_table_can_serve_is_refused(model):
    with pytest.raises(UsageError, match=r"max_drop 0.5: at 95% confidence, 3.00 points may be lost even at 2.00x"):
        choose(config(finish_by="06:00", max_drop=0.5), model)
    with pytest.raises(UsageError, match=r"speedup 5 and max_drop 1 cannot both hold: at 5.00x and 0% confidence"):
        choose(config(finish_by="06:00", max_drop=1.0, max_drop_confidence=0.0, speedup=5.0), model)
    with pytest.raises(UsageError, match=r"finish_by 3h: .* no calibration table for bfloat16 .* jobs/evaluate.py"):
        choose(config(finish_by="3h", max_drop=1.0, dtype="bfloat16"), model)


def test_a_corpus_that_keeps_other_fractions_is_said(model):
    _, expectation = choose(config(speedup=3.0), model)
    assert kept_drift([0.3, 0.2], expectation) == []
    assert kept_drift([0.3, 0.2], None) == []
    (warning,) = kept_drift([0.6, 0.2], expectation)
    assert "reduction 0 kept 60.0% of tokens, outside the 20.0% to 50.0%" in warning


def test_label_shares_that_moved_are_said_beyond_chance():
    before = {"a": 5000, "b": 3000, "c": 2000}
    assert label_drift({"a": 490, "b": 310, "c": 200}, before) == []
    assert label_drift({"a": 3, "b": 5, "c": 2}, before) == [], "ten documents say little"
    assert label_drift({}, before) == []
    assert label_drift(before, {}) == []
    (warning,) = label_drift({"a": 2500, "b": 5000, "c": 2500}, before)
    assert warning == "label shares have moved by 25.0% since the last run, 'a' by -25.0 points"
    assert label_drift({"new": 1000}, before)


def test_the_last_run_is_the_newest_that_scored_with_this_model(tmp_path):
    output = Storage(str(tmp_path / "out"))
    assert last_labels(output, DIGEST) == {}
    for name, report in {
        "20261101T000000Z-a": {"documents": 5, "labels": {"a": 5}, "model": {"digest": DIGEST}},
        "20261102T000000Z-b": {"documents": 6, "labels": {"a": 6}, "model": {"digest": DIGEST}},
        "20261103T000000Z-c": {"documents": 7, "labels": {"a": 7}, "model": {"digest": "another"}},
        "20261104T000000Z-d": {"documents": 0, "labels": {}, "model": {"digest": DIGEST}},
    }.items():
        output.write(f"_runs/{name}.json", json.dumps(report).encode())
    output.write("_runs/20261105T000000Z-e.json", b"{")
    assert last_labels(output, DIGEST) == {"a": 6}


def test_an_expectation_is_part_of_a_report_as_json(model):
    _, expectation = choose(config(speedup=3.0), model)
    assert isinstance(expectation, Expectation)
    values = json.loads(json.dumps(expectation.as_dict()))
    assert values["asked"] == "speedup 3"
    assert values["thresholds"] == [0.4, 0.4]
