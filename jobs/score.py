"""Score a corpus of Parquet shards with a TR-BERT model.

    python jobs/score.py --input s3://bucket/corpus --output s3://bucket/scores --model s3://bucket/model \\
        --text-column text --id-column id

Exit codes: 0 the output is complete; 1 the run failed, run it again to finish; 2 an option, the input, the model or
the output does not fit, nothing was started; 3 done, but with unreadable shards or more bad rows than
--max-bad-rows; 4 stopped by SIGTERM, SIGHUP, Ctrl-C or --stop-after, run it again to continue; 5 another run is working
on the output (nothing was started), or has taken it over.
"""

import contextlib
import json
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from jobs.command import run_command
from pipeline.stopping import StopRequest


def main(arguments: Sequence[str] | None = None) -> int:
    stop = StopRequest()
    with stop.on_signals():  # before the imports, which take seconds
        return _main(arguments, stop)


def _main(arguments: Sequence[str] | None, stop: StopRequest) -> int:
    from pipeline.config import ScoreConfig
    from trbert_model.options import parse_options

    config = parse_options(ScoreConfig, arguments, __doc__ or "")
    from pipeline.report import summary  # not before the options are known to be good: Ray and torch take seconds
    from pipeline.run import score

    report = score(config, stop)
    print(json.dumps(report, indent=1) if report.get("dry_run") else summary(report))
    return report["exit_code"]


def command() -> NoReturn:
    """The console script `trbert-score`."""
    code = run_command(main)
    with contextlib.suppress(OSError):  # whoever read it has gone; the exit code still tells how the run ended
        sys.stdout.flush()
    os._exit(code)  # the run has ended all it started; to take the interpreter and torch apart would take a second more


if __name__ == "__main__":
    command()
