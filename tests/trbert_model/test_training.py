"""Training: the guide, its targets, the kept fractions, and a whole run that resumes."""

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import BertConfig, BertModel

from tests.conftest import TINY, tiny_classifier, tiny_tokenizer
from trbert_model import ConfigurationError, InputError, TRBertConfig
from trbert_model.convert import apply_adapter
from trbert_model.engine import Engine, EngineOptions, load_model
from trbert_model.flops import dense_flops, reduced_flops
from trbert_model.training import (
    LabelledCorpus,
    TrainingConfig,
    WindowDataset,
    calibrate_thresholds,
    collate,
    guide,
    kept_fractions_for,
    read_labelled,
    top_tokens,
    train,
)


@pytest.mark.parametrize("speedup", [1.5, 2.0, 3.0, 5.0])
def test_kept_fractions_spend_what_was_asked_for(speedup):
    config, lengths = TRBertConfig(), np.array([100, 512, 300, 512])
    fractions = np.array(kept_fractions_for(speedup, config, lengths))
    assert fractions[1] == pytest.approx(fractions[0] ** 2)
    kept = np.round(np.outer(lengths, fractions))
    reached = dense_flops(config, lengths).sum() / reduced_flops(config, lengths, kept).sum()
    assert reached == pytest.approx(speedup, rel=0.02)


def test_a_speedup_out_of_reach_is_refused_with_the_ceiling():
    with pytest.raises(ConfigurationError, match=r"keeping one token after each gives 5\.\d+; reduce earlier"):
        kept_fractions_for(6.5, TRBertConfig(num_hidden_layers=6), np.array([500]))
    assert kept_fractions_for(6.5, TRBertConfig(num_hidden_layers=6, reduction_layers=[0, 3]), np.array([500]))


def test_top_tokens_are_the_highest_scored_and_the_first():
    scores = torch.tensor([0.0, 5, 4, 3, 0.0, 1, 2])
    chosen = top_tokens(scores, torch.tensor([0, 4, 7]), torch.tensor([3, 2]))
    assert chosen.tolist() == [True, True, True, False, True, False, True]
    assert top_tokens(scores, torch.tensor([0, 4, 7]), torch.tensor([9, 1])).tolist() == [True] * 5 + [False] * 2


def test_the_guide_is_the_originals_saliency():
    """abs⟨∂loss/∂h_d, h_d − h_i⟩ of one document at a time, by autograd from its definition."""
    model = tiny_classifier(num_hidden_layers=6, reduction_layers=[1, 3]).requires_grad_(False)
    model.enable_input_require_grads()
    documents = [np.arange(5, 14), np.arange(6, 20)]
    inputs = collate(list(zip(documents, [0, 2])))
    together = [scores.split(inputs["cu_seqlens"].diff().tolist()) for scores in guide(model, inputs)]
    for place, (document, label) in enumerate(zip(documents, [0, 2])):
        output = model(**collate([(document, label)]), reduce=False, output_hidden_states=True)
        h = output.hidden_states
        (gradient,) = torch.autograd.grad(output.loss, h[5])
        for reduction, layer in enumerate([1, 3]):
            expected = (gradient * (h[5] - h[layer])).sum(-1).abs()
            torch.testing.assert_close(together[reduction][place], expected, atol=1e-5, rtol=1e-3)


def test_calibrated_thresholds_keep_the_fractions_asked_for():
    task = Engine(tiny_classifier(), tiny_tokenizer(), EngineOptions(device="cpu")).task
    rng = np.random.default_rng(0)
    documents = [rng.integers(5, 20, 28).astype(np.int32) for _ in range(200)]
    dataset = WindowDataset(LabelledCorpus(documents, [0] * 200, ["x", "y"]), task)
    model = tiny_classifier()
    for selector in model.bert.encoder.selectors:
        torch.nn.init.normal_(selector.linear_2.weight, std=0.1)  # wider ones saturate the probabilities
    calibrate_thresholds(model, dataset, [0.4, 0.2])
    results = Engine(model, tiny_tokenizer(), EngineOptions(device="cpu")).score(documents)
    np.testing.assert_allclose(results.kept_tokens.sum(0) / results.num_tokens.sum(), [0.4, 0.2], atol=0.02)


def test_a_long_document_gives_any_of_its_windows():
    task = Engine(tiny_classifier(), tiny_tokenizer(), EngineOptions(device="cpu", stride=0)).task
    dataset = WindowDataset(LabelledCorpus([np.arange(100) % 15 + 5], [1], ["x", "y"]), task)
    torch.manual_seed(0)
    assert {len(dataset[0][0]) for _ in range(40)} == {32, 12}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"body": ["a"], "label": ["x"]}, "no column 'text'"),
        ({"text": ["a", None], "label": ["x", "y"]}, "1 rows have no 'text'"),
        ({"text": ["a", "b"], "label": ["x", "x"]}, "fewer than two different labels"),
    ],
)
def test_a_corpus_that_cannot_be_trained_on_is_refused(tmp_path, columns, message):
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    with pytest.raises(InputError, match=message):
        read_labelled(str(tmp_path / "train.parquet"), "text", "label")


def test_what_cannot_be_read_is_named(tmp_path):
    (tmp_path / "text.parquet").write_text("not Parquet")
    for name in ("text.parquet", "nowhere.parquet"):
        with pytest.raises(InputError, match=f"{name}: cannot be read as Parquet"):
            read_labelled(str(tmp_path / name), "text", "label")


def test_options_out_of_range_are_refused():
    places = {"train": "t", "backbone": "b", "output": "o"}
    for wrong, message in [
        ({"speedup": 1.0}, "speedup 1.0"),
        ({"dtype": "int8"}, "dtype"),
        ({"train": ""}, "train is"),
    ]:
        with pytest.raises(ConfigurationError, match=message):
            TrainingConfig(**places | wrong)


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


@pytest.mark.parametrize("adapter_rank", [None, 4])
def test_a_run_trains_saves_and_resumes(corpus, adapter_rank, caplog):
    config = TrainingConfig(
        train=str(corpus / "train.parquet"),
        evaluation=str(corpus / "evaluation.parquet"),
        backbone=str(corpus / "backbone"),
        output=str(corpus / "model"),
        adapter_rank=adapter_rank,
        fine_tune_epochs=30.0 if adapter_rank is None else 2.0,
        imitation_epochs=8.0,
        joint_epochs=2.0,
        learning_rate=2e-3,
        speedup=1.8,
    )
    measured = train(config)["stages"]
    assert set(measured) == {"fine_tune", "imitation", "joint", "joint_without_reduction"}
    assert measured["fine_tune"]["flops_speedup"] == 1.0
    assert measured["joint"]["flops_speedup"] == pytest.approx(1.8, rel=0.15)
    if adapter_rank is None:
        assert measured["fine_tune"]["accuracy"] > 0.9
        assert measured["joint"]["accuracy"] > 0.9

    model, tokenizer = load_model(corpus / "model")
    texts, labels = read_labelled(config.evaluation, "text", "label")
    engine = Engine(model, tokenizer, EngineOptions(device="cpu"))
    results = engine.score_texts(texts)
    accuracy = np.mean([engine.labels[i] == label for i, label in zip(results.logits.argmax(1), labels)])
    assert accuracy == measured["joint"]["accuracy"]
    assert json.loads((corpus / "model/training.json").read_text())["stages"] == measured
    if adapter_rank is not None:
        rebuilt = apply_adapter(corpus / "backbone", corpus / "model/adapter")
        again = Engine(rebuilt, tiny_tokenizer(), EngineOptions(device="cpu")).score_texts(texts)
        np.testing.assert_allclose(again.logits, results.logits, atol=1e-5)

    # Run again, as after a kill: every stage goes on from its last checkpoint, and the result is the same.
    again = train(config)["stages"]
    assert again["fine_tune"] == measured["fine_tune"]
    with pytest.raises(ConfigurationError, match="trained with other options"):
        train(dataclasses.replace(config, speedup=1.5))
