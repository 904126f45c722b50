"""Speed chosen when the model is used: fractions for a speed-up, cutoffs for fractions, the table, what is picked."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from tests.conftest import tiny_classifier, tiny_tokenizer
from trbert_model import CheckpointError, ConfigurationError, TRBertConfig
from trbert_model.calibration.measure import (
    calibrate,
    cutoffs_for,
    kept_fractions_for,
    schedules,
    thresholds_of,
)
from trbert_model.calibration.table import (
    Calibration,
    OperatingPoint,
    calibration_key,
    pareto_front,
    read_calibration,
    with_table,
)
from trbert_model.engine import Engine, EngineOptions
from trbert_model.flops import dense_flops, reduced_flops
from trbert_model.reduction.policies import ThresholdPolicy
from trbert_model.tasks.classification.labelled import LabelledTexts


@pytest.mark.parametrize("speedup", [1.5, 2.0, 3.0, 5.0])
def test_kept_fractions_spend_what_was_asked_for(speedup):
    config, lengths = TRBertConfig(), np.array([100, 512, 300, 512])
    for exponents in [None, *schedules(2)]:
        fractions = np.array(kept_fractions_for(speedup, config, lengths, exponents))
        powers = (1, 2) if exponents is None else exponents
        assert np.log(fractions[1]) / np.log(fractions[0]) == pytest.approx(powers[1] / powers[0])
        kept = np.round(np.outer(lengths, fractions))
        reached = dense_flops(config, lengths).sum() / reduced_flops(config, lengths, kept).sum()
        assert reached == pytest.approx(speedup, rel=0.02)


def test_a_speedup_out_of_reach_is_refused_with_the_ceiling():
    with pytest.raises(ConfigurationError, match=r"keeping one token after each gives 5\.\d+; reduce earlier"):
        kept_fractions_for(6.5, TRBertConfig(num_hidden_layers=6), np.array([500]))
    assert kept_fractions_for(6.5, TRBertConfig(num_hidden_layers=6, reduction_layers=[0, 3]), np.array([500]))


def calm_classifier(**config):
    model = tiny_classifier(**config)
    for selector in model.bert.encoder.selectors:
        torch.nn.init.normal_(selector.linear_2.weight, std=0.1)  # wider ones saturate the probabilities
    return model


def corpus(count=200, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(5, 20, rng.integers(20, 29)).astype(np.int32) for _ in range(count)]


def test_cutoffs_keep_the_fractions_asked_for():
    documents, fractions = corpus(), [0.8, 0.4, 0.2]
    engine = Engine(calm_classifier(reduction_layers=[0, 1, 3]), tiny_tokenizer(), EngineOptions(device="cpu"))
    cutoffs = cutoffs_for(engine, documents, fractions)
    results = engine.score(documents, ThresholdPolicy(thresholds_of(cutoffs)))
    np.testing.assert_allclose(results.kept_tokens.sum(0) / results.num_tokens.sum(), fractions, atol=0.02)


def point(speedup: float, accuracy: float, drop: float = 0.0) -> OperatingPoint:
    return OperatingPoint((0.5,), (0.3,), ((0.1, 0.5),), speedup, speedup, accuracy, (0, 100), drop, (-1, 1))


def test_the_front_has_no_point_that_another_beats():
    points = [point(2, 90), point(3, 91), point(4, 85), point(4, 86), point(4.03, 40), point(6, 70), point(5, 60)]
    assert [(p.flops_speedup, p.metric) for p in pareto_front(points)] == [(3, 91), (4, 86), (6, 70)]


def test_a_choice_takes_the_best_point_that_keeps_the_promise():
    table = Calibration(
        "k", "c", 100, "accuracy", 92.0, point(2.2, 91), (point(2, 91.8, 0.2), point(3, 91, 1.0), point(4, 89, 3.0))
    )
    assert table.pick(speedup=2).flops_speedup == 2
    assert table.pick(speedup=2.5).flops_speedup == 3
    assert table.pick(max_drop=1.0, confidence=0.0).flops_speedup == 3
    assert table.pick(max_drop=0.5, confidence=0.0).flops_speedup == 2
    with pytest.raises(ConfigurationError, match=r"speedup 5 is beyond the calibration table, which ends at 4\.00x"):
        table.pick(speedup=5)
    with pytest.raises(ConfigurationError, match=r"max_drop 0.1: at 0% confidence, 0\.20 points may be lost .* 2\.00x"):
        table.pick(max_drop=0.1, confidence=0.0)


def test_a_drop_counts_with_the_confidence_asked_for():
    each = point(2, 90, 0.2)
    assert each.largest_drop(0.95) == pytest.approx(1.0), "the end of the measured interval"
    assert each.largest_drop(0.0) == 0.2
    drops = [each.largest_drop(confidence) for confidence in (0.0, 0.5, 0.9, 0.95, 0.99)]
    assert drops == sorted(drops)
    table = Calibration("k", "c", 100, "accuracy", 92.0, each, (each,))
    assert table.pick(max_drop=1.0) is each
    with pytest.raises(
        ConfigurationError, match=r"at 95% confidence, 1\.00 points may be lost even at 2\.00x \(0\.20 "
    ):
        table.pick(max_drop=0.9)


def test_a_table_is_measured_written_and_read_again(tmp_path):
    documents = corpus(60)
    engine = Engine(calm_classifier(reduction_layers=[0, 2]), tiny_tokenizer(), EngineOptions(device="cpu"))
    dense = Engine(
        calm_classifier(reduction_layers=[0, 2]), tiny_tokenizer(), EngineOptions(device="cpu", reduce=False)
    )
    labels = dense.score(documents).outputs.argmax(1)
    labels[:6] = (labels[:6] + 1) % 3
    key = calibration_key("0123456789abcdef0123", "float32", 32)
    labelled = LabelledTexts(documents, labels, engine.task)
    table = calibrate(engine, labelled, key=key, name="dev", speedups=(1.5, 2.5, 100.0))
    assert table.dense_metric == pytest.approx(90.0)
    assert table.documents == 60
    for each in table.points:
        results = engine.score(documents, ThresholdPolicy(each.thresholds))
        correct = results.outputs.argmax(1) == labels
        assert each.metric == pytest.approx(100 * correct.mean())
        assert each.drop == pytest.approx(90.0 - each.metric)
        assert each.flops_speedup == pytest.approx(results.dense_flops.sum() / results.flops.sum(), rel=1e-6)
        fractions = results.kept_tokens.sum(0) / results.num_tokens.sum()
        np.testing.assert_allclose(each.kept_fractions, fractions)
        assert all(low <= fraction <= high for fraction, (low, high) in zip(fractions, each.kept_spread))
    assert 1.3 < table.points[0].flops_speedup < 3
    assert table.default.thresholds == (0.5, 0.5)

    other = dataclasses.replace(table, key=calibration_key("0123456789abcdef0123", "bfloat16", 32))
    for each in (dataclasses.replace(table, corpus="an older one"), other, table):
        (tmp_path / "calibration.json").write_bytes(with_table(tmp_path, each))
    assert read_calibration(tmp_path, key) == table
    assert read_calibration(tmp_path, other.key) == other
    assert read_calibration(tmp_path, "another model's") is None
    assert read_calibration(tmp_path / "nowhere", key) is None
    (tmp_path / "calibration.json").write_text(json.dumps({key: {"points": [{}]}}))
    with pytest.raises(CheckpointError, match=r"calibration.json: damaged .* jobs/evaluate.py"):
        read_calibration(tmp_path, key)
    (tmp_path / "calibration.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"calibration.json: damaged .* remove it"):
        with_table(tmp_path, table)
