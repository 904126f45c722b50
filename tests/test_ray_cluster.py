"""ray_cluster.yaml, as far as it can be checked without a cloud."""

from copy import deepcopy
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

FILE = Path(__file__).parent.parent / "ray_cluster.yaml"
CONFIG = yaml.safe_load(FILE.read_text())


def test_ray_accepts_it():
    validate_config(prepare_config(deepcopy(CONFIG)))


def test_rays_validation_would_notice():
    broken = deepcopy(CONFIG)
    broken["head_node_type"] = "nobody"
    with pytest.raises((ValueError, KeyError)):
        validate_config(prepare_config(broken))


def test_workers_autoscale_have_gpus_and_can_be_spot():
    types = CONFIG["available_node_types"]
    assert types["gpu_worker"]["min_workers"] == 0 < types["gpu_worker"]["max_workers"]
    assert types["gpu_spot_worker"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    for name in ("gpu_worker", "gpu_spot_worker"):
        assert types[name]["node_config"]["InstanceType"].startswith("g6.")
    assert types["head"]["resources"]["CPU"] == 0


def test_it_holds_no_credentials_and_serves_nobody_outside():
    text = FILE.read_text().lower()
    assert "secret" not in text
    assert "access_key" not in text
    assert "--dashboard-host=127.0.0.1" in text
