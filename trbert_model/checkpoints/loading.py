"""Loading a saved model and its tokenizer, from the model files only (see `files`)."""

import codecs
import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from ..configuration import TRBertConfig
from ..errors import CheckpointError, ConfigurationError, ModelChangedError, TRBertError
from ..modeling import TRBertPreTrainedModel
from ..tasks.registry import task_of
from .files import WEIGHTS, SavedFiles, saved_files

# transformers merges the contents of these files into the arguments of the tokenizer's class. Some arguments name files
# anywhere on the machine. Those in _OPENED are opened, so they are refused. Those that end in _PUT_ASIDE are only
# overridden, so they are removed: older models have paths there from the machine that saved them.
TOKENIZER_ARGUMENTS = ("tokenizer_config.json", "special_tokens_map.json")
_OPENED = ("vocab", "merges", "init_inputs", "fast_tokenizer_files")
_PUT_ASIDE = "_file"


class LoadedModel(NamedTuple):
    """A model, its tokenizer, and the digest of the files that they were loaded from."""

    model: TRBertPreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    digest: str


def load_model(
    directory: str | Path, digest: str | None = None
) -> tuple[TRBertPreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model and the tokenizer, as `load_checkpoint` without the digest."""
    return load_checkpoint(directory, digest)[:2]


def load_checkpoint(directory: str | Path, digest: str | None = None) -> LoadedModel:
    """Load a saved TR-BERT model with a task's head, and its tokenizer. Nothing is unpickled.

    Args:
        directory: a model directory, see `model_files`.
        digest: the expected digest of the model files. Default: any.

    Raises:
        ModelChangedError: the digest is different.
        CheckpointError: the model is incomplete, damaged or not supported, or its tokenizer has tokens without an
            embedding. The message names the directory and the problem.
    """
    directory = Path(directory)
    with saved_files(directory) as files, tempfile.TemporaryDirectory(prefix="trbert-") as copies:
        if digest is not None and files.digest != digest:
            raise ModelChangedError(
                f"{directory}: the run began with another model: its digest was {digest[:12]}…, "
                f"that of the files there now is {files.digest[:12]}…"
            )
        try:
            model, tokenizer = _made_of(files, Path(copies))
        except CheckpointError:
            raise
        except TRBertError as error:
            raise CheckpointError(f"{directory}: {error}") from error
        except BaseException as error:
            if not is_of_a_library(error):
                raise
            raise CheckpointError(f"{directory}: cannot be loaded: {first_line(error, copies, directory)}") from error
    model.config.name_or_path = tokenizer.name_or_path = str(directory)
    return LoadedModel(model, tokenizer, files.digest)


def _made_of(files: SavedFiles, copies: Path) -> tuple[TRBertPreTrainedModel, PreTrainedTokenizerBase]:
    """Load model and tokenizer; `copies` is an empty directory for copies of the files that transformers reads."""
    directory = files.directory
    if "adapter_config.json" in files.names:  # transformers would load the backbone it names
        raise ConfigurationError(
            "it holds an adapter (adapter_config.json); jobs/convert.py --adapter makes a model of it and its backbone"
        )
    for name in files.names:
        if not name.endswith(".safetensors"):
            data = (directory / name).read_bytes()
            data = data.removeprefix(codecs.BOM_UTF8) if name.endswith(".json") else data
            (copies / name).write_bytes(without_paths(name, data) if name in TOKENIZER_ARGUMENTS else data)
    config = TRBertConfig.from_pretrained(copies)
    if weights := getattr(config, "transformers_weights", None):
        raise ConfigurationError(f"config.json names its weights (transformers_weights: {weights!r}), not {WEIGHTS}")
    task = task_of(config)
    task.check(config)
    with _without_progress_bars():
        model, loading = task.model_class().from_pretrained(
            None,
            config=config,
            state_dict=files.weights(),
            output_loading_info=True,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
        )
    # trust_remote_code=False: otherwise transformers asks on the terminal whether to run the model's code.
    tokenizer = AutoTokenizer.from_pretrained(copies, use_fast=True, trust_remote_code=False)
    if loading["missing_keys"] or loading["mismatched_keys"]:
        bad = sorted(loading["missing_keys"]) + sorted(str(key) for key in loading["mismatched_keys"])
        raise CheckpointError(f"{directory}: weights missing or of another shape: {bad[:5]}")
    if bad := [name for name, weight in model.named_parameters() if not weight.isfinite().all()]:
        raise CheckpointError(f"{directory}: weights that are not finite: {bad[:5]}")
    check_tokenizer(tokenizer, config, directory)
    return model, tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: TRBertConfig, directory: Path) -> None:
    """Raise CheckpointError if a model with this configuration cannot use the tokenizer."""
    if not tokenizer.is_fast:  # tasks need a fast one, and a slow one may open further files
        raise CheckpointError(
            f"{directory}: its tokenizer, a {type(tokenizer).__name__}, is none of the tokenizers library"
        )
    tokens = max(tokenizer.get_vocab().values(), default=-1) + 1
    if tokens > config.vocab_size:
        raise CheckpointError(
            f"{directory}: its tokenizer has {tokens} tokens, the model's embeddings only {config.vocab_size}"
        )
    if tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
        raise CheckpointError(f"{directory}: its tokenizer names no cls or sep token (tokenizer_config.json)")


def without_paths(name: str, data: bytes) -> bytes:
    """The contents of a file in `TOKENIZER_ARGUMENTS`, without the arguments that name files.

    Raises:
        ConfigurationError: not a mapping, or an argument names files that transformers would open.
    """
    values = json.loads(data)
    if not isinstance(values, dict):
        raise ConfigurationError(f"{name} must hold a mapping, not {type(values).__name__}")
    if opened := [key for key in _OPENED if values.get(key)]:
        raise ConfigurationError(f"{name} names files of its own ({', '.join(opened)}); only tokenizer.json is read")
    kept = {key: value for key, value in values.items() if not key.endswith(_PUT_ASIDE)}
    return data if len(kept) == len(values) else json.dumps(kept).encode()


def is_of_a_library(error: BaseException) -> bool:
    """Whether an error is about what is read. Panics in Rust code (tokenizers, safetensors) are no Exceptions."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def first_line(error: BaseException, copies: str, directory: Path) -> str:
    """The first line of a library's error message, with `directory` instead of the temporary copy's path."""
    return next(iter(str(error).replace(copies, str(directory)).splitlines()), type(error).__name__)


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Disable transformers' progress bar for loading weights, which would fill the actors' logs."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
