"""Measure a model's quality at several speeds on a labelled corpus, and write its calibration table.

    python jobs/evaluate.py --model model --corpus labelled.parquet

The table is written to the model directory as calibration.json, which jobs/score.py --speedup and --max-drop read, and
plotted as calibration.png. Use documents that the model was not trained on. With --no-write the model directory is not
changed, for example to measure on a test set, from which no speed should be chosen.
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.command import run_command
from pipeline.errors import StorageError, UsageError
from pipeline.model import fetch_model
from pipeline.storage import Storage
from trbert_model.calibration.table import FILE, SPEEDUPS, Calibration, OperatingPoint, calibration_key, with_table
from trbert_model.card import CARD, write_card
from trbert_model.options import LabelledColumns, option, parse_options
from trbert_model.plotting import draw_calibration
from trbert_model.terminal import printable


@dataclass(frozen=True)
class EvaluateConfig(LabelledColumns):
    """The options of an evaluation."""

    model: str = option("", "directory or URI of a TR-BERT model", path=True)
    corpus: str = option(
        "",
        "Parquet file, folder or glob with labelled documents, local or a URI; for questions also SQuAD's JSON",
        path=True,
    )
    dtype: str = option("auto", "float32, bfloat16, float16; auto: bfloat16 where that is fast")
    speedups: tuple[float, ...] = option(SPEEDUPS, "FLOPs speed-ups to find thresholds for")
    plot: str | None = option(
        None, "PNG or SVG file to draw (default: a local model directory's calibration.png)", path=True
    )
    write: bool = option(True, "write table and picture into the model directory")

    def __post_init__(self):
        for name in ("model", "corpus"):
            if not getattr(self, name):
                raise UsageError(f"{name} is required")
        Storage(self.corpus)  # refuses a URI with credentials before it is printed anywhere
        if not self.speedups or not min(self.speedups) > 1:
            raise UsageError(f"speedups {self.speedups} must be more than 1 each")


def main(arguments: Sequence[str] | None = None) -> int:
    config = parse_options(EvaluateConfig, arguments, __doc__ or "")
    from pipeline.labelled import corpora_read_as_input
    from trbert_model.calibration.measure import calibrate  # torch: after the options
    from trbert_model.checkpoints.loading import load_checkpoint
    from trbert_model.engine import Engine, EngineOptions
    from trbert_model.engine.options import operating_thresholds

    logging.getLogger("trbert_model").setLevel(logging.INFO)
    directory = fetch_model(config.model)
    loaded = load_checkpoint(directory)
    engine = Engine(loaded.model, loaded.tokenizer, EngineOptions(dtype=config.dtype))
    if not operating_thresholds(engine.config):
        raise UsageError(f"{config.model}: it has no reduction layers, exits or gates, so there is no speed to choose")
    with corpora_read_as_input():
        corpus = engine.task.read_corpus(config.corpus, config)
    key = calibration_key(loaded.digest, engine.dtype, engine.config.usable_positions)
    name = Path(config.corpus).name
    table = calibrate(engine, corpus, key=key, name=name, speedups=config.speedups)
    print(printable(as_text(table)))
    storage = Storage(config.model)
    if config.write:
        storage.write(FILE, with_table(directory, table))
        print(printable(f"\nwritten to {config.model}/{FILE}"))
    plot = config.plot or (f"{storage.root}/calibration.png" if config.write and storage.is_local else None)
    if plot is not None:
        try:
            draw_calibration(table, plot)
        except (OSError, ValueError) as error:  # the latter if its name has the ending of no picture
            raise StorageError(f"{plot}: cannot be drawn: {error}") from error
        print(printable(f"drawn in {plot}"))
    if config.write and storage.is_local and Path(storage.root, CARD).is_file():
        write_card(Path(storage.root))
    return 0


def as_text(table: Calibration) -> str:
    """Format the table for a terminal."""
    others = list(table.dense_other_metrics)
    dense = [f"{table.dense_metric:.2f}% {table.metric}"]
    dense += [f"{table.dense_other_metrics[name]:.2f}% {name}" for name in others]
    lines = [
        f"{table.documents:,} documents of {table.corpus}, dense {', '.join(dense)}",
        f"{'':10} {'FLOPs':>7} {'time':>7} {table.metric:>9} {'change':>7} {'95% interval':>16}  "
        + "".join(f"{name:>13}" for name in others)
        + f"{'  ' if others else ''}kept",
    ]
    for label, point in [*(("", point) for point in table.points), ("default", table.default)]:
        lines.append(_line(label, point))
    return "\n".join(lines)


def _line(label: str, point: OperatingPoint) -> str:
    low, high = point.drop_interval
    others = "".join(f"{value:12.2f}%" for value in point.other_metrics.values())
    kept = " / ".join(f"{100 * fraction:.0f}%" for fraction in point.kept_fractions)
    return (
        f"{label:10} {point.flops_speedup:6.2f}x {point.measured_speedup:6.2f}x {point.metric:8.2f}% "
        f"{-point.drop:+7.2f} {-high:+7.2f} to {-low:+5.2f}  {others}{'  ' if others else ''}{kept}"
    )


def command() -> int:
    """The console script `trbert-evaluate`."""
    return run_command(main)


if __name__ == "__main__":
    sys.exit(command())
