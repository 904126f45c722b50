"""What the stages minimise: against the same quantities computed one sequence and one sample at a time."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.conftest import classification_task, tiny_classifier
from trbert_model.flops import dense_flops, reduced_flops
from trbert_model.reduction.sampling import SamplingPolicy
from trbert_model.tasks.classification.labelled import TextWindows
from trbert_model.tasks.classification.losses import SingleLabelLosses
from trbert_model.tasks.classification.task import Window
from trbert_model.training.objectives import Imitation, Joint, OperatingPoints, Reinforcement
from trbert_model.training.teacher import inputs_of, teacher_signals
from trbert_model.varlen import model_inputs

RNG = np.random.default_rng(0)
DOCUMENTS = [RNG.integers(5, 20, n).astype(np.int32) for n in (12, 30, 7, 21)]
LABELS = [0, 1, 2, 1]


LOSSES = SingleLabelLosses(3)


class Windows(TextWindows):
    """Documents that are windows already."""

    def __init__(self, model):
        self.task = classification_task()
        self.windows, self.labels = [Window(ids, len(ids)) for ids in DOCUMENTS], np.array(LABELS)
        self.losses = LOSSES
        self.teacher = teacher_signals(model, self)


def batch(model, indices=(0, 1, 2, 3)) -> dict[str, torch.Tensor]:
    return Windows(model).collate([[index] for index in indices])


def single_cutoff(reductions: int = 2) -> OperatingPoints:
    return OperatingPoints([], [], reductions)


def recorded_policies(monkeypatch):
    """Every selection a SamplingPolicy makes, in order: (probabilities' logits, keep, lengths)."""
    made = []
    original = SamplingPolicy.__call__

    def record(self, candidates):
        keep = original(self, candidates)
        made.append(keep.clone())
        return keep

    monkeypatch.setattr(SamplingPolicy, "__call__", record)
    return made


@pytest.mark.parametrize("distillation", [False, True])
def test_the_policy_gradient_is_the_papers(monkeypatch, distillation):
    """Reward, baseline and log-probability of each sample of each document, from their definitions."""
    model = tiny_classifier().requires_grad_(False)
    model.bert.encoder.selectors.requires_grad_(True)
    data = batch(model)
    objective = Reinforcement(model, LOSSES, single_cutoff(), samples=3, length_penalty=0.7, distillation=distillation)
    made = recorded_policies(monkeypatch)
    found = objective(**data)

    lengths = data["cu_seqlens"].diff().tolist()
    rewards, log_probabilities = torch.zeros(3, 4), [[None] * 4 for _ in range(3)]
    keeps = [list(made[0].split(lengths * 3))]
    kept_lengths = []
    for keep in keeps[0]:
        keep[0] = True
        kept_lengths.append(int(keep.sum()))
    keeps.append(list(made[1].split(kept_lengths)))
    for sample in range(3):
        for i in range(4):
            mine = [keeps[reduction][sample * 4 + i] for reduction in (0, 1)]
            output = model(
                **model_inputs([DOCUMENTS[i]]),
                selection_policy=lambda candidates: mine[candidates.reduction],  # noqa: B023
                output_selections=True,
            )
            label = F.one_hot(torch.tensor(LABELS[i]), 3).float()
            target = data["teacher"][i, :3].softmax(-1) if distillation else label
            task_loss = -(target * output.logits[0].log_softmax(-1)).sum()
            fractions = [int(kept) / lengths[i] for kept in output.kept_tokens]
            rewards[sample, i] = -task_loss - 0.7 * sum(fractions) / 2
            total = torch.zeros(())
            for selection in output.selections:
                p = torch.sigmoid(selection.logits)
                chosen = torch.where(selection.keep, p, 1 - p).log()
                total = total + chosen[1:].sum() / len(p)  # [CLS] was not chosen
            log_probabilities[sample][i] = total
    advantage = rewards - rewards.mean(0)
    expected = -sum(advantage[s, i] * log_probabilities[s][i] for s in range(3) for i in range(4)) / 12
    torch.testing.assert_close(found["loss"], expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found["reward"], rewards.mean(), atol=1e-5, rtol=1e-4)

    mine = torch.autograd.grad(found["loss"], list(model.bert.encoder.selectors.parameters()))
    theirs = torch.autograd.grad(expected, list(model.bert.encoder.selectors.parameters()))
    for a, b in zip(mine, theirs):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-3)


def test_a_guided_sample_keeps_what_the_guide_ranks_highest(monkeypatch):
    model = tiny_classifier()
    data = batch(model, indices=(1,))
    objective = Reinforcement(model, LOSSES, single_cutoff(), samples=2, length_penalty=0.5, guided_steps=1)
    made = recorded_policies(monkeypatch)
    objective(**data)
    guided, tokens = made[0].split([30, 30])[0], data["guide"][model.config.reduction_layers[0]]
    probability = torch.sigmoid(model(**model_inputs([DOCUMENTS[1]]), output_selections=True).selections[0].logits)
    assert guided.sum() == int((1 + probability[1:].sum()).round()), "[CLS] goes on whatever its probability"
    others = guided.clone()
    others[0] = False
    assert tokens[others].min() >= tokens[~guided].max()
    made.clear()
    objective(**data)  # the guided steps are over
    assert not torch.equal(made[0].split([30, 30])[0], guided)


def test_imitation_teaches_each_selector_the_guides_choice():
    model = tiny_classifier(num_hidden_layers=6, reduction_layers=[0, 2]).requires_grad_(False)
    model.bert.encoder.selectors.requires_grad_(True)
    data = batch(model)
    points = OperatingPoints([[0.5, 0.2]], [[0.0, 0.0]], 2)
    optimizer = torch.optim.Adam(model.bert.encoder.selectors.parameters(), lr=1e-2)
    losses = []
    for _ in range(150):
        loss = Imitation(model, LOSSES, points)(**data)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_the_cost_counts_what_samples_share_once():
    model = tiny_classifier(reduction_layers=[2, 3])
    objective = Reinforcement(model, LOSSES, single_cutoff(), samples=4, length_penalty=0.5)
    lengths, kept = torch.tensor([20, 10]), torch.tensor([[10, 5], [4, 2]] * 4)
    config, tokens = model.config, lengths.numpy()
    one = reduced_flops(config, tokens, kept[:2].numpy()).sum()
    first = dense_flops(config, tokens).sum() * 2 / 4
    expected = (first + 4 * (one - first)) / dense_flops(config, tokens).sum()
    assert objective._cost(lengths, kept, 4) == pytest.approx(expected, rel=1e-6)


def test_no_gradient_reaches_the_backbone_from_the_selectors_stage():
    model = tiny_classifier()
    Reinforcement(model, LOSSES, single_cutoff(), samples=2, length_penalty=0.5)(**batch(model))["loss"].backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert with_gradient
    assert all(".selectors." in name for name in with_gradient)


def test_the_joint_stage_trains_everything_and_restores_the_mode():
    model = tiny_classifier()
    objective = Joint(model, LOSSES, single_cutoff(), samples=2, length_penalty=0.5).train()
    measured = objective(**batch(model))
    measured["loss"].backward()
    assert model.training
    assert {name for name, p in model.named_parameters() if p.grad is None} == set()
    assert {"reward", "task_loss", "policy_entropy", "kept_0", "kept_1", "dense_passes"} <= set(measured)


@pytest.mark.parametrize("samples", [0, 2])
def test_a_dense_model_beside_the_joint_stage_judges_what_no_teacher_has_seen(samples):
    model, dense = tiny_classifier(), tiny_classifier().requires_grad_(False)
    data = batch(dense)
    settings = {"samples": samples, "length_penalty": 0.5}
    model.config.hidden_dropout_prob = 0.0
    known = Joint(model, LOSSES, single_cutoff(), **settings).eval()
    torch.manual_seed(0)
    expected = known(**data)
    seen = {name: value for name, value in data.items() if name not in ("teacher", "guide")}
    beside = Joint(model, LOSSES, single_cutoff(), dense=dense, **settings).eval()
    torch.manual_seed(0)
    found = beside(**seen)
    torch.testing.assert_close(found["loss"], expected["loss"])
    assert float(found["dense_passes"]) == pytest.approx(float(expected["dense_passes"]) + 1)
    found["loss"].backward()
    assert all(p.grad is None for p in dense.parameters())


def test_a_policy_of_its_own_replaces_the_selectors_in_the_joint_stage():
    model = tiny_classifier()
    nothing = Joint(
        model,
        LOSSES,
        single_cutoff(),
        samples=0,
        length_penalty=0.5,
        selection_policy=lambda candidates: torch.zeros_like(candidates.fixed),
    )
    measured = nothing(**batch(model))
    assert float(measured["kept_0"]) == 0.0
    measured["loss"].backward()


def test_unreduced_documents_keep_their_tokens_and_leave_the_cutoffs():
    model = tiny_classifier().eval()
    data = batch(model)
    measured, cutoffs = {}, {}
    for share in (0.0, 0.5, 1.0):
        points = OperatingPoints([[0.5, 0.25]], [[0.0, 0.0]], 2)
        torch.manual_seed(1)  # draws documents of both kinds at 0.5
        measured[share] = Joint(model, LOSSES, points, samples=0, length_penalty=0.0, unreduced=share).eval()(**data)
        cutoffs[share] = points.cuts[1]
    dense = LOSSES.distilled(model(**inputs_of(data), reduce=False), data).mean()
    torch.testing.assert_close(measured[1.0]["task_loss"], dense)
    assert torch.equal(cutoffs[1.0], torch.zeros(1, 2))
    assert measured[0.0]["dense_passes"] < measured[0.5]["dense_passes"] < measured[1.0]["dense_passes"]
    assert measured[0.5]["kept_1"] < 0.9, "what is measured, and followed, is the reduced documents'"
    assert (cutoffs[0.5] != 0).any()


def test_cutoffs_follow_the_tokens_they_let_through():
    """From cutoffs that keep everything to the fractions asked for, each point its own."""
    model = tiny_classifier().requires_grad_(False)
    fractions = [[0.6, 0.4], [0.3, 0.1]]
    points = OperatingPoints(fractions, [[-9.0, -9.0], [-9.0, -9.0]], 2)
    inputs = model_inputs([RNG.integers(5, 20, 30).astype(np.int32) for _ in range(64)])
    lengths = inputs["cu_seqlens"].diff()
    torch.manual_seed(0)
    history = []
    for _ in range(300):
        drawn = points.draw(64, torch.device("cpu"))
        policy = SamplingPolicy(points.cutoffs_at(drawn, sampled=False), at_random=False)
        kept = torch.stack(model(**inputs, selection_policy=policy).kept_tokens, 1)
        points.follow(drawn, lengths, kept, policy.spreads(), sampled=False)
        history.append([(kept[drawn == i].sum(0) / lengths[drawn == i].sum()).tolist() for i in (0, 1)])
    np.testing.assert_allclose(np.mean(history[-100:], axis=0), fractions, atol=0.05)
    assert torch.equal(points.cuts[0], torch.full((2, 2), -9.0)), "the cutoffs for random choices are others"


def test_the_originals_single_cutoff_stays():
    points = single_cutoff()
    points.follow(
        torch.zeros(2, dtype=torch.int64),
        torch.tensor([10, 10]),
        torch.tensor([[9, 9]] * 2),
        torch.ones(2),
        sampled=True,
    )
    assert float(points.cuts.abs().max()) == 0.0
