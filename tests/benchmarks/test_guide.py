"""The experiments about what a reduction can do."""

import torch

from benchmarks.guide import CombiningPolicy
from tests.conftest import tiny_classifier
from trbert_model.reduction.policies import TopTokensPolicy
from trbert_model.varlen import model_inputs


def test_a_combined_token_is_the_mean_of_all_that_left():
    model = tiny_classifier(num_hidden_layers=2, reduction_layers=[0, 1])
    scores = torch.arange(13.0).expand(2, -1)
    policy = CombiningPolicy(TopTokensPolicy(torch.tensor([[4, 2], [9, 9]]), scores))
    inputs = model_inputs([range(5, 13), range(5, 10)])
    with torch.no_grad():
        output = model(**inputs, selection_policy=policy, output_hidden_states=True, output_selections=True)
        embedded = model(**inputs, reduce=False, output_hidden_states=True).hidden_states[0]
    first, second = output.selections
    assert first.keep[8:].all()  # nothing leaves, so nothing is combined
    assert second.keep[-5:].all()
    assert first.keep[:8].tolist() == [True, True, False, False, False, True, True, True]
    torch.testing.assert_close(output.hidden_states[0][1], embedded[1:5].mean(0))
    assert second.keep[:5].tolist() == [True, True, False, False, True]
    assert policy.stands_for[:5].tolist() == [1, 6, 1, 1, 1]
