"""The results of the runs, as Markdown and as a picture."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality.outcomes import joined, scores_in
from benchmarks.quality.runs import RUNS, Run


def summary(
    dense: dict[str, Any], point: dict[str, Any], rows: np.ndarray | None = None, metric: str | None = None
) -> dict[str, Any]:
    """Compare a metric with the dense model's, with a paired-bootstrap interval, and compute the FLOPs speed-up.

    Args:
        rows: bool (documents,), the documents to include. Default: all, or those that `metric` applies to.
        metric: default: the corpus's main metric.
    """
    before, after = scores_in(dense, metric), scores_in(point, metric)
    if rows is None:
        rows = before.denominators + after.denominators > 0 if metric else np.ones(len(before.numerators), bool)
    before, after = before[rows], after[rows]
    return {
        "documents": int(rows.sum()),
        "metric": metric or dense["metric"],
        "dense": before.value,
        "reduced": after.value,
        "difference": after.value - before.value,
        "interval": after.interval(before),
        "flops_speedup": float(np.array(dense["dense_flops"])[rows].sum() / np.array(point["flops"])[rows].sum()),
    }


def rows_of(run: Run, parts: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The table rows of a run; parts: for each part, the measurements of each of the run's corpora."""
    rows = []
    for part, measured in parts.items():
        title = run.title if len(run.parts) == 1 else f"{run.title}, {part}"
        dense = joined([each["dense"] for each in measured])
        reached = min(len(each["points"]) for each in measured)
        for index, target in enumerate(run.targets[:reached]):
            points = [each["points"][index] for each in measured]
            point = joined(points)
            speed = float(np.mean([each["measured_speedup"] for each in points]))
            rows.append({"title": title, "target": target, **summary(dense, point), "measured_speedup": speed})
            for metric in dense["scores"].keys() - {dense["metric"]}:
                rows.append({"title": title, "target": target, **summary(dense, point, metric=metric)})
            if run.long:  # these are not timed separately
                long = summary(dense, point, np.array(dense["tokens"]) > 512)
                rows.append({"title": f"{title}, > 512 tokens", "target": target, **long})
    return sorted(rows, key=lambda row: (row["title"], row["metric"] != dense["metric"], row["metric"]))


def table(results: dict[str, dict[str, Any]]) -> str:
    """All existing results as Markdown."""
    lines = [
        "| corpus | documents | metric | dense | asked | FLOPs | time | reduced | difference (95%) |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, result in results.items():
        if not RUNS[name].is_comparison:
            lines += [_line(f"{RUNS[name].corpus}, {row['title']}", row) for row in result["rows"]]
    if any(RUNS[name].is_comparison for name in results):
        lines += [
            "",
            "| corpus | compared | FLOPs | accuracy | difference to dense (95%) | full recipe ahead by (95%) |",
            "|---|---|---:|---:|---:|---:|",
        ]
    for name, result in results.items():
        if RUNS[name].is_comparison:
            (row,) = result["rows"]
            behind = _difference(row["behind"]) if "behind" in row else "–"
            lines.append(
                f"| {RUNS[name].corpus} | {row['title']} | {row['flops_speedup']:.2f}× | {row['reduced']:.2f} | "
                f"{_difference(row)} | {behind} |"
            )
    conditions: dict[str, list[str]] = defaultdict(list)
    for name, result in results.items():
        where = result["machine"]
        conditions[
            f"{where['cores']} cores of {where['cpu']}, {result['dtype']}, torch {where['torch']}, {where['date']}"
        ].append(name)
    lines += ["", *(f"{condition}: {', '.join(names)}." for condition, names in conditions.items())]
    return "\n".join(lines)


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Plot the metric's difference to dense over FLOPs speed-up and over measured speed-up, with 95% intervals.

    Only whole test sets are plotted, because parts of them are not timed separately.
    """
    import matplotlib  # only needed for drawing

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for name, result in results.items():
        if not RUNS[name].is_comparison:
            for row in (row for row in result["rows"] if "measured_speedup" in row):
                lines[f"{RUNS[name].corpus}, {row['title']}"].append(row)
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for panel, speed, title in (
        (panels[0], "flops_speedup", "FLOPs speed-up over dense"),
        (panels[1], "measured_speedup", "measured speed-up over dense"),
    ):
        for name, points in lines.items():
            differences = np.array([point["difference"] for point in points])
            intervals = np.array([point["interval"] for point in points])
            errors = [differences - intervals[:, 0], intervals[:, 1] - differences]
            panel.errorbar([p[speed] for p in points], differences, yerr=errors, marker="o", capsize=3, label=name)
        panel.plot(1, 0, "k*", markersize=12, label="dense")
        panel.axhline(0, color="gray", linewidth=0.8, linestyle=":")
        panel.set_xlabel(title)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("points against dense, on test documents")
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _difference(summary: dict[str, Any]) -> str:
    low, high = summary["interval"]
    return f"{summary['difference']:+.2f} ({low:+.2f} to {high:+.2f})"


def _line(title: str, summary: dict[str, Any]) -> str:
    cells = [
        title,
        f"{summary['documents']:,}",
        summary["metric"].replace("_", " "),
        f"{summary['dense']:.2f}",
        f"{summary['target']:g}×",
        f"{summary['flops_speedup']:.2f}×",
        f"{summary['measured_speedup']:.2f}×" if "measured_speedup" in summary else "–",
        f"{summary['reduced']:.2f}",
        _difference(summary),
    ]
    return f"| {' | '.join(cells)} |"
