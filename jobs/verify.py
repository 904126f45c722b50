"""Check the output of jobs/score.py against its input, row by row and object by object.

    python jobs/verify.py --output s3://bucket/scores

Prints what is missing, doubled, extra or damaged. Exit codes: 0 the output holds every row of the input exactly once;
3 it does not; 1 something could not be read; 2 the output or the input does not exist.
"""

import sys
from collections.abc import Sequence

from jobs.command import run_command
from pipeline.verify import VerifyConfig, summary, verify
from trbert_model.options import parse_options

EXIT_HOLDS, EXIT_DOES_NOT_HOLD = 0, 3


def main(arguments: Sequence[str] | None = None) -> int:
    found = verify(parse_options(VerifyConfig, arguments, __doc__ or ""))
    print(summary(found))
    return EXIT_HOLDS if found.holds else EXIT_DOES_NOT_HOLD


def command() -> int:
    """The console script `trbert-verify`."""
    return run_command(main)


if __name__ == "__main__":
    sys.exit(command())
