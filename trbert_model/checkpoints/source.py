"""Reading checkpoints as they are found: configurations and names that no current transformers version writes."""

import contextlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import CheckpointError

# Modules around a model whose state was saved: DistributedDataParallel, Lightning and other trainers, torch.compile.
_WRAPPERS = {"module", "model", "_orig_mod"}
# Names of the encoder within transformers' models, and the `model_type` that each tells; by the name of the encoder's
# token table, which every checkpoint has.
_ENCODERS: dict[str, dict[str, str | None]] = {
    "embeddings.word_embeddings.weight": {"bert": "bert", "roberta": "roberta", "distilbert": "distilbert"},
    "embeddings.tok_embeddings.weight": {"model": "modernbert", "bert": None},  # "bert": of a TR-BERT
}


def read_config(directory: Path) -> dict[str, Any]:
    """A checkpoint's config.json, without null values, and with numbers where numbers are written as text.

    Raises:
        CheckpointError: it cannot be read, or is not a mapping.
    """
    path = directory / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: must hold a mapping, not {type(raw).__name__}")
    return {name: _number(value) for name, value in raw.items() if value is not None and value != ""}


def _number(value: Any) -> Any:
    if isinstance(value, str):
        for number in (int, float):
            with contextlib.suppress(ValueError):
                return number(value)
    return value


def without_wrappers(tensors: dict[str, Tensor], src: Path) -> tuple[dict[str, Tensor], str | None]:
    """The tensors by the names that transformers gives them, and the `model_type` that their names tell.

    Removes the names of modules around the model (`module.bert.…`), also a doubled encoder's (`bert.bert.…`).

    Raises:
        CheckpointError: there are several encoders.
    """
    found = [
        (name.removesuffix(table).split(".")[:-1], encoders)
        for name in tensors
        for table, encoders in _ENCODERS.items()
        if name.endswith(table)
    ]
    found = [(path, encoders) for path, encoders in found if (_WRAPPERS | encoders.keys()).issuperset(path)]
    if len(found) > 1:
        paths = sorted(".".join(path) for path, _ in found)
        raise CheckpointError(f"{src}: several encoders among its tensors: {paths}")
    if not found:
        return tensors, None
    path, encoders = found[0]
    encoder = path.pop() if path and path[-1] in encoders else None
    outer = "".join(f"{name}." for name in path)
    renamed: dict[str, Tensor] = {}
    for name, value in tensors.items():
        new = name.removeprefix(outer)
        if new in renamed:
            raise CheckpointError(f"{src}: two tensors for {new}, one of them {name}")
        renamed[new] = value
    return renamed, encoder and encoders[encoder]
