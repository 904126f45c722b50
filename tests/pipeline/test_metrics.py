"""Metrics are the report's numbers, and tell how runs end."""

import dataclasses
import logging
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from pipeline import ScoreConfig, UsageError, metrics, score
from pipeline.corpus import Shard
from pipeline.errors import OutputBusyError
from pipeline.metrics import RunMetrics, series
from pipeline.plan import Plan
from pipeline.report import Progress, RunStatistics, SplitStats
from trbert_model.terminal import printable

SHARD = Shard("a.parquet", "v", 1000)


def values(path) -> dict[tuple[str, str], float]:
    """The samples of a file by name and label besides `output`."""
    found = {}
    for family in text_string_to_metric_families(path.read_text()):
        for sample in family.samples:
            labels = {name: value for name, value in sample.labels.items() if name != "output"}
            assert set(sample.labels) - set(labels) == {"output"}
            assert len(labels) <= 1, "labels must stay few"
            found[sample.name, "".join(labels.values())] = sample.value
    return found


def run_statistics(plan: Plan | None = None) -> RunStatistics:
    return RunStatistics("run", plan or Plan(pending=[(SHARD, frozenset())]), time.time() - 5)


def add(statistics: RunStatistics, stats: SplitStats) -> None:
    start = statistics.started + statistics.splits
    actor = {"actor": "1", "loaded_seconds": 1.0, "start": start, "end": start + 1}
    statistics.add_split(stats, SHARD, 1, 100, actor)


counts = st.integers(0, 10**12)
seconds = st.floats(0, 1e5)
splits = st.builds(
    SplitStats,
    documents=counts,
    text_bytes=counts,
    result_bytes=counts,
    bad_rows=st.dictionaries(st.sampled_from(["null", "empty", "wrong_type"]), st.integers(1, 10**6)),
    tokens=counts,
    windows=counts,
    kept_tokens=st.lists(counts, min_size=2, max_size=2),
    exit_layers=st.dictionaries(st.sampled_from(["1", "6", "12"]), st.integers(1, 10**6)),
    flops=st.floats(0, 1e18),
    dense_flops=st.floats(0, 1e18),
    read_seconds=seconds,
    tokenize_seconds=seconds,
    predict_seconds=seconds,
    model_seconds=seconds,
    commit_seconds=seconds,
    halved_batches=st.integers(0, 9),
    storage_retries=st.integers(0, 9),
)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(splits, st.booleans()), max_size=6))
def test_the_last_values_are_the_reports_however_often_they_were_updated(tmp_path_factory, added):
    path = tmp_path_factory.mktemp("metrics") / "trbert.prom"
    run, statistics = RunMetrics("s3://bucket/scores", str(path)), run_statistics()
    for stats, update in added:
        add(statistics, stats)
        run.add_split(stats)
        if update:
            run.update(statistics, Progress(0.5, 1, 1.0))
    statistics.deaths, statistics.hung = 2, 1
    statistics.failed_splits["a.parquet split 0"] = "why"
    statistics.unreadable["b.parquet"] = "why"
    statistics.add_shard(quarantined=1)
    run.update(statistics)
    run.end(1)
    report, found = statistics.report(status="failed", exit_code=1, settings={}), values(path)

    def total(name: str, label: str = "") -> float:
        return found.pop((f"ray_trbert_{name}_total", label))

    for name in ("documents", "tokens", "windows", "text_bytes", "result_bytes"):
        assert total(name) == report[name]
    for reason, rows in report["bad_rows"].items():
        assert total("rejects", reason) == rows
    for number, kept in enumerate(statistics.total.kept_tokens, start=1):
        assert total("kept_tokens", str(number)) == kept
    for layer, documents in report.get("exit_layers", {"documents": {}})["documents"].items():
        assert total("exits", layer) == documents
    for stage, busy in report["busy_seconds"].items():
        assert total("stage_seconds", stage) == pytest.approx(busy, abs=1e-3)
    assert (total("flops"), total("dense_flops")) == (report["flops"]["spent"], report["flops"]["dense"])
    assert total("process_deaths") == report["faults"]["process_deaths"]
    assert total("hung_processes") == report["faults"]["hung_processes"]
    assert total("storage_retries") == report["faults"]["storage_retries"]
    assert total("halved_batches") == report["actors"]["halved_batches"]
    assert total("splits") == report["splits"]["committed"] == found["ray_trbert_split_seconds_count", ""]
    assert (total("shards"), total("unreadable_shards"), total("failed_splits")) == (1, 1, 1)
    assert [name for name, _ in found if name.endswith("_total")] == []
    assert found["ray_trbert_last_run_exit_code", ""] == 1


def test_every_metric_has_a_meaning_a_unit_and_one_prefix(tmp_path):
    path = tmp_path / "trbert.prom"
    run, statistics = RunMetrics("out", str(path)), run_statistics()
    add(statistics, SplitStats(documents=1, tokens=2, kept_tokens=[1], bad_rows={"null": 1}, exit_layers={"6": 1}))
    run.add_split(SplitStats(predict_seconds=1.0))
    run.update(statistics, Progress(0.5, 1, 60.0), deadline=time.time() + 60)
    found = {name for name, _ in values(path)}
    run.end(0)
    found |= {name for name, _ in values(path)}
    assert found == series(), "what `series` says is what the file has"
    for metric in metrics.COUNTERS:
        assert metric.name.endswith("_total")
    for family in text_string_to_metric_families(path.read_text()):
        assert family.name.startswith("ray_trbert_")
        assert family.documentation


def test_a_run_that_fails_keeps_when_one_succeeded_last(tmp_path, model_directory):
    path = tmp_path / "trbert.prom"
    places = {"output": str(tmp_path / "out"), "model": str(model_directory), "metrics_file": str(path)}
    RunMetrics(places["output"], str(path)).end(0)
    before = values(path)
    with pytest.raises(UsageError, match="nothing-here"):
        score(ScoreConfig(input=str(tmp_path / "nothing-here"), **places))
    after = values(path)
    assert (before["ray_trbert_last_run_exit_code", ""], after["ray_trbert_last_run_exit_code", ""]) == (0, 2)
    same = ("ray_trbert_last_success_timestamp_seconds", "")
    assert before[same] == after[same]
    assert after["ray_trbert_last_run_timestamp_seconds", ""] > before[same]
    assert after["ray_trbert_last_run_duration_seconds", ""] >= 0


def test_while_a_run_is_at_work_the_file_says_how_the_last_one_ended(tmp_path):
    path = tmp_path / "trbert.prom"
    RunMetrics("out", str(path)).end(1)
    run, statistics = RunMetrics("out", str(path)), run_statistics()
    add(statistics, SplitStats(documents=7))
    run.update(statistics, Progress(0.25, 1, 60.0), deadline=9e9)
    found = values(path)
    assert found["ray_trbert_last_run_exit_code", ""] == 1
    assert found["ray_trbert_documents_total", ""] == 7
    assert found["ray_trbert_run_eta_seconds", ""] == 60
    assert found["ray_trbert_run_deadline_timestamp_seconds", ""] == 9e9
    add(statistics, SplitStats(documents=1))
    run.update(statistics)
    assert values(path) == found, "it is not written again so soon"
    run.end(4)
    found = values(path)
    assert found["ray_trbert_documents_total", ""] == 8
    assert ("ray_trbert_run_eta_seconds", "") not in found, "a run that has ended is never late"


def test_a_run_that_finds_another_at_work_leaves_the_file_to_it(tmp_path):
    path = tmp_path / "trbert.prom"
    RunMetrics("out", str(path)).end(OutputBusyError.exit_code)
    assert not path.exists()


def test_counts_never_go_down(tmp_path):
    path = tmp_path / "trbert.prom"
    run, statistics = RunMetrics("out", str(path)), run_statistics()
    for statistics.deaths in (3, 1):  # the ledger died with what it knew
        run.update(statistics)
    run.end(0)
    assert values(path)["ray_trbert_process_deaths_total", ""] == 3


@pytest.mark.parametrize(
    ("file", "message"), [("metrics.txt", "must end in .prom"), ("no/folder/m.prom", "its folder does not exist")]
)
def test_a_file_that_nobody_would_read_is_refused_before_anything_starts(tmp_path, model_directory, file, message):
    places = {"input": str(tmp_path), "output": str(tmp_path / "out"), "model": str(model_directory)}
    with pytest.raises(UsageError, match=message):
        score(ScoreConfig(**places, metrics_file=str(tmp_path / file)))
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_any_more_ends_no_run(tmp_path, caplog):
    (tmp_path / "folder").mkdir()
    run = RunMetrics("out", str(tmp_path / "folder/trbert.prom"))
    (tmp_path / "folder").rmdir()
    with caplog.at_level(logging.WARNING):
        run.update(run_statistics())
    assert "the metrics are not in" in caplog.text


def test_a_file_of_something_else_is_replaced_with_a_warning(tmp_path, caplog):
    path = tmp_path / "trbert.prom"
    path.write_bytes(b"\xff{{{ not metrics")
    with caplog.at_level(logging.WARNING):
        RunMetrics("out", str(path)).end(0)
    assert "does not say how the last run ended" in caplog.text
    assert values(path)["ray_trbert_last_run_exit_code", ""] == 0


@pytest.mark.parametrize("name", ["plain", 'quotes "\\', "two\nlines", "not UTF-8: \udcff", "\x1b[31m", "文"])
def test_any_name_of_an_output_is_a_label(tmp_path, name):
    path = tmp_path / "trbert.prom"
    for _ in range(2):
        RunMetrics(f"/data/{name}", str(path)).end(0)
    (sample,) = {
        sample.labels["output"]
        for family in text_string_to_metric_families(path.read_text())
        for sample in family.samples
    }
    assert sample == f"/data/{printable(name)}"


def test_no_label_holds_credentials():
    with pytest.raises(UsageError, match="credentials do not belong") as raised:
        RunMetrics("s3://key:secret@bucket/scores")
    assert "secret" not in str(raised.value)


def test_every_count_of_a_split_is_a_metric():
    """A new field of `SplitStats` is either a metric or named here."""
    elsewhere = {"labels", "by_length"}  # without bounds: the report has them
    elsewhere |= {"exit_layer_sum"}  # from exit_layers, but for the rounding
    statistics = run_statistics()
    before = {metric.name: metric.values(statistics) for metric in metrics.COUNTERS}
    for field in dataclasses.fields(SplitStats):
        if field.name not in elsewhere:
            default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
            changed = {"x": 1} if isinstance(default, dict) else [1] if isinstance(default, list) else default + 1
            statistics.total = SplitStats(**{field.name: changed})
            after = {metric.name: metric.values(statistics) for metric in metrics.COUNTERS}
            assert after != before, field.name
