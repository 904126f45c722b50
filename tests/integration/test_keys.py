"""Shards by the keys that a real S3 server lists, without Ray."""

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.corpus import list_shards
from pipeline.storage import Storage
from tests.pipeline.stages import encode, encode_options


def test_what_is_listed_is_scored_and_what_is_deleted_since_is_no_ones_fault(s3, model_directory):
    """Keys with empty parts among it; this server leaves these parts out, also when it lists them."""
    bucket = s3.bucket("odd-keys")
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"id": [1], "text": ["good"]}), sink)
    for key in ("in//a.parquet", "in/x//b.parquet", "in/c d.parquet", "in/deleted.parquet"):
        s3.client.put_object(Bucket="odd-keys", Key=key, Body=sink.getvalue().to_pybytes())
    storage = Storage(f"{bucket}/in", retry_seconds=5)
    shards = list_shards(storage)
    assert len(shards) == 4
    assert [storage.listed(shard.path) for shard in shards] == [shard.version for shard in shards]
    s3.client.delete_object(Bucket="odd-keys", Key="in/deleted.parquet")
    for shard in shards:
        (row,) = encode(shard, encode_options("unused", model_directory, input=storage))
        if shard.path == "deleted.parquet":
            assert "there is no such file" in row["error"]
            assert row["index"] == 0
        else:
            assert row["error"] is None
            assert row["rows"] == 1
