"""What is to be done, from listings alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.corpus import Shard, input_root, list_shards
from pipeline.errors import UsageError
from pipeline.storage import Storage


def corpus(tmp_path, *paths):
    storage = Storage(str(tmp_path / "in"))
    for path in paths:
        storage.write(path, b"x")
    return storage


def test_shards_are_the_parquet_files_that_are_nobodys_markers(tmp_path):
    corpus(
        tmp_path, "b.parquet", "sub/a.parquet", "_temporary/0.parquet", "sub/.a.parquet.crc", ".hidden.parquet", "n.csv"
    )
    assert [shard.path for shard in list_shards(Storage(str(tmp_path / "in")))] == ["b.parquet", "sub/a.parquet"]


def test_a_single_file_and_a_glob(tmp_path):
    corpus(tmp_path, "2024/a.parquet", "2024/b.parquet", "2025/a.parquet")
    file, glob = str(tmp_path / "in/2024/a.parquet"), str(tmp_path / "in/*/a.parquet")
    assert [shard.path for shard in list_shards(Storage(file))] == ["a.parquet"]
    assert input_root(file) == str(tmp_path / "in/2024")
    assert [shard.path for shard in list_shards(Storage(glob))] == ["2024/a.parquet", "2025/a.parquet"]
    assert input_root(glob) == str(tmp_path / "in")
    for uri in (file, glob):
        for shard in list_shards(Storage(uri)):
            assert Storage(input_root(uri)).read(shard.path) == b"x"


def test_an_input_without_shards_is_named(tmp_path):
    corpus(tmp_path, "n.csv")
    with pytest.raises(UsageError, match=r"in: no Parquet files there \(1 other files\)"):
        list_shards(Storage(str(tmp_path / "in")))


@given(path=st.text(min_size=1, max_size=300))
def test_no_shard_name_leaves_the_output(path):
    name = Shard(path, "0" * 12, 1).object(3)
    assert "/" not in name
    assert name.isascii()
    assert name[0] not in "._-"
    assert len(name) < 120


def test_shards_of_one_name_in_two_directories_do_not_collide():
    assert Shard("a/x.parquet", "v", 1).key != Shard("b/x.parquet", "v", 1).key
