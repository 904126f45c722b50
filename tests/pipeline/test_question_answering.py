"""Questions through the pipeline's stages, without Ray: results, quarantine, and the notebook's call."""

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from pipeline.commit import Committed, open_output, write_marker
from pipeline.predict import SplitPredictor, TRBertPredictor
from pipeline.storage import Storage
from tests.pipeline.stages import encode_options, only_shard, run_stages, write_shard
from trbert_model.engine import Engine, EngineOptions

CONTEXT = "the good news of a game and the bad bank " * 4 + "é 中."
ROWS = [
    ("a", "good news", CONTEXT),
    ("b", "the bad bank", CONTEXT),
    ("c", None, CONTEXT),
    ("d", "  ", CONTEXT),
    ("e", "good", None),
    ("f", "good " * 40, CONTEXT),
    ("g", "\u200b", CONTEXT),
    ("h", "fine sport", "a fine game"),
]
REASONS = {"c": "null", "d": "empty", "e": "null", "f": "question_too_long", "g": "no_tokens"}


@pytest.fixture
def shard(tmp_path):
    ids, questions, contexts = zip(*ROWS)
    columns = {"id": list(ids), "question": pa.array(questions), "context": pa.array(contexts)}
    write_shard(tmp_path / "in/a.parquet", columns, row_group_size=3)
    return tmp_path / "in"


def expected(answering_model, threshold=None, **options):
    """Each good question alone, by the engine."""
    engine = Engine.from_pretrained(answering_model, EngineOptions(device="cpu", **options))
    answers = {}
    for name, question, context in ROWS:
        if name not in REASONS:
            (answer,) = engine.score_columns([question], [context]).outputs
            answers[name] = (answer, answer.best(threshold), context)
    return answers


@pytest.mark.parametrize("threshold", [None, -0.5])
def test_every_question_has_one_end(shard, answering_model, tmp_path, threshold):
    options = encode_options(
        shard, answering_model, text_columns=("question", "context"), split_bytes=300, keep_columns=("context",)
    )
    settings = {"no_answer_threshold": threshold, "spans": True, "n_best": 3}
    predictor = SplitPredictor(["id", "context"], "id", model=str(answering_model), device="cpu", **settings)
    output = Storage(str(tmp_path / "out"))
    rows = run_stages(only_shard(shard), options, predictor, output)
    assert len(rows) > 1
    assert not any(row["error"] for row in rows)
    write_marker(output, only_shard(shard), [Committed(**json.loads(row["committed"])) for row in rows], "run")

    results = open_output(output.uri).to_table().to_pylist()
    wanted = expected(answering_model, threshold, n_best=3)
    assert [row["id"] for row in results] == list(wanted)
    for row in results:
        answer, best, context = wanted[row["id"]]
        assert row["null_score"] == pytest.approx(answer.null_score, abs=1e-4)
        assert row["num_windows"] >= 1
        assert len(row["kept_tokens"]) == 2
        if best is None:
            assert (row["answer"], row["score"], row["start_char"], row["end_char"]) == (None,) * 4
        else:
            assert row["answer"] == context[row["start_char"] : row["end_char"]] == context[best.start : best.end]
            assert row["score"] == pytest.approx(best.score, abs=1e-4)
        assert [span["start_char"] for span in row["spans"]] == [span.start for span in answer.spans]
    assert any(row["answer"] is None for row in results) == (threshold is not None)
    rejected = open_output(output.uri, quarantine=True).to_table().to_pylist()
    assert {row["id"]: row["reason"] for row in rejected} == REASONS
    details = {row["id"]: row["detail"] for row in rejected}
    assert details["c"] == "the question is null"
    assert details["e"] == "the context is null"
    assert "40 tokens leave too little of 32 positions" in details["f"]
    counted = [json.loads(row["stats"])["labels"] for row in rows]
    answered = sum(each.get("answered", 0) for each in counted)
    assert answered == sum(row["answer"] is not None for row in results)


@pytest.mark.parametrize("kind", ["numpy", "pandas", "pyarrow"])
def test_the_notebooks_call_answers_whole_batches(answering_model, kind):
    predictor = TRBertPredictor(str(answering_model), device="cpu")
    ids, questions, contexts = zip(*ROWS)
    columns = {"id": list(ids), "question": list(questions), "context": list(contexts)}
    batch = {
        "numpy": {name: np.array(values, dtype=object) for name, values in columns.items()},
        "pandas": pd.DataFrame(columns),
        "pyarrow": pa.table(columns),
    }[kind]
    found = predictor(batch)
    frame = found.to_pandas() if kind == "pyarrow" else pd.DataFrame({name: list(found[name]) for name in found})
    wanted = expected(answering_model)
    for row in frame.to_dict("records"):
        if row["id"] in REASONS:
            assert row["error"] == REASONS[row["id"]]
            assert row["answer"] is None or row["answer"] != row["answer"]
        else:
            _, best, context = wanted[row["id"]]
            assert row["answer"] == context[best.start : best.end]
            assert row["error"] is None or row["error"] != row["error"]
