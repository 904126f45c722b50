"""What a run has to do: what is believed of an output, and what is not."""

import json

import pytest

from pipeline.commit import write_marker
from pipeline.corpus import QUARANTINE, Shard
from pipeline.manifest import SUCCESS, complete_markers, write_manifest
from pipeline.plan import make_plan
from pipeline.storage import Storage
from tests.pipeline.test_commit import publish, rejected, results

DONE, BEGUN, FRESH, REWRITTEN = (
    Shard(f"{name}.parquet", "0" * 11 + "1", 10) for name in ("done", "begun", "fresh", "rewritten")
)
OLD, GONE = Shard(REWRITTEN.path, "f" * 12, 9), Shard("gone.parquet", "a" * 12, 9)


@pytest.fixture
def output(tmp_path):
    return Storage(str(tmp_path / "out"))


def complete(output, *shards, **options):
    for shard in shards:
        splits = [publish(output, shard, index, results(index), rejected(2 + index)) for index in range(2)]
        write_marker(output, shard, splits, "run", **options)


def test_the_plan_subtracts_what_is_there(output):
    complete(output, DONE, OLD, GONE)
    for path in (
        BEGUN.object(0),
        BEGUN.object(2),
        f"{QUARANTINE}/{BEGUN.object(1)}",  # quarantine alone is no committed split
        "_runs/x.json",
        "_output.json",
        "somebody-elses.parquet",
    ):
        output.write(path, b"")
    plan = make_plan([DONE, BEGUN, FRESH, REWRITTEN], output)
    assert plan.complete == [DONE]
    assert [(shard.path, sorted(indices)) for shard, indices in plan.pending] == [
        ("begun.parquet", [0, 2]),
        ("fresh.parquet", []),
        ("rewritten.parquet", []),
    ]
    of_old = [OLD.marker, OLD.object(0), OLD.object(1), *(f"{QUARANTINE}/{OLD.object(index)}" for index in range(2))]
    assert plan.superseded[REWRITTEN.key] == of_old, "in the order in which a death does no harm"
    assert list(plan.removed) == [GONE.key]
    assert plan.manifest is None


@pytest.mark.parametrize(
    "lost", [DONE.marker, DONE.object(1), f"{QUARANTINE}/{DONE.object(0)}", f"{QUARANTINE}/{DONE.object(1)}"]
)
@pytest.mark.parametrize("with_manifest", [True, False])
def test_a_shard_is_complete_if_everything_that_it_has_is_there(output, lost, with_manifest):
    complete(output, DONE, BEGUN)
    if with_manifest:
        write_manifest(output, {}, complete_markers(output), [], "run")
    assert make_plan([DONE, BEGUN], output).pending == []
    output.delete([lost])
    plan = make_plan([DONE, BEGUN], output)
    assert ([shard for shard, _ in plan.pending], plan.complete, plan.manifest) == ([DONE], [BEGUN], None)


def test_a_success_that_was_written_late_is_not_believed(output):
    """By a run that was paused, had lost its lease and knew a part of the shards."""
    complete(output, DONE)
    write_manifest(output, {}, complete_markers(output), [], "paused")
    complete(output, BEGUN)
    assert [marker["shard"] for marker in complete_markers(output)] == [BEGUN.path, DONE.path], "nor do readers"
    plan = make_plan([DONE, BEGUN], output)
    assert (plan.complete, plan.manifest, plan.has_success) == ([DONE, BEGUN], None, True)
    assert make_plan([DONE, BEGUN, FRESH], output).pending == [(FRESH, frozenset())]


def test_a_marker_that_lacks_a_split_is_not_believed(output):
    complete(output, DONE)
    marker = json.loads(output.read(DONE.marker))
    output.write(DONE.marker, json.dumps(marker | {"splits": marker["splits"][:1]}).encode())
    plan = make_plan([DONE], output)
    assert plan.pending == [(DONE, frozenset([0, 1]))]
    assert plan.distrusted == [DONE.marker]


def test_a_marker_of_a_run_with_other_options_is_not_believed(output):
    complete(output, DONE, identity_key="theirs")
    assert make_plan([DONE], output, "theirs").complete == [DONE]
    assert make_plan([DONE], output, "ours").distrusted == [DONE.marker]


@pytest.mark.parametrize("path", [DONE.marker, SUCCESS])
def test_damage_is_no_completeness(output, path):
    complete(output, DONE)
    output.write(path, b"{")
    plan = make_plan([DONE], output)
    assert plan.manifest is None
    assert bool(plan.complete) == (path == SUCCESS)


def test_what_no_split_has_made_goes(output):
    """A split's quarantined rows whose process died, and which the next one scored."""
    splits = [publish(output, DONE, 0, results(0, 1), rejected())]
    stray = f"{QUARANTINE}/{DONE.object(0)}"
    output.write(stray, b"")
    superseded = make_plan([DONE], output).superseded[DONE.key]
    write_marker(output, DONE, splits, "run", superseded=superseded)
    assert [file.path for file in output.files()] == sorted([DONE.marker, DONE.object(0)])
    output.write(stray, b"")
    plan = make_plan([DONE], output)
    assert (plan.complete, plan.superseded) == ([DONE], {DONE.key: [stray]})
