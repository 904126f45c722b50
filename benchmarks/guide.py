"""What a reduction can do: predictions of the dense model when it sees only the tokens that a ranking of its own keeps.

    python -m benchmarks.guide --data DIR --work build/quality

It shows without training, at each speed, how often the reduced and the dense model predict the same for a window:

- with selectors in front of other layers, and other kept fractions (`calibration.measure.schedules`);
- with tokens ranked by the gradient of the dense model's own prediction (`training.teacher.guide`, which selectors
  imitate), or by the attention that they get in its last layer: from all tokens (as ToP ranks them: Li et al., KDD
  2023), or from [CLS]; or by the sum of its ranks by gradient and by attention;
- with dropped tokens combined into one that stays: their mean.

Selectors can only approximate a ranking, and what training the rest of the model gains is not included.
"""

import argparse
import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import described, machine, save
from benchmarks.corpora import prepare
from benchmarks.quality.runs import RUNS
from benchmarks.quality.workshop import Workshop
from trbert_model.calibration.measure import kept_fractions_for, schedules
from trbert_model.checkpoints.conversion import convert_checkpoint
from trbert_model.engine import Engine, EngineOptions
from trbert_model.engine.precision import computes_bfloat16
from trbert_model.flops import dense_flops, reduced_flops
from trbert_model.labelled import WindowDataset
from trbert_model.reduction.policies import TopTokensPolicy
from trbert_model.reduction.state import Candidates, SelectionPolicy
from trbert_model.tasks.classification.losses import UNLABELLED
from trbert_model.training.teacher import attention_guide, guide, inputs_of
from trbert_model.varlen import sequence_sums

EARLY, PAPER = (0, 1, 3), (1, 2, 4)
SPEEDUPS = (2.0, 3.0, 4.0, 5.0)
BATCH = 8  # windows


class Reduction(NamedTuple):
    """A way to reduce.

    Attributes:
        layers: with a selector in front.
        schedule: index in `schedules`.
        ranking: "gradient", "attention" (from all tokens), "[CLS] attention", or "both" (gradient and that from [CLS]).
        combined: dropped tokens leave their mean behind.
    """

    layers: tuple[int, ...] = EARLY
    schedule: int = 0
    ranking: str = "gradient"
    combined: bool = False


REDUCTIONS = {
    "layers 0, 1, 3; fractions fall evenly; ranked by the gradient": Reduction(),
    "layers 1, 2, 4": Reduction(layers=PAPER),
    "fractions fall later": Reduction(schedule=1),
    "fractions fall later still": Reduction(schedule=2),
    "ranked by the last layer's attention (ToP)": Reduction(ranking="attention"),
    "ranked by the last layer's attention from [CLS]": Reduction(ranking="[CLS] attention"),
    "ranked by the sum of both ranks, by the gradient and from [CLS]": Reduction(ranking="both"),
    "dropped tokens are combined into one": Reduction(combined=True),
}


class CombiningPolicy:
    """Keeps tokens like another policy, and one more of each sequence, which becomes the mean of those that leave.

    Works on states that no gradient passes through, since it changes them in place.
    """

    def __init__(self, policy: SelectionPolicy):
        self.policy = policy
        # By token index in the batch: the tokens that combined ones stand for.
        self.stands_for: Tensor | None = None

    def __call__(self, candidates: Candidates) -> Tensor:
        indices, cu_seqlens = candidates.token_indices, candidates.cu_seqlens
        if self.stands_for is None:
            self.stands_for = torch.ones(len(indices))
        weights = self.stands_for[indices]
        combined = weights > 1
        keep = self.policy(candidates) & ~combined
        leaving = torch.where(keep, 0.0, weights)
        sums = sequence_sums(candidates.hidden.float() * leaving[:, None], cu_seqlens)
        count = sequence_sums(leaving, cu_seqlens)
        bounds = cu_seqlens.tolist()
        for sequence, (start, end) in enumerate(zip(bounds, bounds[1:])):
            out = (~keep[start:end]).nonzero()
            if len(out):
                row = start + int(out[int(combined[start:end][out[:, 0]].long().argmax())])
                candidates.hidden[row] = (sums[sequence] / count[sequence]).to(candidates.hidden.dtype)
                self.stands_for[indices[row]] = count[sequence]
                keep[row] = True
        return keep


def ranks(scores: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Each token's rank in its window, from 0 for the lowest score, (..., total tokens)."""
    parts = scores.split(cu_seqlens.diff().tolist(), dim=-1)
    return torch.cat([part.argsort(-1).argsort(-1) for part in parts], -1).float()


def agreement(dense: Path, dataset: WindowDataset, indices: np.ndarray) -> list[dict[str, Any]]:
    """The percentage of windows with the dense model's label, one row for each reduction and speed-up."""
    models: dict[tuple[int, ...], Any] = {
        layers: convert_checkpoint(dense, reduction_layers=list(layers)).eval() for layers in (EARLY, PAPER)
    }
    lengths = np.array([len(dataset.windows[index].input_ids) for index in indices])

    def fractions(reduction: Reduction, speedup: float) -> Tensor:
        config = models[reduction.layers].config
        return torch.tensor(kept_fractions_for(speedup, config, lengths, schedules(3)[reduction.schedule]))

    settings = [
        (name, reduction, speedup, fractions(reduction, speedup))
        for name, reduction in REDUCTIONS.items()
        for speedup in SPEEDUPS
    ]
    agreed, flops = np.zeros(len(settings)), np.zeros(len(settings))
    for start in range(0, len(indices), BATCH):
        batch = dataset.collate([[int(index)] for index in indices[start : start + BATCH]])
        batch["labels"].fill_(UNLABELLED)  # the guide must not depend on the correct labels
        tokens = batch["cu_seqlens"].diff().long()
        with torch.autocast("cpu", torch.bfloat16, enabled=computes_bfloat16()):
            signals, saliency = guide(models[EARLY], batch, dataset.losses)
            labels = signals[:, : models[EARLY].config.num_labels].argmax(-1)
            _, from_all = attention_guide(models[EARLY], batch, dataset.losses, from_all=True)
            _, from_cls = attention_guide(models[EARLY], batch, dataset.losses, from_all=False)
            rankings = {
                "gradient": saliency,
                "attention": from_all,
                "[CLS] attention": from_cls,
                "both": ranks(saliency, batch["cu_seqlens"]) + ranks(from_cls, batch["cu_seqlens"]),
            }
            with torch.no_grad():
                for i, (_, reduction, _, kept) in enumerate(settings):
                    model = models[reduction.layers]
                    counts = ((tokens[:, None] * kept).round().long() - int(reduction.combined)).clamp(min=1)
                    policy: SelectionPolicy = TopTokensPolicy(
                        counts, rankings[reduction.ranking][list(reduction.layers)]
                    )
                    if reduction.combined:
                        policy = CombiningPolicy(policy)
                    output = model(**inputs_of(batch), selection_policy=policy)
                    agreed[i] += int((output.logits.argmax(-1) == labels).sum())
                    kept_tokens = torch.stack(output.kept_tokens, 1).numpy()
                    flops[i] += reduced_flops(model.config, tokens.numpy(), kept_tokens).sum()
    dense_cost = dense_flops(models[EARLY].config, lengths).sum()
    return [
        {
            "reduction": name,
            "speedup": speedup,
            "agreement": 100 * float(agreed[i] / len(indices)),
            "flops_speedup": float(dense_cost / flops[i]),
        }
        for i, (name, _, speedup, _) in enumerate(settings)
    ]


def measured(workshop: Workshop, name: str, limit: int) -> dict[str, Any]:
    """Measure each corpus of a run with its own dense model, on documents that it was not trained on."""
    run = RUNS[name]
    rows: list[list[dict[str, Any]]] = []
    windows = []
    for corpus in run.corpora:
        dense = workshop.dense(corpus)
        engine = Engine.from_pretrained(dense, EngineOptions(dtype="float32", reduce=False))
        part = "dev" if workshop.file(corpus, "dev").exists() else "test"
        dataset = workshop.read(corpus, part, engine).dataset()
        indices = np.random.default_rng(0).permutation(len(dataset.windows))[:limit]
        rows.append(agreement(dense, dataset, indices))
        windows.append(len(indices))
        logging.info("%s, %d windows: %s", corpus, len(indices), rows[-1])
    joined = []
    for same in zip(*rows):
        means = {
            key: float(np.average([row[key] for row in same], weights=windows))
            for key in ("agreement", "flops_speedup")
        }
        joined.append({**same[0], **means})
    return {"windows": sum(windows), "rows": joined}


def markdown(result: dict[str, Any]) -> str:
    lines = []
    for corpus, found in result["corpora"].items():
        speeds = " | ".join(f"agree at {speedup:g}×" for speedup in SPEEDUPS)
        lines += [f"| {corpus}, {found['windows']:,} windows | {speeds} |", "|---|" + "---:|" * len(SPEEDUPS)]
        for name in dict.fromkeys(row["reduction"] for row in found["rows"]):
            cells = [f"{row['agreement']:.1f}%" for row in found["rows"] if row["reduction"] == name]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    where = result["machine"]
    lines.append(f"{result['dtype']}, torch {where['torch']}, {described(where)}, {where['date']}.")
    return "\n".join(lines)


def main() -> None:
    names = ["20news", "imdb", "hyperpartisan"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory of the corpora's Parquet files")
    parser.add_argument("--work", type=Path, default=Path("build/quality"), help="as benchmarks.quality's")
    parser.add_argument("--corpora", nargs="*", choices=names, default=names, help="%(default)s")
    parser.add_argument("--windows", type=int, default=1000, help="of each dense model's documents (%(default)s)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    prepare(arguments.data, arguments.work / "corpora")
    workshop = Workshop(arguments.work, "float32")
    corpora = {name: measured(workshop, name, arguments.windows) for name in arguments.corpora}
    dtype = "bfloat16" if computes_bfloat16() else "fp32"
    result = {"machine": machine(), "dtype": dtype, "corpora": corpora}
    save("guide", result, markdown(result))


if __name__ == "__main__":
    main()
