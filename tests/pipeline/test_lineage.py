"""Lineage events: what they say, where they go, and that a run never fails for them."""

import json
import logging
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from uuid import UUID

import pytest

from pipeline import ScoreConfig, UsageError, score
from pipeline.errors import OutputBusyError, PipelineError, StoppedError
from pipeline.lineage import Lineage, dataset_name
from pipeline.plan import Plan
from pipeline.report import RunStatistics, SplitStats

STARTED = 1_795_000_000.5
SOURCE, OUTPUT = "s3://bucket/corpus/*.parquet", "s3://bucket/scores/"


def report(exit_code: int) -> dict:
    statistics = RunStatistics("run", Plan(), STARTED)
    statistics.total = SplitStats(documents=29, text_bytes=1000, result_bytes=300, bad_rows={"null": 2, "empty": 1})
    statistics.splits = 2
    return statistics.report(status="a status", exit_code=exit_code, settings={})


def events(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_two_events_tell_what_was_read_what_was_written_and_how_much(tmp_path):
    path = tmp_path / "events.jsonl"
    lineage = Lineage(str(path))
    lineage.start("run-1", STARTED, SOURCE, OUTPUT)
    lineage.end(report(0))
    start, complete = events(path)
    assert (start["eventType"], complete["eventType"]) == ("START", "COMPLETE")
    assert start["eventTime"] <= complete["eventTime"]
    assert start["run"]["runId"] == complete["run"]["runId"] == str(UUID(start["run"]["runId"]))
    assert start["job"] == complete["job"]
    assert (start["job"]["namespace"], start["job"]["name"]) == ("trbert", "score s3://bucket/scores")
    for event in (start, complete):
        assert event["schemaURL"].startswith("https://openlineage.io/spec/2-")
        assert event["producer"]
        assert [(each["namespace"], each["name"]) for each in event["inputs"]] == [("s3://bucket", "corpus/*.parquet")]
        assert [(each["namespace"], each["name"]) for each in event["outputs"]] == [("s3://bucket", "scores")]
        assert ("run", "run-1") in [(tag["key"], tag["value"]) for tag in event["run"]["facets"]["tags"]["tags"]]
        assert "errorMessage" not in event["run"]["facets"]
    written = complete["outputs"][0]["outputFacets"]["outputStatistics"]
    assert (written["rowCount"], written["size"], written["fileCount"]) == (29, 300, 2)
    read = complete["inputs"][0]["inputFacets"]["inputStatistics"]
    assert (read["rowCount"], read["size"]) == (32, 1000)


def test_events_of_one_run_have_one_id_and_those_of_others_others(tmp_path):
    path = tmp_path / "events.jsonl"
    for run_id, started in (("a", STARTED), ("a", STARTED), ("b", STARTED), ("a", STARTED + 1)):
        Lineage(str(path)).start(run_id, started, SOURCE, OUTPUT)
    ids = [event["run"]["runId"] for event in events(path)]
    assert ids[0] == ids[1]
    assert len(set(ids)) == 3


@pytest.mark.parametrize(
    ("exit_code", "error", "state", "message"),
    [
        (0, None, "COMPLETE", None),
        (3, None, "COMPLETE", None),
        (1, None, "FAIL", "a status"),
        (4, None, "ABORT", "a status"),
        (None, PipelineError("Ray ended the run"), "FAIL", "Ray ended the run"),
        (None, OutputBusyError("taken over"), "FAIL", "taken over"),
        (None, StoppedError("stopped"), "ABORT", "stopped"),
        (None, KeyboardInterrupt(), "ABORT", "KeyboardInterrupt"),
        (None, RuntimeError("with a password: hunter2"), "FAIL", "RuntimeError"),
    ],
)
def test_the_last_event_says_how_the_run_ended(tmp_path, exit_code, error, state, message):
    path = tmp_path / "events.jsonl"
    lineage = Lineage(str(path))
    lineage.start("run-1", STARTED, SOURCE, OUTPUT)
    lineage.end(None if exit_code is None else report(exit_code), error)
    event = events(path)[-1]
    assert event["eventType"] == state
    assert event["run"]["facets"].get("errorMessage", {}).get("message") == message


def test_a_run_that_never_started_has_no_events(tmp_path, model_directory):
    path = tmp_path / "events.jsonl"
    with pytest.raises(UsageError):
        score(
            ScoreConfig(
                input=str(tmp_path / "nothing"),
                output=str(tmp_path / "out"),
                model=str(model_directory),
                openlineage=str(path),
            )
        )
    assert not path.exists()


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("s3://bucket/a/b", ("s3://bucket", "a/b")),
        ("s3a://bucket/a/b/", ("s3://bucket", "a/b")),
        ("s3://bucket", ("s3://bucket", "/")),
        ("gs://bucket/a", ("gs://bucket", "a")),
        ("gcs://bucket/a", ("gs://bucket", "a")),
        (
            "abfss://box@account.dfs.core.windows.net/a",
            ("abfss://box@account.dfs.core.windows.net", "a"),
        ),
        ("hdfs://node:8020/a", ("hdfs://node:8020", "/a")),
        ("/data/a/", ("file", "/data/a")),
        ("file:///data/a", ("file", "/data/a")),
    ],
)
def test_names_follow_the_naming_specification(uri, name):
    assert dataset_name(uri) == name


class Server(ThreadingHTTPServer):
    """Takes events, or refuses them with its `status`."""

    def __init__(self, status: int = 201):
        self.events: list[tuple[str, str | None, dict]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(handler):  # noqa: N805 - the library's name
                body = handler.rfile.read(int(handler.headers["Content-Length"]))
                self.events.append((handler.path, handler.headers["Authorization"], json.loads(body)))
                handler.send_response(status)
                handler.send_header("Content-Length", "0")
                handler.end_headers()

            def log_message(handler, *_arguments):  # noqa: N805
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> "Server":
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.shutdown()
        self.server_close()


def test_a_server_gets_the_events_and_the_key(monkeypatch, caplog):
    monkeypatch.setenv("OPENLINEAGE_API_KEY", "a-secret-key")
    with Server() as server, caplog.at_level(logging.WARNING):
        lineage = Lineage(server.url)
        lineage.start("run-1", STARTED, SOURCE, OUTPUT)
        lineage.end(report(0))
    assert [(path, event["eventType"]) for path, _, event in server.events] == [
        ("/api/v1/lineage", "START"),
        ("/api/v1/lineage", "COMPLETE"),
    ]
    assert {key for _, key, _ in server.events} == {"Bearer a-secret-key"}
    assert "a-secret-key" not in json.dumps([event for *_, event in server.events])
    assert caplog.text == ""


@pytest.mark.parametrize("status", [400, None])
def test_a_server_that_refuses_or_is_down_is_worth_one_line(caplog, status):
    with Server(status or 201) as server:
        if status is None:
            server.shutdown()
            server.server_close()
        with caplog.at_level(logging.WARNING):
            lineage = Lineage(server.url.replace("//", "//user:hunter2@"))
            lineage.start("run-1", STARTED, SOURCE, OUTPUT)
            lineage.end(report(0))
    (record,) = caplog.records
    assert record.getMessage().startswith("127.0.0.1 takes no lineage events: ")
    assert "hunter2" not in caplog.text


def test_a_file_that_cannot_be_written_is_worth_one_line(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        lineage = Lineage(str(tmp_path / "no/folder/events.jsonl"))
        lineage.start("run-1", STARTED, SOURCE, OUTPUT)
        lineage.end(report(0))
    assert len(caplog.records) == 1


def test_without_the_client_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "openlineage.client", None)
    with pytest.raises(UsageError, match=r"pip install 'trbert-pipeline\[lineage\]'"):
        Lineage("http://localhost:5000")
    Lineage(None).end(None)


def test_only_servers_and_local_files_take_events():
    with pytest.raises(UsageError, match="must be the http"):
        Lineage("s3://bucket/events")
