"""Copy a complete output of jobs/score.py into few large objects, for readers that are slow with many small ones.

    python jobs/compact.py --output s3://bucket/scores --into s3://bucket/scores-2026-11-22

The output is not changed, and later runs still use it. The copy has its own _SUCCESS, written last. After a failure,
run the command again to finish. Exit codes: 0 done; 1 failed, run it again; 2 the output is not complete or the target
is not empty; 4 stopped by a signal, run it again; 5 a scoring run is working on the output.
"""

import sys
from collections.abc import Sequence

from jobs.command import run_command
from pipeline.compact import CompactConfig, compact
from trbert_model.options import parse_options


def main(arguments: Sequence[str] | None = None) -> int:
    config = parse_options(CompactConfig, arguments, __doc__ or "")
    copy = compact(config)
    print(f"{copy['results']:,} results and {copy['quarantined']:,} quarantined rows in {len(copy['parts'])} objects")
    return 0


def command() -> int:
    """The console script `trbert-compact`."""
    return run_command(main)


if __name__ == "__main__":
    sys.exit(command())
