"""The tokenizer of a checkpoint as it is found, read as transformers reads it and saved in full.

Many checkpoints have a vocabulary only, and leave the tokenizer's class, its special tokens or whether it lowercases to
defaults that depend on their `model_type`. A TR-BERT has another `model_type`, so its tokenizer must name everything.
"""

import codecs
import json
import tempfile
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..backbones import BACKBONES
from ..configuration import TRBertConfig
from ..errors import CheckpointError
from .loading import TOKENIZER_ARGUMENTS, check_tokenizer, first_line, is_of_a_library, without_paths
from .source import read_config

VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "sentencepiece.bpe.model")
TOKENIZER_FILES = (*VOCABULARIES, *TOKENIZER_ARGUMENTS, "added_tokens.json")


def read_tokenizer(directory: Path, config: TRBertConfig) -> PreTrainedTokenizerBase | None:
    """The tokenizer that transformers' AutoTokenizer reads from a checkpoint directory; None if there is none.

    As in `load_checkpoint`, nothing outside the directory is read.

    Args:
        config: of the model that the checkpoint was converted to.

    Raises:
        CheckpointError: it cannot be read, or the model cannot use it.
    """
    names = [name for name in TOKENIZER_FILES if (directory / name).is_file()]
    if not set(names) & set(VOCABULARIES):
        return None
    raw = read_config(directory)
    known = [name for family in BACKBONES.values() for name in family.names]
    kind = raw["model_type"] if raw.get("model_type") in known else config.backbone
    with tempfile.TemporaryDirectory(prefix="trbert-") as copies:
        try:
            for name in names:
                data = (directory / name).read_bytes()
                if name.endswith(".json"):
                    data = data.removeprefix(codecs.BOM_UTF8)
                if name in TOKENIZER_ARGUMENTS:
                    data = without_paths(name, data)
                (Path(copies) / name).write_bytes(data)
            fields = {"model_type": kind} | {name: raw[name] for name in ("tokenizer_class",) if name in raw}
            (Path(copies) / "config.json").write_text(json.dumps(fields))
            tokenizer = AutoTokenizer.from_pretrained(copies, trust_remote_code=False, local_files_only=True)
        except BaseException as error:
            if not is_of_a_library(error):
                raise
            reason = first_line(error, copies, directory)
            raise CheckpointError(f"{directory}: its tokenizer cannot be read: {reason}") from error
    files = [name for name in tokenizer.vocab_files_names.values() if name != "tokenizer.json"]
    if "tokenizer.json" not in names and not set(files) <= set(names):  # transformers makes one without any words
        raise CheckpointError(
            f"{directory}: its {type(tokenizer).__name__} needs tokenizer.json or {' and '.join(files)}, not {names}"
        )
    around = tokenizer("")["input_ids"]
    if (tokenizer.cls_token_id is None or tokenizer.sep_token_id is None) and len(around) == 2:
        tokenizer.cls_token, tokenizer.sep_token = tokenizer.convert_ids_to_tokens(around)
    check_tokenizer(tokenizer, config, directory)
    return tokenizer


def save_tokenizer(
    tokenizer: PreTrainedTokenizerBase, directory: Path, config: TRBertConfig, *, extended: bool = False
) -> None:
    """Save a tokenizer beside its model.

    Args:
        extended: the model has more positions than the one that the tokenizer was made for.
    """
    positions = config.usable_positions
    tokenizer.model_max_length = positions if extended else min(tokenizer.model_max_length, positions)
    tokenizer.save_pretrained(directory)
