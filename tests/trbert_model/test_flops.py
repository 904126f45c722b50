"""FLOPs as the paper counts them."""

import numpy as np
import pytest

from trbert_model import TRBertConfig
from trbert_model.flops import dense_flops, reduced_flops

BASE = TRBertConfig()


@pytest.mark.parametrize(("tokens", "gflops"), [(128, 22.3), (512, 96.6), (1024, 212.6)])
def test_bert_base_costs_what_the_literature_says(tokens, gflops):
    assert dense_flops(BASE, np.array([tokens]))[0] / 1e9 == pytest.approx(gflops, abs=0.1)


@pytest.mark.parametrize(("first", "second", "speedup"), [(0.5, 0.25, 2.5), (0.3, 0.1, 4.1), (0.2, 0.05, 5.5)])
def test_kept_fractions_imply_the_known_speedups(first, second, speedup):
    tokens = np.array([512])
    kept = np.round(np.array([[first * 512, second * 512]]))
    assert dense_flops(BASE, tokens)[0] / reduced_flops(BASE, tokens, kept)[0] == pytest.approx(speedup, abs=0.1)


def test_selectors_are_counted():
    tokens, kept = np.array([100, 7]), np.array([[100, 100], [7, 7]])
    extra = reduced_flops(BASE, tokens, kept) - dense_flops(BASE, tokens)
    np.testing.assert_allclose(extra, 2 * 2 * tokens * (768 * 32 + 32))


def test_selectors_that_know_the_question_are_counted():
    config = TRBertConfig(question_aware=True, reduction_layers=[2])
    tokens, kept = np.array([100]), np.array([[100]])
    extra = reduced_flops(config, tokens, kept) - dense_flops(config, tokens)
    kind = 2 * 768 * 32 + 32 + 25 * 2  # what is asked, what the token is, their product, and the neighbours'
    np.testing.assert_allclose(extra, 2 * 100 * (kind + 5 + 5 * 32 + 32))


def test_a_reduction_before_the_first_layer_saves_everything_after_it():
    config = TRBertConfig(reduction_layers=[0])
    few = reduced_flops(config, np.array([100]), np.array([[10]]))[0]
    assert few == pytest.approx(dense_flops(config, np.array([10]))[0] + 2 * 100 * (768 * 32 + 32))
