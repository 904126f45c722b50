"""How near tokens are to a question's words: against distances counted one by one, and apart from the batch."""

import numpy as np
import torch

from trbert_model.reduction.question import LEAST_COSINE, NEIGHBOUR_SCALES, REACH, SCALES, question_match
from trbert_model.varlen import model_inputs

SEQUENCES = [[2, 7, 8, 3, 9, 7, 9, 9, 8, 7, 3], [2, 7, 3, 8, 9, 3], [2, 5, 6, 7, 7, 3, 6, 9, 9, 9, 9, 5, 3]]
SEGMENTS = [[0] * 4 + [1] * 7, [0] * 3 + [1] * 3, [0] * 6 + [1] * 7]
# No token is like another, but 5 and 6: a cosine of 0.8.
EMBEDDINGS = torch.eye(20)
EMBEDDINGS[6, 5:7] = torch.tensor([0.8, 0.6])


def match(rows):
    batch = model_inputs([np.array(SEQUENCES[i]) for i in rows], [SEGMENTS[i] for i in rows])
    return question_match(batch["input_ids"], batch["token_type_ids"], batch["cu_seqlens"], EMBEDDINGS)


def likeness(word, token):
    if {word, token} == {5, 6}:
        return (0.8 - LEAST_COSINE) / (1 - LEAST_COSINE)
    return float(word == token)


def expected(row, weights):
    """Coverage by its definition, (tokens, scales)."""
    ids, segments = SEQUENCES[row], SEGMENTS[row]
    words = segments.count(0)
    rows = []
    for token in range(len(ids)):
        values = []
        for scale in SCALES:
            total = 0.0
            for word in range(words):
                passage = range(words, len(ids))
                near = [likeness(ids[word], ids[j]) * np.exp(-abs(token - j) / scale) for j in passage]
                total += weights[word] * max(near)
            values.append(total / sum(weights[:words]))
        rows.append(values)
    return np.array(rows)


def test_coverage_is_the_weighted_nearness_of_the_questions_words():
    together = match([0, 1, 2])
    weights = torch.rand(together.valid.shape, generator=torch.Generator().manual_seed(0))
    found = together.coverage(weights).split([len(s) for s in SEQUENCES])
    for row, values in enumerate(found):
        np.testing.assert_allclose(values, expected(row, weights[row].tolist()), rtol=1e-5, atol=1e-7)
        words = SEGMENTS[row].count(0)
        torch.testing.assert_close(match([row]).coverage(weights[row : row + 1, :words]), values, rtol=1e-6, atol=0)
    assert together.words[1, :3].argmax(1).tolist() == [2, 7, 3]
    assert together.valid.sum(1).tolist() == [4, 3, 6]


def test_some_tokens_and_a_batch_laid_end_to_end():
    once = match([0, 1])
    weights = torch.rand(once.valid.shape, generator=torch.Generator().manual_seed(1))
    some = torch.tensor([1, 5, 12])
    assert torch.equal(once.at(some).coverage(weights), once.coverage(weights)[some])
    assert torch.equal(once.repeated(2).coverage(weights.repeat(2, 1)), once.coverage(weights).repeat(2, 1))


def test_without_a_second_segment_nothing_is_near():
    batch = model_inputs([np.array([2, 7, 7, 3])])
    alone = question_match(batch["input_ids"], batch["token_type_ids"], batch["cu_seqlens"], EMBEDDINGS)
    assert alone.coverage(torch.ones(alone.valid.shape)).abs().sum() == 0


def test_means_over_the_question_and_sums_over_neighbours():
    together, generator = match([0, 1, 2]), torch.Generator().manual_seed(2)
    lengths = [len(sequence) for sequence in SEQUENCES]
    values = torch.randn(sum(lengths), 3, generator=generator)
    means, around = together.asked_mean(values), together.around(values[:, 0])
    for row, (part, sums) in enumerate(zip(values.split(lengths), around.split(lengths))):
        words = SEGMENTS[row].count(0)
        torch.testing.assert_close(means[row], part[:words].mean(0))
        for token in range(lengths[row]):
            positions = [j for j in range(words, lengths[row]) if abs(token - j) <= REACH]
            expected = [
                sum(float(part[j, 0]) * np.exp(-abs(token - j) / scale) for j in positions) / (2 * scale)
                for scale in NEIGHBOUR_SCALES
            ]
            np.testing.assert_allclose(sums[token], expected, rtol=1e-4, atol=1e-6)
        alone = match([row])
        assert torch.equal(alone.asked_mean(part)[0], means[row])
        assert torch.equal(alone.around(part[:, 0]), sums)


def test_neighbours_that_were_dropped_count_nothing():
    whole = match([0, 2])
    values = torch.arange(1.0, 25.0)
    some = torch.tensor([0, 1, 2, 3, 5, 8, 11, 12, 20])
    gone = torch.ones(24, dtype=torch.bool)
    gone[some] = False
    assert torch.equal(whole.at(some).around(values[some]), whole.around(values.masked_fill(gone, 0.0))[some])
    doubled = whole.repeated(2).around(values.repeat(2))
    assert torch.equal(doubled, whole.around(values).repeat(2, 1))
