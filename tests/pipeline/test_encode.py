"""Shards → encoded splits: every row is in exactly one split, as a document or as a rejected row."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import encode as encode_module
from pipeline.corpus import list_shards
from pipeline.report import SplitStats
from pipeline.rows import SPLIT_SCHEMA
from pipeline.storage import Storage
from tests.pipeline.stages import encode, encode_options, only_shard, texts, write_shard


def rows_of(rows):
    return sorted(
        n for row in rows if row["payload"] for t in (row["documents"], row["bad"]) for n in t["row"].to_pylist()
    )


def test_a_shard_becomes_splits_of_about_the_target(tmp_path, model_directory):
    documents = texts(100)
    write_shard(tmp_path / "a.parquet", {"id": range(100), "text": documents}, row_group_size=17)
    rows = encode(only_shard(tmp_path), encode_options(tmp_path, model_directory, split_bytes=500))
    assert [row["index"] for row in rows] == list(range(len(rows)))
    assert len(rows) > 5
    assert rows_of(rows) == list(range(100))
    for row in rows[:-1]:
        assert row["num_splits"] is None
        sizes = [len(documents[i]) for i in row["documents"]["row"].to_pylist()]
        assert sum(sizes) >= 500
        assert sum(sizes[:-1]) < 500
    assert rows[-1]["num_splits"] == len(rows)
    assert {row["shard_rows"] for row in rows} == {100}


@settings(max_examples=25, deadline=None)
@given(
    row_group=st.integers(1, 40),
    split_bytes=st.integers(1, 2000),
    bad=st.sets(st.integers(0, 49)),
    done=st.sets(st.integers(0, 60)),
)
def test_every_row_is_in_one_split_however_the_file_is_laid_out(
    tmp_path_factory, model_directory, row_group, split_bytes, bad, done
):
    directory = tmp_path_factory.mktemp("corpus")
    column = [None if i in bad else text for i, text in enumerate(texts(50))]
    write_shard(directory / "a.parquet", {"id": range(50), "text": column}, row_group_size=row_group)
    options = encode_options(directory, model_directory, split_bytes=split_bytes)
    shard = only_shard(directory)
    everything = encode(shard, options)
    assert rows_of(everything) == list(range(50))
    assert {n for row in everything for n in row["bad"]["row"].to_pylist()} == bad
    # Ids go with their documents, however rejected rows lie between them.
    for row in everything:
        assert row["documents"]["id"].to_pylist() == row["documents"]["row"].to_pylist()
    # What is done is left out, the rest is the same, and the last row says how many splits there are.
    rest = encode(shard, options, done=frozenset(done))
    assert rest[-1]["num_splits"] == len(everything)
    left = [row for row in rest if row["index"] >= 0]
    assert [row["index"] for row in left] == [row["index"] for row in everything if row["index"] not in done]
    assert sum(row["rows"] + row["skipped_rows"] for row in rest) == 50
    for row in left:
        assert row["payload"] == everything[row["index"]]["payload"]


def test_a_shard_whose_splits_are_all_done_says_how_many_there_are(tmp_path, model_directory):
    write_shard(tmp_path / "a.parquet", {"id": range(3), "text": texts(3)})
    (row,) = encode(only_shard(tmp_path), encode_options(tmp_path, model_directory), done=frozenset([0]))
    assert (row["index"], row["num_splits"], row["payload"], row["error"]) == (-1, 1, None, None)


@pytest.mark.parametrize("groups", [0, 1])
def test_a_shard_without_rows_has_no_splits(tmp_path, model_directory, groups):
    schema = pa.schema([("id", pa.int64()), ("text", pa.string())])
    with pq.ParquetWriter(tmp_path / "a.parquet", schema) as writer:
        for _ in range(groups):
            writer.write_table(schema.empty_table())
    (row,) = encode(only_shard(tmp_path), encode_options(tmp_path, model_directory))
    assert (row["index"], row["num_splits"], row["error"]) == (-1, 0, None)


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.large_binary(),
        pa.binary_view(),
        pa.dictionary(pa.int32(), pa.string()),
    ],
    ids=str,
)
def test_all_text_like_columns_are_read(tmp_path, model_directory, kind):
    values = ["the good news", None, "bad", "the good news"]
    array = pa.array(values).cast(pa.binary()).cast(kind) if "binary" in str(kind) else pa.array(values).cast(kind)
    write_shard(tmp_path / "a.parquet", {"id": range(4), "text": array})
    (row,) = encode(only_shard(tmp_path), encode_options(tmp_path, model_directory))
    assert row["documents"]["row"].to_pylist() == [0, 2, 3]
    assert row["documents"]["document"].to_pylist()[0] == row["documents"]["document"].to_pylist()[2]
    assert [(bad["row"], bad["reason"]) for bad in row["bad"].to_pylist()] == [(1, "null")]


def test_rows_that_cannot_be_scored_are_rejected_with_their_reason(tmp_path, model_directory):
    values = [b"good", None, b"", b" \n\t ", b"\xff\xfe", b"\xed\xa0\x80", "\u200b\x00".encode(), "中".encode()]
    write_shard(tmp_path / "a.parquet", {"id": list("abcdefgh"), "text": pa.array(values, pa.binary())})
    (row,) = encode(only_shard(tmp_path), encode_options(tmp_path, model_directory))
    assert [(bad["row"], bad["id"], bad["reason"]) for bad in row["bad"].to_pylist()] == [
        (1, "b", "null"),
        (2, "c", "empty"),
        (3, "d", "empty"),
        (4, "e", "undecodable"),
        (5, "f", "undecodable"),
        (6, "g", "no_tokens"),
    ]
    assert row["documents"]["id"].to_pylist() == ["a", "h"]
    assert {bad["shard"] for bad in row["bad"].to_pylist()} == {"a.parquet"}
    stats = SplitStats.from_json(row["stats"])
    assert stats.bad_rows == {"null": 1, "empty": 2, "undecodable": 2, "no_tokens": 1}


def test_invalid_utf8_in_a_string_column_rejects_that_row_only(tmp_path, model_directory):
    raw = pa.array([b"good", b"\xff", b"bad"], pa.binary())
    broken = pa.StringArray.from_buffers(3, raw.buffers()[1], raw.buffers()[2])
    write_shard(tmp_path / "a.parquet", {"id": range(3), "text": broken})
    (row,) = encode(only_shard(tmp_path), encode_options(tmp_path, model_directory))
    assert row["documents"]["row"].to_pylist() == [0, 2]
    assert row["bad"]["reason"].to_pylist() == ["undecodable"]


def test_a_column_of_another_type_rejects_its_rows(tmp_path, model_directory):
    write_shard(tmp_path / "a.parquet", {"id": range(3), "text": [1, None, 3]})
    (row,) = encode(only_shard(tmp_path), encode_options(tmp_path, model_directory))
    assert row["bad"]["reason"].to_pylist() == ["wrong_type", "null", "wrong_type"]
    assert "int64" in row["bad"]["detail"][0].as_py()


def test_without_an_id_column(tmp_path, model_directory):
    write_shard(tmp_path / "a.parquet", {"text": ["good", None, "bad"]})
    (row,) = encode(only_shard(tmp_path), encode_options(tmp_path, model_directory, id_column=None))
    assert row["documents"].column_names == ["row", "document"]
    assert row["bad"]["id"].to_pylist() == [None]


def test_passed_columns_come_as_plain_types(tmp_path, model_directory):
    columns = {
        "id": pa.array(["x", "y"], pa.large_string()),
        "text": ["good", "bad"],
        "source": pa.array(["s", "s"]).dictionary_encode(),
        "when": pa.array([1, None], pa.timestamp("us")),
        "tags": [["a"], []],
        "document": [1, 2],
        "nothing": pa.nulls(2),
        "blob": pa.array([b"b", None], pa.large_binary()),
    }
    write_shard(tmp_path / "a.parquet", columns)
    kept = ("source", "when", "tags", "document", "nothing", "blob")
    (row,) = encode(only_shard(tmp_path), encode_options(tmp_path, model_directory, keep_columns=kept))
    schema = row["documents"].schema
    kinds = {name: schema.field(name).type for name in ("id", "source", "when", "tags", "nothing", "blob")}
    assert kinds == {
        "id": pa.string(),
        "source": pa.string(),
        "when": pa.timestamp("us"),
        "tags": pa.list_(pa.field("element", pa.string())),
        "nothing": pa.string(),
        "blob": pa.binary(),
    }


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a readable Parquet file"),
        (b"PAR1", "not a readable Parquet file"),
        (b"something else entirely, and long enough to be a file", "not a readable Parquet file"),
    ],
)
def test_what_is_no_parquet_is_an_unreadable_shard(tmp_path, model_directory, content, reason):
    (tmp_path / "a.parquet").write_bytes(content)
    (row,) = encode(only_shard(tmp_path), encode_options(tmp_path, model_directory))
    assert reason in row["error"]
    assert (row["shard"], row["index"]) == ("a.parquet", -1)


def test_a_shard_damaged_in_the_middle_gives_its_first_splits_and_then_an_error(tmp_path, model_directory):
    path = write_shard(
        tmp_path / "a.parquet",
        {"id": range(60), "text": texts(60)},
        row_group_size=20,
        compression="none",
        use_dictionary=False,
        write_page_checksum=False,
    )
    start = pq.ParquetFile(path).metadata.row_group(1).column(1).data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 8] = b"\xff" * 8
    path.write_bytes(bytes(data))
    rows = encode(only_shard(tmp_path), encode_options(tmp_path, model_directory, split_bytes=50))
    assert rows[-1]["error"] is not None
    assert rows[-1]["index"] == -1
    assert all(row["error"] is None for row in rows[:-1])
    assert all(row["num_splits"] is None for row in rows), "an unreadable shard never counts as complete"


def test_a_missing_column_is_named_with_those_that_are_there(tmp_path, model_directory):
    write_shard(tmp_path / "a.parquet", {"name": ["x"], "body": ["good"]})
    (row,) = encode(only_shard(tmp_path), encode_options(tmp_path, model_directory))
    assert "no column 'text', 'id'; its columns are 'name', 'body'" in row["error"]


def test_a_shard_that_changed_after_the_listing_is_not_read(tmp_path, model_directory):
    path = write_shard(tmp_path / "a.parquet", {"id": [1], "text": ["good"]})
    shard = only_shard(tmp_path)
    path.unlink()
    write_shard(path, {"id": [1, 2], "text": ["good", "bad"]})
    (row,) = encode(shard, encode_options(tmp_path, model_directory))
    assert "changed after it was listed" in row["error"]
    assert row["index"] == 0, "not the shard's fault: another run will do"


def test_a_shard_that_vanished_is_an_unreadable_shard(tmp_path, model_directory):
    path = write_shard(tmp_path / "a.parquet", {"id": [1], "text": ["good"]})
    shard = only_shard(tmp_path)
    path.unlink()
    (row,) = encode(shard, encode_options(tmp_path, model_directory))
    assert "cannot read" in row["error"]
    assert row["index"] == 0


def test_an_encoder_that_fails_names_its_shard(tmp_path, model_directory, monkeypatch):
    write_shard(tmp_path / "a.parquet", {"id": [1], "text": ["good"]})

    def fail(self, texts):
        raise RuntimeError("tokenizer panicked")

    monkeypatch.setattr("trbert_model.tasks.classification.task.ClassificationTask.tokenize", fail)
    (row,) = encode(only_shard(tmp_path), encode_options(tmp_path, model_directory))
    assert row["error"] == "TokenizerError: the tokenizer fails on every text: RuntimeError: tokenizer panicked"
    assert (row["shard"], row["index"]) == ("a.parquet", 0)


def test_shard_names_of_all_kinds(tmp_path, model_directory):
    names = [
        "with space.parquet",
        "50%25.parquet",
        "a#b.parquet",
        "k=v/x.parquet",
        "quote'\".parquet",
        "é中.parquet",
        "[a].parquet",
    ]
    for name in names:
        write_shard(tmp_path / name, {"id": [name], "text": ["good"]})
    shards = list_shards(Storage(str(tmp_path)))
    assert sorted(shard.path for shard in shards) == sorted(names)
    for shard in shards:
        (row,) = encode(shard, encode_options(tmp_path, model_directory))
        assert row["documents"]["id"].to_pylist() == [shard.path]


def test_the_payload_is_what_the_tokenizer_says(tmp_path, model_directory):
    write_shard(tmp_path / "a.parquet", {"id": [1, 2], "text": ["the good news", "bad"]})
    (row,) = encode(only_shard(tmp_path), encode_options(tmp_path, model_directory))
    tokens = [ids.values.to_numpy() for ids in row["documents"]["document"]]
    assert [list(map(int, ids)) for ids in tokens] == [[5, 6, 9], [7]]
    assert tokens[0].dtype == np.int32
    assert set(row) - {"documents", "bad"} == set(SPLIT_SCHEMA.names)
    assert json.loads(row["stats"])["text_bytes"] == 16


def test_readers_do_without_the_model_torch_and_transformers(tmp_path, model_directory):
    """They start in a fraction of the time: what the driver gives them is enough to read a shard."""
    write_shard(tmp_path / "a.parquet", {"id": range(5), "text": texts(5)})
    options = encode_options(tmp_path, model_directory)
    (tmp_path / "options").write_bytes(pickle.dumps((only_shard(tmp_path), options)))
    code = """
import pickle, sys
from pathlib import Path
from pipeline.encode import encode_shard
from pipeline.ledger import NO_LEDGER
shard, options = pickle.loads(Path(sys.argv[1]).read_bytes())
with NO_LEDGER.work("reading") as entry:
    tables = list(encode_shard(shard, frozenset(), options, entry))
print(sum(table["rows"][0].as_py() for table in tables), sorted({"torch", "transformers"} & set(sys.modules)))
"""
    run = [sys.executable, "-c", code, str(tmp_path / "options")]
    finished = subprocess.run(run, capture_output=True, text=True, timeout=60)
    assert finished.stdout.strip() == "5 []", finished.stderr[-2000:]


SAME = "good " * 100_000
DICTIONARY = pa.DictionaryArray.from_arrays(pa.array([0] * 1500, pa.int32()), pa.array([SAME]))
DISTINCT = [f"{i} {SAME}" for i in range(600)]


def skewed(path):
    """A row group of many tiny texts before a few hundred long ones."""
    write_shard(
        path,
        {"id": range(200_300), "text": ["good"] * 200_000 + DISTINCT[:300]},
        use_dictionary=False,
        write_batch_size=1,
    )


def deltas(path):
    """A column chunk of half a megabyte that decodes to three hundred."""
    encoding = {"id": "PLAIN", "text": "DELTA_BYTE_ARRAY"}
    columns = {"id": range(600), "text": [SAME + str(i) for i in range(600)]}
    write_shard(path, columns, use_dictionary=False, column_encoding=encoding, data_page_size=1 << 30)


LARGER_THAN_THEY_LOOK = {
    "one text for all rows": lambda path: write_shard(
        path, {"id": range(1500), "text": DICTIONARY}, store_schema=False
    ),
    "a dictionary of one text": lambda path: write_shard(path, {"id": range(1500), "text": DICTIONARY}),
    "a dictionary column stored as plain texts": lambda path: write_shard(
        path,
        {"id": range(600), "text": pa.chunked_array([pa.array([text]).dictionary_encode() for text in DISTINCT])},
        write_batch_size=1,
    ),
    "deltas": deltas,
    "skewed": skewed,
    "one value kept in all rows": lambda path: write_shard(
        path, {"id": range(1500), "text": ["good " * 20_000] * 1500, "kept": DICTIONARY}
    ),
}


@pytest.mark.parametrize(
    "write", [pytest.param(LARGER_THAN_THEY_LOOK[name], id=name) for name in LARGER_THAN_THEY_LOOK]
)
def test_a_reader_holds_little_more_than_a_split(write, tmp_path):
    """Texts of half a megabyte of which 150 MB to 750 MB are in one shard, in splits of 1 MiB."""
    write(tmp_path / "a.parquet")
    code = """
import re, sys
from pathlib import Path
import pyarrow.parquet as pq
from pipeline.encode import EncodeOptions, split_shard
from pipeline.corpus import list_shards
from pipeline.storage import Storage

def peak():  # of this process alone: ru_maxrss begins with the parent's
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) >> 10

storage = Storage(sys.argv[1])
(shard,) = list_shards(storage)
kept = [name for name in pq.read_schema(f"{sys.argv[1]}/{shard.path}").names if name == "kept"]
before, read = peak(), 0
for split, rows in split_shard(shard, EncodeOptions(storage, None, ("text",), "id", ["id", *kept], 1 << 20)):
    read += split.rows
assert read == rows
print(peak() - before)
"""
    finished = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert int(finished.stdout) < 150, "MiB"


@pytest.mark.parametrize("whole_bytes", [0, 1 << 30])
def test_splits_do_not_depend_on_how_a_shard_is_read(tmp_path, model_directory, whole_bytes):
    """Large shards are read piecemeal, and rows are put together in batches: both leave ends and contents alone."""
    column = [None if i % 7 == 0 else text for i, text in enumerate(texts(5000))]
    path = write_shard(tmp_path / "a.parquet", {"id": range(5000), "text": column, "kept": column}, row_group_size=1900)
    reading = {"split_bytes": 30_000, "whole_bytes": whole_bytes}
    options = encode_options(tmp_path, model_directory, keep_columns=("kept",), **reading)
    splits = [split for split, _ in encode_module.split_shard(only_shard(tmp_path), options)]
    ends, size = [0], 0
    for row, text in enumerate(pq.read_table(path)["text"].to_pylist()):
        size += len(text or "")
        if size >= 30_000:
            ends.append(row + 1)
            size = 0
    assert [sum(split.rows for split in splits[:i]) for i in range(len(splits))] == ends
    for split in splits:
        kept = pa.Table.from_batches(split.passed)
        assert kept["id"].to_pylist() == split.row_numbers
        assert kept["kept"].to_pylist() == [text for (text,) in split.texts]
    assert max(len(split.passed) for split in splits) < 300, "batches are put together"


def test_kept_columns_of_gigabytes_in_one_split_make_an_unreadable_shard(tmp_path, model_directory):
    write_shard(tmp_path / "a.parquet", {"id": range(3), "text": texts(3), "kept": [SAME] * 3})
    options = encode_options(tmp_path, model_directory, keep_columns=("kept",), most_passed_bytes=1 << 20)
    (row,) = encode(only_shard(tmp_path), options)
    assert row["error"].startswith("ShardError: its id and kept columns hold more than")
    assert row["index"] == -1


def test_dictionaries_come_as_plain_columns_beside_types_that_only_arrow_knows(tmp_path):
    columns = {
        "id": pa.array(["x", "y", None]).dictionary_encode(),
        "text": pa.array(["good", None, "bad"], pa.large_string()).dictionary_encode(),
        "number": pa.array([1, 2, None]).dictionary_encode(),
        "when": pa.array([1, 2, None], pa.timestamp("us", "Europe/Berlin")),
        "lasts": pa.array([1, 2, None], pa.duration("s")),
        "ARROW:schema": [1, 2, 3],
    }
    path = write_shard(tmp_path / "a.parquet", columns)
    with path.open("rb") as file:
        table = encode_module._parquet_file(file, whole=True).read()
    assert [str(kind) for kind in table.schema.types] == [
        *("string", "string", "int64", "timestamp[us, tz=Europe/Berlin]", "duration[s]", "int64")
    ]
    assert table.to_pydict() == pq.read_table(path).to_pydict()
