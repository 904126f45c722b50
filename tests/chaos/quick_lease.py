"""`jobs/score.py` with a short lease, for the short form: what waits for a dead run's lease to lapse waits for less."""

import functools
import sys

import pipeline.run
from jobs.command import run_command
from jobs.score import main
from pipeline.lock import OutputLock

if __name__ == "__main__":
    pipeline.run.OutputLock = functools.partial(OutputLock, lease_seconds=25.0, renewal_seconds=4.0)  # type: ignore
    sys.exit(run_command(main))
