"""The objective of each training stage, as modules around the model, in the order of the stages.

A step may need several passes through the model. They all happen in one forward of the module, so that transformers'
Trainer can run it on one device or replicate it over many. Every forward takes a batch of `WindowDataset.collate`, in
which an example may have several windows, and returns `{"loss": (), **measurements}`. Measurements are () too. Among
them, `dense_passes` is the cost of the step in forward passes of the dense model over the same windows. A backward pass
counts as two.
"""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..configuration import TRBertConfig
from ..exits.options import NO_SKIPPING
from ..exits.policies import ExitThresholds
from ..exits.training import MixingGates, PlannedExits, planned_exits
from ..flops import dense_flops, first_layers_flops, reduced_flops, spent_flops
from ..losses import ExitLosses, TaskLosses
from ..modeling import TRBertModel
from ..reduction.policies import TopTokensPolicy, keep_all
from ..reduction.sampling import SamplingPolicy
from ..reduction.state import SelectionPolicy
from ..tasks.token_classification.losses import IGNORED, word_losses
from ..varlen import sequence_sums
from .teacher import extra_inputs_of, inputs_of, tokens_of


class Objective(nn.Module):
    """Base class of the objectives; model: a task's model, or peft's wrapper around one."""

    def __init__(self, model: Any, losses: TaskLosses):
        super().__init__()
        self.model, self.losses = model, losses

    @property
    def trunk(self) -> TRBertModel:
        """The model without the task's head and peft's wrapper."""
        return next(module for module in self.model.modules() if isinstance(module, TRBertModel))

    def imitation_loss(self, output: Any, batch: dict[str, Tensor], counts: Tensor) -> Tensor:
        """The selectors' imitation loss on the tokens that each of them judged, summed over the reductions.

        Args:
            counts: int64 (windows, reductions), number of tokens to keep.
        """
        targets = self.losses.keep_targets(batch, self.model.config.reduction_layers, counts)
        examples = batch["example"].repeat_interleave(batch["cu_seqlens"].diff().long())
        losses = []
        for selection, target in zip(output.selections, targets):
            judged = selection.token_indices[~selection.fixed]
            losses.append(self.losses.imitation(selection.logits[~selection.fixed], target[judged], examples[judged]))
        return torch.stack(losses).sum()

    def _cost(self, lengths: Tensor, kept: Tensor, samples: int = 1) -> float:
        """FLOPs of a pass with these kept tokens, (samples · sequences, reductions), relative to the dense pass."""
        config, tokens = self.model.config, lengths.cpu().numpy()
        spent = reduced_flops(config, np.tile(tokens, samples), kept.cpu().numpy()).sum()
        shared = first_layers_flops(config, config.reduction_layers[0], tokens).sum() * (samples - 1)
        return float((spent - shared) / dense_flops(config, tokens).sum())


class FineTune(Objective):
    """Trains the dense model on the task; with exits that read words, those too (SENTEE and TOKEE's first stage)."""

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        exits = self.model.config.exit_options
        with_exits = exits is not None and exits.head == "words"
        output = self.model(**inputs_of(batch), reduce=False, output_exits=with_exits)
        loss = self.losses.labelled(output, batch).mean()
        if with_exits:
            losses = cast(ExitLosses, self.losses).of_exits(output.exits, batch, distilled=False)
            loss = _by_depth(self.model.config, losses, loss)
        return {"loss": loss, "task_loss": loss.detach(), "dense_passes": torch.tensor(3.0)}


class OperatingPoints(nn.Module):
    """The keep-logit cutoffs for each of several speed-ups, while the selectors still change.

    Each document of a step is reduced for a randomly drawn speed-up, so that one model learns all of them. After each
    step the cutoffs are moved towards the wanted kept fractions.

    Args:
        fractions: kept fractions, (points, reductions); empty for the original's single, fixed cutoff at p = 0.5.
        cutoffs: initial cutoffs, (points, reductions).
        reductions: number of reductions.
    """

    GAIN = 0.1  # change per step, in standard deviations of the logits, if the kept fraction is e times too high

    def __init__(self, fractions: Sequence[Sequence[float]], cutoffs: Sequence[Sequence[float]], reductions: int):
        super().__init__()
        points = max(len(fractions), 1)
        self.follows = bool(fractions)
        self.fractions = nn.Buffer(torch.tensor(fractions or [[0.5] * reductions]))
        # The first cutoffs are for sampling with probability p, the second for keeping all logits above the cutoff: the
        # same cutoff keeps different numbers of tokens. The buffer's name is in the stages' checkpoints.
        self.cuts = nn.Buffer(torch.tensor(cutoffs or [[0.0] * reductions]).repeat(2, 1, 1))
        assert self.cuts.shape == (2, points, reductions)

    def draw(self, sequences: int, device: torch.device) -> Tensor:
        """Draw a point for each sequence, int64 (sequences,)."""
        return torch.randint(len(self.fractions), (sequences,), device=device)

    def counts(self, points: Tensor, lengths: Tensor) -> Tensor:
        """Number of tokens to keep of sequences of these lengths at these points, int64 (sequences, reductions)."""
        return (lengths[:, None] * self.fractions[points]).round().long().clamp(min=1)

    def cutoffs_at(self, points: Tensor, *, sampled: bool) -> Tensor:
        """The cutoffs at these points, (sequences, reductions)."""
        return self.cuts[0 if sampled else 1, points]

    def follow(self, points: Tensor, lengths: Tensor, kept: Tensor, spreads: Tensor, *, sampled: bool) -> None:
        """Move the cutoffs of the points that were used towards their kept fractions.

        Args:
            points: (sequences,).
            lengths: (sequences,), tokens of each sequence.
            kept: (sequences, reductions), tokens kept.
            spreads: (reductions,), standard deviations of the keep logits.
            sampled: whether the tokens were sampled, or kept by the cutoff.
        """
        if not self.follows:
            return
        table = self.cuts[0 if sampled else 1]
        tokens = torch.zeros(len(table), device=table.device).index_add_(0, points, lengths.float())
        alive = torch.zeros_like(table).index_add_(0, points, kept.float())
        used = tokens > 0
        ratio = (alive[used] / tokens[used, None]).clamp(min=1e-4) / self.fractions[used]
        table[used] += self.GAIN * spreads * ratio.log().clamp(-2, 2)


class Imitation(Objective):
    """Trains each selector with the task's imitation loss: to keep the tokens that the guide ranks highest.

    For questions, these are the tokens near the answer. Each selector sees the tokens that the selectors before it
    rank highest, as in inference.
    """

    def __init__(self, model: Any, losses: TaskLosses, points: OperatingPoints):
        super().__init__(model, losses)
        self.points = points

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        self.model.eval()  # without dropout, so that the selectors judge the states of inference
        lengths, points = batch["cu_seqlens"].diff(), _points_of(self.points, batch)
        counts = self.points.counts(points, lengths)
        output = self.model(**inputs_of(batch), selection_policy=TopTokensPolicy(counts), output_selections=True)
        loss = self.imitation_loss(output, batch, counts)
        kept = torch.stack(output.kept_tokens, 1)
        cost = torch.tensor(self._cost(lengths, kept))
        return {"loss": loss, "imitation_loss": loss.detach(), "dense_passes": cost}


class Reinforcement(Objective):
    """Trains the selectors alone, by policy gradient (Ye et al., section 3.3).

    Several selections of each document are sampled. The reward is −task loss − λ · mean kept fraction, and the
    baseline is the mean reward of the document's samples.

    Args:
        samples: selections per document in a step; they share the layers before the first reduction.
        length_penalty: λ.
        guided_steps: for this many steps, one of the samples keeps the tokens that the guide ranks highest, as many as
            the sum of the keep probabilities.
        distillation: compute the task loss against the dense model's outputs, not the labels.
    """

    def __init__(
        self,
        model: Any,
        losses: TaskLosses,
        points: OperatingPoints,
        *,
        samples: int,
        length_penalty: float,
        guided_steps: int = 0,
        distillation: bool = False,
    ):
        super().__init__(model, losses)
        self.points, self.samples, self.length_penalty = points, samples, length_penalty
        self.guided_steps, self.distillation = guided_steps, distillation
        self.step = nn.Buffer(torch.zeros((), dtype=torch.int64))

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        loss, measured = self.policy_loss(batch, _points_of(self.points, batch))
        return {"loss": loss, **measured}

    def policy_loss(self, batch: dict[str, Tensor], points: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The selectors' loss, which has gradients only in the selectors, and the measurements.

        Args:
            points: (windows,), the same for all windows of an example.
        """
        self.model.eval()
        lengths, count, example = batch["cu_seqlens"].diff(), self.samples, batch["example"]
        windows, examples = len(lengths), _examples(batch)
        cutoffs = self.points.cutoffs_at(points, sampled=True).repeat(count, 1)
        guided = torch.zeros(count * windows, dtype=torch.bool, device=lengths.device)
        guided[:windows] = bool(self.step < self.guided_steps)
        self.step.add_(1)
        guide = None
        if guided.any():
            guide = self.losses.guide(batch, self.model.config.reduction_layers).repeat(1, count)
        policy = SamplingPolicy(cutoffs, guided, guide)
        # An example's windows are rewarded together.
        owner = torch.cat([example + examples * sample for sample in range(count)])
        with torch.no_grad():
            state = self.trunk.before_reduction(**tokens_of(batch)).repeated(count)
            extra = extra_inputs_of(batch, count)
            output = self.model(state=state, selection_policy=policy, output_selections=True, **extra)
            task_loss = self.task_losses(output, batch, count)
            kept = torch.stack(output.kept_tokens, 1)
            fractions = (kept / lengths.repeat(count)[:, None]).mean(1)
            reward = -task_loss - self.length_penalty * _means(fractions, owner, examples * count)
            advantage = (reward - reward.view(count, -1).mean(0).repeat(count))[owner]
        # Without guided selections, which would move the cutoffs by what the guide keeps.
        free = ~guided
        self.points.follow(
            points.repeat(count)[free], lengths.repeat(count)[free], kept[free], policy.spreads(), sampled=True
        )

        log_probability, entropy = torch.zeros_like(fractions), torch.zeros((), device=lengths.device)
        for reduction, selection in enumerate(output.selections):
            logits = self.trunk.encoder.selectors[reduction](selection.hidden, selection.match)
            logits = logits - cutoffs[:, reduction][selection.sequence]
            chosen = torch.where(selection.keep, F.logsigmoid(logits), F.logsigmoid(-logits))
            sums = sequence_sums(chosen * ~selection.fixed, selection.cu_seqlens)
            log_probability = log_probability + sums / selection.lengths
            probability = torch.sigmoid(logits.detach()[~selection.fixed])
            entropy += F.binary_cross_entropy(probability, probability) / len(output.selections)
        measured = {
            "reward": reward.mean(),
            "task_loss": task_loss.mean(),
            "policy_entropy": entropy,
            "dense_passes": torch.tensor(self._cost(lengths, kept, count)),
            **_kept_measurements(kept[free], lengths.repeat(count)[free]),
        }
        return -(advantage * log_probability).mean(), measured

    def task_losses(self, output: Any, batch: dict[str, Tensor], repeats: int = 1) -> Tensor:
        """The task's loss of each example, against the dense model's outputs or the labels."""
        return (self.losses.distilled if self.distillation else self.losses.labelled)(output, batch, repeats)


class Joint(Reinforcement):
    """Trains everything together: the task loss of the reduced model, and the selectors' policy gradient.

    Takes the arguments of `Reinforcement`, with `distillation` on by default.

    Args:
        samples: 0 turns the policy gradient off.
        imitation: weight of the selectors' imitation loss, which also trains the layers below them, so that these learn
            what the selectors need.
        unreduced: share of the examples whose task loss is computed without reduction.
        dense: frozen dense model, for batches without the teacher's outputs.
        selection_policy: chooses the tokens instead of the selectors, for comparisons; `samples` must be 0.
    """

    def __init__(
        self,
        *reinforcement: Any,
        imitation: float = 0.0,
        unreduced: float = 0.0,
        selection_policy: SelectionPolicy | None = None,
        dense: nn.Module | None = None,
        **settings: Any,
    ):
        super().__init__(*reinforcement, **{"distillation": True, **settings})
        self.imitation, self.unreduced = imitation, unreduced
        self.selection_policy, self.dense = selection_policy, dense

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        points, lengths = _points_of(self.points, batch), batch["cu_seqlens"].diff()
        loss, cost = torch.zeros((), device=lengths.device), torch.zeros(())
        if self.dense is not None:
            self.dense.eval()
            with torch.no_grad():
                batch["teacher"] = self.losses.signals(self.dense(**inputs_of(batch), reduce=False)).float()
            cost = cost + 1
        measured: dict[str, Tensor] = {}
        if self.samples:
            loss, measured = self.policy_loss(batch, points)
            cost = cost + measured["dense_passes"]
            self.model.train(self.training)
        # With the original's fixed cutoff, the model sees sampled selections, as in the original. With cutoffs for
        # speed-ups, it sees the selections of inference.
        cutoffs = self.points.cutoffs_at(points, sampled=not self.points.follows)
        reduced = (torch.rand(_examples(batch), device=lengths.device) >= self.unreduced)[batch["example"]]
        cutoffs = torch.where(reduced[:, None], cutoffs, -torch.inf)
        selectors = SamplingPolicy(cutoffs, at_random=not self.points.follows)
        output = self.model(
            **inputs_of(batch),
            selection_policy=self.selection_policy or selectors,
            output_selections=bool(self.imitation),
        )
        kept = torch.stack(output.kept_tokens, 1)
        if self.selection_policy is None and self.points.follows:
            self.points.follow(points[reduced], lengths[reduced], kept[reduced], selectors.spreads(), sampled=False)
        task_loss = self.task_losses(output, batch).mean()
        loss = loss + task_loss
        if self.imitation:
            imitation_loss = self.imitation_loss(output, batch, self.points.counts(points, lengths))
            loss = loss + self.imitation * imitation_loss
            measured["imitation_loss"] = imitation_loss.detach()
        measured |= {
            "task_loss": task_loss.detach(),
            "dense_passes": cost + 3 * self._cost(lengths, kept),
            **_kept_measurements(kept[reduced], lengths[reduced]),
        }
        return {"loss": loss, **measured}


class Exits(Objective):
    """Trains the exits on the states that inference has, with the sum of their losses (DeeBERT, SmartBERT).

    With gates, documents skip layers as in inference, and the exit of a layer learns nothing from those that skip it.

    Only the exits may have trainable parameters: the layers then keep nothing for a backward pass, and a step costs one
    forward pass. Dropout is off in the layers, unlike in DeeBERT's training, so that exits judge the states of
    inference; their own is on.

    Args:
        points: the operating points of the selectors, which do not change; None for a model without any.
        distillation: learn the dense model's outputs, not the labels.
    """

    def __init__(self, model: Any, losses: TaskLosses, points: OperatingPoints | None, *, distillation: bool):
        super().__init__(model, losses)
        self.points, self.distillation = points, distillation

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        self.model.eval()
        self.trunk.encoder.exits.train(self.training)
        gates = self.model.config.gate_options
        output = self.model(
            **inputs_of(batch),
            selection_policy=_selection_at(self.points, batch),
            exit_policy=ExitThresholds(gate=gates.threshold if gates else NO_SKIPPING),
            output_exits=True,
        )
        losses = cast(ExitLosses, self.losses).of_exits(output.exits, batch, distilled=self.distillation)
        return {
            "loss": losses.sum(),
            "exit_loss": losses.detach().mean(),
            "dense_passes": torch.tensor(_spent(self.model.config, output, batch)),
        }


class Gates(Objective):
    """Trains gates and layers: each layer's output is mixed with its input, by the gate (SmartBERT's first stage).

    The loss is the task's plus λ over the sum of the gates' mean probabilities to skip. SmartBERT's contrast between
    adjacent layers, of a weight of 0.01, is left out.

    Args:
        points, distillation: as for `Exits`.
        penalty: λ.
        soft_steps: for this many steps the gates mix; after them, layers are skipped or not, as in inference.
    """

    def __init__(
        self,
        model: Any,
        losses: TaskLosses,
        points: OperatingPoints | None,
        *,
        distillation: bool,
        penalty: float,
        soft_steps: int,
    ):
        super().__init__(model, losses)
        self.points, self.distillation, self.penalty, self.soft_steps = points, distillation, penalty, soft_steps
        self.step = nn.Buffer(torch.zeros((), dtype=torch.int64))

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        gates = MixingGates(hard=bool(self.step >= self.soft_steps))
        if self.training:
            self.step.add_(1)
        output = self.model(**inputs_of(batch), selection_policy=_selection_at(self.points, batch), exit_policy=gates)
        loss = (self.losses.distilled if self.distillation else self.losses.labelled)(output, batch).mean()
        skipped = torch.stack(gates.probabilities).mean(1)
        return {
            "loss": loss + self.penalty / skipped.sum().clamp(min=1e-3),
            "task_loss": loss.detach(),
            "skipped": (torch.stack(gates.probabilities) >= gates.threshold).float().mean(),
            "dense_passes": torch.tensor(3 * _spent(self.model.config, output, batch)),
        }


class SelfSampling(Objective):
    """Trains everything with halted words (TOKEE's second stage).

    For each window of a batch, a window of words and a threshold are drawn. They say which words would be halted where,
    by the uncertainties of the model before this stage. In the pass these words are halted there, whatever the exits
    say now. Every exit learns from all words that have got so far, halted ones included, and the final classifier too,
    weighted with their layers. The loss of a word is the distance to its loss before this stage (flooding).

    Batches have `teacher` from `teacher.exit_signals`.

    Args:
        points: as for `Exits`.
    """

    WINDOWS = (5, 7, 9, 11, 13, 15)
    THRESHOLDS = (0.01, 0.03, 0.05, 0.1, 0.15, 0.2, 0.25)
    HIGHEST = 0.5  # in the upper half of the layers, where thresholds are doubled
    WHOLE = 0.4  # share of the windows without halted words, besides a batch's first

    def __init__(self, model: Any, losses: TaskLosses, points: OperatingPoints | None):
        super().__init__(model, losses)
        self.points = points

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        config, options, inputs = self.model.config, self.model.config.exit_options, inputs_of(batch)
        exits = len(options.layers)
        uncertainties, floods = batch["teacher"].split([exits, exits + 1], 1)
        plan = planned_exits(uncertainties, inputs["words"], batch["cu_seqlens"], *self._drawn(batch))
        selection = _selection_at(self.points, batch)
        output = self.trunk(**inputs, selection_policy=selection, exit_policy=PlannedExits(plan), output_exits=True)

        labels, sequences = batch["labels"], batch["cu_seqlens"].diff().long()
        stayed = torch.zeros_like(sequences, dtype=torch.bool).index_fill(0, output.remaining, True)
        final = self.model.classifier(self.model.dropout(output.last_hidden_state))
        layers = [
            *zip(options.layers, floods.T, output.exits.logits, output.exits.judged),
            (config.num_hidden_layers - 1, floods[:, -1], final, stayed.repeat_interleave(sequences)),
        ]
        total = torch.zeros((), device=labels.device)
        for layer, flood, logits, judged in layers:
            counted = judged & (labels != IGNORED)
            distances = (word_losses(logits, labels) - flood).abs()[counted]
            total = total + (layer + 1) * distances.sum() / counted.sum().clamp(min=1)
        loss = total / (sum(options.layers) + exits + config.num_hidden_layers)
        answers = batch["answers"]
        return {
            "loss": loss,
            "exit_loss": loss.detach(),
            "halted": (plan[answers] < exits).float().mean(),
            "dense_passes": torch.tensor(3 * _spent(config, output, batch)),
        }

    def _drawn(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """A window of words, (sequences,), and thresholds, (sequences, exits), for each sequence."""
        sequences, device = len(batch["example"]), batch["example"].device
        options, half = self.model.config.exit_options, self.model.config.num_hidden_layers / 2

        def drawn(choices: Sequence[float]) -> Tensor:
            return torch.tensor(choices, device=device)[torch.randint(len(choices), (sequences,), device=device)]

        windows, thresholds = drawn(self.WINDOWS), drawn(self.THRESHOLDS)
        whole = torch.rand(sequences, device=device) < self.WHOLE
        whole[0] = True  # so that every exit learns in every step
        thresholds[whole] = 0.0
        factors = torch.tensor([1.0 if layer < half else 2.0 for layer in options.layers], device=device)
        return windows, (thresholds[:, None] * factors).clamp(max=self.HIGHEST)


def _by_depth(config: TRBertConfig, exits: Tensor, final: Tensor) -> Tensor:
    """The mean of the exits' losses, (exits,), and the final classifier's, (), each weighted with its layers."""
    assert config.exit_options is not None
    depths = torch.tensor([*config.exit_options.layers, config.num_hidden_layers - 1], device=exits.device) + 1
    return (depths * torch.cat([exits, final[None]])).sum() / depths.sum()


def _selection_at(points: OperatingPoints | None, batch: dict[str, Tensor]) -> SelectionPolicy:
    """The selection of inference, with a point drawn for each example."""
    if points is None:
        return keep_all
    return SamplingPolicy(points.cutoffs_at(_points_of(points, batch), sampled=False), at_random=False)


def _spent(config: TRBertConfig, output: Any, batch: dict[str, Tensor]) -> float:
    """FLOPs of a pass relative to the dense model's."""
    trace, asked = output.trace, None if output.exits is None else output.exits.asked.cpu().numpy()
    spent = spent_flops(config, trace.counts.cpu().numpy(), asked, trace.gated).sum()
    return float(spent / dense_flops(config, batch["cu_seqlens"].diff().cpu().numpy()).sum())


def _points_of(points: OperatingPoints, batch: dict[str, Tensor]) -> Tensor:
    """Draw a point for each example, and repeat it for the example's windows: int64 (windows,)."""
    return points.draw(_examples(batch), batch["example"].device)[batch["example"]]


def _examples(batch: dict[str, Tensor]) -> int:
    return int(batch["example"].max()) + 1


def _means(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """Mean of each group's values, (groups,)."""
    sums = torch.zeros(groups, device=values.device).index_add(0, group, values)
    return sums / group.bincount(minlength=groups)


def _kept_measurements(kept: Tensor, lengths: Tensor) -> dict[str, Tensor]:
    """Kept fractions of all tokens except [CLS], which is always kept."""
    others = (kept - 1).sum(0) / (lengths - 1).sum().clamp(min=1)
    return {f"kept_{reduction}": fraction for reduction, fraction in enumerate(others)}
