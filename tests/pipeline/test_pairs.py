"""Pairs through the pipeline's stages, without Ray: results, quarantine, the notebook's call, and what is refused."""

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from pipeline.commit import Committed, open_output, write_marker
from pipeline.config import ScoreConfig
from pipeline.errors import UsageError
from pipeline.job import make_job
from pipeline.predict import SplitPredictor, TRBertPredictor
from pipeline.storage import Storage
from tests.conftest import tiny_classifier, tiny_tokenizer
from tests.pipeline.stages import encode_options, only_shard, run_stages, write_shard
from trbert_model.engine import Engine, EngineOptions

TEXT = "the good news of a game and the bad bank " * 4 + "é 中."
ROWS = [
    ("a", "good news", TEXT),
    ("b", "the bad bank", TEXT),
    ("c", None, TEXT),
    ("d", "  ", TEXT),
    ("e", "good", None),
    ("f", "good " * 40, TEXT),
    ("g", "\u200b", TEXT),
    ("h", "fine sport", "a fine game"),
]
REASONS = {"c": "null", "d": "empty", "e": "null", "f": "question_too_long", "g": "no_tokens"}


@pytest.fixture(scope="module")
def pair_model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pairs")
    tiny_classifier(text_pairs=True, window_pooling="log-sum-exp").save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def expected(model):
    """Each good pair alone, by the engine: its label and score."""
    engine = Engine.from_pretrained(model, EngineOptions(device="cpu"))
    found = {}
    for name, question, text in ROWS:
        if name not in REASONS:
            columns = engine.task.result_columns(engine.score_columns([question], [text]).outputs, [])
            found[name] = (columns["label"][0].as_py(), columns["score"][0].as_py())
    return found


def columns(asked="question", text="text"):
    ids, questions, texts = zip(*ROWS)
    return {"id": list(ids), asked: pa.array(questions), text: pa.array(texts)}


def test_every_pair_has_one_end(pair_model, tmp_path):
    write_shard(tmp_path / "in/a.parquet", columns("claim", "body"), row_group_size=3)
    options = encode_options(tmp_path / "in", pair_model, text_columns=("claim", "body"), split_bytes=300)
    predictor = SplitPredictor(["id"], "id", model=str(pair_model), device="cpu")
    output, shard = Storage(str(tmp_path / "out")), only_shard(tmp_path / "in")
    rows = run_stages(shard, options, predictor, output)
    assert len(rows) > 1
    assert not any(row["error"] for row in rows)
    write_marker(output, shard, [Committed(**json.loads(row["committed"])) for row in rows], "run")
    results = open_output(output.uri).to_table().to_pylist()
    wanted = expected(pair_model)
    assert {row["id"]: row["label"] for row in results} == {name: label for name, (label, _) in wanted.items()}
    for row in results:
        assert row["score"] == pytest.approx(wanted[row["id"]][1], abs=1e-4)
        assert set(row) == {"id", "shard", "row", "label", "score", "num_tokens", "num_windows", "kept_tokens"}
    rejected = open_output(output.uri, quarantine=True).to_table().to_pylist()
    assert {row["id"]: row["reason"] for row in rejected} == REASONS
    details = {row["id"]: row["detail"] for row in rejected}
    assert details["c"] == "the claim is null"
    assert details["e"] == "the body is null"
    assert "40 tokens leave too little of 32 positions for the text" in details["f"]


@pytest.mark.parametrize("kind", ["numpy", "pandas", "pyarrow"])
def test_the_notebooks_call_takes_pairs(pair_model, kind):
    predictor = TRBertPredictor(str(pair_model), text_column="body", question_column="claim", device="cpu")
    table = pa.table(columns("claim", "body"))
    batch = {
        "numpy": {name: np.array(table[name].to_pylist(), dtype=object) for name in table.column_names},
        "pandas": table.to_pandas(),
        "pyarrow": table,
    }[kind]
    found = predictor(batch)
    frame = found.to_pandas() if kind == "pyarrow" else pd.DataFrame({name: list(found[name]) for name in found})
    wanted = expected(pair_model)
    for row in frame.to_dict("records"):
        if row["id"] in REASONS:
            assert row["error"] == REASONS[row["id"]]
        else:
            assert row["label"] == wanted[row["id"]][0]
            assert row["error"] is None or row["error"] != row["error"]


def test_a_question_too_few_or_too_many_is_refused(pair_model, model_directory, tmp_path):
    batch = pa.table({"text": ["good news"]})
    with pytest.raises(UsageError, match="no column 'question' in the batch"):
        TRBertPredictor(str(pair_model), device="cpu")(batch)
    for name in ("question", "claim"):
        with pytest.raises(UsageError, match=f"question_column '{name}': the model reads no questions"):
            TRBertPredictor(str(model_directory), question_column=name, device="cpu")
    write_shard(tmp_path / "in/a.parquet", {"text": ["good news"], "question": ["good"]})
    places = {"input": str(tmp_path / "in"), "output": str(tmp_path / "out")}
    with pytest.raises(UsageError, match="question_column 'question': the model reads no questions"):
        make_job(ScoreConfig(**places, model=str(model_directory), question_column="question"))
    with pytest.raises(UsageError, match="question_column is required"):
        ScoreConfig(**places, model=str(pair_model), question_column="")
    job = make_job(ScoreConfig(**places, model=str(pair_model)))
    assert job.divided("cpu").encode_options(1).text_columns == ("question", "text")
    named = make_job(ScoreConfig(**places, model=str(pair_model), question_column="question"))
    assert named.identity == job.identity
