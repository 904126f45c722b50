"""Loading a saved model: the model and its tokenizer, made of the files that count and of nothing else."""

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

# What transformers merges into the arguments of a tokenizer's class, where some name files, anywhere: those it opens,
# and those it only puts others in the place of. Models of earlier versions have paths of their makers' machines there.
_TOKENIZER_ARGUMENTS = ("tokenizer_config.json", "special_tokens_map.json")
_OPENED = ("vocab", "merges", "init_inputs", "fast_tokenizer_files")
_PUT_ASIDE = "_file"


class LoadedModel(NamedTuple):
    """A model, its tokenizer, and the digest of the files that both were made of."""

    model: TRBertPreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    digest: str


def load_model(
    directory: str | Path, digest: str | None = None
) -> tuple[TRBertPreTrainedModel, PreTrainedTokenizerBase]:
    """The model and the tokenizer of `load_checkpoint`."""
    return load_checkpoint(directory, digest)[:2]


def load_checkpoint(directory: str | Path, digest: str | None = None) -> LoadedModel:
    """A saved TR-BERT model with a task's head and its tokenizer, nothing missing, nothing unpickled.

    Args:
        directory: see `model_files`.
        digest: what the model's digest must be.

    Raises:
        ModelChangedError: it is another.
        CheckpointError: names the directory and what is wrong with it.
    """
    directory = Path(directory)
    with saved_files(directory) as files, tempfile.TemporaryDirectory(prefix="trbert-") as place:
        if digest is not None and files.digest != digest:
            raise ModelChangedError(
                f"{directory}: the run began with another model: its digest was {digest[:12]}…, "
                f"that of the files there now is {files.digest[:12]}…"
            )
        try:
            model, tokenizer = _made_of(files, Path(place))
        except CheckpointError:
            raise
        except TRBertError as error:
            raise CheckpointError(f"{directory}: {error}") from error
        except BaseException as error:
            # Rust's panics, in tokenizers and safetensors, are no Exceptions.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise CheckpointError(f"{directory}: cannot be loaded: {_reason(error, place, directory)}") from error
    model.config.name_or_path = tokenizer.name_or_path = str(directory)
    return LoadedModel(model, tokenizer, files.digest)


def _made_of(files: SavedFiles, place: Path) -> tuple[TRBertPreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer; `place` is an empty directory for copies of the files that transformers is to read."""
    directory = files.directory
    if "adapter_config.json" in files.names:  # transformers would apply it, and load the backbone that it names
        raise ConfigurationError(
            "it holds an adapter (adapter_config.json); jobs/convert.py --adapter makes a model of it and its backbone"
        )
    for name in files.names:
        if not name.endswith(".safetensors"):
            data = (directory / name).read_bytes()
            (place / name).write_bytes(_arguments(name, data) if name in _TOKENIZER_ARGUMENTS else data)
    config = TRBertConfig.from_pretrained(place)
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
    # Not even when somebody answers "y" to the question that transformers would ask.
    tokenizer = AutoTokenizer.from_pretrained(place, use_fast=True, trust_remote_code=False)
    if loading["missing_keys"] or loading["mismatched_keys"]:
        bad = sorted(loading["missing_keys"]) + sorted(str(key) for key in loading["mismatched_keys"])
        raise CheckpointError(f"{directory}: weights missing or of another shape: {bad[:5]}")
    if bad := [name for name, weight in model.named_parameters() if not weight.isfinite().all()]:
        raise CheckpointError(f"{directory}: weights that are not finite: {bad[:5]}")
    if not tokenizer.is_fast:  # one in Python has no use here, and may open dictionaries of its own
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
    return model, tokenizer


def _arguments(name: str, data: bytes) -> bytes:
    """A file with arguments of a tokenizer's class, without those that name files.

    Raises:
        ConfigurationError: one of them would be opened.
    """
    values = json.loads(data)
    if not isinstance(values, dict):
        raise ConfigurationError(f"{name} must hold a mapping, not {type(values).__name__}")
    if opened := [key for key in _OPENED if values.get(key)]:
        raise ConfigurationError(f"{name} names files of its own ({', '.join(opened)}); only tokenizer.json is read")
    kept = {key: value for key, value in values.items() if not key.endswith(_PUT_ASIDE)}
    return data if len(kept) == len(values) else json.dumps(kept).encode()


def _reason(error: BaseException, place: str, directory: Path) -> str:
    """The first line of what a library says, of the directory where it speaks of its copy."""
    return next(iter(str(error).replace(place, str(directory)).splitlines()), type(error).__name__)


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    """transformers' bar for weights that load in a blink would be most of what an actor writes into the log."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
