"""Training exits: by the recipe of each system, on a finished TR-BERT too."""

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import TAGS, TINY, tiny_classifier, tiny_tagger, tiny_tokenizer
from tests.trbert_model.two_words import places_in, rows_of, save_backbone, write_parts
from trbert_model import ConfigurationError, TrainingError, TRBertConfig, TRBertForQuestionAnswering
from trbert_model.checkpoints.conversion import convert_checkpoint
from trbert_model.checkpoints.loading import load_model
from trbert_model.engine import Engine, EngineOptions
from trbert_model.exits.policies import ExitThresholds, uncertainty
from trbert_model.exits.training import MixingGates, PlannedExits, planned_exits
from trbert_model.reduction.policies import keep_all
from trbert_model.tasks.classification.losses import losses_of
from trbert_model.training import TrainingConfig, train
from trbert_model.training.objectives import Exits, Gates, SelfSampling
from trbert_model.varlen import model_inputs

NONE = {"imitation_epochs": 0.0, "selectors_epochs": 0.0, "joint_epochs": 0.0}


@pytest.fixture
def corpus(tmp_path):
    """Documents whose label is which of two words they hold, and a tiny backbone."""
    write_parts(tmp_path, rows_of(8, 24))
    save_backbone(tmp_path / "backbone")
    return tmp_path


def options(corpus, **changes) -> TrainingConfig:
    values = {
        **places_in(corpus),
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


def test_exits_of_a_dense_model_learn_and_nothing_else_does(corpus, monkeypatch):
    """DeeBERT's recipe. Its exits begin with the pre-trained pooler."""
    seen = losses_seen(monkeypatch, Exits)
    config = options(corpus, reduction_layers=(), exits_epochs=12.0)
    measured = train(config)["stages"]
    assert set(measured) == {"fine_tune", "exits", "exits_at_0.2"}
    assert np.mean(seen[-8:]) < 0.7 * np.mean(seen[:4])
    assert measured["exits_at_0.2"]["flops_speedup"] > 1.05
    assert 0.9 < measured["exits"]["dense_passes_per_document"] < 1.6
    assert measured["exits_at_0.2"]["accuracy"] > 0.8
    model, _ = load_model(corpus / "model")
    assert model.config.exit_options.layers == (0, 1, 2)
    assert model.config.exit_options.thresholds == (0.0,) * 3
    trained = {
        path.parent.parent.name: load_file(path) for path in (corpus / "model/stages").rglob("model.safetensors")
    }
    changed = {name for name, value in trained["fine_tune"].items() if not torch.equal(value, trained["exits"][name])}
    assert changed == {f"model.{name}" for name, _ in model.named_parameters() if ".exits." in name}
    again = train(config)  # as after a kill
    assert again["stages"]["exits_at_0.2"] == measured["exits_at_0.2"]


def test_exits_are_added_to_a_finished_model_which_answers_as_before(corpus):
    finished = {"imitation_epochs": 2.0, "selectors_epochs": 0.0, "joint_epochs": 1.0, "speedup": 1.6}
    finished["fine_tune_epochs"] = 3.0
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
    with pytest.raises(ConfigurationError, match="gates: they skip layers of whole documents"):
        options(corpus, task="token-classification", exits="words", gates=True)
    with pytest.raises(ConfigurationError, match="no exits that halt words"):
        train(options(corpus, halting_epochs=1.0, **NONE))


def test_gates_learn_with_the_layers_and_the_exits_after_them(corpus, monkeypatch):
    """SmartBERT's recipe, from a fine-tuned model."""
    skipped, forward = [], Gates.forward

    def recorded(self, **batch):
        measured = forward(self, **batch)
        skipped.append(float(measured["skipped"]))
        return measured

    monkeypatch.setattr(Gates, "forward", recorded)
    seen = losses_seen(monkeypatch, Exits)
    config = options(
        corpus,
        exits="attention",
        gates=True,
        reduction_layers=(),
        fine_tune_epochs=8.0,
        gates_epochs=10.0,
        exits_epochs=5.0,
        distillation=False,
        joint_learning_rate=1e-3,
    )
    measured = train(config)["stages"]
    assert set(measured) == {"fine_tune", "gates", "exits", "exits_at_0.2"}
    assert len(skipped) == 40
    assert 0 < np.mean(skipped[-5:]) < 0.3
    assert np.mean(seen[-4:]) < 0.5 * np.mean(seen[:4])
    assert measured["gates"]["accuracy"] > 0.8
    model, _ = load_model(corpus / "model")
    assert model.config.gate_options.threshold == 0.5
    fresh = convert_checkpoint(corpus / "model", gates={}).state_dict()
    learnt = {name: value for name, value in model.state_dict().items() if ".gates." in name}
    learnt = {name: value for name, value in learnt.items() if "key.bias" not in name}  # changes no attention
    assert learnt
    assert not any(torch.equal(value, fresh[name]) for name, value in learnt.items())
    assert scored(corpus / "model").exit_layers.tolist() == [4.0, 4.0], "exits have no thresholds yet"
    costly = dataclasses.replace(config, gate_penalty=9.0, output=str(corpus / "costly"), evaluation=None)
    with pytest.raises(TrainingError, match="gates: they skip 100% of all layers; lower gate_penalty"):
        train(dataclasses.replace(costly, fine_tune_epochs=1.0, gates_epochs=4.0))


def test_gates_that_are_sure_skip_as_inference_does():
    """Mixed by 0 or 1, layers are run or skipped; by less, their gates have gradients. Hard ones have them too."""
    model = tiny_classifier(gates={}, reduction_layers=[])
    inputs = model_inputs([[2, 5, 6, 3], [2, 7, 8, 9, 10, 3], [2, 6, 3]])
    for gate in model.bert.encoder.gates:
        torch.nn.init.normal_(gate.linear.weight, std=3.0)
    hard = model(**inputs, exit_policy=MixingGates(hard=True))
    skipping = ExitThresholds(gate=0.5)
    with torch.no_grad():
        expected = model(**inputs, exit_policy=skipping)
    assert 0 < int((expected.trace.counts[2] == 0).sum()) < 12
    torch.testing.assert_close(hard.logits, expected.logits)
    for policy in (MixingGates(hard=True), MixingGates(hard=False)):
        model.zero_grad()
        model(**inputs, exit_policy=policy).logits.sum().backward()
        assert all(gate.linear.weight.grad.abs().sum() > 0 for gate in model.bert.encoder.gates)


def words_tagger(**exits):
    """A tagger in whose layers no token sees another, and normalisation changes nothing: halting changes no state."""
    model = tiny_tagger(exits={"head": "words", "layers": [0, 1, 2], "unit": "word"} | exits, reduction_layers=[])
    for layer in model.bert.encoder.layer:
        for dense in (layer.attention.output.dense, layer.output.dense):
            torch.nn.init.zeros_(dense.weight)
            torch.nn.init.zeros_(dense.bias)
    for head in model.bert.encoder.exits:
        torch.nn.init.normal_(head.classifier.weight, std=0.6)
    return model


@pytest.mark.parametrize("window", [1, 3, 5])
def test_words_are_planned_to_leave_where_thresholds_let_them_leave(window):
    model = words_tagger(window=window)
    rng = np.random.default_rng(1)
    lengths = [3, 9, 17, 30, 12, 2]
    sequences = [[2, *rng.integers(5, 20, length - 2).tolist(), 3] for length in lengths]
    # Words of one or two tokens.
    words = [np.pad(np.arange(length - 2) * 2 // 3, 1, constant_values=-1) for length in lengths]
    inputs = model_inputs(sequences) | {"words": torch.from_numpy(np.concatenate(words)).long()}
    with torch.no_grad():
        dense = model(**inputs, reduce=False, output_exits=True).exits.logits
        for thresholds in ((0.5, 0.6, 0.7), (0.75, 0.75, 0.8), (0.0, 0.9, 0.95)):
            output = model(**inputs, selection_policy=keep_all, exit_policy=ExitThresholds(thresholds))
            uncertainties = torch.stack([uncertainty(logits) for logits in dense], 1)
            windows = torch.full((6,), window)
            each = torch.tensor([thresholds]).repeat(6, 1)
            plan = planned_exits(uncertainties, inputs["words"], inputs["cu_seqlens"], windows, each)
            expected = torch.where(output.exits.layers > 0, output.exits.layers - 1, 3)
            assert torch.equal(plan, expected)
            assert 0 < int((plan < 3).sum()) < 50
            planned = model(**inputs, selection_policy=keep_all, exit_policy=PlannedExits(plan))
            torch.testing.assert_close(planned.logits, output.logits)


@pytest.mark.parametrize("distilled", [False, True])
def test_an_exit_learns_as_the_classifier_from_what_it_judged(distilled):
    """Of documents whose windows are pooled, from those that it judged in full."""
    model = tiny_classifier(exits={"head": "first", "layers": [1, 3]}, reduction_layers=[])
    windows = [[2, 5, 6, 3], [2, 7, 8, 9, 10, 3], [2, 6, 3], [2, 7, 3], [2, 11, 12, 3]]
    batch = {"labels": torch.tensor([0, 2, 1]), "example": torch.tensor([0, 1, 1, 2, 2]), "teacher": torch.randn(5, 3)}
    output = model(**model_inputs(windows), output_exits=True)
    losses = losses_of(model.config)
    each = losses.distilled if distilled else losses.labelled
    expected = [each(dataclasses.replace(output, logits=logits), batch) for logits in output.exits.logits]
    found = losses.of_exits(output.exits, batch, distilled=distilled)
    torch.testing.assert_close(found, torch.stack(expected).mean(1))
    output.exits.judged[1][3] = False
    found = losses.of_exits(output.exits, batch, distilled=distilled)
    torch.testing.assert_close(found, torch.stack([expected[0].mean(), expected[1][:2].mean()]))


@pytest.fixture
def tagged(corpus):
    rng, names = np.random.default_rng(0), {"good": "B-PER", "bad": "B-LOC"}
    rows = []
    for _ in range(48):
        tokens = rng.choice(["the", "news", "good", "bad", "game", "and"], rng.integers(4, 20)).tolist()
        rows.append({"tokens": tokens, "tags": [names.get(token, "O") for token in tokens]})
    pq.write_table(pa.Table.from_pylist(rows), corpus / "train.parquet")
    pq.write_table(pa.Table.from_pylist(rows[:16]), corpus / "evaluation.parquet")
    return corpus


def test_words_learn_to_be_halted(tagged, monkeypatch):
    """TOKEE's recipe: classifiers of all layers with the fine-tune, then halted words by plan."""
    halted, forward = [], SelfSampling.forward

    def recorded(self, **batch):
        measured = forward(self, **batch)
        halted.append(float(measured["halted"]))
        assert float(measured["dense_passes"]) < 3.2
        return measured

    monkeypatch.setattr(SelfSampling, "forward", recorded)
    settings = {"task": "token-classification", "exits": "words", "exit_unit": "word", "exit_window": 3}
    config = options(tagged, **settings, reduction_layers=(), fine_tune_epochs=50.0, halting_epochs=2.0)
    measured = train(config)["stages"]
    assert set(measured) == {"fine_tune", "halting", "halting_at_0.2"}
    assert len(halted) == 6
    assert 0.1 < np.mean(halted) < 0.9
    assert measured["halting_at_0.2"]["accuracy"] > 0.9
    assert measured["halting_at_0.2"]["flops_speedup"] > 1.1
    assert " of 4 layers that halts words after layers 0, 1, 2: " in (tagged / "model/README.md").read_text()


def test_exits_that_read_words_are_added_to_a_reduced_model(tagged):
    """On frozen layers, and each exit learns from the words that are still there."""
    torch.manual_seed(0)
    tiny_tagger(tags=TAGS).save_pretrained(tagged / "finished")
    tiny_tokenizer().save_pretrained(tagged / "finished")
    settings = {"task": "token-classification", "exits": "words", "fine_tune_epochs": 0.0, "exits_epochs": 2.0}
    train(options(tagged, **NONE, **settings, backbone=str(tagged / "finished"), evaluation=None))
    own, model = load_model(tagged / "finished")[0].state_dict(), load_model(tagged / "model")[0]
    changed = {
        name for name, value in model.state_dict().items() if name not in own or not torch.equal(value, own[name])
    }
    assert changed == {name for name, _ in model.named_parameters() if ".exits." in name}
    assert not torch.equal(model.bert.encoder.exits[0].classifier.weight, model.classifier.weight)
