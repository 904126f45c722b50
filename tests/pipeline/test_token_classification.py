"""Entities and tags through the pipeline's stages, without Ray: results, quarantine, verification, notebooks."""

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from pipeline.commit import Committed, open_output, write_marker
from pipeline.compact import CompactConfig, compact
from pipeline.page import page
from pipeline.predict import SplitPredictor, TRBertPredictor
from pipeline.storage import Storage
from pipeline.verify import VerifyConfig, verify
from tests.pipeline.stages import encode_options, only_shard, run_stages, score_here, write_shard
from tests.pipeline.test_page import report_of, scored
from tests.pipeline.test_verify import rows_of
from trbert_model.engine import Engine, EngineOptions

LONG = "the good news of a game, é 中 and the bad bank\r\n👍🏽 e\u0301 " * 6
ROWS = [("a", "good news"), ("b", LONG), ("c", None), ("d", "  "), ("e", "\u200b"), ("f", "fine 中中"), ("g", LONG[5:])]
REASONS = {"c": "null", "d": "empty", "e": "no_tokens"}
kinds = pytest.mark.parametrize("tags", [False, True], ids=["entities", "tags"])


@pytest.fixture
def shard(tmp_path):
    ids, documents = zip(*ROWS)
    write_shard(tmp_path / "in/a.parquet", {"id": list(ids), "text": pa.array(documents)}, row_group_size=3)
    return tmp_path / "in"


def expected(model, tags):
    """Each good document alone, by the engine."""
    engine, found = Engine.from_pretrained(model, EngineOptions(device="cpu", tags=tags)), {}
    for name, text in ROWS:
        if name not in REASONS:
            documents, _ = engine.task.encode_rows([(text,)])
            columns = engine.task.result_columns(engine.score(documents).outputs, documents)
            found[name] = columns[engine.task.result_names[0]][0].as_py()
    return found


@kinds
def test_every_document_has_one_end(shard, tagging_model, tmp_path, tags):
    options = encode_options(shard, tagging_model, EngineOptions(device="cpu", tags=tags), split_bytes=300)
    predictor = SplitPredictor(["id"], "id", model=str(tagging_model), device="cpu", tags=tags)
    output = Storage(str(tmp_path / "out"))
    rows = run_stages(only_shard(shard), options, predictor, output)
    assert len(rows) > 1
    assert not any(row["error"] for row in rows)
    write_marker(output, only_shard(shard), [Committed(**json.loads(row["committed"])) for row in rows], "run")

    results, wanted = open_output(output.uri).to_table().to_pylist(), expected(tagging_model, tags)
    name, kind = ("tags", "tag") if tags else ("entities", "label")
    assert [row["id"] for row in results] == list(wanted)
    counted: dict[str, int] = {}
    for row in results:
        text = dict(ROWS)[row["id"]]
        assert len(row[name]) == len(wanted[row["id"]])
        for found, right in zip(row[name], wanted[row["id"]]):
            counted[found[kind]] = counted.get(found[kind], 0) + 1
            assert found.pop("score") == pytest.approx(right.pop("score"), abs=1e-5)
            assert found == right
            piece = text[found["start_char"] : found["end_char"]]
            assert piece == piece.strip() != ""
    assert max(len(row[name]) for row in results) > 10
    rejected = open_output(output.uri, quarantine=True).to_table().to_pylist()
    assert {row["id"]: row["reason"] for row in rejected} == REASONS
    reported: dict[str, int] = {}
    for row in rows:
        for label, count in json.loads(row["stats"])["labels"].items():
            reported[label] = reported.get(label, 0) + count
    assert reported == counted


def test_outputs_are_verified_and_compacted(shard, tagging_model, tmp_path):
    output = Storage(str(tmp_path / "out"))
    score_here(shard, output, tagging_model, split_bytes=300)
    found = verify(VerifyConfig(output=output.uri))
    assert found.holds
    assert (found.results, found.quarantined) == (4, 3)
    compact(CompactConfig(output=output.uri, into=str(tmp_path / "compacted")))
    assert verify(VerifyConfig(output=str(tmp_path / "compacted"))).holds
    assert rows_of(str(tmp_path / "compacted")) == rows_of(output.uri)


def test_the_page_of_a_run_shows_entities(shard, tagging_model, tmp_path):
    _, statistics = scored(tmp_path, tagging_model, samples=10.0)
    report = report_of(statistics)
    assert set(report["labels"]) == {"PER", "LOC"}
    shown = page(report, [], statistics.highlights.samples)
    assert '<small class="label">PER</small>' in shown
    assert "Share of each label" in shown


@kinds
@pytest.mark.parametrize("batch_kind", ["numpy", "pandas", "pyarrow"])
def test_the_notebooks_call_tags_whole_batches(tagging_model, batch_kind, tags):
    predictor = TRBertPredictor(str(tagging_model), device="cpu", tags=tags)
    ids, documents = zip(*ROWS)
    columns = {"id": list(ids), "text": list(documents)}
    batch = {
        "numpy": {name: np.array(values, dtype=object) for name, values in columns.items()},
        "pandas": pd.DataFrame(columns),
        "pyarrow": pa.table(columns),
    }[batch_kind]
    found = predictor(batch)
    name = "tags" if tags else "entities"
    if batch_kind == "numpy":
        values, errors = found[name].tolist(), found["error"].tolist()
    else:
        table = found if batch_kind == "pyarrow" else pa.Table.from_pandas(found)
        values, errors = table[name].to_pylist(), table["error"].to_pylist()
        kind = "tag" if tags else "label"
        assert table.schema.field(name).type.value_type.field(0).name == kind
    wanted = expected(tagging_model, tags)
    for identifier, value, error in zip(ids, values, errors, strict=True):
        assert error == REASONS.get(identifier)
        if error:
            assert value is None
        else:
            assert [(each["start_char"], each["end_char"]) for each in value] == [
                (each["start_char"], each["end_char"]) for each in wanted[identifier]
            ]
