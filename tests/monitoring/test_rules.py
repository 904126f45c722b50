"""The alert rules and the dashboard: what promtool says, and that they name no series that is not there."""

import json
import subprocess

import pytest
import yaml

from pipeline.metrics import series
from tests.monitoring.prometheus import (
    DASHBOARD,
    ROOT,
    RULES,
    binary,
    dashboard_expressions,
    rule_expressions,
    series_in,
)

UNIT_TESTS = ROOT / "tests/monitoring/alerts_test.yml"


@pytest.mark.parametrize("expressions", [dashboard_expressions, rule_expressions])
def test_every_series_that_is_asked_for_exists(expressions):
    asked = [series_in(expression) for expression in expressions()]
    assert all(asked), "every expression selects something"
    assert set.union(*asked) <= series()


def test_the_dashboard_shows_every_metric():
    shown = set.union(*(series_in(expression) for expression in dashboard_expressions()))
    unshown = {name.removeprefix("ray_trbert_") for name in series() - shown}
    assert unshown == {
        "last_run_timestamp_seconds",
        "run_start_timestamp_seconds",  # of its variable `output`
        "split_seconds_count",
        "split_seconds_sum",
        "windows_total",
    }


def test_the_dashboard_is_one_that_grafana_imports():
    dashboard = json.loads(DASHBOARD.read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells), "no panel lies on another"
    assert max(x for x, _ in cells) < 24, "Grafana's grid has 24 columns"
    for panel in panels:
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


def test_promtool_accepts_the_rules_and_each_alert_fires_when_it_should_and_only_then(tmp_path):
    promtool = binary("promtool")
    checked = subprocess.run([promtool, "check", "rules", RULES], capture_output=True, text=True, timeout=200)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    unit_tests = UNIT_TESTS.read_text().replace("%RULES%", str(RULES))
    (tmp_path / "tests.yml").write_text(unit_tests)
    tested = subprocess.run(
        [promtool, "test", "rules", tmp_path / "tests.yml"], capture_output=True, text=True, timeout=200
    )
    assert tested.returncode == 0, tested.stdout + tested.stderr
    alerts = {rule["alert"] for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]}
    fired = {
        each["alertname"]
        for test in yaml.safe_load(unit_tests)["tests"]
        for each in test["alert_rule_test"]
        if each["exp_alerts"]
    }
    assert fired == alerts, "each alert has a unit test in which it fires"
