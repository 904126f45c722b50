"""One type per kept column: whatever types the shards have, the output is one dataset to every reader."""

import contextlib
import datetime
import json
import pickle
import uuid
from collections import Counter
from decimal import Decimal
from pathlib import Path

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import ScoreConfig, UsageError, open_output, schema, score
from pipeline.commit import Committed, settle_done, write_marker
from pipeline.compact import CompactConfig, compact
from pipeline.corpus import IDENTITY, SCHEMA, find_input, list_shards, read_corpus
from pipeline.errors import PipelineError, ShardError
from pipeline.manifest import write_manifest
from pipeline.predict import SplitPredictor
from pipeline.rows import REJECTED_SCHEMA
from pipeline.schema import (
    Column,
    cast_columns,
    columns_of,
    common_type,
    is_outgrown,
    open_parquet,
    plain,
    settle_output,
    settle_types,
    target_types,
    widened,
)
from pipeline.storage import Storage
from pipeline.verify import VerifyConfig, verify
from tests.pipeline.stages import encode, encode_options, only_shard, run_stages, write_shard

TEXTS = ["the good news", "bad", None]
DAY = datetime.datetime(2026, 1, 1)
FAR = datetime.datetime(9999, 12, 31)


@pytest.fixture(scope="module")
def predictor(model_directory):
    return SplitPredictor(["id", "k"], "id", model=str(model_directory), device="cpu")


@pytest.fixture
def run(tmp_path, model_directory, predictor):
    """A run over tmp_path/in without Ray; returns the unreadable shards and why.

    Without `settled`, each shard's own types are passed on, as older versions did.
    """

    def run(settled: bool = True) -> dict[str, str]:
        input, output = Storage(str(tmp_path / "in")), Storage(str(tmp_path / "out"))
        identity = {"input": input.uri, "id_column": "id", "keep_columns": ["k"]}
        output.write(IDENTITY, json.dumps(identity).encode())
        shards = list_shards(input)
        types = settle_output(output, input, shards, ["id", "k"]) if settled else {}
        options = encode_options(tmp_path / "in", model_directory, keep_columns=("k",), types=types)
        markers, unreadable = [], {}
        for shard in shards:
            rows = run_stages(shard, options, predictor, output)
            unreadable |= {row["shard"]: row["error"] for row in rows if row["error"]}
            splits = [Committed(**json.loads(row["committed"])) for row in rows if row["committed"]]
            if shard.path not in unreadable:
                markers.append(write_marker(output, shard, splits, "run"))
        output.delete(["_SUCCESS"])
        write_manifest(output, identity, markers, [], "run")
        return unreadable

    return run


def shard_of(path: Path, column, start: int = 0, **options) -> None:
    """A shard whose last row has no text and is quarantined."""
    column = column if isinstance(column, pa.Array) else pa.array(column)
    write_shard(path, {"id": range(start, start + 3), "text": TEXTS, "k": column}, **options)


def objects(output: Path) -> list[pa.Schema]:
    return [pq.read_schema(path).remove_metadata() for path in sorted(output.glob("*.parquet"))]


def struct(**types) -> pa.DataType:
    return pa.struct(list(types.items()))


STRING, INT, STRINGS = pa.string(), pa.int64(), pa.list_(pa.string())
DRIFT = {  # the values of two shards, the output's type
    "null then list": (pa.nulls(3), [["a"], None, []], STRINGS),
    "null then int": (pa.nulls(3), [1, None, 3], INT),
    "null in both": (pa.nulls(3), pa.nulls(3), STRING),
    "nulls of another type": (pa.nulls(3, pa.float64()), ["a", "b", "c"], STRING),
    "list of nulls then list": (pa.array([[None], [], []]), [["a"], None, []], STRINGS),
    "int then double": ([1, 2, 3], [1.5, None, 2.0], pa.float64()),
    "int32 then int64": (pa.array([1, 2, 3], pa.int32()), [2**40, None, 3], INT),
    "signs": (pa.array([1, 2, 3], pa.uint32()), pa.array([-1, 2, 3], pa.int32()), INT),
    "float then double": (pa.array([0.5, 1, 2], pa.float32()), [0.1, None, 2.0], pa.float64()),
    "string then dictionary": (["a", "b", "c"], pa.array(["a", None, "a"]).dictionary_encode(), STRING),
    "large string then view": (
        pa.array(["a", "b", "c"], pa.large_string()),
        pa.array(["x", None, ""]).cast("string_view"),
        STRING,
    ),
    "string then JSON": (["a", "b", "c"], pa.array(['{"a": 1}', None, "1"]).cast(pa.json_()), STRING),
    "string then binary": (["a", "b", "c"], [b"\xff", None, b"a"], pa.binary()),
    "units": (pa.array([DAY] * 3, pa.timestamp("ms")), pa.array([DAY] * 3, pa.timestamp("us")), pa.timestamp("us")),
    "zones": (
        pa.array([DAY] * 3, pa.timestamp("us", "Europe/Berlin")),
        pa.array([DAY] * 3, pa.timestamp("us", "Asia/Tokyo")),
        pa.timestamp("us", "UTC"),
    ),
    "decimals": ([Decimal("12345.6")] * 3, [Decimal("0.123")] * 3, pa.decimal128(8, 3)),
    "int then decimal": (pa.array([2**31 - 1] * 3, pa.int32()), [Decimal("0.12")] * 3, pa.decimal128(12, 2)),
    "a field more": ([{"a": 1}] * 3, [{"b": "x", "a": 2}, None, {"b": None, "a": None}], struct(a=INT, b=STRING)),
    "a field more in a list": (
        [[{"a": 1}], [], None],
        [[{"a": 2, "b": ["x"]}], [], []],
        pa.list_(struct(a=INT, b=STRINGS)),
    ),
    "values of a map": (
        pa.array([[("x", 1)], [], None], pa.map_(STRING, pa.int32())),
        pa.array([[("y", 2**40)], [], None], pa.map_(STRING, INT)),
        pa.map_(STRING, INT),
    ),
    "no rows of another type": (["a", "b", "c"], pa.array([], INT), STRING),
}


@pytest.mark.parametrize(("one", "two", "kind"), [pytest.param(*DRIFT[name], id=name) for name in DRIFT])
def test_one_schema_whatever_types_the_shards_have(run, tmp_path, one, two, kind):
    shard_of(tmp_path / "in/a.parquet", one)
    if len(two):
        shard_of(tmp_path / "in/b.parquet", two, start=3)
    else:
        write_shard(tmp_path / "in/b.parquet", {"id": pa.array([], INT), "text": pa.array([], STRING), "k": two})
    write_shard(tmp_path / "in/bad.parquet", {"id": [6], "text": pa.nulls(1, STRING), "k": pa.nulls(1)})  # no results
    assert run() == {}
    out = str(tmp_path / "out")
    first, *others = objects(tmp_path / "out")
    assert all(str(other) == str(first) for other in others)
    assert first.field("k").type == kind
    expected = []
    for values in (one, two):
        column = values if isinstance(values, pa.Array) else pa.array(values)
        expected += pa.array(column.to_pylist(), kind).to_pylist()[:2]
    table = pyarrow.dataset.dataset(out, format="parquet", schema=first).to_table().sort_by("id")
    assert table["k"].to_pylist() == expected
    assert open_output(out).to_table().num_rows == len(pd.read_parquet(out)) == len(expected)
    assert duckdb.sql(f"select k from '{out}/*.parquet' order by id").to_arrow_table().num_rows == len(expected)
    quarantined = open_output(out, quarantine=True).to_table()
    assert str(quarantined.schema.remove_metadata()) == str(REJECTED_SCHEMA)
    assert verify(VerifyConfig(output=out)).holds
    compact(CompactConfig(output=out, into=str(tmp_path / "copy"), target_bytes=1))
    assert {str(copy) for copy in objects(tmp_path / "copy")} == {str(first)}


KINDS = st.recursive(
    st.sampled_from(
        [
            *(
                pa.null(),
                pa.bool_(),
                pa.int8(),
                pa.int16(),
                pa.int32(),
                pa.int64(),
                pa.uint8(),
                pa.uint32(),
                pa.uint64(),
            ),
            *(pa.float32(), pa.float64(), pa.string(), pa.large_string(), pa.binary(), pa.json_(), pa.uuid()),
            *(pa.decimal128(5, 2), pa.decimal128(9, 4), pa.decimal128(38, 0), pa.date32(), pa.time32("ms")),
            *(pa.timestamp("ms"), pa.timestamp("us"), pa.timestamp("us", "UTC"), pa.timestamp("ms", "Asia/Tokyo")),
            *(pa.dictionary(pa.int32(), pa.string()), pa.string_view()),
        ]
    ),
    lambda kinds: (
        st.builds(pa.list_, kinds)
        | st.builds(pa.large_list, kinds)
        | st.dictionaries(st.sampled_from("abc"), kinds, min_size=1, max_size=2).map(lambda names: struct(**names))
    ),
    max_leaves=4,
)


@given(one=KINDS, other=KINDS)
def test_a_wider_type_is_the_same_from_both_sides_and_holds_both(one, other):
    one, other = plain(one), plain(other)
    assert plain(one) == one
    assert widened(one, one) == one
    wide, back = widened(one, other), widened(other, one)
    assert (wide is None) == (back is None)
    if wide is not None:
        assert widened(wide, one) == widened(wide, other) == wide
        for kind in (one, other):
            nothing = pa.nulls(2, kind)
            assert nothing.cast(wide).cast(back).null_count == 2


LIMITS = [7, 8, 15, 16, 24, 31, 32, 53, 63, 64]
NUMBERS = st.sampled_from([0, *(sign * 2**bits + more for bits in LIMITS for sign in (-1, 1) for more in (-1, 0, 1))])
TYPES_OF_NUMBERS = st.sampled_from(
    [
        *(pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()),
        *(pa.float32(), pa.float64(), pa.decimal128(5, 2), pa.decimal128(20, 0), pa.decimal128(38, 10)),
    ]
)


@given(kind=TYPES_OF_NUMBERS, other=TYPES_OF_NUMBERS, value=NUMBERS)
def test_a_number_stays_what_it_is_or_its_shard_is_refused(kind, other, value):
    try:
        values = pa.array([value], pa.decimal128(20, 0)).cast(kind)
    except pa.ArrowException:
        return  # no value of this type
    if (wide := widened(kind, other)) is None:
        return
    with contextlib.suppress(ShardError):
        batch = cast_columns(pa.record_batch({"k": values}), {"k": Column(kind, False)}, {"k": wide})
        assert batch["k"][0].as_py() == values[0].as_py()


def test_a_shard_that_does_not_go_with_most_is_unreadable_by_column_and_types(run, tmp_path):
    shard_of(tmp_path / "in/a.parquet", [["x"], [], None])
    for name in "bc":
        shard_of(tmp_path / f"in/{name}.parquet", ["x", None, "z"])
    unreadable = run()
    assert list(unreadable) == ["a.parquet"]
    assert (
        "column 'k' is list<element: string>, which cannot become string, its type in this" in unreadable["a.parquet"]
    )
    assert len(objects(tmp_path / "out")) == 2
    assert open_output(str(tmp_path / "out")).to_table().num_rows == 4


def test_a_value_that_does_not_fit_makes_its_shard_unreadable(run, tmp_path):
    shard_of(tmp_path / "in/a.parquet", [2**53 + 1, 2, 3])
    shard_of(tmp_path / "in/b.parquet", [0.5, None, 2.0])
    (error,) = run().values()
    assert "column 'k' is int64 and holds a value that does not fit double, its type in this output: " in error
    assert str(2**53 + 1) in error


def test_later_runs_keep_to_the_recorded_types(run, tmp_path):
    shard_of(tmp_path / "in/a.parquet", pa.array([1, 2, 3], pa.int32()))
    assert run() == {}
    recorded = (tmp_path / "out" / SCHEMA).read_bytes()
    assert json.loads(recorded)["columns"] == {"id": "int64", "k": "int32"}
    shard_of(tmp_path / "in/b.parquet", pa.array([1, 2, 3], pa.int8()))
    shard_of(tmp_path / "in/c.parquet", pa.array([1, 2, 2**40]))
    shard_of(tmp_path / "in/d.parquet", pa.nulls(3, pa.float64()))
    unreadable = run()
    assert list(unreadable) == ["c.parquet"]
    assert "column 'k' is int64, which is wider than int32, its type in this output; " in unreadable["c.parquet"]
    assert "--overwrite" in unreadable["c.parquet"]
    assert {str(one.field("k").type) for one in objects(tmp_path / "out")} == {"int32"}
    assert (tmp_path / "out" / SCHEMA).read_bytes() == recorded
    input, output = Storage(str(tmp_path / "in")), Storage(str(tmp_path / "out"))
    assert is_outgrown(output, input, list_shards(input), ["k"])
    assert not is_outgrown(output, input, list_shards(input)[:2], ["k"])


def older_output(run, tmp_path, **shards) -> Storage:
    for name, values in shards.items():
        shard_of(tmp_path / f"in/{name}.parquet", values)
    assert run(settled=False) == {}
    return Storage(str(tmp_path / "out"))


def test_an_output_that_records_no_types_has_those_of_its_objects(run, tmp_path):
    output = older_output(run, tmp_path, a=pa.array([1, 2, 3], pa.int32()), b=[1, 2, 3], c=pa.nulls(3))
    narrow, _, text = (file.path for file in output.files() if "/" not in file.path and "parquet" in file.path)
    problems = verify(VerifyConfig(output=output.uri)).problems
    assert problems == [
        f"damaged: {narrow}: column 'k' is int32 where the output has int64; delete it and run again",
        f"damaged: {text}: column 'k' is string where the output has int64; delete it and run again",
    ]
    compact(CompactConfig(output=output.uri, into=str(tmp_path / "copy"), target_bytes=1))
    assert {str(copy.field("k").type) for copy in objects(tmp_path / "copy")} == {"int64"}
    types = settle_output(output, Storage(str(tmp_path / "in")), [], ["id", "k"])
    assert types == {"id": pa.int64(), "k": pa.int64()}
    shard, *_ = list_shards(Storage(str(tmp_path / "in")))
    assert settle_done(output, [(shard, frozenset([0]))], "", types) == {}, "to be computed again"
    assert output.read_if_there(narrow) is None
    output.delete([text])
    assert run() == {}
    assert verify(VerifyConfig(output=output.uri)).holds


def test_compaction_names_the_object_that_does_not_go_with_the_others(run, tmp_path):
    output = older_output(run, tmp_path, a=[1, 2, 3], b=["1", "2", "3"])
    with pytest.raises(
        PipelineError, match=r"/b-.*parquet: column 'k' is string, which cannot become int64.* see jobs/"
    ):
        compact(CompactConfig(output=output.uri, into=str(tmp_path / "copy")))


def test_partition_columns_keep_the_recorded_types_too(tmp_path, model_directory):
    def settled():
        location = find_input(Storage(str(tmp_path / "in")))
        corpus = read_corpus(location, ("month", "text"))
        output = Storage(str(tmp_path / "out"))
        types = settle_output(output, location.root, corpus.shards, ["month"], corpus.partitions)
        return types, corpus, location

    write_shard(tmp_path / "in/month=01/a.parquet", {"text": ["good"]})
    write_shard(tmp_path / "in/b.parquet", {"text": ["bad"], "month": pa.array([2], pa.int32())})  # a column there
    assert settled()[0] == {"month": pa.int64()}
    write_shard(tmp_path / "in/month=may/a.parquet", {"text": ["good"]})
    types, corpus, location = settled()
    assert types == {"month": pa.int64()}
    options = encode_options(
        location.root.uri,
        model_directory,
        id_column=None,
        keep_columns=("month",),
        partitions=corpus.partitions.typed(types),
        types=types,
    )
    found = {shard.path: row for shard in corpus.shards for row in encode(shard, options)}
    assert "partition column 'month' is 'may' here, which is not int64" in found.pop("month=may/a.parquet")["error"]
    assert [row["documents"]["month"].to_pylist() for row in found.values()] == [[2], [1]]
    assert {row["documents"].schema.field("month").type for row in found.values()} == {pa.int64()}


def test_footers_are_read_however_large_and_other_files_are_left_to_the_readers(tmp_path, monkeypatch):
    monkeypatch.setattr(schema, "_TAIL_BYTES", 16)
    shard_of(tmp_path / "a.parquet", [1, 2, 3])
    for name, data in (("b", b""), ("c", b"PAR1"), ("d", b"PAR1" + b"\xff" * 8 + b"PAR1"), ("e", b"x" * 1000)):
        (tmp_path / f"{name}.parquet").write_bytes(data)
    input = Storage(str(tmp_path))
    settled = settle_types(input, list_shards(input), ["k", "nowhere"], {})
    assert (settled.types, settled.conflicts) == ({"k": pa.int64()}, {})


def logical_types(path: Path) -> None:
    """Columns of logical types; ENUM, which pyarrow cannot write, by changing STRING in the footer."""
    columns = {
        "text": pa.array(['"good"', None], STRING),
        "json": pa.array(['{"a": 1}', None]).cast(pa.json_()),
        "uuid": pa.array([uuid.UUID(int=7).bytes, None], pa.binary(16)).cast(pa.uuid()),
        "price": pa.array([Decimal("1.20"), None], pa.decimal128(10, 2)),
        "zoned": pa.array([DAY, None], pa.timestamp("us", "Europe/Berlin")),
    }
    write_shard(path, columns, store_schema=True)


def test_logical_types_stay_what_they_are(tmp_path):
    logical_types(tmp_path / "a.parquet")
    parquet = open_parquet(tmp_path / "a.parquet")
    columns = columns_of(parquet, ["json", "uuid", "price", "zoned"])
    targets = target_types(columns, {})
    batch = cast_columns(parquet.read().to_batches()[0], columns, targets)
    assert [str(field.type) for field in batch.schema] == [
        *("extension<arrow.json>", "extension<arrow.uuid>", "decimal128(10, 2)", "timestamp[us, tz=Europe/Berlin]")
    ]
    assert batch["uuid"][0].as_py() == uuid.UUID(int=7)
    assert pickle.loads(pickle.dumps(targets)) == targets  # noqa: S301 - as Ray passes it to the readers


@pytest.mark.parametrize(("unit", "zone"), [("us", None), ("us", "Europe/Berlin"), ("ns", "Asia/Tokyo")])
@pytest.mark.parametrize("store_schema", [True, False])
def test_int96_timestamps_keep_far_dates_nanoseconds_and_zones(tmp_path, unit, zone, store_schema):
    values = pa.array([DAY, FAR, None] if unit == "us" else [DAY, DAY, None], pa.timestamp(unit, zone))
    write_shard(tmp_path / "a.parquet", {"k": values}, use_deprecated_int96_timestamps=True, store_schema=store_schema)
    parquet = open_parquet(tmp_path / "a.parquet")
    columns = columns_of(parquet, ["k"])
    batch = cast_columns(parquet.read().to_batches()[0], columns, target_types(columns, {}))
    expected = values if store_schema else values.cast(pa.timestamp("us"))
    assert batch["k"].equals(expected)


@pytest.mark.parametrize("kind", ["JSON", "ENUM"])
def test_json_and_enum_columns_are_texts(tmp_path, model_directory, kind):
    texts = pa.array(["good", None, "bad"])
    path = write_shard(
        tmp_path / "a.parquet", {"text": texts.cast(pa.json_()) if kind == "JSON" else texts}, store_schema=False
    )
    if kind == "ENUM":  # pyarrow cannot write it: change STRING and UTF8 in the footer
        data = path.read_bytes()
        assert data.count(b"text%\x00L\x1c") == 1
        path.write_bytes(data.replace(b"text%\x00L\x1c", b"text%\x08L\x4c"))
    assert pq.ParquetFile(path).schema.column(0).logical_type.type == kind
    (row,) = encode(only_shard(tmp_path), encode_options(tmp_path, model_directory, id_column="text"))
    assert row["documents"]["row"].to_pylist() == [0, 2]
    assert row["documents"]["text"].cast(STRING).to_pylist() == ["good", "bad"]


def test_names_that_differ_only_by_case_are_refused(tmp_path):
    places = {"input": "in", "output": "out", "model": "m"}
    with pytest.raises(UsageError, match=r"columns \['Shard'\] of the input are named like columns of the results"):
        ScoreConfig(**places, keep_columns=("Shard",))
    with pytest.raises(UsageError, match=r"columns \['ID', 'id'\] differ only by case: Spark"):
        ScoreConfig(**places, id_column="id", keep_columns=("ID", "other"))
    kinds = Counter({struct(a=INT): 2, struct(A=INT): 1})
    assert common_type(kinds) == struct(a=INT)
    with pytest.raises(ShardError, match=r"fields \['A', 'a'\] differ only by case"):
        target_types({"k": Column(pa.list_(struct(a=INT, A=INT)), False)}, {})


def test_a_dry_run_tells_the_types_and_conflicts(run, tmp_path, model_directory):
    for name, values in (("a", pa.array([1, 2, 3], pa.int32())), ("b", [1, 2, 2**40]), ("c", ["x", "y", "z"])):
        shard_of(tmp_path / f"in/{name}.parquet", values)
    places = {"input": str(tmp_path / "in"), "output": str(tmp_path / "new"), "model": str(model_directory)}
    told = score(ScoreConfig(**places, id_column="id", keep_columns=("k",), dry_run=True))
    assert told["column_types"] == {"id": "int64", "k": "int64"}
    assert [conflict["shard"] for conflict in told["conflicts"]] == ["c.parquet"]
    assert "column 'k' is string, which cannot become int64" in told["conflicts"][0]["error"]
    assert not (tmp_path / "new").exists()
