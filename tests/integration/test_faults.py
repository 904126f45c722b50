"""Runs that are stopped, doubled, starved or poisoned: a real S3 server, a real Ray; every row accounted for."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pyarrow as pa
import pytest
from s3fs import S3FileSystem

from pipeline import ScoreConfig, UsageError, open_output, score
from pipeline.errors import OutputBusyError, StorageError
from pipeline.job import make_job
from pipeline.lock import OutputLock
from pipeline.manifest import SUCCESS, read_manifest
from pipeline.ray_start import RayStart
from pipeline.run import RunContext, run_job
from pipeline.stopping import StopRequest
from pipeline.storage import Storage
from pipeline.stream import Patience
from pipeline.verify import VerifyConfig, verify
from tests.chaos.cluster import ACTOR
from tests.chaos.fault_proxy import FaultProxy
from tests.conftest import tiny_classifier
from tests.integration import poison
from tests.integration.conftest import ROOT
from tests.integration.s3_server import READER
from tests.integration.test_jobs import command
from tests.integration.test_score import accounted_rows, put_table, shard_table
from tests.pipeline.stages import texts, write_shard

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture
def places(s3, model_directory, request):
    """An input and an output in a bucket, and the model."""
    bucket = s3.bucket(f"faults-{abs(hash(request.node.nodeid)) % 10**8}")
    for name, rows in (("a.parquet", 60), ("b.parquet", 35)):
        put_table(f"{bucket}/in", name, shard_table(name, rows))
    return {"input": f"{bucket}/in", "output": f"{bucket}/out", "model": str(model_directory)}


def settings(places, **changes) -> ScoreConfig:
    quick = {"id_column": "id", "split_bytes": 600, "num_actors": 1, "threads_per_actor": 1, "progress_interval": 1.0}
    return ScoreConfig(**{**places, **quick, **changes})


ALL = {"a.parquet": list(range(60)), "b.parquet": list(range(35))}


# Documents that kill.


@pytest.mark.timeout(550)
def test_documents_that_kill_their_process_are_quarantined_and_everything_else_is_scored(
    tmp_path, model_directory, ray_cluster
):
    """A segmentation fault in the only actor, an abort in a tokenizer, an actor that stands still; one split each."""
    poisoned = {"a.parquet": poison.SEGFAULT, "b.parquet": poison.TOKENIZER, "c.parquet": poison.HANGS}
    for name, text in poisoned.items():
        documents = texts(20)
        documents[13] = text
        write_shard(tmp_path / "in" / name, {"id": [f"{name}:{i}" for i in range(20)], "text": documents})
    config = {"input": str(tmp_path / "in"), "output": str(tmp_path / "out"), "model": str(model_directory)}
    config |= {"id_column": "id", "num_actors": 1, "threads_per_actor": 1, "document_timeout": 15.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = ("-m", "tests.integration.poison", str(tmp_path / "config.json"))
    finished = command(*arguments, RAY_ADDRESS=ray_cluster.address)
    assert finished.returncode == 0, finished.stderr[-3000:]
    (report_file,) = [file for file in Storage(config["output"]).files("_runs") if file.path.endswith(".json")]
    report = json.loads(Storage(config["output"]).read(report_file.path))
    assert report["bad_rows"] == {"killed_process": 3}
    # Three and two more for each, two for what hangs; fewer where a restart took as long as the document timeout.
    assert report["faults"]["process_deaths"] >= 6
    assert report["faults"]["hung_processes"] >= 2
    assert not Storage(config["output"]).files("_deaths.json")
    assert accounted_rows(config["output"]) == {name: list(range(20)) for name in poisoned}
    quarantined = open_output(config["output"], quarantine=True).to_table().to_pylist()
    assert sorted((row["id"], row["reason"]) for row in quarantined) == [
        (f"{name}:13", "killed_process") for name in poisoned
    ]
    assert {row["detail"].split(" it ")[0] for row in quarantined} == {"scoring", "tokenising"}
    assert verify(VerifyConfig(output=config["output"])).holds


# Runs that stop.


def start(places: dict, log, *arguments: str, **environment: str) -> subprocess.Popen:
    """`jobs/score.py`, with a grace of a second."""
    words = [word for name, value in places.items() for word in (f"--{name}", value)]
    run = [sys.executable, "jobs/score.py", *words, "--stop-grace", "1", *arguments]
    with log.open("w") as file:
        return subprocess.Popen(run, cwd=ROOT, env={**os.environ, **environment}, stdout=file, stderr=file)


def wait_until(condition, driver: subprocess.Popen, log, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert driver.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.05)


def listens_to(number: int, pid: int) -> bool:
    """Whether a process has set a handler for a signal."""
    caught = re.search(r"^SigCgt:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) >> (number - 1) & 1)


@contextlib.contextmanager
def scoring_suspended() -> Iterator[None]:
    """The actors of this session's cluster stand still meanwhile, so that the run under test cannot be over before."""
    mine = psutil.Process().children(recursive=True)
    actors = [process for process in mine if any(ACTOR in word for word in process.cmdline())]
    assert actors
    for actor in actors:
        actor.suspend()
    try:
        yield
    finally:
        for actor in actors:
            actor.resume()


def hold_elsewhere(output: Storage) -> None:
    """A lease of a run on a machine that cannot be seen."""
    lease = {"epoch": 1, "run": "theirs", "host": "elsewhere", "pid": 1, "released": False}
    output.write("_leases/00000001.json", json.dumps(lease).encode())


@pytest.mark.parametrize(
    ("during", "number"),
    [
        *[(during, signal.SIGTERM) for during in ("imports", "lock", "resources", "ray")],
        *[("resources", number) for number in (signal.SIGHUP, signal.SIGINT)],
    ],
)
def test_every_wait_ends_with_the_grace(places, ray_cluster, tmp_path, during, number):
    output, log = Storage(places["output"]), tmp_path / "log"
    if during == "lock":
        hold_elsewhere(output)
    many = ("--num-actors", "64", "--threads-per-actor", "1", "--wait-for-resources", "600")
    environment = {} if during == "ray" else {"RAY_ADDRESS": ray_cluster.address}
    driver = start(places, log, *(many if during == "resources" else ()), **environment)
    try:
        if during == "imports":
            wait_until(lambda: listens_to(number, driver.pid), driver, log)
        elif during == "lock":
            wait_until(lambda: "waiting up to" in log.read_text(), driver, log)
        else:
            wait_until(lambda: output.files("_leases"), driver, log)
            time.sleep(3.0 if during == "resources" else 1.5)
        sent = time.monotonic()
        driver.send_signal(number)
        assert driver.wait(60) == 4, log.read_text()[-3000:]
        assert time.monotonic() - sent < 25
    finally:
        driver.kill()
    text = log.read_text()
    assert "incomplete: stopped (" in text, text
    assert "Traceback" not in text
    leases = [json.loads(output.read(file.path)) for file in output.files("_leases")]
    assert all(lease["released"] or lease["run"] == "theirs" for lease in leases), "it leaves no lock behind"


def test_a_stop_does_not_wait_for_a_store_that_refuses(places, s3, ray_cluster, tmp_path):
    """Its requests are answered with 503 for good, and made again for three minutes."""
    proxy, log = FaultProxy(s3.endpoint), tmp_path / "log"
    proxy.hit(1.0, ["slow_down"])
    driver = start(places, log, RAY_ADDRESS=ray_cluster.address, AWS_ENDPOINT_URL=proxy.endpoint)
    try:
        wait_until(lambda: "trying again for 180 s" in log.read_text(), driver, log)
        sent = time.monotonic()
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(60) == 4, log.read_text()[-3000:]
        assert time.monotonic() - sent < 25
    finally:
        driver.kill()
        proxy.stop()
    assert "incomplete: stopped (SIGTERM)" in log.read_text()


def test_a_run_stops_on_sigterm_lets_no_other_in_and_is_finished_by_the_next(tmp_path, model_directory, ray_cluster):
    """While it is at work another run is refused; SIGTERM ends it with 4; the next run does the rest."""
    rows = 600
    columns = {"id": list(range(rows)), "text": [" ".join(text for text in texts(40, start=i)) for i in range(rows)]}
    write_shard(tmp_path / "in/a.parquet", columns, row_group_size=25)
    output = Storage(str(tmp_path / "out"))
    places = {"input": str(tmp_path / "in"), "output": output.uri, "model": str(model_directory)}
    arguments = [word for name, value in places.items() for word in (f"--{name}", value)]
    arguments += ["--split-bytes", "15000", "--num-actors", "1", "--threads-per-actor", "1"]
    environment = {**os.environ, "RAY_ADDRESS": ray_cluster.address}
    run = [sys.executable, "jobs/score.py", *arguments]
    with (tmp_path / "log").open("w") as log:
        first = subprocess.Popen(run, cwd=ROOT, env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while len([file for file in output.files() if file.path.endswith(".parquet")]) < 3:
            assert first.poll() is None, (tmp_path / "log").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        with scoring_suspended():
            with pytest.raises(OutputBusyError, match=r"is at work there \(process") as refused:
                score(settings(places, id_column=None, split_bytes=15000))
            assert refused.value.exit_code == 5
            first.send_signal(signal.SIGTERM)
        assert first.wait(60) == 4, (tmp_path / "log").read_text()[-3000:]
    finally:
        first.kill()
    log_text = (tmp_path / "log").read_text()
    assert "stopping (SIGTERM): splits under way have 15 s to finish" in log_text
    assert "incomplete: stopped (SIGTERM); run again to finish" in log_text
    assert read_manifest(output) is None
    committed = len([file for file in output.files() if file.path.endswith(".parquet")])
    assert not [file for file in output.files() if file.path.startswith("_lock")]

    report = score(settings(places, id_column=None, split_bytes=15000))
    assert (report["status"], report["splits"]["found_committed"]) == ("complete", committed)
    assert accounted_rows(output.uri) == {"a.parquet": list(range(rows))}


def test_a_run_stops_by_itself_and_says_so(places):
    report = score(settings(places, stop_after="0.01s", stop_grace=0.0))
    assert (report["exit_code"], report["stopped"]) == (4, "0.01s are over")
    assert report["status"] == "incomplete: stopped (0.01s are over); run again to finish"
    assert read_manifest(Storage(places["output"])) is None


def impatient() -> StopRequest:
    return StopRequest(grace=0.0, last_words=1.0)


def test_a_run_whose_actors_cannot_load_the_model_ends_and_says_why(places, model_directory, tmp_path):
    """It lies on the driver's machine only, say: nothing ever comes, and the run does not wait for it."""
    model = shutil.copytree(model_directory, tmp_path / "model")
    job = make_job(settings(places, model=str(model)))
    shutil.rmtree(model)
    report = run_job(job, RunContext(stop=impatient(), patience=Patience(loads_an_actor=2)), RayStart())
    assert report["exit_code"] == 1
    reason = (
        rf"failed: no actor can load the model \(on .*: UsageError: {model}: not a model directory: .*\); run again"
    )
    assert re.match(reason, report["status"])
    assert report["documents"] == 0
    assert score(settings(places))["status"] == "complete"
    assert accounted_rows(places["output"]) == ALL


def test_a_run_takes_no_results_from_a_model_that_has_replaced_its_own(places, model_directory, tmp_path):
    """An output is one model's, also when an actor starts after the model's files were exchanged."""
    model = shutil.copytree(model_directory, tmp_path / "model")
    job = make_job(settings(places, model=str(model)))
    tiny_classifier(1).save_pretrained(model)
    report = run_job(job, RunContext(stop=impatient()), RayStart())
    assert (report["exit_code"], report["documents"]) == (1, 0)
    reason = (
        rf"failed: the model changed during the run \(on .*: ModelChangedError: {model}: "
        "the run began with another model"
    )
    assert re.match(reason, report["status"])
    assert not [file for file in Storage(places["output"]).files() if file.path.endswith(".parquet")]


# Inputs that change.


def test_success_is_there_only_while_the_output_is_complete(places, s3):
    """Unreadable shards are named, and the others go on; put right, it is complete; then a shard goes away."""
    inputs, output = Storage(places["input"]), Storage(places["output"])
    inputs.write("broken.parquet", b"PAR1 no")
    inputs.write("empty.parquet", b"")
    put_table(places["input"], "c.parquet", pa.table({"body": ["x"]}))
    report = score(settings(places))
    assert report["exit_code"] == 3
    assert sorted(report["shards"]["unreadable"]) == ["broken.parquet", "c.parquet", "empty.parquet"]
    assert "no column 'text', 'id'" in report["shards"]["unreadable"]["c.parquet"]
    assert accounted_rows(places["output"]) == ALL
    assert read_manifest(output) is None
    assert not verify(VerifyConfig(output=output.uri)).holds
    put_table(places["input"], "c.parquet", shard_table("c.parquet", 5))
    inputs.delete(["broken.parquet", "empty.parquet"])
    assert score(settings(places))["status"] == "complete"
    manifest = read_manifest(output)
    assert (manifest["rows"], manifest["removed"]) == (100, [])
    assert verify(VerifyConfig(output=output.uri)).holds
    before = s3.client.head_object(Bucket=output.root.split("/")[0], Key=f"out/{SUCCESS}")["LastModified"]
    assert score(settings(places))["status"] == "complete already: nothing to do"
    after = s3.client.head_object(Bucket=output.root.split("/")[0], Key=f"out/{SUCCESS}")["LastModified"]
    assert after == before

    # A shard that is removed is reported, and deleted on request.
    everything = {**ALL, "c.parquet": list(range(5))}
    inputs.delete(["b.parquet"])
    report = score(settings(places))
    assert (report["exit_code"], report["shards"]["removed"]) == (0, ["b.parquet"])
    assert read_manifest(output)["removed"] == ["b.parquet"]
    assert accounted_rows(places["output"]) == everything, "its results stay"
    assert verify(VerifyConfig(output=places["output"])).problems == [
        "extra: b.parquet: no longer in the input, 35 rows (--delete-removed)"
    ]
    score(settings(places, delete_removed=True))
    del everything["b.parquet"]
    assert accounted_rows(places["output"]) == everything
    assert verify(VerifyConfig(output=places["output"])).holds
    assert read_manifest(output)["removed"] == []


# Storage that refuses.


@pytest.fixture
def become(monkeypatch):
    """Changes this process's credentials."""

    def become(**credentials: str) -> None:
        for name, value in credentials.items():
            monkeypatch.setenv(name, value)
        S3FileSystem.clear_instance_cache()  # it keeps a client with its credentials for as long as the process lives

    yield become
    S3FileSystem.clear_instance_cache()


def test_storage_that_refuses_and_another_run_are_named_before_anything_starts(places, become, monkeypatch):
    nowhere = "s3://no-such-bucket"
    for changes, error, message in [
        ({"input": f"{nowhere}/in"}, StorageError, f"{nowhere}/in: cannot list: there is no such bucket"),
        ({"output": f"{nowhere}/out"}, StorageError, f"{nowhere}/out/_output.json: cannot list: there is no such"),
        ({"input": f"{places['input']}/nothing"}, UsageError, "no Parquet files there"),
    ]:
        with pytest.raises(error, match=message):
            score(settings(places, **changes))
    lock = OutputLock(Storage(places["output"]), "theirs", renewal_seconds=1.0)
    with lock, pytest.raises(OutputBusyError, match="run theirs is at work"):
        score(settings(places))
    become(**READER)
    with pytest.raises(StorageError, match=r"_leases/.*: cannot write: .*AccessDenied"):
        score(settings(places))
    become(AWS_SECRET_ACCESS_KEY="not-the-right-one")
    with pytest.raises(StorageError, match=r"cannot list: .*SignatureDoesNotMatch"):
        score(settings(places))
