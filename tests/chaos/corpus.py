"""A corpus for faults to hit: shards of very different sizes, every kind of bad row, ids that prove nothing."""

import random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.conftest import WORDS, tiny_classifier, tiny_tokenizer
from tests.integration.s3_server import S3Server

SPLIT_BYTES = 50_000
# Shards with documents, and the share of all splits that each holds.
SHARES = {"large.parquet": 0.6, "sub dir/middle #1%.parquet": 0.3, "é/bytes.parquet": 0.1}
NO_TOKENS = "\u200b"  # no white space to Python, and nothing is left of it after the tokenizer's cleaning


def make_corpus(splits: int, seed: int = 0) -> dict[str, pa.Table]:
    """Shards by path: about `splits` splits of SPLIT_BYTES, and some small shards with nothing but special cases."""
    generator = random.Random(seed)
    shards = {path: _shard(path, share * splits * SPLIT_BYTES, generator) for path, share in SHARES.items()}
    source = pa.array(["special"], pa.string())
    shards["one.parquet"] = pa.table({"id": ["one"], "text": ["good news"], "source": source})
    shards["no rows.parquet"] = shards["one.parquet"].slice(0, 0)
    numbers = {"id": ["n"] * 30, "text": range(30), "source": ["special"] * 30}
    shards["numbers.parquet"] = pa.table(numbers, _schema(pa.int64()))
    return shards


def _schema(text: pa.DataType) -> pa.Schema:
    return pa.schema([("id", pa.string()), ("text", text), ("source", pa.string())])


def _shard(path: str, text_bytes: float, generator: random.Random) -> pa.Table:
    """Documents of 20 to 4,000 words; about one row in 25 is bad, one id in ten null, and ids repeat."""
    is_binary = path.endswith("bytes.parquet")
    columns: dict[str, list[Any]] = {"id": [], "text": [], "source": []}
    size = 0
    while size < text_bytes:
        row = len(columns["text"])
        words = int(20 * 200 ** generator.random())
        text: Any = " ".join(generator.choices(WORDS, k=words))
        if generator.random() < 0.04:
            text = generator.choice([None, "", "\t ", NO_TOKENS])
        if is_binary and text:
            text = text.encode() + (b" \xff" if generator.random() < 0.04 else b"")
        columns["id"].append(None if generator.random() < 0.1 else f"document {row % 40}")
        columns["text"].append(text.encode() if is_binary and isinstance(text, str) else text)
        columns["source"].append(f"{path}:{row}")
        size += len(text or "")
    return pa.table(columns, _schema(pa.binary() if is_binary else pa.string()))


def put_corpus(server: S3Server, bucket: str, prefix: str, shards: dict[str, pa.Table]) -> None:
    for path, table in shards.items():
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, row_group_size=24)
        server.client.put_object(Bucket=bucket, Key=f"{prefix}/{path}", Body=sink.getvalue().to_pybytes())


def put_model(server: S3Server, bucket: str, prefix: str, directory: Any) -> None:
    """The tests' tiny model with its tokenizer, saved in `directory` and from there to the bucket."""
    tiny_classifier().save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    for path in sorted(directory.iterdir()):
        server.client.put_object(Bucket=bucket, Key=f"{prefix}/{path.name}", Body=path.read_bytes())
