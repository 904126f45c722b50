"""What an earlier version made: a model, and an output of it, of 2026-11-26, before tasks and backbones had seams."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from s3fs import S3FileSystem

from pipeline import ScoreConfig, TRBertPredictor, open_output, score
from pipeline.storage import Storage
from pipeline.verify import VerifyConfig, verify

BEFORE = Path(__file__).parent.parent / "data/before"
ROWS = {"a.parquet": 30, "b.parquet": 20}


@pytest.fixture
def config(s3, ray_cluster, tmp_path) -> ScoreConfig:
    """The run that made the output, where it made it: keys are made of places, sizes and ETags."""
    fs = S3FileSystem(skip_instance_cache=True)
    if fs.exists("before"):
        fs.rm("before", recursive=True)
    s3.bucket("before")
    for name in ("corpus", "scores"):
        fs.put(f"{BEFORE}/{name}", "before", recursive=True)
    model = shutil.copytree(BEFORE / "model", tmp_path / "model")
    places = {"input": "s3://before/corpus", "output": "s3://before/scores", "model": str(model)}
    quick = {"split_bytes": 400, "num_actors": 1, "threads_per_actor": 1}
    return ScoreConfig(**places, **quick, id_column="id", probabilities=True)


def test_an_output_of_before_is_complete_and_verified(config):
    assert verify(VerifyConfig(output=config.output)).holds
    assert score(config)["status"] == "complete already: nothing to do"


def test_an_output_of_before_is_resumed(config):
    """With a marker and two of its shard's splits gone, the rest is kept and these two are the same again."""
    output = Storage(config.output)
    names = sorted(file.path for file in output.files() if file.path.startswith("a-"))
    before = {name: output.read(name) for name in names}
    (marker,) = (file.path for file in output.files("_shards") if "/a-" in file.path)
    output.delete(["_SUCCESS", marker, *names[:2]])
    report = score(config)
    assert (report["status"], report["splits"]["found_committed"]) == ("complete", 2)
    assert verify(VerifyConfig(output=config.output)).holds
    assert {name: output.read(name) for name in names[2:]} == {name: before[name] for name in names[2:]}
    for name in names[:2]:
        old, new = (pq.read_table(Storage(place).open(name)) for place in (f"{BEFORE}/scores", config.output))
        assert old.column_names == new.column_names
        assert old.drop_columns(["score", "probabilities"]).equals(new.drop_columns(["score", "probabilities"]))
        np.testing.assert_allclose(old["score"].to_numpy(), new["score"].to_numpy(), atol=1e-4)


def test_a_model_of_before_says_what_it_said(config):
    corpus = {name: pq.read_table(BEFORE / "corpus" / name) for name in ROWS}
    scored = open_output(config.output).to_table().to_pandas()
    assert len(scored) == sum(ROWS.values()) - 2  # a null and an empty text
    predictor = TRBertPredictor(config.model, device="cpu", probabilities=True)
    for name, table in corpus.items():
        expected = scored[scored["shard"] == name].sort_values("row")
        found = predictor(table).to_pandas().iloc[expected["row"]]
        assert found["label"].tolist() == expected["label"].tolist()
        assert np.array_equal(np.stack(found["kept_tokens"]), np.stack(expected["kept_tokens"]))
        np.testing.assert_allclose(np.stack(found["probabilities"]), np.stack(expected["probabilities"]), atol=1e-4)
