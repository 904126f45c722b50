"""S3 keys that are no paths: with empty parts, and with dots for parts."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.corpus import input_root, list_shards
from pipeline.errors import UsageError
from pipeline.storage import Storage
from tests.pipeline.stages import encode, encode_options
from tests.pipeline.verbatim_s3 import verbatim_s3

ODD = [
    "in//a.parquet",
    "in/x//b.parquet",
    "in/x/../c.parquet",
    "in/./d.parquet",
    "in///e.parquet",
    "in/y/../../f.parquet",
]
PLAIN = "in/plain.parquet"


def shard_of(*ids):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"id": ids, "text": ["good"] * len(ids)}), sink)
    return sink.getvalue().to_pybytes()


def corpus(*keys):
    return {key: shard_of(key) for key in keys}


def encoded(uri, model_directory):
    """What an input's shards become: their rows, by their paths."""
    options = encode_options("unused", model_directory, input=Storage(input_root(uri), retry_seconds=1))
    return {shard.path: encode(shard, options) for shard in list_shards(Storage(uri, retry_seconds=1))}


@pytest.mark.parametrize("prefix", ["in", "in/", "in/**", "", "in/x", "in//a.parquet", "in/x//b.parquet"])
def test_a_shard_is_scored_under_its_own_path(model_directory, prefix):
    with verbatim_s3(corpus(*ODD, PLAIN, "in/_x//hidden.parquet", "in/x//.hidden.parquet")) as bucket:
        uri = f"{bucket}/{prefix}"
        below = input_root(uri).removeprefix(bucket).strip("/")
        found = encoded(uri, model_directory)
    below = below and below + "/"
    folder = prefix.removesuffix("**")
    assert set(found) == {key.removeprefix(below) for key in (*ODD, PLAIN) if key.startswith(folder)}
    for path, (row,) in found.items():
        assert row["error"] is None
        assert row["documents"]["id"].to_pylist() == [below + path]


def test_paths_begin_with_the_slash_that_keys_have_twice(model_directory):
    with verbatim_s3(corpus("in//a.parquet", "in/a.parquet", "in//", "in/")) as bucket:
        shards = list_shards(Storage(f"{bucket}/in"))
    assert [shard.path for shard in shards] == ["/a.parquet", "a.parquet"]
    assert len({shard.key for shard in shards}) == 2


@pytest.mark.parametrize("key", ODD)
@pytest.mark.parametrize("in_its_place", [False, True])
def test_a_key_that_is_changed_on_its_way_makes_an_unreadable_shard(model_directory, key, in_its_place):
    objects = corpus(key, PLAIN)
    if in_its_place:  # what the changed key leads to
        objects |= {"f.parquet": shard_of("x", "y")}
        objects |= {f"in/{name}.parquet": shard_of("x", "y") for name in ("a", "x/b", "c", "d", "e")}
    with verbatim_s3(objects, normalizes=True) as bucket:
        found = encoded(f"{bucket}/in", model_directory)
    (row,) = found[key.removeprefix("in/")]
    assert row["error"].startswith("ShardError: listed under this name, but not to be had by it: ")
    assert row["index"] == -1, "another run would find the same"
    assert found[PLAIN.removeprefix("in/")][0]["error"] is None


@pytest.mark.parametrize("key", [ODD[0], PLAIN])
@pytest.mark.parametrize("deleted", [True, False])
def test_a_shard_that_was_deleted_or_rewritten_after_the_listing_is_not_at_fault(model_directory, key, deleted):
    objects = corpus(key)
    with verbatim_s3(objects) as bucket:
        options = encode_options("unused", model_directory, input=Storage(f"{bucket}/in", retry_seconds=1))
        (shard,) = list_shards(options.input)
        objects[key] = shard_of("x", "y")
        if deleted:
            del objects[key]
        (row,) = encode(shard, options)
    assert ("there is no such file" if deleted else "changed after it was listed") in row["error"]
    assert row["index"] == 0


def test_an_empty_prefix_has_no_shards():
    with verbatim_s3({"in//": b"", "in/": b""}) as bucket, pytest.raises(UsageError, match=r"\(2 other files\)"):
        list_shards(Storage(f"{bucket}/in"))
