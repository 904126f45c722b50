"""Shards by the keys that a real S3 server lists, without Ray."""

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable, write_deltalake

from pipeline.corpus import find_input, input_root, list_shards, read_corpus
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


def test_folders_globs_and_tables_are_listed(s3, tmp_path):
    """The same names as on a local disk."""
    bucket = s3.bucket("names")
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"id": [1], "text": ["good"]}), sink)
    write_deltalake(tmp_path / "table", pa.table({"id": [1, 2], "p": ["a", "b c"]}), partition_by=["p"])
    DeltaTable(tmp_path / "table").delete("p = 'a'")
    for name in ("bare/20240101_00001_abcde", "hive/date=2026-01-01/x.parquet", "hive/date=2026-01-02/[1].parquet"):
        Storage(str(tmp_path)).write(name, sink.getvalue().to_pybytes())
    for file in Storage(str(tmp_path)).files():
        Storage(bucket).write(file.path, (tmp_path / file.path).read_bytes())
    globs = [
        "hive/date=2026-01-0?/x.parquet",
        "hive/date=*",
        "{bare,hive}/**",
        "hive/*/?1].parquet",
        "table/*/*",
        "b*/*",
    ]
    for path in ("bare", "bare/20240101_00001_abcde", "hive/date=2026-01-02/[1].parquet", "table/p=b%20c", "", *globs):
        local, remote = (Storage(f"{place}/{path}") for place in (str(tmp_path), bucket))
        shards = [shard.path for shard in list_shards(remote)]
        assert shards == [shard.path for shard in list_shards(local)], path
        assert input_root(remote.uri).removeprefix(bucket) == input_root(local.uri).removeprefix(str(tmp_path))
    corpus = read_corpus(find_input(Storage(bucket)), ["p", "date"])
    assert corpus.partitions.types == {"p": pa.string(), "date": pa.date32()}
    assert (("p", "b c"),) in [shard.partition for shard in corpus.shards]
    assert len(corpus.shards) == 4
