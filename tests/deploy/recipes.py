"""The files of deploy/, read."""

import ast
import tomllib
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"
KUBERNETES = {path.name: list(yaml.safe_load_all(path.read_text())) for path in (DEPLOY / "kubernetes").glob("*.yaml")}
(RAYJOB,), (RAYCRONJOB,) = KUBERNETES["rayjob.yaml"], KUBERNETES["raycronjob.yaml"]
CRONJOB, ONE_MACHINE = KUBERNETES["cronjob.yaml"][0], KUBERNETES["cronjob-one-machine.yaml"][0]
DAG = ast.parse((DEPLOY / "airflow/nightly_scoring.py").read_text())
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
PINNED = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)


def constants(tree: ast.Module) -> dict[str, Any]:
    """The literals that a module assigns to names."""
    assigned = (node for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name))
    return {node.targets[0].id: ast.literal_eval(node.value) for node in assigned}


def template_of(cronjob: dict) -> dict:
    """The pod template of a Kubernetes CronJob."""
    return cronjob["spec"]["jobTemplate"]["spec"]["template"]


def ray_templates(spec: dict) -> list[dict]:
    """The pod templates of a RayJob's spec: the head's and those of the workers."""
    cluster = spec["rayClusterSpec"]
    return [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
