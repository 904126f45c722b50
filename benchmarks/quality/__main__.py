"""The command line; see the package's docstring."""

import argparse
import json
import logging
from pathlib import Path
from typing import Any

from benchmarks import quality
from benchmarks.common import RESULTS
from benchmarks.corpora import prepare
from benchmarks.quality.runs import RUNS
from benchmarks.quality.tables import draw, table
from benchmarks.quality.workshop import Workshop, write_json
from trbert_model.engine.options import DTYPES


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description=quality.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, help="directory of the corpora's Parquet files")
    parser.add_argument("--work", type=Path, default=Path("build/quality"), help="models and results (%(default)s)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="to measure in (%(default)s)")
    parser.add_argument(
        "--runs", nargs="*", choices=list(RUNS), default=list(RUNS), metavar="RUN", help=", ".join(RUNS)
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    prepare(arguments.data, arguments.work / "corpora")
    workshop = Workshop(arguments.work, arguments.dtype)
    for name in arguments.runs:
        write_json(RESULTS / "quality" / f"{name}.json", workshop.run(name))
    found = {name: RESULTS / "quality" / f"{name}.json" for name in RUNS}
    results = {name: json.loads(path.read_text()) for name, path in found.items() if path.exists()}
    by_corpus = sorted(results, key=lambda name: RUNS[name].corpus)
    early = {name: _main_metric(results[name]) for name in by_corpus if RUNS[name].early}
    reduction = {name: result for name, result in results.items() if name not in early}
    for name, some in (("quality", reduction), ("quality-early", early)):
        (RESULTS / f"{name}.md").write_text(table(some) + "\n")
        print(table(some))
    draw(reduction, RESULTS / "quality.png")


def _main_metric(result: dict[str, Any]) -> dict[str, Any]:
    main = result["rows"][0]["metric"]
    return {**result, "rows": [row for row in result["rows"] if row["metric"] == main]}


if __name__ == "__main__":
    main()
