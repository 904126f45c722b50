"""Convert a checkpoint to a TR-BERT: transformers BERT, DistilBERT, RoBERTa or XLM-R, or the original TR-BERT's format.

    python jobs/convert.py path/to/checkpoint path/to/trbert
    python jobs/convert.py path/to/backbone path/to/trbert --adapter path/to/adapter

New selectors keep every token, so the converted model predicts the same as its source; jobs/train.py trains them. With
--adapter, the backbone and an adapter saved by jobs/train.py --adapter-rank become the trained classifier.
"""

import argparse
import contextlib
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from jobs.command import run_command
from pipeline.model import fetch_model
from pipeline.storage import Storage
from trbert_model.errors import ConfigurationError
from trbert_model.tasks.registry import KINDS
from trbert_model.terminal import printable

# Files of a tokenizer of the BERT family.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("src", help="checkpoint directory or URI")
    parser.add_argument("dst", help="directory or URI for the TR-BERT model")
    parser.add_argument("--task", choices=KINDS, help="default: its head's")
    parser.add_argument("--max-positions", type=int, help="extend the position table, to be trained then")
    parser.add_argument("--reduction-layers", help="comma-separated zero-based layers (default: the paper's)")
    parser.add_argument("--adapter", type=Path, help="adapter directory to apply to SRC")
    options = parser.parse_args(arguments)
    if options.adapter and (options.task or options.reduction_layers or options.max_positions):
        raise ConfigurationError(
            "an adapter brings its own task, reduction layers and positions: leave --task, --reduction-layers and "
            "--max-positions out with --adapter"
        )
    from trbert_model.checkpoints.conversion import apply_adapter, convert_checkpoint  # torch: after the options

    # The converter checks local directories itself.
    src = Path(options.src) if Storage(options.src).is_local else fetch_model(options.src)
    if options.adapter:
        model = apply_adapter(src, options.adapter)
    else:
        model = convert_checkpoint(
            src,
            task=options.task,
            reduction_layers=_layers(options.reduction_layers),
            max_positions=options.max_positions,
        )
    with _directory(Storage(options.dst)) as dst:
        model.save_pretrained(dst)
        for name in TOKENIZER_FILES:
            if (src / name).is_file():
                shutil.copyfile(src / name, dst / name)
    print(
        printable(
            f"{type(model).__name__} with reduction layers {model.config.reduction_layers} saved to {options.dst}"
        )
    )
    return 0


@contextlib.contextmanager
def _directory(storage: Storage) -> Iterator[Path]:
    """Yield a local directory, and copy its files to `storage` afterwards: config.json last, as it marks a model."""
    if storage.is_local:
        yield Path(storage.root)
        return
    with tempfile.TemporaryDirectory(prefix="trbert-") as directory:
        yield Path(directory)
        for path in sorted(Path(directory).iterdir(), key=lambda path: (path.name == "config.json", path)):
            storage.write(path.name, path.read_bytes())


def _layers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise ConfigurationError(f"--reduction-layers {text!r} must be comma-separated integers") from error


if __name__ == "__main__":
    sys.exit(run_command(main))
