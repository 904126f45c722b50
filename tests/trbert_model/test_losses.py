"""The tasks' losses against their definitions, one example and one repeat at a time."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.conftest import TINY, question_task, tiny_tokenizer
from trbert_model import ConfigurationError, InputError, TRBertConfig, TRBertForQuestionAnswering
from trbert_model.engine import Engine, EngineOptions
from trbert_model.options import LabelledColumns
from trbert_model.tasks.classification.losses import UNLABELLED, SingleLabelLosses
from trbert_model.tasks.question_answering.labelled import LabelledQuestions, read_questions
from trbert_model.tasks.question_answering.losses import AnswerLosses
from trbert_model.training.objectives import Joint, OperatingPoints
from trbert_model.training.teacher import teacher_signals

CONTEXTS = ["the good news of a game and the bad bank " * 8, "a fine game", "the bank and the news"]
QUESTIONS = ["good game", "fine", "sport"]
ANSWERS = [["bad bank"], ["fine game", "game"], []]
STARTS = [[CONTEXTS[0].index("bad bank")], [2, 7], []]


def test_features_are_distilled_by_their_relative_squared_distance():
    generator = torch.Generator().manual_seed(0)
    output, dense = (
        SimpleNamespace(
            logits=torch.randn(n, 3, generator=generator), pooler_output=torch.randn(n, 5, generator=generator)
        )
        for n in (4, 2)
    )
    plain = SingleLabelLosses(3)
    batch = {"teacher": plain.signals(dense), "labels": torch.tensor([0, UNLABELLED])}
    found = SingleLabelLosses(3, classifier_input_weight=0.5).distilled(output, batch, repeats=2)
    for i, j in enumerate((0, 1, 0, 1)):
        cross_entropy = -(dense.logits[j].softmax(0) * output.logits[i].log_softmax(0)).sum()
        distance = (output.pooler_output[i] - dense.pooler_output[j]).norm() / dense.pooler_output[j].norm()
        assert found[i] == pytest.approx(float(cross_entropy + 0.5 * distance**2), rel=1e-5)
        assert plain.distilled(output, batch, repeats=2)[i] == pytest.approx(float(cross_entropy), rel=1e-5)
    assert plain.completed(batch, batch["teacher"])["labels"].tolist() == [0, int(dense.logits[1].argmax())]


def test_layers_that_the_guide_does_not_judge_are_refused_by_name():
    batch = {"guide": torch.zeros(2, 5)}
    assert SingleLabelLosses(3).guide(batch, [0, 1]).shape == (2, 5)
    with pytest.raises(ConfigurationError, match=r"layers \[2\]: the guide judges layers below 2.*guide_rate"):
        SingleLabelLosses(3).guide(batch, [0, 2])


@pytest.fixture
def dataset():
    task = question_task(24, stride=4)
    corpus = LabelledQuestions(task.encode(QUESTIONS, CONTEXTS), ANSWERS, STARTS, task)
    return corpus.dataset()


def model():
    torch.manual_seed(0)
    answering = TRBertForQuestionAnswering(TRBertConfig(**TINY)).eval()
    torch.nn.init.normal_(answering.qa_outputs.weight, std=1.0)
    return answering


def random_output(tokens: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return SimpleNamespace(
        start_logits=torch.randn(tokens, generator=generator), end_logits=torch.randn(tokens, generator=generator)
    )


def expected_loss(logits, target, batch, example, offset=0):
    """One example's loss from the probabilities of all its scored positions."""
    lengths = batch["cu_seqlens"].diff()
    mine = (batch["example"] == example).repeat_interleave(lengths)
    scored = mine & batch["scored"]
    logits = logits[offset : offset + len(mine)]
    share = logits.exp() / logits[scored].exp().sum()
    return -share[mine & target].sum().log()


def test_windows_of_a_question_share_one_softmax(dataset):
    batch = dataset.collate([[0, 1, 2], [dataset.first_window[1]], [dataset.first_window[2]]])
    assert batch["example"].tolist() == [0, 0, 0, 1, 2]
    tokens = len(batch["input_ids"])
    output = random_output(2 * tokens)
    found = AnswerLosses().labelled(output, batch, repeats=2)
    assert found.shape == (6,)
    for repeat in range(2):
        for example in range(3):
            both = [
                expected_loss(output.start_logits, batch["start_targets"], batch, example, repeat * tokens),
                expected_loss(output.end_logits, batch["end_targets"], batch, example, repeat * tokens),
            ]
            assert float(found[3 * repeat + example]) == pytest.approx(float(sum(both)) / 2, rel=1e-5)


def test_distillation_is_the_cross_entropy_to_the_teachers_probabilities(dataset):
    batch = dataset.collate([[0, 1], [dataset.first_window[1]]])
    tokens = len(batch["input_ids"])
    output, teacher = random_output(tokens), random_output(tokens, seed=1)
    losses = AnswerLosses()
    batch["teacher"] = losses.signals(teacher)
    found = losses.distilled(output, batch)
    lengths = batch["cu_seqlens"].diff()
    for example in range(2):
        scored = (batch["example"] == example).repeat_interleave(lengths) & batch["scored"]
        crosses = [
            -(theirs[scored].softmax(0) * ours[scored].log_softmax(0)).sum()
            for ours, theirs in (
                (output.start_logits, teacher.start_logits),
                (output.end_logits, teacher.end_logits),
            )
        ]
        assert float(found[example]) == pytest.approx(float(sum(crosses)) / 2, rel=1e-5)


def test_an_example_has_a_window_with_the_answer_and_another(dataset):
    torch.manual_seed(0)
    drawn = {tuple(dataset[0]) for _ in range(60)}
    holding = {index for index in range(dataset.first_window[1]) if dataset.target(index)}
    assert holding
    assert all(len(example) == 2 and holding & set(example) for example in drawn)
    assert len(drawn) > 1
    assert dataset[1] == [dataset.first_window[1]]


def test_targets_are_the_answers_tokens_or_no_answer(dataset):
    batch = dataset.collate([dataset[1], dataset[2]])
    first = dataset.windows[dataset.first_window[1]]
    starts, ends = (torch.nonzero(batch[name]).flatten().tolist() for name in ("start_targets", "end_targets"))
    length = len(first.input_ids)
    # "a fine game": tokens 1 to 2, and 2 alone; the last question has no answer.
    assert starts == [first.passage + 1, first.passage + 2, length]
    assert ends == [first.passage + 2, length]


def test_what_is_near_an_answer_is_to_go_on(dataset):
    """By the distance to the nearest end of an answer in the same window, whatever the number of tokens to keep."""
    batch = dataset.collate([[0, 1, 2], [dataset.first_window[1]], [dataset.first_window[2]]])
    bounds, losses = batch["cu_seqlens"].tolist(), AnswerLosses()
    (found,) = losses.guide(batch, [1])
    near_something = []
    for start, end in zip(bounds, bounds[1:]):
        ends = batch["start_targets"][start + 1 : end] | batch["end_targets"][start + 1 : end]
        right = (torch.nonzero(ends).flatten() + 1).tolist()
        expected = [max((np.exp(-abs(i - j) / losses.NEAR) for j in right), default=0.0) for i in range(end - start)]
        np.testing.assert_allclose(found[start:end], expected, rtol=1e-5)
        near_something.append(bool(right))
    assert near_something[3:] == [True, False]  # the last question has no answer
    assert len(set(near_something[:3])) == 2
    few, many = (losses.keep_targets(batch, [1, 2], torch.full((5, 2), count)) for count in (1, 20))
    assert torch.equal(few, many)
    assert torch.equal(few, found.expand(2, -1))


def test_an_answers_ends_are_to_be_above_the_other_tokens_of_their_question():
    targets = torch.tensor([1.0, 0.5, 0.0, 1.0, 0.0])
    question = torch.tensor([0, 0, 0, 1, 1])
    logits = torch.tensor([2.0, 1.0, -1.0, -3.0, 0.5])
    entropy = F.binary_cross_entropy_with_logits(logits, targets)
    pairs = [(2.0, 1.0), (2.0, -1.0), (-3.0, 0.5)]
    order = np.mean([np.log1p(np.exp(other - end)) for end, other in pairs])
    torch.testing.assert_close(AnswerLosses().imitation(logits, targets, question), entropy + order)
    nothing = AnswerLosses().imitation(logits[:0], targets[:0], question[:0])
    assert nothing == 0  # nothing left to judge
    without = AnswerLosses().imitation(logits[1:3], targets[1:3], question[1:3])
    torch.testing.assert_close(without, F.binary_cross_entropy_with_logits(logits[1:3], targets[1:3]))


def test_layers_below_the_selectors_learn_what_to_keep_in_the_joint_stage_if_asked(dataset):
    """Nothing else reaches the first layer here: the head is zero."""
    with_gradient = []
    for weight in (0.0, 1.0):
        answering = model()
        torch.nn.init.zeros_(answering.qa_outputs.weight)
        objective = Joint(
            answering,
            dataset.losses,
            OperatingPoints([[0.8, 0.5]], [[0.0, 0.0]], 2),
            samples=0,
            length_penalty=0.0,
            distillation=False,
            imitation=weight,
        )
        measured = objective(**dataset.collate([dataset[i] for i in range(3)]))
        measured["loss"].backward()
        gradient = answering.bert.encoder.layer[0].attention.self.query.weight.grad
        with_gradient.append(bool(gradient.abs().sum() > 0))
        assert ("imitation_loss" in measured) == bool(weight)
    assert with_gradient == [False, True]


def test_the_joint_stage_trains_a_model_that_answers(dataset):
    answering = model()
    dataset.teacher = teacher_signals(answering, dataset)
    answering.requires_grad_(True)
    objective = Joint(answering, dataset.losses, OperatingPoints([], [], 2), samples=3, length_penalty=0.5).train()
    torch.manual_seed(0)
    measured = objective(**dataset.collate([dataset[i] for i in range(3)]))
    measured["loss"].backward()
    assert {name for name, p in answering.named_parameters() if p.grad is None} == set()
    assert torch.isfinite(measured["loss"])


def test_a_teacher_says_of_a_window_what_it_says_of_it_alone(dataset):
    answering = model()
    together = teacher_signals(answering, dataset)
    alone = teacher_signals(answering, dataset, tokens_per_batch=1)
    indices = [2, 0, dataset.first_window[2]]
    for mine, its in zip(together.of_windows(indices), alone.of_windows(indices)):
        torch.testing.assert_close(mine, its, atol=2e-3, rtol=1e-2)
    targets, guide = together.of_windows([0])
    assert targets.shape == (len(dataset.windows[0].input_ids), 2)
    assert guide.shape[0] == 0  # not guided by the saliency, whose gradient is not computed then


def test_metrics_of_a_corpus_of_questions(dataset):
    engine = Engine(model(), tiny_tokenizer(), EngineOptions(device="cpu", stride=4))
    corpus = LabelledQuestions(engine.task.encode(QUESTIONS, CONTEXTS), ANSWERS, STARTS, engine.task)
    results = engine.score(corpus.documents)
    answers = corpus.predictions(results)
    right = LabelledQuestions(corpus.documents, [[answer] if answer else [] for answer in answers], STARTS, engine.task)
    assert right.measure(results)["f1"] == right.measure(results)["exact_match"] == 1.0
    measured = corpus.measure(results)
    assert set(measured) == {"f1", "exact_match", "no_answer_f1"}
    assert measured["f1"] == pytest.approx(corpus.scores(results).numerators.mean())


def test_questions_take_no_documents_without_labels():
    corpus = LabelledQuestions([], [], [], question_task())
    with pytest.raises(ConfigurationError, match="documents without labels"):
        corpus.with_unlabelled("u.parquet", LabelledColumns())


def test_questions_that_cannot_be_read_are_named(tmp_path):
    task = question_task(24)
    (tmp_path / "a.json").write_text('{"data": [{"paragraphs": [{"context": "the news"}]}]}')
    with pytest.raises(InputError, match=r"a.json: cannot be read as SQuAD's JSON: KeyError\('qas'\)"):
        read_questions(str(tmp_path / "a.json"), "question", "context")
    (tmp_path / "b.json").write_text('{"data": []}')
    with pytest.raises(InputError, match=r"b.json: it has no questions"):
        read_questions(str(tmp_path / "b.json"), "question", "context")
    asked = '{"id": 7, "question": "%s", "answers": [{"text": "good", "answer_start": %d}]}'
    squad = '{"data": [{"paragraphs": [{"context": "the good news", "qas": [' + asked + "]}]}]}"
    (tmp_path / "c.json").write_text(squad % ("fine", 4))
    corpus = LabelledQuestions.read(str(tmp_path / "c.json"), task, LabelledColumns())
    assert (corpus.answers, corpus.starts, corpus.ids) == ([["good"]], [[4]], ["7"])
    (tmp_path / "d.json").write_text(squad % ("fine", 3))
    with pytest.raises(InputError, match=r"d.json: question '7': 'good' is not at 3 of its context"):
        LabelledQuestions.read(str(tmp_path / "d.json"), task, LabelledColumns())
    (tmp_path / "e.json").write_text(squad % ("good " * 30, 4))
    with pytest.raises(InputError, match=r"e.json: question '7': the question's 30 tokens leave too little"):
        LabelledQuestions.read(str(tmp_path / "e.json"), task, LabelledColumns())
