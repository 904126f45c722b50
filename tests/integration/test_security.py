"""What nobody may find: credentials in anything that is written, and an open port on another address than loopback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from ray.util import state

from pipeline import ScoreConfig, score
from pipeline.storage import Storage
from tests.integration.conftest import ROOT, submit
from tests.integration.s3_server import ACCESS_KEY, SECRET_KEY


def test_secrets_reach_no_log_report_marker_exception_or_dump(good_job, ray_cluster, s3, model_directory, left_behind):
    """Runs that worked, that ended in a storage error, whose shards are broken; then everything they wrote."""
    bucket, good = good_job
    places = ("--input", f"{bucket}/in", "--model", str(model_directory))
    failing = submit(ray_cluster, "failing", *places, "--output", "s3://no-such-bucket/out")
    Storage(f"{bucket}/broken").write("broken.parquet", b"PAR1")
    report = score(ScoreConfig(input=f"{bucket}/broken", output=f"{bucket}/nothing", model=str(model_directory)))
    assert "29 scored" in good.stdout
    assert report["status"] == "complete but for unreadable shards"
    assert "cannot list: there is no such bucket" in failing.stdout + failing.stderr
    written = {"jobs": "".join(job.stdout + job.stderr for job in (good, failing)).encode()}
    with pytest.raises(Exception, match="no such bucket") as raised:
        score(ScoreConfig(input=f"{bucket}/in", output="s3://no-such-bucket/out", model=str(model_directory)))
    causes = [raised.value, raised.value.__cause__]
    written["exceptions"] = repr([(each, vars(each)) for each in causes]).encode()

    for key in s3.keys(bucket.removeprefix("s3://")):
        written[key] = s3.client.get_object(Bucket=bucket.removeprefix("s3://"), Key=key)["Body"].read()
    for path in Path(ray_cluster.head_node.get_session_dir_path()).rglob("*"):
        if path.is_file() and "runtime_resources" not in path.parts:  # the uploaded working directory: our own source
            written[str(path)] = path.read_bytes()
    for path in left_behind.iterdir():
        written[str(path)] = path.read_bytes()
    dashboard = f"http://{ray_cluster.head_node.webui_url}"
    for what in (state.list_jobs, state.list_actors, state.list_tasks, state.list_runtime_envs, state.list_workers):
        found = what(address=dashboard, detail=True, limit=10_000, raise_on_missing_output=False)
        written[what.__name__] = "\n".join(map(repr, found)).encode()

    assert len(written) > 50
    assert any("_shards/" in name for name in written)
    assert any("_runs/" in name for name in written)
    assert any(name.endswith(".prom") for name in written)
    leaks = [name for name, data in written.items() for secret in (SECRET_KEY, ACCESS_KEY) if secret.encode() in data]
    assert not leaks


def test_what_we_start_listens_on_loopback(s3):
    """The Ray of a job without RAY_ADDRESS, and the tests' S3 server."""
    script = """
import json, psutil, ray
from pipeline.ray_start import RayStart
with RayStart() as ray_start:
    ray_start.wait()
    ray.get(ray.remote(lambda: 1).remote())
    mine = [psutil.Process(), *psutil.Process().children(recursive=True)]
    print(json.dumps([c.laddr.ip for p in mine for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN]))
"""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    started = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert started.returncode == 0, started.stderr[-3000:]
    addresses = json.loads(started.stdout.splitlines()[-1])
    server = psutil.Process(s3.process.pid).net_connections("inet")
    addresses += [connection.laddr.ip for connection in server if connection.status == psutil.CONN_LISTEN]
    assert len(addresses) > 8
    assert set(addresses) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
