"""Labelled corpora read as a run reads its input: files, folders and globs, at any URI."""

import contextlib
from collections.abc import Iterator

from trbert_model.labelled import corpora_opened_by

from .corpus import find_input, read_corpus
from .storage import Storage, open_file


@contextlib.contextmanager
def corpora_read_as_input() -> Iterator[None]:
    """Within the context, training and evaluation find and open their corpora as a scoring run does its input."""
    with corpora_opened_by(open_file, corpus_files):
        yield


def corpus_files(uri: str) -> list[str]:
    """The URIs of a corpus's Parquet files: a single file, all below a folder, or the matches of a glob.

    Raises:
        UsageError: there are no Parquet files, or the glob is invalid.
        StorageError: the corpus cannot be listed.
    """
    location = find_input(Storage(uri))
    if location.file is not None:
        return [uri]
    return [f"{location.root.uri}/{shard.path}" for shard in read_corpus(location).shards]
