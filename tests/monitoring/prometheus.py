"""Debian's Prometheus and promtool, which `make .venv/prometheus` downloads; and what dashboard and rules ask for."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlencode
from urllib.request import urlopen

import promql_parser
import pytest
import yaml

from tests.integration.s3_server import free_ports

ROOT = Path(__file__).parent.parent.parent
RULES = ROOT / "deploy/prometheus/alerts.yml"
DASHBOARD = ROOT / "deploy/grafana/trbert.json"
DOWNLOADED = ROOT / ".venv/prometheus-deb/usr/bin"


def binary(name: str) -> str:
    """The path of `prometheus` or `promtool`; skips the test without it, unless the variable CI is set."""
    found = shutil.which(name, path=f"{DOWNLOADED}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        problem = f"there is no {name} here: make .venv/prometheus downloads it where there is Debian's archive"
        if os.environ.get("CI"):
            pytest.fail(problem)
        pytest.skip(problem)
    return found


def dashboard_expressions() -> list[str]:
    """The dashboard's queries, with its variables filled in as Grafana does."""
    targets = [target for panel in json.loads(DASHBOARD.read_text())["panels"] for target in panel["targets"]]
    return [target["expr"].replace("$output", ".*").replace("$__rate_interval", "1m") for target in targets]


def rule_expressions() -> list[str]:
    return [rule["expr"] for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def series_in(expression: str) -> set[str]:
    """The names of the series that an expression selects."""
    names = set()

    def visit(node: promql_parser.Expr) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            names.add(node.name)

    promql_parser.walk(promql_parser.parse(expression), visit)
    return names


class Prometheus:
    """A running Prometheus."""

    def __init__(self, port: int):
        self._url = f"http://127.0.0.1:{port}"

    def get(self, path: str, **arguments: str):
        """The data of an answer of its API."""
        with urlopen(f"{self._url}/api/v1/{path}?{urlencode(arguments)}", timeout=10) as answer:
            answered = json.load(answer)
        assert answered["status"] == "success", answered
        return answered["data"]

    def values(self, expression: str, label: str) -> dict[str, float]:
        """The values of a query by one of its labels."""
        found = self.get("query", query=expression)["result"]
        return {sample["metric"].get(label, ""): float(sample["value"][1]) for sample in found}

    def wait_for(self, expression: str) -> None:
        """Wait until a query has a result."""
        deadline = time.monotonic() + 60
        while True:
            try:
                if self.get("query", query=expression)["result"]:
                    return
            except OSError:  # it does not listen yet
                pass
            assert time.monotonic() < deadline, f"{expression} has no result after a minute"
            time.sleep(0.1)


@contextmanager
def running(folder: Path, *scrapes: dict) -> Iterator[Prometheus]:
    """A Prometheus with our rules that scrapes every second; its data are in a folder."""
    (port,) = free_ports(1)
    each = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    settings = {"global": each, "rule_files": [str(RULES)], "scrape_configs": list(scrapes)}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(settings))
    options = {"config.file": folder / "prometheus.yml", "storage.tsdb.path": folder / "data"}
    options["web.listen-address"] = f"127.0.0.1:{port}"
    command = [binary("prometheus"), *(f"--{name}={value}" for name, value in options.items())]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield Prometheus(port)
    finally:
        process.terminate()
        process.wait(timeout=30)
