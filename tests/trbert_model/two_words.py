"""A corpus to learn in seconds: documents whose label is which of two words they hold, beside a tiny backbone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import BertConfig, BertModel

from tests.conftest import TINY, tiny_tokenizer


def rows_of(shortest: int, longest: int) -> list[dict[str, Any]]:
    """96 documents of this many words, the longest excluded, with their labels."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(96):
        label = ["bad", "good"][i % 2]
        words = rng.choice(["the", "news", "of", "a", "game", "and"], rng.integers(shortest, longest)).tolist()
        words[rng.integers(len(words))] = label
        rows.append({"text": " ".join(words), "label": label})
    return rows


def write_parts(directory: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the first 64 rows to train on, and the others to evaluate on."""
    pq.write_table(pa.Table.from_pylist(rows[:64]), directory / "train.parquet")
    pq.write_table(pa.Table.from_pylist(rows[64:]), directory / "evaluation.parquet")


def save_backbone(directory: Path) -> None:
    torch.manual_seed(0)
    BertModel(BertConfig(**TINY)).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)


def places_in(directory: Path) -> dict[str, Any]:
    """The options of a training that name files."""
    names = {"train": "train.parquet", "evaluation": "evaluation.parquet", "backbone": "backbone", "output": "model"}
    return {option: str(directory / name) for option, name in names.items()}
