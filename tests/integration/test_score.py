"""Whole runs: a real S3 server, a real Ray cluster of three nodes, the tiny model, every row accounted for."""

import contextlib
import html
import json
import re
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import ray
from s3fs import S3FileSystem

from pipeline import ScoreConfig, UsageError, open_output, score
from pipeline.errors import StorageError
from pipeline.storage import Storage
from tests.pipeline.stages import texts
from trbert_model.engine import Engine, EngineOptions
from trbert_model.tasks.classification.labellings import softmax

pytestmark = pytest.mark.usefixtures("ray_cluster")

ROWS = {"a.parquet": 60, "sub dir/b #1%.parquet": 35, "é.parquet": 1}


def shard_table(name: str, rows: int, version: str = "") -> pa.Table:
    documents = [None if i % 20 == 7 else text + version for i, text in enumerate(texts(rows, start=len(name)))]
    return pa.table({"id": [f"{name}:{i}" for i in range(rows)], "text": documents, "source": ["test"] * rows})


def put_table(uri: str, name: str, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=16)
    Storage(uri).write(name, sink.getvalue().to_pybytes())


@pytest.fixture(scope="session")
def model_uri(s3, model_directory):
    """The tiny model in a bucket."""
    uri = s3.bucket("models")
    for path in model_directory.iterdir():
        Storage(f"{uri}/tiny").write(path.name, path.read_bytes())
    return f"{uri}/tiny"


def config(corpus, model_uri, **changes):
    settings = {
        "input": f"{corpus}/in",
        "output": f"{corpus}/out",
        "model": model_uri,
        "id_column": "id",
        "keep_columns": ("source",),
        "probabilities": True,
        "split_bytes": 600,
        "num_actors": 1,
        "threads_per_actor": 1,
        "progress_interval": 1.0,
    }
    return ScoreConfig(**settings | changes)


def put_corpus(uri: str) -> str:
    """A corpus of three shards below `uri`/in, and things among them that are no shards."""
    for name, rows in ROWS.items():
        put_table(f"{uri}/in", name, shard_table(name, rows))
    for name in ("_SUCCESS", ".hidden.parquet", "notes.txt"):
        Storage(f"{uri}/in").write(name, b"")
    return uri


@pytest.fixture
def corpus(s3, request):
    """A bucket with a corpus."""
    return put_corpus(s3.bucket(f"corpus-{abs(hash(request.node.nodeid)) % 10**8}"))


@pytest.fixture(scope="module")
def first_run(s3, model_uri):
    """A bucket with a corpus that several tests share, and the report of the run that scored it."""
    uri = put_corpus(s3.bucket("finished"))
    return uri, score(config(uri, model_uri, num_actors=2))


@pytest.fixture
def finished(first_run, model_uri):
    """A bucket with a corpus and its complete output, whatever the test before did to that."""
    uri, _ = first_run
    assert score(config(uri, model_uri))["exit_code"] == 0
    return uri


def accounted_rows(output: str) -> dict[str, list[int]]:
    """Every (shard, row) among results and quarantine, as often as it is there."""
    rows: dict[str, list[int]] = {}
    for quarantine in (False, True):
        for row in open_output(output, quarantine=quarantine).to_table(columns=["shard", "row"]).to_pylist():
            rows.setdefault(row["shard"], []).append(row["row"])
    return {shard: sorted(numbers) for shard, numbers in rows.items()}


def test_a_corpus_in_s3_is_scored_row_by_row(finished, first_run, model_directory):
    corpus, report = first_run
    assert (report["status"], report["exit_code"]) == ("complete", 0)
    assert accounted_rows(f"{corpus}/out") == {name: list(range(rows)) for name, rows in ROWS.items()}

    # The results are those of the engine, document by document, and carry what was passed through.
    results = open_output(f"{corpus}/out").to_table().to_pandas().set_index("id")
    engine = Engine.from_pretrained(model_directory, EngineOptions(device="cpu"))
    inputs = pd.concat([shard_table(name, rows).to_pandas() for name, rows in ROWS.items()]).dropna()
    expected = engine.score_columns(inputs["text"])
    results = results.loc[inputs["id"]]
    np.testing.assert_allclose(np.stack(results["probabilities"]), softmax(expected.outputs), atol=1e-4)
    assert results["kept_tokens"].map(list).tolist() == expected.kept_tokens.tolist()
    assert results["num_tokens"].tolist() == expected.num_tokens.tolist()
    assert set(results["source"]) == {"test"}

    # The report adds up to what is there.
    bad = sum(1 for name, rows in ROWS.items() for i in range(rows) if i % 20 == 7)
    assert report["documents"] == len(results) == sum(ROWS.values()) - bad
    assert report["bad_rows"] == {"null": bad}
    assert report["tokens"] == int(expected.num_tokens.sum())
    assert report["flops"]["spent"] == pytest.approx(expected.flops.sum())
    assert report["kept_fractions"] == pytest.approx(list(expected.kept_tokens.sum(0) / expected.num_tokens.sum()))
    assert sum(report["labels"].values()) == report["documents"]
    assert report["splits"]["committed"] > 5
    stored = json.loads(Storage(f"{corpus}/out").read(f"_runs/{report['run']}.json"))
    assert stored == report
    assert "test-secret-key" not in json.dumps(stored)


def data_keys(s3, bucket: str) -> list[str]:
    """What lies there beside the number of the last run's lease."""
    return [key for key in s3.keys(bucket) if "/_leases/" not in key]


def test_running_again_computes_nothing(finished, model_uri, s3, capfd):
    bucket = finished.removeprefix("s3://")
    before = {key: s3.client.head_object(Bucket=bucket, Key=key)["LastModified"] for key in data_keys(s3, bucket)}
    report = score(config(finished, model_uri))
    assert (report["status"], report["documents"]) == ("complete already: nothing to do", 0)
    assert "3 of 3 shards are complete" in capfd.readouterr().err
    after = {key: s3.client.head_object(Bucket=bucket, Key=key)["LastModified"] for key in data_keys(s3, bucket)}
    assert {key: after[key] for key in before} == before
    new = [key for key in after if key not in before]
    assert new == [f"out/_runs/{report['run']}.{kind}" for kind in ("html", "json")]


def test_a_page_shows_each_run_and_none_is_needed(finished, first_run, model_uri, monkeypatch, caplog):
    _, report = first_run
    output = Storage(f"{finished}/out")
    page = output.read(report["page"]).decode()
    assert f"Run {report['run']}: complete" in page
    samples = json.loads(output.read(f"_samples/{report['run']}.json"))
    assert len(samples) == 10
    visible = html.unescape(re.sub(r"<[^>]*>", "", page))
    assert all(sample["explanation"]["texts"][0]["text"] in visible for sample in samples)
    assert report["rejected_rows"]["null"][0]["object"] in page
    assert sum(report["timeline"]["documents"]) == pytest.approx(report["documents"], abs=5)
    monkeypatch.setitem(sys.modules, "pygal", None)  # as if it were not installed
    again = score(config(finished, model_uri))
    assert (again["exit_code"], again["page"]) == (0, None)
    assert json.loads(output.read(f"_runs/{again['run']}.json"))["documents"] == 0
    assert output.read_if_there(f"_runs/{again['run']}.html") is None
    assert "the run's page is not in the output" in caplog.text


def test_a_rerun_finishes_what_is_missing(finished, model_uri):
    """Splits' objects without a marker, as a killed run leaves them, some of a shard and all of another: only what is
    missing is computed."""
    whole = open_output(f"{finished}/out").to_table().sort_by([("shard", "ascending"), ("row", "ascending")])
    output = Storage(f"{finished}/out")
    some, every = (file.path for file in output.files("_shards")[:2])
    before = json.loads(output.read(every))
    lost = [split["object"] for split in json.loads(output.read(some))["splits"][1:]]
    output.delete([some, every, *lost])
    second = score(config(finished, model_uri))
    assert second["splits"]["committed"] == len(lost)
    assert second["splits"]["found_committed"] == 1 + len(before["splits"])
    assert second["shards"]["completed"] == 2
    assert 0 < second["documents"] < whole.num_rows
    after = json.loads(output.read(every))
    assert (after["splits"], after["rows"]) == (before["splits"], before["rows"])
    again = open_output(f"{finished}/out").to_table().sort_by([("shard", "ascending"), ("row", "ascending")])
    assert again.drop_columns(["score", "probabilities"]) == whole.drop_columns(["score", "probabilities"])


@contextlib.contextmanager
def _reading(output: str, shard: str) -> Iterator[list[tuple[int, ...]]]:
    """A reader by markers that looks all the time at a shard's rows, and once more in the end."""
    seen: list[tuple[int, ...]] = []
    over = threading.Event()

    def look() -> None:
        try:
            table = open_output(output).to_table(columns=["shard", "row"])
        except (StorageError, FileNotFoundError):
            return  # it was opened by the old marker, and then the old objects went
        seen.append(tuple(sorted(table.filter(pc.equal(table["shard"], shard))["row"].to_pylist())))

    def look_on() -> None:
        while not over.wait(0.05):  # without a pause the run would hardly get the processor
            look()

    reader = threading.Thread(target=look_on)
    reader.start()
    try:
        yield seen
    finally:
        over.set()
        reader.join()
        look()


def test_what_changed_is_scored_again_and_replaces_the_old(corpus, model_uri):
    """A shard with other rows, of which readers see the old ones or the new ones; then other settings, which are
    refused by name unless all may be scored again."""
    score(config(corpus, model_uri))
    put_table(f"{corpus}/in", "a.parquet", shard_table("a.parquet", 44, version=" good"))
    with _reading(f"{corpus}/out", "a.parquet") as seen:
        report = score(config(corpus, model_uri))
    old, new = (tuple(row for row in range(rows) if row % 20 != 7) for rows in (60, 44))
    assert set(seen) == {old, new}
    assert seen == sorted(seen, key=lambda rows: rows == new), "and never the old ones again"
    assert report["shards"]["complete_before"] == 2
    assert report["shards"]["completed"] == 1
    assert accounted_rows(f"{corpus}/out") == {n: list(range(44 if n == "a.parquet" else r)) for n, r in ROWS.items()}
    # Nothing of the old version is left, also not for readers of the prefix.
    output = Storage(f"{corpus}/out")
    objects = [file.path for file in output.files() if "/" not in file.path and file.path.endswith(".parquet")]
    by_prefix = sum(pq.read_table(output.open(name)).num_rows for name in objects)
    assert by_prefix == open_output(f"{corpus}/out").count_rows()

    with pytest.raises(UsageError, match=r"overflow 'windows' where this run has 'truncate'"):
        score(config(corpus, model_uri, overflow="truncate"))
    report = score(config(corpus, model_uri, overflow="truncate", overwrite=True, max_bad_rows=1))
    assert (report["status"], report["exit_code"]) == ("complete, with more than 1 bad rows", 3)
    assert report["shards"]["completed"] == 3
    assert report["documents"] == report["windows"] == by_prefix
    assert accounted_rows(f"{corpus}/out") == {n: list(range(44 if n == "a.parquet" else r)) for n, r in ROWS.items()}


def test_a_shard_of_a_wider_type_is_named_and_scored_with_the_others_by_overwrite(s3, model_uri):
    corpus = s3.bucket("wider")

    def put(name: str, kind: pa.DataType) -> None:
        table = shard_table(name, 3)
        put_table(f"{corpus}/in", name, table.append_column("number", pa.array([1, None, 3], kind)))

    put("a.parquet", pa.int32())
    put("b.parquet", pa.int32())
    numbers = config(corpus, model_uri, keep_columns=("number",))
    assert score(numbers)["exit_code"] == 0
    put("b.parquet", pa.int64())
    plan = score(replace(numbers, dry_run=True))
    assert plan["column_types"] == {"id": "string", "number": "int32"}
    (conflict,) = plan["conflicts"]
    assert conflict["shard"] == "b.parquet"
    assert "column 'number' is int64, which is wider than int32" in conflict["error"]
    assert score(replace(numbers, dry_run=True, overwrite=True))["conflicts"] == []
    assert score(replace(numbers, overwrite=True))["exit_code"] == 0
    table = open_output(f"{corpus}/out").to_table().sort_by("id")
    assert (table["number"].type, table["number"].to_pylist()) == (pa.int64(), [1, None, 3] * 2)


def test_a_dry_run_tells_and_writes_nothing(corpus, finished, model_uri, s3):
    bucket = corpus.removeprefix("s3://")
    before = s3.keys(bucket)
    plan = score(config(corpus, model_uri, dry_run=True))
    assert [shard["shard"] for shard in plan["shards_to_score"]] == sorted(ROWS)
    assert plan["bytes_to_read"] > 0
    assert s3.keys(bucket) == before
    assert score(config(finished, model_uri, dry_run=True))["shards_complete"] == 3
    refused = score(config(finished, model_uri, dry_run=True, stride=3))
    assert refused["exit_code"] == 2
    assert refused["differences"] == ["stride None where this run has 3"]


def test_what_cannot_work_is_refused_before_anything_is_written(corpus, model_uri, s3):
    bucket = corpus.removeprefix("s3://")
    before = data_keys(s3, bucket)
    for changes, message in [
        ({"num_actors": 50}, "no room for 50 actors"),
        ({"gpus_per_actor": 1.0}, "no room for 1? ?.*GPUs"),
        ({"input": f"{corpus}/nothing"}, "no Parquet files there"),
        ({"model": f"{corpus}/in"}, r"no config\.json"),
        ({"output": f"{corpus}/in/scores"}, "inside each other"),
        ({"stride": 40}, "stride 40 must be less than the 30 tokens"),
    ]:
        with pytest.raises(UsageError, match=message):
            score(config(corpus, model_uri, **changes))
    assert data_keys(s3, bucket) == before


def test_one_dataset_to_pandas_duckdb_and_pyarrow(tmp_path, finished):
    output = str(tmp_path / "out")
    S3FileSystem().get(f"{finished}/out", output, recursive=True)
    expected = open_output(f"{finished}/out").count_rows()
    assert len(pd.read_parquet(output)) == expected
    assert duckdb.sql(f"select count(*) from read_parquet('{output}/*.parquet')").fetchall() == [(expected,)]
    assert pq.read_table(output).num_rows == expected


def test_the_stages_are_not_fused_and_a_split_is_a_block(corpus, model_uri):
    """Fused, reading would run inside the actors; merged, one task would hold many splits."""
    from pipeline.job import make_job
    from pipeline.placement import place_actors
    from pipeline.plan import make_plan
    from pipeline.ray_start import data_context
    from pipeline.report import RunStatistics
    from pipeline.stopping import StopRequest
    from pipeline.stream import COMMIT_CPUS, READER_CPUS, Stream

    job = make_job(config(corpus, model_uri, dtype="float32"))
    plan = make_plan(job.shards, job.output)
    placement = place_actors(job.config, spare_cpus=READER_CPUS + COMMIT_CPUS, stop=StopRequest())
    with data_context():
        dataset = Stream(job, placement, RunStatistics("run", plan, time.time())).dataset(plan.pending)
        blocks = [table.num_rows for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow")]
        stages = dataset.stats()
    assert set(blocks) == {1}
    assert len(blocks) > 5
    for stage in ("MapBatches(read_shards)", "MapBatches(SplitPredictor)", "MapBatches(publish_splits)"):
        assert f" {stage}: " in stages
    assert ray.data.DataContext.get_current().target_max_block_size != 1


def test_a_speed_is_chosen_from_the_models_table(corpus, model_directory, s3, tmp_path, capsys):
    """Refused without a table; with one the run says what it picked, keeps to it, and the output is bound to it."""
    from jobs.evaluate import main as evaluate

    model = f"{corpus}/model"
    for path in model_directory.iterdir():
        Storage(model).write(path.name, path.read_bytes())
    refusal = rf"speedup 1.5: {model} has no calibration table for float32 .* jobs/evaluate.py --model {model} "
    with pytest.raises(UsageError, match=refusal):
        score(config(corpus, model, speedup=1.5, dtype="float32"))
    assert not Storage(f"{corpus}/out").files()

    documents = shard_table("a.parquet", 60).to_pandas()["text"].dropna().tolist()
    engine = Engine.from_pretrained(model_directory, EngineOptions(device="cpu", reduce=False))
    labels = [engine.task.labels[i] for i in engine.score_columns(documents).outputs.argmax(1)]
    pq.write_table(pa.table({"text": documents, "label": labels}), tmp_path / "labelled.parquet")
    arguments = ["--model", model, "--corpus", str(tmp_path / "labelled.parquet"), "--speedups", "1.5"]
    assert evaluate([*arguments, "--dtype", "float32"]) == 0
    assert b"flops_speedup" in Storage(model).read("calibration.json")

    report = score(config(corpus, model, speedup=1.2))
    expected = report["expectation"]
    assert expected["asked"] == "speedup 1.2"
    assert report["options"]["thresholds"] == expected["thresholds"]
    assert report["flops"]["speedup"] == pytest.approx(expected["flops_speedup"], rel=0.15)
    assert "speedup 1.2: thresholds" in capsys.readouterr().err
    again = score(config(corpus, model, speedup=1.2))
    assert again["status"] == "complete already: nothing to do"
    with pytest.raises(UsageError, match=r"thresholds .* where this run has None"):
        score(config(corpus, model))
