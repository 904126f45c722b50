"""Statistics add up, and the report says what they say."""

import time

import pytest

from pipeline.corpus import Shard
from pipeline.ledger import UnderWay
from pipeline.plan import Plan
from pipeline.report import RunStatistics, SplitStats, summary

A = SplitStats(
    documents=3,
    text_bytes=300,
    bad_rows={"null": 1},
    labels={"x": 2, "y": 1},
    tokens=100,
    windows=4,
    kept_tokens=[40, 10],
    flops=1e12,
    dense_flops=3e12,
    predict_seconds=2.0,
    model_seconds=1.5,
)
B = SplitStats(
    documents=1,
    text_bytes=100,
    bad_rows={"null": 2, "empty": 1},
    labels={"y": 1},
    tokens=50,
    windows=1,
    kept_tokens=[20, 5],
    flops=1e12,
    dense_flops=2e12,
)


def test_addition_has_a_zero_and_does_not_depend_on_the_order():
    assert SplitStats() + A == A + SplitStats() == A
    assert A + B == B + A
    assert (A + B).kept_tokens == [60, 15]
    assert (A + B).bad_rows == {"null": 3, "empty": 1}
    assert (A + B).bad == 4
    assert SplitStats.from_json(A.to_json()) == A


def statistics():
    shards = [Shard("a.parquet", "v", 1000), Shard("b.parquet", "v", 1000)]
    stats = RunStatistics("run", Plan(pending=[(shard, frozenset()) for shard in shards]), time.time())
    start = stats.started + 5
    stats.add_split(A, shards[0], 4, 4, {"actor": "1", "loaded_seconds": 2.0, "start": start, "end": start + 2})
    stats.add_split(B, shards[1], 4, 16, {"actor": "2", "loaded_seconds": 2.0, "start": start + 1, "end": start + 4})
    stats.finished = start + 5
    return stats


def test_the_report_separates_start_up_from_steady_state():
    report = statistics().report(status="complete", exit_code=0, settings={"model": "m"})
    assert report["seconds"] == {"wall": 10.0, "startup": 5.0, "steady_state": 4.0, "finish": 1.0}
    assert report["per_second_steady_state"]["documents"] == 1.0
    assert report["per_second_steady_state"]["tokens"] == 37.5
    assert report["kept_fractions"] == [0.4, 0.1]
    assert report["flops"]["saved"] == 3e12
    assert report["flops"]["speedup"] == 2.5
    # Actor 1 was busy 2 of 2 seconds between its first and last split, actor 2 3 of 3.
    assert report["actors"]["computing_share"] == pytest.approx(1.0)
    assert report["model"] == "m"


def test_an_idle_actor_shows():
    stats = statistics()
    start = stats.started + 5
    stats.add_split(
        B, Shard("b.parquet", "v", 1), 1, 1, {"actor": "1", "loaded_seconds": 0, "start": start + 6, "end": start + 8}
    )
    report = stats.report(status="complete", exit_code=0, settings={})
    assert report["actors"]["computing_share"] == pytest.approx((4 + 3) / (8 + 3), abs=1e-4)


def test_progress_is_the_share_of_the_shards_bytes():
    stats = statistics()
    line = stats.progress_line()
    assert "62%" in line  # all of the first 1000 bytes and a quarter of the second
    assert "4 documents" in line
    assert "kept 40% / 10%" in line
    empty = RunStatistics("run", Plan(), time.time())
    assert "starting: no document is scored yet" in empty.progress_line()


def test_progress_includes_splits_under_way_and_never_goes_back():
    """A split may take minutes, and one that is being committed is in neither list for a while."""
    started = time.time() - 20
    stats = RunStatistics("run", Plan(pending=[(Shard("a", "v", 1000), frozenset())]), started)
    line = stats.progress_line([UnderWay("a", 30, 0.25, started), UnderWay("a", 10, 0.25, started + 1)])
    assert line == "0:00:20 50% · 40 documents · 0 bad rows · ETA 0:00:20"
    assert "50% · 40 documents" in stats.progress_line([])


def test_a_run_with_nothing_to_do_has_a_report_too():
    stats = RunStatistics("run", Plan(complete=[Shard("a", "v", 1)]), time.time())
    report = stats.report(status="complete already: nothing to do", exit_code=0, settings={})
    assert report["documents"] == 0
    assert "1 complete before" in summary(report)


def test_the_summary_names_what_went_wrong():
    stats = statistics()
    stats.unreadable["c.parquet"] = "ShardError: not a readable Parquet file"
    stats.failed_splits["a.parquet split 3"] = "OutOfMemoryError: too long"
    text = summary(stats.report(status="incomplete", exit_code=1, settings={}))
    for part in ("c.parquet: ShardError", "a.parquet split 3: OutOfMemoryError", "empty: 1", "null: 3", "2.50x fewer"):
        assert part in text


def test_a_model_with_exits_has_its_exit_layers_in_the_report():
    assert "exit_layers" not in statistics().report(status="complete", exit_code=0, settings={})
    stats = statistics()
    stats.total += SplitStats(exit_layers={"12": 1, "2": 1}, exit_layer_sum=14.0)
    stats.total += SplitStats(exit_layers={"2": 2}, exit_layer_sum=4.4)
    report = stats.report(status="complete", exit_code=0, settings={})
    assert report["exit_layers"] == {"mean": pytest.approx(4.6), "documents": {"2": 3, "12": 1}}
    assert "after 4.6 layers on average: 75% after 2, 25% after 12" in summary(report)


def test_the_summary_tells_of_faults_and_of_names_that_would_do_things_to_a_terminal():
    stats = statistics()
    stats.deaths, stats.hung, stats.total.storage_retries, stats.stopped = 2, 1, 14, "SIGTERM"
    stats.removed = ["gone.parquet", "\x1b[2Jclear.parquet"]
    stats.unreadable = {f"{i:03d}.parquet": "ShardError: broken" for i in range(60)}
    report = stats.report(status="incomplete: stopped (SIGTERM); run again to finish", exit_code=4, settings={})
    assert (report["stopped"], report["faults"]) == (
        "SIGTERM",
        {"process_deaths": 2, "hung_processes": 1, "storage_retries": 14},
    )
    text = summary(report)
    assert "2 processes died at their work, 1 hung, 14 storage requests were made again" in text
    assert "2 shards are no longer in the corpus" in text
    assert "  \\x1b[2Jclear.parquet" in text
    assert "\x1b" not in text
    assert "049.parquet" in text
    assert "050.parquet" not in text
    assert "… and 10 more, in the run report" in text
