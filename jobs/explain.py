"""Show how many layers of a TR-BERT model computed each token of a text.

    python jobs/explain.py article.txt --model my-model --html article.html
    python jobs/explain.py "Who won?" --context article.txt --model my-model

Prints the result and the text, with the tokens that all layers computed in [brackets]. The HTML file shows the same for
every number of layers.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.command import run_command
from pipeline.errors import UsageError
from trbert_model.options import option, parse_options


@dataclass(frozen=True)
class ExplainConfig:
    """The options of jobs/explain.py.

    Raises:
        UsageError: an option is missing.
    """

    text: str = option("", "the text to classify, or the question; or a file with it", positional=True)
    context: str | None = option(None, "the text that the question is about, or a file with it")
    model: str = option("", "directory of a TR-BERT model; local or URI")
    html: str | None = option(None, "HTML file to write")
    reduce: bool = option(True, "drop tokens; --no-reduce runs the dense model")
    thresholds: tuple[float, ...] | None = option(
        None,
        "keep probability from which on a token stays, one a reduction, then those of exits (default: the model's)",
    )
    dtype: str = option("auto", "float32, bfloat16, float16; auto: bfloat16 where that is fast")

    def __post_init__(self):
        for name in ("text", "model"):
            if not getattr(self, name):
                raise UsageError(f"{name} is required")


def main(arguments: Sequence[str] | None = None) -> int:
    config = parse_options(ExplainConfig, arguments, __doc__ or "")
    text = _text(config.text)
    context = None if config.context is None else _text(config.context)
    from pipeline.model import fetch_model  # not before the options are known to be good: torch takes seconds
    from trbert_model import explain
    from trbert_model.engine import EngineOptions

    options = EngineOptions(reduce=config.reduce, thresholds=config.thresholds, dtype=config.dtype)
    explanation = explain(fetch_model(config.model), text, context, options=options)
    print(explanation.to_text())
    if config.html:
        try:
            Path(config.html).write_text(explanation.to_html(), encoding="utf-8")
        except OSError as error:
            raise UsageError(f"{config.html}: cannot be written: {error.strerror}") from error
        print(f"\nAlso in {config.html}")
    return 0


def _text(given: str) -> str:
    """The contents of the file of this name, or the text itself if there is none.

    Raises:
        UsageError: the file is no UTF-8 text, or the text looks like the name of a file.
    """
    if not os.path.isfile(given):
        if len(given.split()) == 1 and Path(given).suffix:
            raise UsageError(f"{given}: no such file")
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{given}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{given}: not UTF-8 at byte {error.start}") from error


def command() -> int:
    """The console script `trbert-explain`."""
    return run_command(main)


if __name__ == "__main__":
    sys.exit(command())
