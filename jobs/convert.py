"""Convert a checkpoint to a TR-BERT: transformers BERT, DistilBERT, RoBERTa, XLM-R or ModernBERT, or the
original TR-BERT's format.

    python jobs/convert.py path/to/checkpoint path/to/trbert
    python jobs/convert.py path/to/backbone path/to/trbert --adapter path/to/adapter
    python jobs/convert.py path/to/inference-classifier path/to/trbert --pairs

New selectors keep every token, so the converted model predicts the same as its source; jobs/train.py trains them. With
--adapter, the backbone and an adapter saved by jobs/train.py --adapter-rank become the trained classifier.
"""

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from jobs.command import run_command
from pipeline.errors import UsageError
from pipeline.model import fetch_model
from pipeline.storage import Storage, is_same_place
from trbert_model.checkpoints.files import INDEX
from trbert_model.errors import ConfigurationError
from trbert_model.tasks.registry import KINDS
from trbert_model.terminal import printable


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("src", help="checkpoint directory or URI")
    parser.add_argument("dst", help="directory or URI for the TR-BERT model")
    parser.add_argument("--task", choices=KINDS, help="default: its head's")
    parser.add_argument(
        "--pairs", action="store_true", help="its classifier was fine-tuned on pairs of texts, as for inference"
    )
    parser.add_argument("--max-positions", type=int, help="extend the position table, to be trained then")
    parser.add_argument("--reduction-layers", help="comma-separated zero-based layers (default: the paper's)")
    parser.add_argument("--adapter", type=Path, help="adapter directory to apply to SRC")
    options = parser.parse_args(arguments)
    if options.adapter and (options.task or options.reduction_layers or options.max_positions or options.pairs):
        raise ConfigurationError(
            "an adapter brings its own task, reduction layers and positions: leave --task, --pairs, --reduction-layers "
            "and --max-positions out with --adapter"
        )
    if not options.src or not options.dst:
        raise UsageError("SRC and DST must not be empty")
    dst = Storage(options.dst)
    for source in (options.src, options.adapter):
        if source and is_same_place(Storage(str(source)), dst):
            raise UsageError(
                f"{options.dst}: the model would replace {source}, of which it is made; choose another DST"
            )
    _refuse_another_model(dst)
    from trbert_model.checkpoints.conversion import apply_adapter, convert_checkpoint  # torch: after the options
    from trbert_model.checkpoints.tokenizer import TOKENIZER_FILES, read_tokenizer, save_tokenizer

    # The converter checks local directories itself.
    source = Storage(options.src)
    src = Path(source.root) if source.is_local else fetch_model(options.src)
    if options.adapter:
        model = apply_adapter(src, options.adapter)
    else:
        model = convert_checkpoint(
            src,
            task=options.task,
            reduction_layers=_layers(options.reduction_layers),
            max_positions=options.max_positions,
            text_pairs=options.pairs,
        )
    tokenizer = read_tokenizer(src, model.config)
    with _written_to(dst, replaced=(*TOKENIZER_FILES, INDEX)) as directory:
        model.save_pretrained(directory)
        if tokenizer is not None:
            save_tokenizer(tokenizer, directory, model.config, extended=bool(options.max_positions or options.adapter))
    print(
        printable(
            f"{type(model).__name__} with reduction layers {model.config.reduction_layers} saved to {options.dst}"
            + ("" if tokenizer else f"\n{options.src} has no tokenizer: put one into {options.dst} to score with it")
        )
    )
    return 0


def _refuse_another_model(dst: Storage) -> None:
    """Raise UsageError if there is a checkpoint that this command did not write."""
    there = dst.read_if_there("config.json")
    if there is not None and b'"trbert"' not in there:
        raise UsageError(f"{dst.uri}: there is another checkpoint; choose an empty directory")


@contextlib.contextmanager
def _written_to(storage: Storage, replaced: Iterable[str]) -> Iterator[Path]:
    """Yield a local directory, and move its files to `storage` afterwards: config.json last, as it marks a model.

    Existing files are replaced, never written into: they may be links to somebody else's. Of those in `replaced`, the
    ones that are not written again are deleted.
    """
    where = storage.location("") if storage.is_local else None
    with storage.errors("write"):
        if where is not None:
            os.makedirs(where, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".trbert-", dir=where) as directory:
            yield Path(directory)
            paths = sorted(Path(directory).iterdir(), key=lambda path: (path.name == "config.json", path))
            storage.delete(set(replaced) - {path.name for path in paths})
            for path in paths:
                if where is not None:
                    os.replace(path, storage.location(path.name))
                else:
                    storage.write(path.name, path.read_bytes())


def _layers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise ConfigurationError(f"--reduction-layers {text!r} must be comma-separated integers") from error


def command() -> int:
    """The console script `trbert-convert`."""
    return run_command(main)


if __name__ == "__main__":
    sys.exit(command())
