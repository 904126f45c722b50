"""Plots of calibration tables."""

from pathlib import Path

from .calibration.table import Calibration, OperatingPoint


def draw_calibration(table: Calibration, path: str | Path) -> None:
    """Plot a table's metric over FLOPs speed-up and over measured speed-up, in a PNG or SVG file.

    Shows 95% intervals of the change from the dense model over paired documents, and marks the dense model and the
    default thresholds.
    """
    import matplotlib  # only needed here

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for panel, name, title in (
        (panels[0], "flops_speedup", "FLOPs speed-up over dense"),
        (panels[1], "measured_speedup", "measured speed-up over dense"),
    ):
        points = sorted(table.points, key=lambda point: getattr(point, name))
        panel.errorbar(
            [getattr(point, name) for point in points],
            [point.metric for point in points],
            yerr=_errors(points),
            marker="o",
            capsize=3,
            label="calibration table, 95% intervals of paired documents",
        )
        panel.plot(1, table.dense_metric, "k*", markersize=12, label="dense")
        panel.plot(getattr(table.default, name), table.default.metric, "rs", label="default thresholds")
        panel.axhline(table.dense_metric, color="gray", linewidth=0.8, linestyle=":")
        panel.set_xlabel(title)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(f"{table.metric}, % of {table.documents:,} documents")
    panels[0].legend(loc="lower left")
    figure.suptitle(table.corpus, parse_math=False)  # a name may hold $
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _errors(points: list[OperatingPoint]) -> list[list[float]]:
    low = [max(point.drop_interval[1] - point.drop, 0.0) for point in points]
    high = [max(point.drop - point.drop_interval[0], 0.0) for point in points]
    return [low, high]
