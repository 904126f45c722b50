"""What is to be done, from listings alone."""

import contextlib
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.corpus import Shard, find_input, input_root, list_shards
from pipeline.errors import UsageError
from pipeline.storage import Storage
from tests.pipeline.verbatim_s3 import verbatim_s3


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


def parquet(*ids):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"id": ids, "text": ["good"] * len(ids)}), sink)
    return sink.getvalue().to_pybytes()


NAMES = ["part-1", "part-2", "part-x", "{a}", "a,b", "d/part-1", "e/f/part-1"]
GLOBS = {
    "part-?": ["part-1", "part-2", "part-x"],
    "part-[12]": ["part-1", "part-2"],
    "part-[!12]": ["part-x"],
    "part-[0-9]": ["part-1", "part-2"],
    "{part-1,part-2}": ["part-1", "part-2"],
    "{part-{1,2},d/part-1}": ["d/part-1", "part-1", "part-2"],
    "{a}": ["{a}"],
    "*": ["a,b", "part-1", "part-2", "part-x", "{a}"],
    "**/part-1": ["d/part-1", "e/f/part-1", "part-1"],
    "?/part-1": ["d/part-1"],
    "{d,e/f}/part-[12]": ["d/part-1", "e/f/part-1"],
}


@pytest.fixture(params=["local", "s3"])
def stored(request, tmp_path):
    """Stores files below a prefix, on this machine or in a bucket; returns the prefix's URI."""
    with contextlib.ExitStack() as stack:

        def store(files: dict[str, bytes]) -> str:
            if request.param == "s3":
                bucket = stack.enter_context(verbatim_s3({f"in/{name}": data for name, data in files.items()}))
                return f"{bucket}/in"
            for name, data in files.items():
                Storage(str(tmp_path / "in")).write(name, data)
            return str(tmp_path / "in")

        yield store


def listed(uri: str) -> list[str]:
    return [shard.path for shard in list_shards(Storage(uri))]


def test_globs(stored):
    uri = stored({f"{name}.parquet": parquet(name) for name in NAMES})
    for glob, names in GLOBS.items():
        assert listed(f"{uri}/{glob}.parquet") == [f"{name}.parquet" for name in names], glob
        assert input_root(f"{uri}/{glob}.parquet") == uri


@pytest.mark.parametrize("name", ["[1]", "a*", "{a,b}"])
def test_what_is_named_like_a_glob_is_found_by_its_name(stored, name):
    """A file, a folder, and a folder before a pattern; other files match the name as a pattern."""
    files = [f"{name}/{name}.parquet", f"{name}/x.parquet", "1/x.parquet", "ab/x.parquet", "a/x.parquet", "1.parquet"]
    uri = stored({file: parquet(file) for file in files})
    assert listed(f"{uri}/{name}") == sorted([f"{name}.parquet", "x.parquet"])
    assert listed(f"{uri}/{name}/{name}.parquet") == [f"{name}.parquet"]
    assert listed(f"{uri}/{name}/?.parquet") == ["x.parquet"]
    assert input_root(f"{uri}/{name}/?.parquet") == f"{uri}/{name}"


def test_folders_that_match_a_glob_are_listed_unless_files_match(stored):
    uri = stored({name: parquet(name) for name in ("d=1/a", "d=1/e/b.parquet", "d=2/_c.parquet", "x/d.parquet")})
    assert listed(f"{uri}/d=*") == ["d=1/a", "d=1/e/b.parquet"]
    assert listed(f"{uri}/*/*") == ["d=1/a", "x/d.parquet"]


def test_stars_for_whole_folders_stand_alone(tmp_path):
    with pytest.raises(UsageError, match=r"/\*\*/"):
        list_shards(Storage(f"{tmp_path}/a**/x.parquet"))


OTHERS = ["_SUCCESS", "_metadata", "d/_a", "_d/a", ".a.crc", "a.crc", "d=1_$folder$", "a._COPYING_", "readme", "x.csv"]


def test_files_without_an_ending_are_told_by_their_first_bytes(stored):
    files = {name: parquet(name) for name in ("20240101_000000_00001_abcde", "d=1/000000_0", "v1.0/x", "_d=1/x-1.0")}
    others = {name: parquet(name) for name in OTHERS if name not in ("d=1_$folder$", "readme")}
    uri = stored(files | others | {"d=1_$folder$": b"", "readme": b"PAR", "notes": b"Not Parquet", "PAR1": b"PAR1"})
    assert listed(uri) == sorted(files)
    assert listed(f"{uri}/*") == ["20240101_000000_00001_abcde"]
    for name in files:
        assert listed(f"{uri}/{name}") == [name.rpartition("/")[2]]


def test_an_ending_counts_if_the_input_spells_it_out(stored):
    files = ("a.parq", "b.parq", "c.PARQUET", "d.parquet")
    uri = stored({name: parquet(name) for name in files} | {"e.parq": b"Not Parquet"})
    assert listed(uri) == ["d.parquet"]
    assert listed(f"{uri}/*.parq") == ["a.parq", "b.parq"]
    assert listed(f"{uri}/c.PARQUET") == ["c.PARQUET"]


def test_files_that_end_in_parquet_are_not_opened_to_be_listed(tmp_path, monkeypatch):
    corpus(tmp_path, *(f"{i}.parquet" for i in range(20)), "d/x.csv", "d/_SUCCESS", "d/no-ending")
    reads = []
    read_many = Storage.read_many
    monkeypatch.setattr(
        Storage, "read_many", lambda s, paths, *a: read_many(s, reads.append(list(paths)) or reads[-1], *a)
    )
    assert len(list_shards(Storage(str(tmp_path / "in")))) == 20
    assert not any(reads)


@pytest.mark.parametrize(
    ("given", "output", "apart"),
    [
        ("score.parquet", "s0", True),
        ("score.parquet", "score", True),
        ("score.parquet", "", False),
        ("*.parquet", "s0", True),
        ("part-?.parquet", "s0/x", True),
        ("d=*/*.parquet", "s0", True),
        ("d=*/*.parquet", "d=1/out", True),
        ("d=*/*.parquet", "d=1", False),
        ("d=*", "d=1/out", False),
        ("{a,b}/*.parquet", "c", True),
        ("{a,b}/*.parquet", "b", False),
        ("**/*.parquet", "s0", False),
        ("*", "s0", False),
        ("a/**", "s0", True),
        ("", "s0", False),
    ],
)
def test_an_output_is_inside_an_input_only_where_the_input_looks(tmp_path, given, output, apart):
    corpus(tmp_path, "score.parquet", "d=1/a.parquet")
    location = find_input(Storage(str(tmp_path / "in" / given)))
    below = os.path.relpath(tmp_path / "in" / output, location.root.uri)
    assert (below.startswith("..") or not location.includes("" if below == "." else below)) is apart
