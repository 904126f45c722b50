"""The predictor: result rows for splits, and batches of every format for notebooks."""

import hashlib
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from ray.data.block import BlockAccessor

from pipeline import TRBertPredictor, UsageError
from pipeline.choice import thresholds_version
from pipeline.commit import VERSION, Committed, publish_splits
from pipeline.config import THRESHOLDS_VERSION
from pipeline.encode import read_shards, shard_groups
from pipeline.ledger import LedgerClient
from pipeline.predict import SplitPredictor
from pipeline.report import SplitStats
from pipeline.rows import from_ipc
from pipeline.storage import Storage
from tests.pipeline.stages import encode_options, only_shard, texts, write_shard
from tests.pipeline.test_choice import point
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


def objects(*cells):
    """A numpy column of these cells, whatever they are."""
    column = np.empty(len(cells), object)
    column[:] = [*cells]
    return column


@pytest.mark.parametrize(
    ("cell", "error"),
    [
        *((null, "null") for null in (None, np.nan, np.float32("nan"), pd.NA, pd.NaT)),
        *((text, "empty") for text in ("", " \t\n", b"")),
        *((text, "undecodable") for text in ("bad \ud83d", "\udcff", b"bad \xff")),
        *((value, "wrong_type") for value in (5, 0.5, True, ["good"], {"a": 1}, np.array(["a", "b"]), np.zeros(0))),
        *((text, None) for text in (b"good", np.str_("good"), "\U0001f642")),
    ],
    ids=ascii,
)
def test_a_cell_that_is_no_text_is_that_rows_error(predictor, cell, error):
    column = np.empty(3, object)
    column[0], column[1], column[2] = "good", cell, "bad"
    for batch in ({"text": column}, pd.DataFrame({"text": pd.Series(column, dtype=object)})):
        scored = predictor(batch)
        assert [None if pd.isna(each) else each for each in scored["error"]] == [None, error, None]
        assert [pd.isna(label) for label in scored["label"]] == [False, error is not None, False]


@pytest.mark.parametrize(
    ("column", "errors"),
    [
        (pa.array([b"good", b"\xff"]), [None, "undecodable"]),
        (pa.array([b"good", b"\xff"]).cast(pa.binary_view()), [None, "undecodable"]),
        (pa.StringArray.from_buffers(2, *pa.array([b"good", b"\xff"]).buffers()[1:]), [None, "undecodable"]),
        (pa.array(["good", None, " "]).dictionary_encode(), [None, "null", "empty"]),
        (pa.array(["good", None], pa.large_string()), [None, "null"]),
        (pa.array([1, None]), ["wrong_type", "null"]),
        (pa.array([0.5, float("nan"), None]), ["wrong_type", "null", "null"]),
        (pa.array([["good"], None]), ["wrong_type", "null"]),
        (pa.array([2**62], pa.timestamp("s")), ["wrong_type"]),
        (pa.nulls(2), ["null", "null"]),
    ],
    ids=lambda value: str(getattr(value, "type", "")),
)
def test_an_arrow_column_of_any_type_is_taken(predictor, column, errors):
    scored = predictor(pa.table({"text": pa.chunked_array([column, column.slice(0, 0)])}))
    assert scored["error"].to_pylist() == errors
    assert scored["label"].is_null().to_pylist() == [error is not None for error in errors]


TYPES = {
    "label": pa.string(),
    "score": pa.float32(),
    "probabilities": pa.list_(pa.float32()),
    "num_tokens": pa.int64(),
    "num_windows": pa.int32(),
    "kept_tokens": pa.list_(pa.int32()),
    "error": pa.string(),
}


@pytest.mark.parametrize("name", ["numpy", "pandas", "pyarrow"])
@pytest.mark.parametrize("rows", [[None, ""], ["good"], ["good", None, "bad news"], []], ids=str)
def test_result_columns_have_the_same_types_whatever_the_rows(predictor, monkeypatch, name, rows):
    """As blocks of Ray Data, so that datasets can be joined and written."""
    column = objects(*rows)
    batch = {"numpy": {"text": column}, "pandas": pd.DataFrame({"text": column}, dtype=object)}.get(name)
    direct = predictor({"text": column})
    assert {each: direct[each].dtype for each in TYPES} == {
        each: np.dtype(np.float32 if each == "score" else object) for each in TYPES
    }
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_actor_id=lambda: "an actor"))
    scored = predictor(pa.table({"text": pa.array(rows, pa.string())}) if batch is None else batch)
    block = BlockAccessor.for_block(BlockAccessor.batch_to_block(scored)).to_arrow()
    assert {each: block.schema.field(each).type for each in TYPES} == TYPES
    assert block.num_rows == len(rows)


@pytest.mark.parametrize("name", ["numpy", "pandas", "pyarrow"])
def test_no_column_of_the_input_is_overwritten(predictor, model_directory, name):
    columns = {"text": ["good"], "score": [7], "error": ["mine"]}
    batch = {
        "numpy": {key: np.array(values, object) for key, values in columns.items()},
        "pandas": pd.DataFrame(columns),
        "pyarrow": pa.table(columns),
    }[name]
    with pytest.raises(UsageError, match=r"columns \['error', 'score'\] of the batch are named like .* prefix="):
        predictor(batch)
    (row,) = as_rows(TRBertPredictor(str(model_directory), prefix="model_", device="cpu")(batch))
    assert (row["score"], row["error"], row["model_label"] in predictor.task.labels) == (7, "mine", True)
    assert list(row)[3:] == [f"model_{each}" for each in TYPES if each != "probabilities"]


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


def test_a_record_batch_is_a_table(predictor):
    rows = {"text": ["the good news", None]}
    assert predictor(pa.record_batch(rows)).equals(predictor(pa.table(rows)))


def test_a_missing_text_column_is_named(predictor):
    with pytest.raises(UsageError, match="2 columns 'text' in the batch"):
        predictor(pa.table([["a"], ["b"]], names=["text", "text"]))
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


def test_the_results_of_a_model_with_exits_say_after_which_layer_a_document_left(split, leaving_model):
    options = {"model": str(leaving_model), "device": "cpu", "dtype": "float32"}
    predictor = SplitPredictor(["id"], "id", **options)
    (row,) = predictor(split).to_pylist()
    results, stats = from_ipc(row["payload"]), SplitStats.from_json(row["stats"])
    assert results.schema.field("exit_layer") == pa.field("exit_layer", pa.float32())
    assert results.column_names[-2:] == ["kept_tokens", "exit_layer"]
    layers = np.array(results["exit_layer"])
    assert len(set(layers.tolist())) > 1
    assert ((layers >= 1) & (layers <= 4)).all()
    assert stats.exit_layers == {
        str(k): int((np.rint(layers) == k).sum()) for k in np.unique(np.rint(layers)).astype(int)
    }
    assert stats.exit_layer_sum == pytest.approx(layers.sum())
    assert sum(stats.exit_layers.values()) == stats.documents == 39

    dense = SplitPredictor(["id"], "id", **options, reduce=False)
    assert set(from_ipc(dense(split)["payload"][0])["exit_layer"].to_pylist()) == {4.0}


@pytest.mark.parametrize("name", ["numpy", "pandas", "pyarrow"])
def test_batches_get_the_exit_layer_of_each_document_too(leaving_model, name):
    predictor = TRBertPredictor(str(leaving_model), device="cpu")
    rows = as_rows(predictor(as_format(name)))
    expected = predictor.engine.score_columns([text for text in TEXTS if text and text.strip()]).exit_layers
    assert [row["exit_layer"] for row in rows if pd.isna(row["error"])] == pytest.approx(expected)
    assert all(pd.isna(row["exit_layer"]) for row in rows if not pd.isna(row["error"]))
    with pytest.raises(
        UsageError, match=r"columns \['exit_layer'\] of the batch are named like columns of the results"
    ):
        predictor(pa.table({"text": ["good"], "exit_layer": [1]}))


def test_a_model_without_exits_leaves_that_name_to_the_batch(predictor):
    scored = predictor(pa.table({"text": ["good"], "exit_layer": [1]}))
    assert scored["exit_layer"].to_pylist() == [1]


def test_probabilities_come_in_the_order_of_the_labels(split, model_directory):
    predictor = SplitPredictor(["id"], "id", model=str(model_directory), device="cpu", probabilities=True)
    results = from_ipc(predictor(split)["payload"][0]).to_pylist()
    for row in results:
        assert row["label"] == ["bad", "fine", "good"][int(np.argmax(row["probabilities"]))]


def test_a_split_that_fails_comes_back_with_its_error(split, model_directory):
    predictor = SplitPredictor(["id"], "id", model=str(model_directory), device="cpu")
    predictor.engine.score = lambda documents, policy, exit_policy, recording: (_ for _ in ()).throw(
        RuntimeError("CUDA error: device-side assert")
    )
    (row,) = predictor(split).to_pylist()
    assert row["error"] == "RuntimeError: CUDA error: device-side assert"
    assert (row["shard"], row["index"], row["payload"]) == ("a.parquet", 0, None)


class Points(LedgerClient):
    """A ledger that sends each split to the next operating point."""

    def __init__(self, *points):
        super().__init__()
        self.points = list(points)

    def _ask(self, method, *arguments):
        return self.points.pop(0) if method == "point" else None


def test_each_split_is_scored_at_one_operating_point_and_says_which(split, model_directory):
    points = tuple(point(speed, 0.0, (value, value)) for speed, value in ((2.0, 0.1), (3.0, 0.9)))
    predictor = SplitPredictor(
        ["id"], "id", model=str(model_directory), device="cpu", points=points, ledger=Points(1, 0, 1)
    )
    rows = [predictor(split).to_pylist()[0] for _ in range(3)]
    results = [from_ipc(row["payload"]) for row in rows]
    for index, table in zip((1, 0, 1), results):
        version = thresholds_version(points[index])
        assert set(table[THRESHOLDS_VERSION].to_pylist()) == {version}
        assert table.schema.field(THRESHOLDS_VERSION).type == pa.string()
        assert table.schema.metadata == {VERSION.encode(): version.encode()}
        alone = SplitPredictor(
            ["id"], "id", model=str(model_directory), device="cpu", thresholds=points[index].thresholds
        )
        (expected,) = alone(split).to_pylist()
        assert table.drop_columns(THRESHOLDS_VERSION).equals(from_ipc(expected["payload"]))
    assert [json.loads(row["actor"])["point"] for row in rows] == [1, 0, 1]
    assert not results[0]["kept_tokens"].equals(results[1]["kept_tokens"])


def test_the_first_version_of_a_split_stays_if_it_is_scored_again_at_another_speed(split, model_directory, tmp_path):
    """As after the death of a machine: what is reported and recorded is what the output holds."""
    points = tuple(point(speed, 0.0, (value, value)) for speed, value in ((2.0, 0.1), (3.0, 0.9)))
    predictor = SplitPredictor(
        ["id"], "id", model=str(model_directory), device="cpu", points=points, ledger=Points(0, 1)
    )
    output = Storage(str(tmp_path / "out"))
    first, second = (
        Committed(**json.loads(publish_splits(predictor(split), output, identity_key="key")["committed"][0].as_py()))
        for _ in range(2)
    )
    assert first == second
    assert first.thresholds_version == thresholds_version(points[0])
    data = output.read(first.object)
    assert hashlib.sha256(data).hexdigest() == first.sha256
    rows = pq.read_table(pa.BufferReader(data))
    assert set(rows[THRESHOLDS_VERSION].to_pylist()) == {first.thresholds_version}
