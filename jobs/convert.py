"""Make a TR-BERT of a checkpoint: transformers BERT or DistilBERT, or the original TR-BERT's format.

    python jobs/convert.py path/to/checkpoint path/to/trbert
    python jobs/convert.py path/to/backbone path/to/trbert --adapter path/to/adapter

Fresh selectors keep every token, so the converted model answers as its source does; jobs/train.py teaches them. With
--adapter, the backbone and an adapter that jobs/train.py --adapter-rank saved become the trained classifier.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from jobs.command import run_command
from trbert_model.convert import apply_adapter, convert_checkpoint
from trbert_model.errors import ConfigurationError

# What tokenizers of the BERT family consist of.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("src", type=Path, help="checkpoint directory")
    parser.add_argument("dst", type=Path, help="directory for the TR-BERT model")
    tasks = ["classification", "question-answering", "multiple-choice", "none"]
    parser.add_argument("--task", choices=tasks, help="default: its head's")
    parser.add_argument("--max-positions", type=int, help="extend the position table, to be trained then")
    parser.add_argument("--reduction-layers", help="comma-separated zero-based layers (default: the paper's)")
    parser.add_argument("--adapter", type=Path, help="adapter directory to apply to SRC")
    options = parser.parse_args(arguments)
    if options.adapter and (options.task or options.reduction_layers or options.max_positions):
        raise ConfigurationError(
            "an adapter brings its own task, reduction layers and positions: leave --task, --reduction-layers and "
            "--max-positions out with --adapter"
        )
    if options.adapter:
        model = apply_adapter(options.src, options.adapter)
    else:
        model = convert_checkpoint(
            options.src,
            task=options.task,
            reduction_layers=_layers(options.reduction_layers),
            max_positions=options.max_positions,
        )
    model.save_pretrained(options.dst)
    for name in TOKENIZER_FILES:
        if (options.src / name).is_file():
            shutil.copyfile(options.src / name, options.dst / name)
    print(f"{type(model).__name__} with reduction layers {model.config.reduction_layers} saved to {options.dst}")
    return 0


def _layers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise ConfigurationError(f"--reduction-layers {text!r} must be comma-separated integers") from error


if __name__ == "__main__":
    sys.exit(run_command(main))
