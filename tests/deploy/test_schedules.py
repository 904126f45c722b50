"""The Airflow DAG and the systemd units, as far as they can be checked without Airflow and systemd."""

import ast
import configparser

from tests.deploy.recipes import DAG, DEPLOY


def keywords(name: str) -> dict[str, ast.expr]:
    (call,) = (
        node
        for node in ast.walk(DAG)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name
    )
    return {each.arg: each.value for each in call.keywords if each.arg}


def hours(node: ast.expr) -> int:
    assert isinstance(node, ast.Call)
    return {each.arg: ast.literal_eval(each.value) for each in node.keywords}["hours"]


def test_the_dag_runs_one_night_at_a_time_and_tries_again():
    dag, task = keywords("DAG"), keywords("ScoreOnRay")
    assert ast.literal_eval(dag["max_active_runs"]) == 1
    assert ast.literal_eval(dag["catchup"]) is False
    assert ast.literal_eval(task["retries"]) > 0
    assert 5 < hours(task["execution_timeout"]) < hours(dag["dagrun_timeout"]) < 24


def test_the_dag_is_read_without_ray():
    outer = (node for node in DAG.body if isinstance(node, (ast.Import, ast.ImportFrom)))
    assert not any("ray" in ast.unparse(node).split() or "ray.job_submission" in ast.unparse(node) for node in outer)


def unit(name: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string((DEPLOY / "cron" / name).read_text())
    return parser


def test_the_service_stops_as_a_run_needs():
    service = unit("trbert-nightly.service")["Service"]
    assert service["Type"] == "oneshot"  # the timer does not start a second one beside it
    assert service["KillMode"] == "mixed"  # SIGTERM to Ray's processes, too, would lose what they have begun
    assert service["TimeoutStopSec"] == "60s"
    assert service["TimeoutStartSec"] == "6h"
    assert "Environment" in service
    assert "AWS" not in service["Environment"]
    assert unit("trbert-nightly.timer")["Timer"]["Persistent"] == "yes"
