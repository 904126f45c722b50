"""Train a TR-BERT from a BERT, DistilBERT, RoBERTa, XLM-R or ModernBERT checkpoint and labelled documents.

    python jobs/train.py --train corpus/train.parquet --backbone path/to/bert --output model --speedup 3

Fine-tunes the dense model, trains the token selectors by imitation and by reinforcement learning, then trains both
together. With --exits, documents or words learn to leave before the last layer. If training was interrupted, run it
again to resume. With --num-workers N it is data-parallel, through Ray Train. Pass the model directory to jobs/score.py
--model.
"""

import argparse
import logging
import sys
from collections.abc import Sequence

from jobs.command import run_command
from pipeline.storage import Storage
from trbert_model.options import parse_options
from trbert_model.terminal import printable
from trbert_model.training.config import TrainingConfig


def main(arguments: Sequence[str] | None = None) -> int:
    workers = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    workers.add_argument("--num-workers", type=int, default=1)
    ours, rest = workers.parse_known_args(arguments)
    config = parse_options(TrainingConfig, rest, __doc__ or "")
    for corpus in filter(None, (config.train, config.evaluation, config.unlabelled)):
        Storage(corpus)  # refuses a URI with credentials before it is printed anywhere
    logging.getLogger("trbert_model").setLevel(logging.INFO)
    if ours.num_workers > 1:
        from pipeline.train import train_distributed  # only here, since a single process needs no Ray

        measured = train_distributed(config, ours.num_workers)
    else:
        from pipeline.labelled import corpora_read_as_input
        from trbert_model.training import train

        with corpora_read_as_input():
            measured = train(config)
    for stage, result in measured["stages"].items():
        if "documents" in result:
            others = ("documents", "flops_speedup", "dense_passes_per_document")
            metrics = ", ".join(f"{name} {100 * value:.2f}%" for name, value in result.items() if name not in others)
            print(
                f"{stage:24} {metrics} on {result['documents']} documents, "
                f"{result['flops_speedup']:.2f}x fewer FLOPs than dense"
            )
    print(printable(f"saved to {config.output}"))
    return 0


def command() -> int:
    """The console script `trbert-train`."""
    return run_command(main)


if __name__ == "__main__":
    sys.exit(command())
