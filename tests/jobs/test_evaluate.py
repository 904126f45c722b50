"""jobs/evaluate.py: the table it measures, writes and draws, and what it refuses."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem

from jobs.command import run_command
from jobs.evaluate import main
from jobs.train import main as train
from pipeline.errors import UsageError
from pipeline.predict import TRBertPredictor
from tests.conftest import TAGS
from tests.pipeline.stages import texts
from trbert_model.calibration.table import calibration_key, read_calibration
from trbert_model.checkpoints.files import model_digest
from trbert_model.engine import Engine, EngineOptions
from trbert_model.errors import InputError
from trbert_model.options import LabelledColumns


@pytest.fixture
def labelled(model_directory, tmp_path):
    """A model of its own, and documents with the labels it gives them."""
    model = tmp_path / "model"
    shutil.copytree(model_directory, model)
    engine = Engine.from_pretrained(model, EngineOptions(device="cpu", reduce=False))
    documents = texts(40)
    labels = [engine.task.labels[i] for i in engine.score_columns(documents).outputs.argmax(1)]
    pq.write_table(pa.table({"text": documents, "label": labels}), tmp_path / "labelled.parquet")
    return model, tmp_path / "labelled.parquet"


def test_a_table_is_written_drawn_and_used(labelled, capsys):
    model, corpus = labelled
    digest = model_digest(model)
    assert main(["--model", str(model), "--corpus", str(corpus), "--speedups", "1.2,1.5,2"]) == 0
    printed = capsys.readouterr().out
    assert "40 documents of labelled.parquet, dense 100.00% accuracy" in printed
    assert "default" in printed
    assert (model / "calibration.png").read_bytes().startswith(b"\x89PNG")
    assert model_digest(model) == digest, "a table changes nothing in the model's results"
    table = read_calibration(model, calibration_key(digest, "float32", 32))
    assert table is not None
    assert table.dense_metric == 100.0

    fastest = table.points[-1]
    predictor = TRBertPredictor(str(model), speedup=fastest.flops_speedup, device="cpu")
    batch = predictor({"text": np.array(pq.read_table(corpus)["text"].to_pylist(), dtype=object)})
    kept = np.stack(batch["kept_tokens"]).sum(0) / batch["num_tokens"].sum()
    np.testing.assert_allclose(kept, fastest.kept_fractions, rtol=1e-6)
    with pytest.raises(UsageError, match="max_drop -200"):
        TRBertPredictor(str(model), max_drop=-200, device="cpu")


def test_no_write_leaves_the_model_alone(labelled, tmp_path):
    model, corpus = labelled
    before = sorted(path.name for path in model.iterdir())
    plot = tmp_path / "plot.svg"
    arguments = ["--model", str(model), "--corpus", str(corpus), "--speedups", "1.5", "--no-write"]
    assert main([*arguments, "--plot", str(plot)]) == 0
    assert sorted(path.name for path in model.iterdir()) == before
    assert "<svg" in plot.read_text()


def test_a_plot_that_cannot_be_drawn_is_an_error_after_the_table_is_written(labelled, capsys):
    model, corpus = labelled
    arguments = ["--model", str(model), "--corpus", str(corpus), "--speedups", "1.5", "--plot"]
    for plot in (f"{corpus}/plot.png", f"{model}/plot.odd"):
        assert run_command(lambda plot=plot: main([*arguments, plot])) == 1
        printed = capsys.readouterr()
        assert "written to" in printed.out
        assert printed.err.splitlines()[-1].startswith(f"error: {plot}: cannot be drawn: ")


def test_what_cannot_be_measured_is_refused(labelled, tmp_path):
    model, corpus = labelled
    with pytest.raises(UsageError, match="corpus is required"):
        main(["--model", str(model)])
    with pytest.raises(UsageError, match=r"speedups .* more than 1"):
        main(["--model", str(model), "--corpus", str(corpus), "--speedups", "0.5"])
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"reduction_layers": [], "selector_thresholds": []}))
    with pytest.raises(UsageError, match="no reduction layers"):
        main(["--model", str(model), "--corpus", str(corpus)])


def test_a_corpus_is_read_as_a_run_reads_its_input(labelled, monkeypatch):
    """Through Storage: requests that fail for a passing reason are made again, and no secret is shown."""
    model, corpus = labelled
    failures = iter([ConnectionError("reset"), None])
    opened = LocalFileSystem.open

    def flaky(self, path, *args, **kwargs):
        if path == str(corpus) and (error := next(failures, None)):
            raise error
        return opened(self, path, *args, **kwargs)

    monkeypatch.setattr(LocalFileSystem, "open", flaky)
    assert main(["--model", str(model), "--corpus", str(corpus), "--speedups", "1.5", "--no-write"]) == 0
    with pytest.raises(InputError, match=r"nowhere\.parquet: cannot be read as Parquet: .*there is no such file"):
        main(["--model", str(model), "--corpus", str(corpus.with_name("nowhere.parquet"))])
    for command in (["--model", str(model), "--corpus"], ["--backbone", "b", "--output", "o", "--train"]):
        run = main if "--corpus" in command else train
        with pytest.raises(UsageError, match="credentials do not belong in a URI") as refused:
            run([*command, "s3://key:secret@bucket/questions.json"])
        assert "secret@" not in str(refused.value)


def test_questions_are_measured_by_all_their_metrics(answering_model, tmp_path, capsys):
    contexts = texts(12)
    answers = [[] if i % 3 == 0 else [context.split()[0]] for i, context in enumerate(contexts)]
    columns = {
        "id": [str(i) for i in range(12)],
        "question": ["the good news"] * 12,
        "context": contexts,
        "answers": pa.array(answers, pa.list_(pa.string())),
        "answer_start": pa.array([[0] * len(each) for each in answers], pa.list_(pa.int64())),
    }
    pq.write_table(pa.table(columns), tmp_path / "questions.parquet")
    model = tmp_path / "model"
    shutil.copytree(answering_model, model)
    assert main(["--model", str(model), "--corpus", str(tmp_path / "questions.parquet"), "--speedups", "1.2"]) == 0
    engine = Engine.from_pretrained(model, EngineOptions(device="cpu", reduce=False))
    corpus = engine.task.read_corpus(str(tmp_path / "questions.parquet"), LabelledColumns())
    dense = {name: 100 * value for name, value in corpus.measure(engine.score(corpus.documents)).items()}
    printed = capsys.readouterr().out
    assert (
        f"12 documents of questions.parquet, dense {dense['f1']:.2f}% f1, {dense['exact_match']:.2f}% exact_match, "
        f"{dense['no_answer_f1']:.2f}% no_answer_f1\n"
    ) in printed
    key = calibration_key(model_digest(model), "float32", engine.config.usable_positions)
    table = read_calibration(model, key)
    assert table is not None
    assert set(table.points[0].other_metrics) == {"exact_match", "no_answer_f1"}
    assert table.dense_other_metrics["exact_match"] == pytest.approx(dense["exact_match"])


def test_tags_are_measured_by_entities_and_words(tagging_model, tmp_path, capsys):
    tokens = [text.split() for text in texts(12)]
    tags = [[TAGS[(i * 7) % 5] for i in range(len(each))] for each in tokens]
    pq.write_table(pa.table({"tokens": tokens, "tags": tags}), tmp_path / "words.parquet")
    model = tmp_path / "model"
    shutil.copytree(tagging_model, model)
    assert main(["--model", str(model), "--corpus", str(tmp_path / "words.parquet"), "--speedups", "1.2"]) == 0
    engine = Engine.from_pretrained(model, EngineOptions(device="cpu", reduce=False))
    corpus = engine.task.read_corpus(str(tmp_path / "words.parquet"), LabelledColumns())
    dense = {name: 100 * value for name, value in corpus.measure(engine.score(corpus.documents)).items()}
    printed = capsys.readouterr().out
    (table,) = json.loads((model / "calibration.json").read_text()).values()
    assert table["metric"] == "f1"
    assert table["dense_other_metrics"] == pytest.approx(
        {name: dense[name] for name in ("precision", "recall", "accuracy")}
    )
    assert all(name in printed for name in dense)
