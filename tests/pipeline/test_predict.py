"""The predictor: result rows for splits, and batches of every format for notebooks."""

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from pipeline import TRBertPredictor, UsageError
from pipeline.encode import read_shards, shard_groups
from pipeline.predict import SplitPredictor
from pipeline.report import SplitStats
from pipeline.rows import from_ipc
from tests.pipeline.stages import encode_options, only_shard, texts, write_shard
from trbert_model.checkpoints.files import model_digest
from trbert_model.errors import ModelChangedError

TEXTS = ["the good news", None, "bad " * 100, "  ", "fine"]


@pytest.fixture(scope="module")
def predictor(model_directory):
    return TRBertPredictor(str(model_directory), probabilities=True, device="cpu")


def as_format(name):
    return {
        "numpy": {"id": np.arange(5), "text": np.array(TEXTS, dtype=object)},
        "pandas": pd.DataFrame({"id": range(5), "text": TEXTS}),
        "pyarrow": pa.table({"id": range(5), "text": TEXTS}),
    }[name]


def as_rows(batch):
    if isinstance(batch, pa.Table):
        return batch.to_pylist()
    if isinstance(batch, pd.DataFrame):
        return batch.to_dict("records")
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


@pytest.mark.parametrize("name", ["numpy", "pandas", "pyarrow"])
def test_every_row_of_a_batch_comes_back_scored_or_with_its_error(predictor, name):
    rows = as_rows(predictor(as_format(name)))
    assert [row["id"] for row in rows] == list(range(5))
    assert [None if pd.isna(row["error"]) else row["error"] for row in rows] == [None, "null", None, "empty", None]
    engine = predictor.engine.score_columns([text for text in TEXTS if text and text.strip()])
    good = [rows[0], rows[2], rows[4]]
    assert [row["label"] for row in good] == [predictor.engine.task.labels[i] for i in engine.outputs.argmax(1)]
    for row in good:
        assert row["score"] == pytest.approx(max(row["probabilities"]), abs=1e-6)
        assert sum(row["probabilities"]) == pytest.approx(1, abs=1e-5)
        assert len(row["kept_tokens"]) == 2
    assert good[1]["num_windows"] == engine.num_windows[1] == 4
    assert pd.isna(rows[1]["label"])


def test_a_predictor_takes_no_other_model_than_the_one_it_is_told(model_directory, answering_model):
    digest = model_digest(model_directory)
    assert list(TRBertPredictor(str(model_directory), digest=digest, device="cpu").task.labels) == [
        "bad",
        "fine",
        "good",
    ]
    with pytest.raises(ModelChangedError) as refused:
        TRBertPredictor(str(answering_model), digest=digest, device="cpu")
    message = str(refused.value)
    assert message.startswith(f"{answering_model}: the run began with another model")
    assert digest[:12] in message
    assert model_digest(answering_model)[:12] in message
    assert "\n" not in message


def test_a_batch_of_nothing_but_bad_rows(predictor):
    rows = predictor(pa.table({"text": pa.array([None, ""], pa.string())})).to_pylist()
    assert [(row["label"], row["error"]) for row in rows] == [(None, "null"), (None, "empty")]


def test_a_missing_text_column_is_named(predictor):
    with pytest.raises(UsageError, match=r"no column 'text' in the batch; its columns are \['body'\]"):
        predictor({"body": np.array(["x"])})


@pytest.fixture
def split(tmp_path, model_directory):
    columns = {"id": [f"n{i}" for i in range(40)], "text": [None, *texts(39)], "document": ["t"] * 40}
    write_shard(tmp_path / "a.parquet", columns)
    options = encode_options(tmp_path, model_directory, keep_columns=("document",))
    (table,) = read_shards(pa.Table.from_pylist(shard_groups([(only_shard(tmp_path), frozenset())])), options)
    return table


def test_a_split_becomes_result_rows_and_statistics(split, model_directory):
    predictor = SplitPredictor(["id", "document"], "id", model=str(model_directory), device="cpu")
    (row,) = predictor(split).to_pylist()
    results, stats = from_ipc(row["payload"]), SplitStats.from_json(row["stats"])
    assert results.schema == pa.schema(
        [
            ("id", pa.string()),
            ("shard", pa.string()),
            ("row", pa.int64()),
            ("label", pa.string()),
            ("score", pa.float32()),
            ("num_tokens", pa.int64()),
            ("num_windows", pa.int32()),
            ("kept_tokens", pa.list_(pa.int32())),
            ("document", pa.string()),
        ]
    )
    assert results["id"].to_pylist() == [f"n{i}" for i in range(1, 40)]
    assert results["row"].to_pylist() == list(range(1, 40))
    assert stats.documents == 39
    assert stats.tokens == sum(results["num_tokens"].to_pylist())
    assert stats.kept_tokens == np.array(results["kept_tokens"].to_pylist()).sum(0).tolist()
    assert sum(stats.labels.values()) == 39
    assert stats.bad_rows == {"null": 1}
    assert 0 < stats.flops < stats.dense_flops
    assert 0 < stats.model_seconds <= stats.predict_seconds
    span = json.loads(row["actor"])
    assert span["end"] - span["start"] == pytest.approx(stats.predict_seconds, abs=1e-3)


def test_probabilities_come_in_the_order_of_the_labels(split, model_directory):
    predictor = SplitPredictor(["id"], "id", model=str(model_directory), device="cpu", probabilities=True)
    results = from_ipc(predictor(split)["payload"][0]).to_pylist()
    for row in results:
        assert row["label"] == ["bad", "fine", "good"][int(np.argmax(row["probabilities"]))]


def test_a_split_that_fails_comes_back_with_its_error(split, model_directory):
    predictor = SplitPredictor(["id"], "id", model=str(model_directory), device="cpu")
    predictor.engine.score = lambda documents, recording: (_ for _ in ()).throw(
        RuntimeError("CUDA error: device-side assert")
    )
    (row,) = predictor(split).to_pylist()
    assert row["error"] == "RuntimeError: CUDA error: device-side assert"
    assert (row["shard"], row["index"], row["payload"]) == ("a.parquet", 0, None)
