"""Ray's Prometheus endpoint after real runs, as a real Prometheus sees it, and what a run leaves beside its output."""

import json
import time
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pipeline.corpus import Shard
from pipeline.metrics import RunMetrics, series
from pipeline.plan import Plan
from pipeline.report import Progress, RunStatistics, SplitStats
from pipeline.storage import Storage
from tests.monitoring import prometheus


@pytest.fixture
def report(good_job) -> dict:
    """The report of the submitted job."""
    output = Storage(f"{good_job[0]}/out")
    (name,) = [file.path for file in output.files("_runs") if file.path.endswith(".json")]
    return json.loads(output.read(name))


def everything_once(output: str) -> None:
    """Record a value for each series that a run can have."""
    shard = Shard("a.parquet", "v", 1)
    statistics = RunStatistics("run", Plan(pending=[(shard, frozenset())]), time.time())
    stats = SplitStats(
        documents=3,
        bad_rows={"null": 1},
        tokens=10,
        kept_tokens=[5],
        exit_layers={"6": 3},
        windows=1,
        text_bytes=1,
        result_bytes=1,
        flops=1.0,
        dense_flops=2.0,
        predict_seconds=1.0,
        halved_batches=1,
        storage_retries=1,
    )
    actor = {"actor": "1", "loaded_seconds": 1.0, "start": statistics.started, "end": statistics.started + 1}
    statistics.add_split(stats, shard, 1, 1, actor)
    statistics.unreadable, statistics.failed_splits = {"b": "why"}, {"c": "why"}
    statistics.deaths = statistics.hung = 1
    statistics.add_shard(quarantined=1)
    metrics = RunMetrics(output)
    metrics.add_split(stats)
    metrics.update(statistics, Progress(0.5, 3, 60.0), deadline=time.time() + 60)
    metrics.end(0)


def test_prometheus_finds_at_rays_endpoint_what_the_report_says_and_what_rules_and_dashboard_ask_for(
    tmp_path, good_job, report, ray_cluster
):
    output = f"{good_job[0]}/out"
    everything_once("s3://bucket/all-series")
    discovery = Path(ray_cluster.head_node.get_session_dir_path()) / "prom_metrics_service_discovery.json"
    scrape = {"job_name": "ray", "file_sd_configs": [{"files": [str(discovery)]}]}
    with prometheus.running(tmp_path, scrape) as server:
        server.wait_for(f'ray_trbert_stage_seconds_total{{output="{output}",stage="commit"}}')
        server.wait_for('ray_trbert_last_success_timestamp_seconds{output="s3://bucket/all-series"}')

        def total(name: str, label: str = "output") -> dict[str, float]:
            return server.values(f'ray_trbert_{name}_total{{output="{output}"}}', label)

        for name in ("documents", "tokens", "windows", "text_bytes", "result_bytes"):
            assert total(name) == {output: report[name]}
        assert total("rejects", "reason") == report["bad_rows"] == {"null": 1}
        kept = [fraction * report["tokens"] for fraction in report["kept_fractions"]]
        assert list(total("kept_tokens", "reduction").values()) == pytest.approx(kept)
        assert total("stage_seconds", "stage") == pytest.approx(report["busy_seconds"], abs=1e-3)
        assert total("flops")[output] == pytest.approx(report["flops"]["spent"])
        assert total("splits") == {output: report["splits"]["committed"]}
        assert server.values(f'ray_trbert_split_seconds_count{{output="{output}"}}', "output") == total("splits")
        assert total("shards") == {output: 1}

        assert series() <= set(server.get("label/__name__/values"))
        for expression in prometheus.dashboard_expressions() + prometheus.rule_expressions():
            server.get("query", query=expression)
        server.wait_for('ALERTS{alertname="TrbertProcessDeaths", alertstate="firing"}')
        rules = [rule for group in server.get("rules")["groups"] for rule in group["rules"]]
        assert {(rule["health"], rule.get("lastError")) for rule in rules} == {("ok", None)}
        firing = {rule["name"] for rule in rules if rule["state"] == "firing"}
        assert firing == {"TrbertRejects", "TrbertProcessDeaths"}


def test_a_run_leaves_its_metrics_and_its_lineage(good_job, report, left_behind):
    values = {}
    for family in text_string_to_metric_families((left_behind / "trbert.prom").read_text()):
        values |= {(sample.name, sample.labels.get("reason")): sample.value for sample in family.samples}
    assert values["ray_trbert_documents_total", None] == report["documents"] == 29
    assert values["ray_trbert_rejects_total", "null"] == 1
    assert values["ray_trbert_last_run_exit_code", None] == 0
    assert values["ray_trbert_run_progress_ratio", None] == 1
    start, complete = [json.loads(line) for line in (left_behind / "lineage.jsonl").read_text().splitlines()]
    assert (start["eventType"], complete["eventType"]) == ("START", "COMPLETE")
    (source,), (output,) = complete["inputs"], complete["outputs"]
    bucket = good_job[0]
    assert (source["namespace"], source["name"]) == (bucket, "in")
    assert (output["namespace"], output["name"]) == (bucket, "out")
    assert output["outputFacets"]["outputStatistics"]["rowCount"] == report["documents"]
    assert output["outputFacets"]["outputStatistics"]["size"] == report["result_bytes"]
    assert ["run", report["run"]] in [[tag["key"], tag["value"]] for tag in start["run"]["facets"]["tags"]["tags"]]
