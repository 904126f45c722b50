"""Thresholds of exits: results from a recording are those of a run, and tables choose all thresholds together."""

import re

import numpy as np
import pytest
import torch

import trbert_model
from tests.conftest import tiny_classifier, tiny_tagger, tiny_tokenizer
from trbert_model.calibration.exits import Trial, best_trials, exit_schedules, thresholds_for
from trbert_model.calibration.measure import calibrate
from trbert_model.calibration.table import AS_FAST
from trbert_model.engine import Engine, EngineOptions
from trbert_model.engine.options import operating_thresholds
from trbert_model.exits.options import NO_SKIPPING
from trbert_model.exits.policies import ExitThresholds
from trbert_model.exits.recording import ExitRecording
from trbert_model.reduction.policies import ThresholdPolicy, keep_all
from trbert_model.scores import Scores
from trbert_model.tasks.classification.labelled import LabelledTexts

FIRST = {"exits": {"head": "first", "layers": [0, 2]}}
SMART = {
    "exits": {"head": "attention", "layers": [0, 1, 2, 3], "answers_all": True, "size": 16, "heads": 2},
    "gates": {"size": 16, "heads": 2},
}
TOGETHER = {"exits": {"head": "words", "layers": [0, 1, 3]}}
SINGLY = {"exits": {"head": "words", "layers": [0, 1, 2], "unit": "word"}}
MODELS = {
    "first": (tiny_classifier, FIRST | {"reduction_layers": [1, 3]}),
    "without reduction": (tiny_classifier, FIRST | {"reduction_layers": []}),
    "gates": (tiny_classifier, SMART | {"reduction_layers": [2]}),
    "max": (tiny_tagger, {"exits": TOGETHER["exits"] | {"pool": "max"}, "reduction_layers": [1, 2]}),
    "mean": (tiny_tagger, {"exits": TOGETHER["exits"] | {"pool": "mean"}, "reduction_layers": [0]}),
}


def engine_of(make, config, **options):
    """An engine on a model whose exits and gates are unsure of some documents only, in small ragged batches."""
    model = make(num_hidden_layers=4, **config)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and re.search(r"\b(exits|gates|pooler|classifier)\b", name):
            torch.nn.init.normal_(module.weight, std=0.5)
    options = {"max_tokens_per_batch": 150, "dtype": "float32"} | options
    return Engine(model, tiny_tokenizer(), EngineOptions(device="cpu", **options))


def documents_of(engine, count=24):
    rng = np.random.default_rng(0)
    words = [f"{word} " for word in ("good", "bad", "news", "shares", "rose", "fell", "on", "friday", ".")]
    texts = ["".join(rng.choice(words, size)) for size in rng.integers(1, 80, count)]
    documents, failures = engine.task.encode_rows([(text,) for text in texts])
    assert not failures
    return documents


def assert_same(engine, found, expected):
    if isinstance(expected.outputs, np.ndarray):
        np.testing.assert_allclose(found.outputs, expected.outputs, atol=1e-5)
    else:
        for mine, its in zip(found.outputs, expected.outputs, strict=True):
            np.testing.assert_array_equal(mine.tags, its.tags)
            np.testing.assert_allclose(mine.scores, its.scores, atol=1e-5)
    for name in ("num_tokens", "num_windows", "kept_tokens"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), name)
    for name in ("exit_layers", "flops", "dense_flops"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-12, err_msg=name)


@pytest.mark.parametrize("name", MODELS)
def test_results_from_a_recording_are_those_of_a_run(name):
    """Answers, exit layers, tokens and FLOPs, whichever thresholds and in whichever batches."""
    engine = engine_of(*MODELS[name])
    documents, config = documents_of(engine), engine.config
    tokens = ThresholdPolicy([0.5] * len(config.reduction_layers))
    layers, seen = config.exit_options.layers, set()
    for gate in (NO_SKIPPING, 0.5) if config.gates else (NO_SKIPPING,):
        recording = ExitRecording()
        engine.score(documents, tokens, ExitThresholds(gate=gate), exit_recording=recording)
        some = thresholds_for(recording.uncertainties(), (0.2, 0.6))
        schedules = [each for threshold in (0.0, *some) for each in exit_schedules(threshold, layers, 4)]
        schedules.append((0.0, *[some[-1]] * (len(layers) - 1)))  # the first exit is not asked
        for schedule in schedules:
            expected = engine.score(documents, tokens, ExitThresholds(schedule, gate))
            assert_same(engine, recording.results(engine.task, config, documents, schedule), expected)
            seen |= set(expected.exit_layers.tolist())
    assert len(seen) > 4, "some windows leave early, and others do not"


def labelled(engine, documents):
    """Labels as the whole network gives them, for nine in ten, and which differ."""
    classifier = engine.model.classifier or engine.model.bert.encoder.exits[-1].classifier
    classifier.bias -= torch.from_numpy(np.median(engine.score(documents, keep_all).outputs, 0))
    labels = engine.score(documents, keep_all).outputs.argmax(1)
    labels[::10] = (labels[::10] + 1) % 3
    return LabelledTexts(documents, labels, engine.task)


@pytest.mark.parametrize("name", ["first", "without reduction", "gates"])
def test_a_table_chooses_the_thresholds_of_tokens_exits_and_gates_together(name):
    engine = engine_of(*MODELS[name], max_tokens_per_batch=4096)
    corpus, config = labelled(engine, documents_of(engine, 50)), engine.config
    table = calibrate(engine, corpus, key="k", name="dev", speedups=(1.5, 2.0))
    assert table.default.thresholds == operating_thresholds(config)
    assert len(table.points) > 1
    exits = slice(len(config.reduction_layers), len(config.reduction_layers) + len(config.exits["layers"]))
    for point in table.points:
        assert len(point.thresholds) == len(table.default.thresholds)
        chosen = Engine(engine.model, tiny_tokenizer(), EngineOptions(device="cpu", thresholds=point.thresholds))
        results = chosen.score(corpus.documents)
        assert point.flops_speedup == pytest.approx(results.dense_flops.sum() / results.flops.sum(), rel=1e-6)
        assert point.metric == pytest.approx(100 * corpus.scores(results).value)
    assert any(any(point.thresholds[exits]) for point in table.points)
    assert table.pick(speedup=1.5).flops_speedup >= AS_FAST * 1.5


def test_words_that_halt_are_run_with_thresholds_that_are_higher_in_the_upper_half(monkeypatch):
    engine = engine_of(tiny_tagger, SINGLY | {"reduction_layers": [3]}, max_tokens_per_batch=4096)
    documents = documents_of(engine)

    class Same(LabelledTexts):
        metric = "accuracy"

        def all_scores(self, results):
            pairs = zip(results.outputs, self.targets, strict=True)
            return {"accuracy": Scores.mean_of(np.array([(mine.tags == its.tags).mean() for mine, its in pairs]))}

    whole = engine.score(documents, keep_all)
    imitating = Same(documents, whole.outputs, engine.task)
    table = calibrate(engine, imitating, key="k", name="dev", speedups=(1.2, 1.5))
    assert table.dense_metric == 100
    halting = [point.thresholds[1:] for point in table.points if any(point.thresholds[1:])]
    assert halting
    for lower, same, upper in halting:
        assert lower == same
        assert upper == pytest.approx(min(2 * lower, 1.0))
    monkeypatch.setattr("trbert_model.calibration.exits._NEARER", 0)
    coarse = calibrate(engine, imitating, key="k", name="dev", speedups=(1.2, 1.5))
    fast = [
        [min(p.flops_speedup for p in each.points if p.flops_speedup >= AS_FAST * speedup) for speedup in (1.2, 1.5)]
        for each in (table, coarse)
    ]
    assert all(np.less_equal(*fast))
    assert any(np.less(*fast))


def test_thresholds_lie_between_values_and_let_the_shares_through():
    values = np.random.default_rng(0).random(1000, np.float32)
    for below in (True, False):
        found = thresholds_for(values, (0.1, 0.5, 0.9), below=below)
        shares = [(values < each).mean() if below else (values >= each).mean() for each in found]
        assert sorted(shares) == pytest.approx([0.1, 0.5, 0.9], abs=0.001)
        assert not set(found) & set(values.tolist())
    assert thresholds_for(np.full(9, 0.25, np.float32), (0.5,)) == []
    assert thresholds_for(np.zeros(0, np.float32), (0.5,)) == []


def test_exit_schedules_are_the_same_everywhere_or_twice_as_high_in_the_upper_half():
    assert exit_schedules(0.3, (0, 1, 2, 3), 4) == [(0.3, 0.3, 0.3, 0.3), (0.3, 0.3, 0.6, 0.6)]
    assert exit_schedules(0.7, (0, 3), 4) == [(0.7, 0.7), (0.7, 1.0)]
    assert exit_schedules(0.0, (0, 3), 4) == [(0.0, 0.0)]


def test_the_best_trial_for_a_speedup_has_the_highest_metric_of_those_that_are_fast_enough():
    trials = [Trial((0.1,), 1.0, 90.0), Trial((0.2,), 2.0, 89.0), Trial((0.3,), 2.5, 89.0), Trial((0.4,), 3.0, 80.0)]
    assert [trial.speedup for trial in best_trials(trials, (1.0, 1.5, 2.0, 3.0, 4.0))] == [1.0, 2.5, 3.0]


def test_an_explanation_shows_the_layers_that_documents_left_after():
    engine = engine_of(tiny_classifier, FIRST | {"reduction_layers": [2]}, thresholds=(0.0, 1.0, 0.0))
    explanation = trbert_model.explain(engine, "good news rose")
    assert set(explanation.texts[0].layers) == {1}
    assert [level[:2] for level in explanation.levels] == [(1, 3), (2, 0), (4, 0)]
    assert "1 of 4 layers: 3 tokens" in explanation.to_text()
