"""A real S3 server and a real Ray cluster of three nodes, one of each for the whole session."""

import os

import pytest

from tests.integration.s3_server import S3Server, free_ports


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
