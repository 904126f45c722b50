"""Metrics over documents and their intervals."""

import numpy as np
import pytest

from trbert_model.scores import Scores


def test_a_mean_is_over_the_documents_that_the_metric_applies_to():
    assert Scores.mean_of(np.array([True, False, True, True])).value == 0.75
    scores = Scores.mean_of(np.array([1.0, np.nan, 0.0, 0.5]))
    assert scores.value == pytest.approx(0.5)
    assert scores[np.array([True, True, False, False])].value == 1.0
    assert (scores * 100).value == pytest.approx(50)
    assert Scores.mean_of(np.array([np.nan])).value == 0.0


def test_a_ratio_of_sums_counts_documents_by_their_size():
    scores = Scores(np.array([9.0, 0.0]), np.array([10.0, 1.0]))
    assert scores.value == pytest.approx(9 / 11)
    assert scores[np.array([1])].value == 0.0


def test_the_interval_holds_the_value_and_shrinks_with_documents():
    rng = np.random.default_rng(0)
    for documents, width in ((100, 2 * 1.96 / 10), (10_000, 2 * 1.96 / 100)):
        scores = Scores.mean_of(rng.normal(size=documents))
        low, high = scores.interval()
        assert low < scores.value < high
        assert high - low == pytest.approx(width, rel=0.25)


def test_the_interval_of_a_difference_is_paired():
    rng = np.random.default_rng(0)
    before = Scores.mean_of(rng.normal(size=400) * 100)
    better = Scores(before.numerators + rng.normal(1.0, 0.1, 400), before.denominators)
    low, high = better.interval(before)
    assert low < better.value - before.value < high
    assert high - low < 0.05
    assert before.interval(before) == (0.0, 0.0)
