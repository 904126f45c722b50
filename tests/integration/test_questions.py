"""Questions about long contexts through a whole run, every one of them accounted for, and the choice of a speed."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.evaluate import main as evaluate
from pipeline import ScoreConfig, TRBertPredictor, open_output, score
from pipeline.verify import VerifyConfig, verify
from tests.integration.test_score import accounted_rows, put_table
from tests.pipeline.stages import texts
from trbert_model.engine import Engine, EngineOptions

pytestmark = pytest.mark.usefixtures("ray_cluster")

# Longer than the tiny model's 32 positions, and each asked about several times.
CONTEXTS = [f"{text} é 中 🙂.\r\n{text}" for text in texts(6, words=40)]
SHARDS = {"a.parquet": 40, "b/c.parquet": 23}


def questions(name: str, rows: int) -> pa.Table:
    asked = [None if i % 17 == 5 else text for i, text in enumerate(texts(rows, words=4, start=len(name)))]
    asked[1] = "good " * 60
    contexts = [CONTEXTS[i // 5 % len(CONTEXTS)] for i in range(rows)]
    return pa.table({"id": [f"{name}:{i}" for i in range(rows)], "question": asked, "context": contexts})


@pytest.fixture
def corpus(s3):
    uri = s3.bucket("questions")
    for name, rows in SHARDS.items():
        put_table(f"{uri}/in", name, questions(name, rows))
    return uri


def test_questions_in_s3_are_answered_row_by_row(corpus, answering_model):
    config = ScoreConfig(
        input=f"{corpus}/in",
        output=f"{corpus}/out",
        model=str(answering_model),
        id_column="id",
        split_bytes=1500,
        num_actors=2,
        threads_per_actor=1,
        n_best=3,
    )
    report = score(config)
    assert (report["status"], report["exit_code"]) == ("complete", 0)
    assert report["splits"]["committed"] > 2
    assert accounted_rows(f"{corpus}/out") == {name: list(range(rows)) for name, rows in SHARDS.items()}
    assert verify(VerifyConfig(f"{corpus}/out")).holds

    rows = {row["id"]: row for name, count in SHARDS.items() for row in questions(name, count).to_pylist()}
    results = {row["id"]: row for row in open_output(f"{corpus}/out").to_table().to_pylist()}
    rejected = open_output(f"{corpus}/out", quarantine=True).to_table().to_pylist()
    assert {row["reason"] for row in rejected} == {"null", "question_too_long"}
    assert results.keys() | {row["id"] for row in rejected} == rows.keys()
    engine = Engine.from_pretrained(answering_model, EngineOptions(device="cpu", n_best=3))
    good = [rows[name] for name in results]
    expected = engine.score_columns([row["question"] for row in good], [row["context"] for row in good])
    for row, answer, kept in zip(good, expected.outputs, expected.kept_tokens):
        found, best = results[row["id"]], answer.spans[0]
        assert found["answer"] == row["context"][found["start_char"] : found["end_char"]]
        assert (found["start_char"], found["end_char"]) == (best.start, best.end)
        assert found["score"] == pytest.approx(best.score, abs=1e-4)
        assert found["null_score"] == pytest.approx(answer.null_score, abs=1e-4)
        assert found["kept_tokens"] == kept.tolist()
        assert [span["start_char"] for span in found["spans"]] == [span.start for span in answer.spans]
    assert report["documents"] == len(results)
    assert report["labels"] == {"answered": len(results)}
    assert report["bad_rows"] == {"null": 5, "question_too_long": 2}

    assert score(config)["documents"] == 0  # complete before


def test_a_speed_is_chosen_from_labelled_questions(answering_model, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(answering_model, model)
    engine = Engine.from_pretrained(model, EngineOptions(device="cpu", reduce=False))
    table = questions("a.parquet", 20).filter(pa.array([i not in (1, 5) for i in range(20)]))
    rows = table.to_pylist()
    spans = [
        answer.spans[0]
        for answer in engine.score_columns([r["question"] for r in rows], [r["context"] for r in rows]).outputs
    ]
    table = table.append_column(
        "answers", pa.array([[row["context"][span.start : span.end]] for row, span in zip(rows, spans)])
    ).append_column("answer_start", pa.array([[span.start] for span in spans]))
    pq.write_table(table, tmp_path / "labelled.parquet")
    arguments = ["--model", str(model), "--corpus", str(tmp_path / "labelled.parquet"), "--speedups", "1.3,2"]
    assert evaluate(arguments) == 0
    assert "18 documents of labelled.parquet, dense 100.00% f1" in capsys.readouterr().out

    predictor = TRBertPredictor(str(model), speedup=1.3, device="cpu")
    found = predictor({name: np.array(table[name].to_pylist(), dtype=object) for name in ("question", "context")})
    kept = np.stack(found["kept_tokens"]).sum(0) / np.sum(found["num_tokens"])
    assert kept[1] < kept[0] < 1
