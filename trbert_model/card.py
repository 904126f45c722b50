"""The model card of a trained model: the README.md that the Hugging Face Hub shows, made from the model's own files."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .calibration.table import FILE

CARD = "README.md"
_MADE_HERE = "<!-- made by jobs/train.py and jobs/evaluate.py; remove this line to keep your own text -->"


def write_card(directory: Path) -> bool:
    """Write a model directory's card, from `config.json`, `training.json`, `calibration.json` and `calibration.png`.

    Returns:
        Whether it was written: a card that somebody wrote by hand is kept.
    """
    path = directory / CARD
    if path.is_file() and _MADE_HERE not in path.read_text(encoding="utf-8"):
        return False
    path.write_text(_card(directory), encoding="utf-8")
    return True


def _card(directory: Path) -> str:
    config, training = _json(directory / "config.json"), _json(directory / "training.json")
    options, stages = training.get("config", {}), training.get("stages", {})
    lines = [
        "---",
        "library_name: transformers",
        "tags: [tr-bert, token-reduction, long-documents]",
        "---",
        "",
        _MADE_HERE,
        "",
        f"# {directory.resolve().name}",
        "",
        f"A TR-BERT ([Ye et al., NAACL 2021](https://arxiv.org/abs/2105.11618)) of {config.get('num_hidden_layers')} "
        f"layers that {'; '.join(_savings(config)) or 'computes all tokens'}: {config.get('architectures', ['?'])[0]}.",
        "",
        "```bash",
        "python jobs/score.py --input CORPUS --output SCORES --model THIS_DIRECTORY",
        "```",
    ]
    measured = {name: stage for name, stage in stages.items() if "documents" in stage}
    if measured:
        metrics = [name for name in next(iter(measured.values())) if name not in ("documents", "flops_speedup")]
        metrics = [name for name in metrics if all(name in stage for stage in measured.values())]
        lines += ["", "## Training", ""]
        lines += _table(
            ["stage", *metrics, "FLOPs over dense", "documents"],
            [
                [name, *(f"{100 * stage[key]:.2f}%" for key in metrics), f"{stage['flops_speedup']:.2f}×",
                 f"{stage['documents']:,}"]
                for name, stage in measured.items()
            ],
        )  # fmt: skip
    for table in _json(directory / FILE).values():
        lines += ["", f"## Speeds, on {table['documents']:,} documents of {table['corpus']} ({table['key']})", ""]
        lines += _table(
            ["FLOPs", "time", table["metric"], "change", "95% interval of paired documents"],
            [
                [f"{point['flops_speedup']:.2f}×", f"{point['measured_speedup']:.2f}×", f"{point['metric']:.2f}%",
                 f"{-point['drop']:+.2f}", f"{-point['drop_interval'][1]:+.2f} to {-point['drop_interval'][0]:+.2f}"]
                for point in table["points"]
            ],
        )  # fmt: skip
        lines += ["", f"The dense model has {table['dense_metric']:.2f}% {table['metric']}."]
    if (directory / "calibration.png").is_file():
        lines += ["", "![Accuracy against speed](calibration.png)"]
    if options:
        given = {name: value for name, value in options.items() if value is not None and not _is_place(name)}
        lines += ["", "## Options", "", "```json", json.dumps(given, indent=1), "```"]
    return "\n".join(lines) + "\n"


def _savings(config: dict[str, Any]) -> Iterator[str]:
    """What the model leaves out, as predicates of a sentence."""
    exits = config.get("exits")
    if config.get("reduction_layers"):
        yield f"drops tokens before layers {', '.join(map(str, config['reduction_layers']))}"
    if config.get("gates") is not None:
        yield "skips layers"
    if exits:
        who = "halts words" if exits.get("unit") == "word" else "lets documents leave"
        yield f"{who} after layers {', '.join(map(str, exits['layers']))}"


def _is_place(option: str) -> bool:
    """Whether an option says where something is on the machine that trained the model, which concerns nobody else."""
    return option in ("train", "evaluation", "unlabelled", "backbone", "output", "teacher_cache", "push_to_hub")


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return ["| " + " | ".join(row) + " |" for row in (header, rule, *rows)]


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
