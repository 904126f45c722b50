"""Labelled corpora read as a run reads its input: files, folders and globs, at any URI."""

import contextlib
from collections.abc import Iterator

from trbert_model.labelled import corpora_opened_by

from .corpus import input_root, list_shards
from .storage import Storage, open_file


@contextlib.contextmanager
def corpora_read_as_input() -> Iterator[None]:
    """Within the context, training and evaluation find and open their corpora as a scoring run does its input."""
    with corpora_opened_by(open_file, corpus_files):
        yield


def corpus_files(uri: str) -> list[str]:
    """The URIs of a corpus's Parquet files: a single file, all below a folder, or the matches of a glob.

    Raises:
        UsageError: there are no Parquet files.
        StorageError: the corpus cannot be listed.
    """
    storage = Storage(uri)
    several = storage.fs.isdir(storage.root) or any(character in uri for character in "*?[{")
    if storage.fs.isfile(storage.root) or not several:
        return [uri]
    root = input_root(uri)
    return [f"{root}/{shard.path}" for shard in list_shards(storage)]
