"""What a run's options are resolved to, what is refused before there is a cluster, and what an output is bound to."""

import json
import shutil
from dataclasses import replace

import pytest

from pipeline import run
from pipeline.commit import bind_output, identity_key
from pipeline.config import ScoreConfig, identity_defaults
from pipeline.errors import UsageError
from pipeline.job import make_job
from pipeline.ray_start import RayStart
from pipeline.storage import Storage
from tests.pipeline.stages import texts, write_shard
from trbert_model.calibration.table import Calibration, OperatingPoint, calibration_key, with_table
from trbert_model.checkpoints.files import model_digest


@pytest.fixture
def places(tmp_path, model_directory):
    write_shard(tmp_path / "in/a.parquet", {"text": texts(3)})
    shutil.copytree(model_directory, tmp_path / "model")
    return {name: str(tmp_path / place) for name, place in {"input": "in", "output": "out", "model": "model"}.items()}


def write_table(places, dtype: str) -> None:
    """A calibration table with one speed of 3x, at thresholds of 0.4."""
    spread = ((0.2, 0.5), (0.1, 0.3))
    point = OperatingPoint((0.4, 0.4), (0.3, 0.2), spread, 3.0, 3.0, 89.0, (80, 95), 1.0, (-1, 3))
    key = calibration_key(model_digest(places["model"]), dtype, 32)
    table = Calibration(key, "dev.parquet", 1000, "accuracy", 90.0, point, (point,))
    Storage(places["model"]).write("calibration.json", with_table(places["model"], table))


def bind(job) -> None:
    job.output.write("_output.json", json.dumps(job.identity).encode())


@pytest.fixture
def no_ray(monkeypatch):
    monkeypatch.setattr(RayStart, "begin", lambda self: None)
    monkeypatch.setattr(RayStart, "wait", lambda self: pytest.fail("Ray is needed"))


@pytest.mark.parametrize("gpus", [None, 0.0, 1.0])
def test_a_speed_without_any_table_is_refused_before_ray_starts(places, no_ray, gpus):
    dtype = "bfloat16" if gpus else "float32"
    with pytest.raises(UsageError, match=rf"speedup 3: .* has no calibration table for {dtype} and windows of 32 "):
        run.score(ScoreConfig(**places, speedup=3.0, gpus_per_actor=gpus))
    assert not Storage(places["output"]).files()


def test_a_dtype_that_the_cluster_decides_on_is_open_until_then(places):
    write_table(places, "bfloat16")
    job = make_job(ScoreConfig(**places, speedup=3.0))
    assert (job.config.dtype, job.config.thresholds, job.asked.dtype) == ("bfloat16", (0.4, 0.4), "auto")
    assert job.on("bfloat16") == job
    with pytest.raises(UsageError, match="no calibration table for float32"):
        job.on("float32")
    assert not make_job(ScoreConfig(**places, dtype="float16")).dtype_is_open


def test_a_dtype_that_is_not_the_outputs_is_refused_before_ray_starts(places, no_ray):
    bind(make_job(ScoreConfig(**places, dtype="bfloat16")))
    assert make_job(ScoreConfig(**places)).config.dtype == "bfloat16"
    with pytest.raises(UsageError, match="made with dtype 'bfloat16' where this run has 'float32'"):
        run.score(ScoreConfig(**places, dtype="float32"))


def test_splits_are_as_long_as_a_stop_may_take_and_stay_so(places):
    """Eight times the FLOPs: an eighth of the text, down to a limit; on GPUs that does not matter."""
    job = make_job(ScoreConfig(**places))
    assert job.config.split_bytes is None
    sizes = [replace(job, token_flops=flops).divided("cpu").config.split_bytes for flops in (1e5, 2e7, 1.6e8, 1e10)]
    assert sizes == [8 << 20, 256 << 10, 32 << 10, 32 << 10]
    assert replace(job, token_flops=1e10).divided("cuda").config.split_bytes == 8 << 20
    bind(replace(job, token_flops=2e7).divided("cpu"))
    for again in ({}, {"overwrite": True}):
        assert make_job(ScoreConfig(**places, **again)).divided("cuda").config.split_bytes == 256 << 10
        assert make_job(ScoreConfig(**places, **again)).on("float32").config.split_bytes == 256 << 10
    assert make_job(ScoreConfig(**places, split_bytes=1000)).divided("cpu").config.split_bytes == 1000


def test_an_output_keeps_the_dtype_that_it_was_begun_with(places):
    """Whatever "auto" means on this run's machines, unless it is begun anew."""
    assert make_job(ScoreConfig(**places)).dtype_is_open
    bind(make_job(ScoreConfig(**places, dtype="bfloat16")))
    job = make_job(ScoreConfig(**places, gpus_per_actor=0.0))
    assert (job.config.dtype, job.dtype_is_open, job.differences) == ("bfloat16", False, [])
    assert make_job(ScoreConfig(**places, overwrite=True)).dtype_is_open


def test_the_dtype_is_one_whose_table_has_the_speed_asked_for(places):
    """bfloat16 is faster, but what was measured in float32 does not hold in it."""
    write_table(places, "float32")
    assert make_job(ScoreConfig(**places, speedup=3.0)).on("bfloat16").config.dtype == "float32"
    assert make_job(ScoreConfig(**places)).on("bfloat16").config.dtype == "bfloat16"


def test_an_output_of_an_earlier_version_is_this_ones(places):
    """What was written before this module was, for options of every kind; the key is in all of its objects."""
    options = {"id_column": "id", "keep_columns": ("a", "b"), "thresholds": (0.5, 0.25), "split_bytes": 1000}
    job = make_job(ScoreConfig(**places, **options, dtype="float32", num_actors=3))
    recorded = {
        "context_column": "context",
        "dtype": "float32",
        "format": 1,
        "id_column": "id",
        "input": places["input"],
        "keep_columns": ["a", "b"],
        "max_answer_tokens": 30,
        "model_digest": model_digest(places["model"]),
        "n_best": 1,
        "no_answer_threshold": None,
        "overflow": "windows",
        "probabilities": False,
        "question_column": "question",
        "reduce": True,
        "split_bytes": 1000,
        "stride": None,
        "text_column": "text",
        "thresholds": [0.5, 0.25],
    }
    assert json.loads(json.dumps(job.identity)) == recorded | {"label_threshold": 0.5, "tags": False}, "came later"
    Storage(places["output"]).write("_output.json", json.dumps(recorded, indent=1, sort_keys=True).encode())
    again = make_job(ScoreConfig(**places, **options))
    assert again.differences == []
    assert again.recorded_key == again.identity_key == job.identity_key
    elsewhere = recorded | {"input": "s3://bucket/in", "model_digest": "0" * 64}
    assert identity_key(elsewhere, identity_defaults()) == "a49a8a54bb089bee"
    older = {name: recorded[name] for name in recorded if name not in ("n_best", "question_column")}
    Storage(places["output"]).write("_output.json", json.dumps(older).encode())
    assert make_job(ScoreConfig(**places, **options)).differences == []


def test_an_output_that_should_finish_by_a_time_is_bound_to_the_speeds_it_may_use(places):
    """Not to the time, which is another one each night."""
    write_table(places, "float32")
    job = make_job(ScoreConfig(**places, finish_by="06:00", max_drop=3.0, dtype="float32", split_bytes=1000))
    assert [point.thresholds for point in job.points] == [(0.4, 0.4)]
    bind_output(job.output, job.identity, overwrite=False)
    again = make_job(ScoreConfig(**places, finish_by="2h", max_drop=4.0))
    assert again.differences == []
    assert again.recorded_key == again.identity_key == job.identity_key
    plain = make_job(ScoreConfig(**places, thresholds=(0.4, 0.4)))
    assert plain.differences == ["finish_by_thresholds [[0.4, 0.4]] where this run has None"]
    assert plain.identity_key != job.identity_key
