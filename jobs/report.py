"""Make the HTML page of a scoring run from the reports in its output, also of runs of older versions.

    python jobs/report.py s3://bucket/scores
    python jobs/report.py s3://bucket/scores --run 20261127T042211Z-7f1fe6 --html run.html

Exit codes: 0 done; 1 the output cannot be read or written; 2 there is no such run.
"""

import sys
from collections.abc import Sequence

from jobs.command import run_command
from pipeline.page import ReportConfig, make_page
from trbert_model.options import parse_options


def main(arguments: Sequence[str] | None = None) -> int:
    print(make_page(parse_options(ReportConfig, arguments, __doc__ or "")))
    return 0


def command() -> int:
    """The console script `trbert-report`."""
    return run_command(main)


if __name__ == "__main__":
    sys.exit(command())
