"""One label of several, any number of labels, or numbers: converted, trained, measured and scored."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel

from jobs.evaluate import main as evaluate
from pipeline import TRBertPredictor
from tests.conftest import TINY, classification_task, tiny_tokenizer
from trbert_model import InputError
from trbert_model.checkpoints.conversion import convert_checkpoint
from trbert_model.options import LabelledColumns
from trbert_model.tasks.base import DocumentResults, TaskOptions
from trbert_model.tasks.classification.labelled import LabelledTexts, RawTexts
from trbert_model.tasks.classification.labellings import MULTI_LABEL, REGRESSION, MultiLabel, Regression, SingleLabel
from trbert_model.tasks.classification.losses import LOSSES
from trbert_model.tasks.classification.task import ClassificationTask
from trbert_model.training import TrainingConfig, train

LABELLINGS = {"single": SingleLabel, "multi": MultiLabel, "numbers": Regression}


def task(kind: str, labels: tuple[str, ...] = ("x", "y"), **options) -> ClassificationTask:
    settings = TaskOptions(**options)
    return ClassificationTask(tiny_tokenizer(), 32, LABELLINGS[kind](labels, settings), settings)


@pytest.mark.parametrize(
    ("config", "labels"),
    [
        ({"problem_type": MULTI_LABEL, "num_labels": 4}, torch.tensor([[1.0, 0, 0, 1], [0, 1, 0, 0]])),
        ({"problem_type": REGRESSION, "num_labels": 3}, torch.tensor([[1.0, -2, 0], [0.5, 1, 7]])),
        ({"num_labels": 1}, torch.tensor([[0.3], [2.0]])),
    ],
    ids=["several labels", "three numbers", "a number"],
)
def test_a_checkpoint_gives_what_transformers_gives(tmp_path, config, labels):
    """Logits and loss, with everything kept."""
    torch.manual_seed(0)
    source = BertForSequenceClassification(BertConfig(**TINY, **config)).eval()
    source.save_pretrained(tmp_path / "source")
    convert_checkpoint(tmp_path / "source").save_pretrained(tmp_path / "trbert")
    model = convert_checkpoint(tmp_path / "trbert")  # and again, from a saved one
    ids, mask = torch.randint(5, 20, (2, 9)), torch.tensor([[1] * 9, [1] * 4 + [0] * 5])
    with torch.inference_mode():
        expected, found = (
            source(ids, attention_mask=mask, labels=labels),
            model(ids, attention_mask=mask, labels=labels),
        )
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.loss, expected.loss, atol=1e-5, rtol=0)


def test_results_of_several_labels():
    several = task("multi", ("x", "y", "z"), label_threshold=0.6)
    columns = several.result_columns(np.array([[3.0, 0.0, 0.5], [-9.0, -9.0, -1000.0]], np.float32), [])
    assert tuple(columns) == several.result_names == ("labels", "probabilities")
    assert columns["labels"].to_pylist() == [["x", "z"], []]
    np.testing.assert_allclose(columns["probabilities"].to_pylist()[0], [0.952574, 0.5, 0.622459], atol=1e-6)
    assert several.counts(columns) == {"x": 1, "z": 1}
    assert several.result_columns(np.zeros((0, 3), np.float32), [])["labels"].to_pylist() == []


def test_results_that_are_numbers():
    one, two = task("numbers", ("score",)), task("numbers", ("a", "b"))
    logits = np.array([[1.5, -2.0], [0.0, 8.0]], np.float32)
    assert one.result_columns(logits[:, :1], [])["score"].to_pylist() == [1.5, 0.0]
    assert two.result_columns(logits, [])["scores"].to_pylist() == [[1.5, -2.0], [0.0, 8.0]]
    assert (one.result_names, two.result_names) == (("score",), ("scores",))
    assert two.counts(two.result_columns(logits, [])) == {}


def test_what_nobody_knows_is_what_the_dense_model_says():
    nan = float("nan")
    signals = torch.tensor([[2.0, -1.0], [0.5, 3.0]])
    for kind, labels, expected in [
        (MULTI_LABEL, [[0.0, 1.0], [nan, nan]], [[0.0, 1.0], [1.0, 1.0]]),
        (REGRESSION, [[7.0, 8.0], [nan, nan]], [[7.0, 8.0], [0.5, 3.0]]),
    ]:
        losses = LOSSES[kind](2)
        completed = losses.completed({"labels": torch.tensor(labels)}, signals)
        assert completed["labels"].tolist() == expected
        assert not losses.to_labels(signals, completed["labels"]).isnan().any()


def test_a_price_of_tokens_does_not_hang_on_the_units():
    """The loss of numbers is in units of their variance: the same for kilometres and metres."""
    targets = np.array([[1.0, 0.1], [2.0, 0.3], [5.0, 0.2]], np.float32)
    losses = []
    for unit in (1.0, 1000.0):
        corpus = LabelledTexts([np.arange(5, 9)] * 3, targets * unit, task("numbers"))
        found = corpus.dataset().losses
        losses.append(found.to_labels(torch.zeros(3, 2), torch.from_numpy(targets * unit)))
    torch.testing.assert_close(*losses)


def results(outputs: np.ndarray) -> DocumentResults:
    none = np.zeros(len(outputs))
    return DocumentResults(outputs, none, none, np.zeros((len(outputs), 0)), none, none, none)


def test_metrics_of_several_labels_and_of_numbers():
    """As scikit-learn has them: f1_score(average="samples", zero_division=1), accuracy_score, r2_score."""
    right = np.array([[1, 0, 1], [0, 0, 0], [0, 1, 0]], np.float32)
    corpus = LabelledTexts([np.arange(5, 9)] * 3, right, task("multi", ("x", "y", "z")))
    found = np.array([[3.0, 1.0, -1.0], [-1.0, -1.0, -2.0], [-1.0, 2.0, -3.0]], np.float32)
    assert corpus.measure(results(found)) == pytest.approx({"f1": (0.5 + 1 + 1) / 3, "exact_match": 2 / 3})
    numbers = LabelledTexts([np.arange(5, 9)] * 3, np.array([[1.0], [2.0], [6.0]], np.float32), task("numbers", ("a",)))
    assert numbers.measure(results(np.array([[1.5], [2.0], [5.0]]))) == pytest.approx({"r2": 1 - 1.25 / 14})
    assert numbers.measure(results(np.full((3, 1), 3.0))) == pytest.approx({"r2": 0.0})


@pytest.mark.parametrize(
    ("labels", "problem_type", "message"),
    [
        (pa.array([["x"], ["y"]]), REGRESSION, "of type list<.*string> is none for regression"),
        (pa.array(["x", "y"]), MULTI_LABEL, "of type string is none for multi_label"),
        (pa.array(["x", "y"]), REGRESSION, "could not convert string to float"),
        (pa.array([1.0, float("nan")]), None, r"row 1: \[nan\] are no such numbers"),
        (pa.array([[1.0], [1.0, 2.0]]), None, r"row 1: \[1.0, 2.0\] are"),
    ],
)
def test_labels_of_another_kind_are_refused_by_name(tmp_path, labels, problem_type, message):
    pq.write_table(pa.table({"text": ["a", "b"], "label": labels}), tmp_path / "corpus.parquet")
    with pytest.raises(InputError, match=f"corpus.parquet: column 'label'.*{message}"):
        RawTexts.read(str(tmp_path / "corpus.parquet"), LabelledColumns(), problem_type)


def test_labels_and_numbers_that_the_model_does_not_have_are_refused(tmp_path):
    path = str(tmp_path / "corpus.parquet")
    pq.write_table(pa.table({"text": ["a", "b"], "label": [["x"], ["z"]]}), path)
    with pytest.raises(InputError, match=r"labels \['z'\] are none of the model's"):
        LabelledTexts.read(path, task("multi"), LabelledColumns())
    pq.write_table(pa.table({"text": ["a", "b"], "label": [1.0, 2.0]}), path)
    with pytest.raises(InputError, match="1 numbers a document, the model gives 2"):
        LabelledTexts.read(path, task("numbers"), LabelledColumns())
    with pytest.raises(InputError, match="none of the model's"):
        LabelledTexts.read(path, classification_task(), LabelledColumns())


def words(kind: str, seed: int, count: int) -> pa.Table:
    """Documents whose labels are which of two words they hold, or how often they hold one."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        document = rng.choice(["the", "news", "of", "a", "game", "and"], rng.integers(12, 24))
        indices = rng.permutation(len(document))
        good, bad = int(rng.integers(0, 5)), int(rng.integers(0, 2))
        document[indices[:good]] = "good"
        if bad:
            document[indices[good]] = "bad"
        labels = [*(["good"] if good else []), *(["bad"] if bad else [])]
        rows.append({"text": " ".join(document), "label": labels if kind == "multi" else good / 2})
    schema = pa.schema([("text", pa.string()), ("label", pa.list_(pa.string()) if kind == "multi" else pa.float64())])
    return pa.Table.from_pylist(rows, schema)


@pytest.mark.parametrize(("kind", "metric", "least"), [("multi", "f1", 0.9), ("numbers", "r2", 0.7)])
def test_trained_measured_and_scored(tmp_path, kind, metric, least, capsys):
    """What a newcomer does, with labels of another kind: train, evaluate, map_batches."""
    for name, seed, count in (("train", 0, 128), ("evaluation", 1, 48)):
        pq.write_table(words(kind, seed, count), tmp_path / f"{name}.parquet")
    torch.manual_seed(0)
    BertModel(BertConfig(**TINY)).save_pretrained(tmp_path / "backbone")
    tiny_tokenizer().save_pretrained(tmp_path / "backbone")
    config = TrainingConfig(
        train=str(tmp_path / "train.parquet"),
        evaluation=str(tmp_path / "evaluation.parquet"),
        backbone=str(tmp_path / "backbone"),
        output=str(tmp_path / "model"),
        fine_tune_epochs=40.0,
        imitation_epochs=4.0,
        selectors_epochs=1.0,
        joint_epochs=2.0,
        learning_rate=2e-3,
        speedup=1.5,
        feature_distillation=1.0,
    )
    measured = train(config)["stages"]
    assert measured["fine_tune"][metric] > least
    assert measured["joint"][metric] > least - 0.15

    model, corpus = str(tmp_path / "model"), str(tmp_path / "evaluation.parquet")
    capsys.readouterr()
    assert evaluate(["--model", model, "--corpus", corpus, "--speedups", "1.5"]) == 0
    assert f"% {metric}" in capsys.readouterr().out
    (measured_table,) = json.loads((tmp_path / "model/calibration.json").read_text()).values()
    assert measured_table["metric"] == metric

    table = pq.read_table(corpus)
    scored = TRBertPredictor(model, device="cpu", reduce=False)(table)
    right = table["label"].to_pylist()
    if kind == "multi":
        found = [sorted(labels) for labels in scored["labels"].to_pylist()]
        assert np.mean([a == sorted(b) for a, b in zip(found, right)]) > 0.7
        assert all(len(each) == 2 for each in scored["probabilities"].to_pylist())
    else:
        assert np.corrcoef(scored["score"].to_numpy(), right)[0, 1] > 0.8
