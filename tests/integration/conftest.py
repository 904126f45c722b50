"""A real S3 server and a real Ray cluster of three nodes, one of each for the whole session."""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.storage import Storage
from tests.integration.s3_server import S3Server, free_ports
from tests.pipeline.stages import texts

ROOT = Path(__file__).parent.parent.parent

# A worker process takes five seconds of imports: one that ran a test's tasks waits for the next test's.
FEWER_STARTS = {
    "RAY_idle_worker_killing_time_threshold_ms": "600000",
    "RAY_USAGE_STATS_ENABLED": "0",
}


@pytest.fixture(scope="session")
def s3(tmp_path_factory):
    """The server; its credentials are in the environment, as a user's would be."""
    server = S3Server(tmp_path_factory.mktemp("s3"))
    before = dict(os.environ)
    os.environ.update(server.environment)
    yield server
    os.environ.clear()
    os.environ.update(before)
    server.stop()


@pytest.fixture(scope="session")
def ray_cluster(s3):
    """Three nodes of two CPUs; the S3 server comes first, so that its environment reaches Ray's workers."""
    import ray
    from ray.cluster_utils import Cluster

    os.environ.update(FEWER_STARTS)
    # The dashboard is where jobs are submitted; it listens on loopback. Its agent's port is by default the same for
    # every Ray of a machine, and without the agent no job starts.
    ports = dict(zip(("dashboard_port", "dashboard_agent_listen_port"), free_ports(2), strict=True))
    dashboard = {"include_dashboard": True, "dashboard_host": "127.0.0.1", **ports}
    head = {"num_cpus": 2, "object_store_memory": 200 << 20, **dashboard}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        cluster.add_node(num_cpus=2, object_store_memory=200 << 20)
    ray.init(address=cluster.address, logging_level="warning")
    cluster.wait_for_nodes()
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def submit(cluster, submission: str, *arguments: str) -> subprocess.CompletedProcess:
    """`ray job submit` of jobs/score.py as in docs/nightly.md; one actor."""
    ray = str(Path(sys.executable).with_name("ray"))
    address = f"http://{cluster.head_node.webui_url}"
    run = [ray, "job", "submit", "--address", address, "--working-dir", ".", "--submission-id", submission, "--"]
    run += [sys.executable, "jobs/score.py", "--id-column", "id", "--num-actors", "1", "--threads-per-actor", "1"]
    return subprocess.run([*run, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="session")
def left_behind(tmp_path_factory):
    """Where the submitted job leaves its metrics and its lineage."""
    return tmp_path_factory.mktemp("left")


@pytest.fixture(scope="session")
def good_job(ray_cluster, s3, model_directory, left_behind):
    """Where a submitted job found its corpus, and how it ended: the working directory travels, the rest is in S3."""
    bucket = s3.bucket("job-submit")
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"id": range(30), "text": [None, *texts(29)]}), sink)
    Storage(f"{bucket}/in").write("a.parquet", sink.getvalue().to_pybytes())
    for path in model_directory.iterdir():
        Storage(f"{bucket}/model").write(path.name, path.read_bytes())
    places = ("--input", f"{bucket}/in", "--output", f"{bucket}/out", "--model", f"{bucket}/model")
    leaves = ("--metrics-file", str(left_behind / "trbert.prom"), "--openlineage", str(left_behind / "lineage.jsonl"))
    return bucket, submit(ray_cluster, "nightly-1", *places, *leaves)
