"""Train a TR-BERT classifier from a BERT or DistilBERT checkpoint and a labelled Parquet corpus.

    python jobs/train.py --train corpus/train.parquet --backbone path/to/bert --output model --speedup 3

Fine-tunes the dense model, teaches the token selectors by imitation, fine-tunes both together; run again after a kill,
it resumes. The model directory is what jobs/score.py --model takes.
"""

import logging
import sys
from collections.abc import Sequence

from jobs.command import run_command
from trbert_model.options import parse_options
from trbert_model.training import TrainingConfig, train


def main(arguments: Sequence[str] | None = None) -> int:
    config = parse_options(TrainingConfig, arguments, __doc__ or "")
    logging.getLogger("trbert_model").setLevel(logging.INFO)
    measured = train(config)
    for stage, result in measured["stages"].items():
        print(
            f"{stage:24} accuracy {100 * result['accuracy']:.2f}% on {result['documents']} documents, "
            f"{result['flops_speedup']:.2f}x fewer FLOPs than dense"
        )
    print(f"saved to {config.output}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
