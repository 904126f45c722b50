"""Training exits: by the recipe of each system, on a finished TR-BERT too."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import BertConfig, BertModel

from tests.conftest import TINY, tiny_tokenizer
from trbert_model import ConfigurationError, TRBertConfig, TRBertForQuestionAnswering
from trbert_model.checkpoints.conversion import convert_checkpoint
from trbert_model.checkpoints.loading import load_model
from trbert_model.engine import Engine, EngineOptions
from trbert_model.training import TrainingConfig, train
from trbert_model.training.objectives import Exits

NONE = {"imitation_epochs": 0.0, "selectors_epochs": 0.0, "joint_epochs": 0.0}


@pytest.fixture
def corpus(tmp_path):
    """Documents whose label is which of two words they hold, and a tiny backbone."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(96):
        label = ["bad", "good"][i % 2]
        words = rng.choice(["the", "news", "of", "a", "game", "and"], rng.integers(8, 24)).tolist()
        words[rng.integers(len(words))] = label
        rows.append({"text": " ".join(words), "label": label})
    pq.write_table(pa.Table.from_pylist(rows[:64]), tmp_path / "train.parquet")
    pq.write_table(pa.Table.from_pylist(rows[64:]), tmp_path / "evaluation.parquet")
    torch.manual_seed(0)
    BertModel(BertConfig(**TINY)).save_pretrained(tmp_path / "backbone")
    tiny_tokenizer().save_pretrained(tmp_path / "backbone")
    return tmp_path


def options(corpus, **changes) -> TrainingConfig:
    values = {
        "train": str(corpus / "train.parquet"),
        "evaluation": str(corpus / "evaluation.parquet"),
        "backbone": str(corpus / "backbone"),
        "output": str(corpus / "model"),
        "fine_tune_epochs": 20.0,
        "learning_rate": 2e-3,
        "exit_learning_rate": 5e-3,
        "exits": "first",
    }
    return TrainingConfig(**values | changes)


def scored(directory, texts=("the good news", "a bad game of news"), **settings):
    model, tokenizer = load_model(directory)
    return Engine(model, tokenizer, EngineOptions(device="cpu", **settings)).score_columns(list(texts))


def losses_seen(monkeypatch, objective):
    """The objective's losses of each step."""
    seen, forward = [], objective.forward

    def recorded(self, **batch):
        measured = forward(self, **batch)
        seen.append(float(measured["exit_loss"]))
        return measured

    monkeypatch.setattr(objective, "forward", recorded)
    return seen


@pytest.mark.parametrize("kind", ["first", "attention"])
def test_exits_of_a_dense_model_learn_and_nothing_else_does(corpus, kind, monkeypatch):
    """DeeBERT's recipe. Its exits begin with the pre-trained pooler."""
    seen = losses_seen(monkeypatch, Exits)
    config = options(corpus, exits=kind, reduction_layers=(), exits_epochs=12.0)
    measured = train(config)["stages"]
    assert set(measured) == {"fine_tune", "exits", "exits_at_0.2"}
    assert np.mean(seen[-8:]) < 0.7 * np.mean(seen[:4])
    if kind == "first":  # an exit with attention is wider than the layers of this model
        assert measured["exits_at_0.2"]["flops_speedup"] > 1.05
        assert 0.9 < measured["exits"]["dense_passes_per_document"] < 1.6
    assert measured["exits_at_0.2"]["accuracy"] > 0.8
    model, _ = load_model(corpus / "model")
    assert model.config.exit_options.layers == (0, 1, 2)
    assert model.config.exit_options.thresholds == (0.0,) * 3
    before = torch.load(next((corpus / "model/stages/fine_tune").glob("*/optimizer.pt")), weights_only=True)
    assert before["state"]
    again = train(config)  # as after a kill
    assert again["stages"]["exits_at_0.2"] == measured["exits_at_0.2"]


def test_exits_are_added_to_a_finished_model_which_answers_as_before(corpus):
    finished = {"imitation_epochs": 2.0, "selectors_epochs": 0.0, "joint_epochs": 1.0, "speed_range": (1.3, 2.5)}
    train(options(corpus, exits=None, output=str(corpus / "finished"), reduction_layers=(0, 2), **finished))
    own = load_model(corpus / "finished")[0]
    changes = NONE | {"fine_tune_epochs": 0.0, "exits_epochs": 4.0, "evaluation": None}
    train(options(corpus, backbone=str(corpus / "finished"), speed_range=(1.3, 2.5), **changes))
    model = load_model(corpus / "model")[0]
    assert model.config.reduction_layers == [0, 2]
    assert model.config.selector_thresholds == own.config.selector_thresholds
    weights = model.state_dict()
    for name, value in own.state_dict().items():
        assert torch.equal(weights[name], value), name
    np.testing.assert_array_equal(scored(corpus / "model").outputs, scored(corpus / "finished").outputs)
    assert not torch.equal(weights["bert.encoder.exits.0.dense.weight"], weights["bert.pooler.dense.weight"])


def test_fresh_exits_change_nothing_and_begin_with_pooler_and_classifier(model_directory, tmp_path):
    own = load_model(model_directory)[0]
    model = convert_checkpoint(model_directory, keep_selectors=True, exits={"head": "first"}, gates={})
    for exit in model.bert.encoder.exits:
        assert torch.equal(exit.dense.weight, own.bert.pooler.dense.weight)
        assert torch.equal(exit.classifier.bias, own.classifier.bias)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    for settings in ({}, {"reduce": False}, {"thresholds": (0.4, 0.6)}):
        texts = ("the good news of the game " * 3, "bad", "a fine bank and a good sport. " * 4)
        before, after = (scored(each, texts, **settings) for each in (model_directory, tmp_path))
        np.testing.assert_array_equal(after.outputs, before.outputs)
        np.testing.assert_array_equal(after.kept_tokens, before.kept_tokens)
        np.testing.assert_array_equal(after.flops, before.flops)
    other = convert_checkpoint(model_directory, keep_selectors=True, reduction_layers=[1])
    assert other.config.reduction_layers == [1], "others that are asked for are new"
    again = convert_checkpoint(tmp_path, keep_selectors=True, exits={"head": "attention", "layers": [1]})
    assert [type(exit).__name__ for exit in again.bert.encoder.exits] == ["AttentionExit"]
    assert len(again.bert.encoder.gates) == 4, "what is not replaced stays"


def test_exits_where_they_make_no_sense_are_refused(corpus, tmp_path):
    for changes, message in [
        ({"exits": "last"}, "exits 'last': classification can have first or attention"),
        ({"exits": "words"}, "exits 'words': classification"),
        ({"task": "question-answering"}, "exits 'first': question-answering can have none"),
        ({"exits": None, "exit_layers": (1,)}, "need exits"),
        ({"exit_unit": "word"}, "only a head that reads words"),
        ({"exits": "words", "task": "token-classification", "exit_window": 4}, "window 4 must be an odd"),
        ({"adapter_rank": 4}, "an adapter has none"),
        ({"exits_epochs": -1.0}, "exits_epochs -1.0"),
    ]:
        with pytest.raises(ConfigurationError, match=message):
            options(corpus, **changes)
    with pytest.raises(ConfigurationError, match=r"exits: layers \(1, 9\) must be"):
        train(options(corpus, exit_layers=(1, 9), **NONE))
    table = pq.read_table(corpus / "train.parquet")
    for labels, what in [([["a", "b"], ["b"]] * 32, "multi_label_classification"), ([0.5, 1.5] * 32, "regression")]:
        pq.write_table(table.set_column(1, "label", pa.array(labels)), corpus / "other.parquet")
        with pytest.raises(ConfigurationError, match=f"exits and gates need one label per document.*{what}"):
            train(options(corpus, train=str(corpus / "other.parquet"), evaluation=None))
    with pytest.raises(ConfigurationError, match="the model has no exits"):
        train(options(corpus, exits=None, exits_epochs=1.0, **NONE))
    TRBertForQuestionAnswering(TRBertConfig(**TINY)).save_pretrained(tmp_path / "answers")
    with pytest.raises(ConfigurationError, match="question-answering, which has no exits"):
        convert_checkpoint(tmp_path / "answers", exits={"head": "first"})
