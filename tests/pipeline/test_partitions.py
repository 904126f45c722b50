"""Columns whose values are in the names of folders: found, typed alike in all shards, and passed on."""

import datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import ScoreConfig
from pipeline.corpus import find_input, read_corpus
from pipeline.errors import UsageError
from pipeline.job import make_job
from pipeline.partitions import NULL, partition_types, path_values
from pipeline.predict import SplitPredictor
from pipeline.storage import Storage
from tests.pipeline.stages import encode, encode_options, run_stages, write_shard


def passed(directory, model_directory, column, below="in"):
    """A kept column's type and values, by shard, as readers pass them on."""
    storage = Storage(f"{directory}/{below}")
    location = find_input(storage)
    corpus = read_corpus(location, [column])
    options = encode_options(location.root.uri, model_directory, keep_columns=(column,), partitions=corpus.partitions)
    found = {}
    for shard in corpus.shards:
        (row,) = encode(shard, options)
        assert row["error"] is None, row["error"]
        found[shard.path] = row["documents"][column]
    (kind,) = {column.type for column in found.values()}
    return kind, {path: column.to_pylist() for path, column in found.items()}


def write(directory, *paths, **columns):
    for path in paths:
        write_shard(directory / "in" / path, {"id": [path, path], "text": ["good", "bad"], **columns})


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        (["1", "007", "-3"], pa.int64(), [1, 7, -3]),
        (["1", NULL], pa.int64(), [1, None]),
        (["1", "x"], pa.string(), ["1", "x"]),
        (["1", "9" * 19], pa.string(), ["1", "9" * 19]),
        (["1.5"], pa.string(), ["1.5"]),
        ([""], pa.string(), [""]),
        ([NULL], pa.string(), [None]),
        (["2026-01-01", "2024-02-29"], pa.date32(), [datetime.date(2026, 1, 1), datetime.date(2024, 2, 29)]),
        (["2026-01-01", "2026-02-30"], pa.string(), ["2026-01-01", "2026-02-30"]),
        (["2026-01-01", "20260102"], pa.string(), ["2026-01-01", "20260102"]),
        (["a%20b", "%C3%A9%2F%3D", "x=y", "1+1"], pa.string(), ["a b", "é/=", "x=y", "1+1"]),
    ],
)
def test_a_column_has_one_type_for_all_of_its_values(tmp_path, model_directory, values, kind, expected):
    paths = [f"c={value}/p.parquet" for value in values]
    write(tmp_path, *paths)
    assert passed(tmp_path, model_directory, "c") == (kind, {p: [v, v] for p, v in zip(paths, expected)})


@given(st.lists(st.integers(-(2**64), 2**64).map(str) | st.dates().map(str) | st.text(), min_size=1))
def test_every_value_is_of_its_columns_type(values):
    kind = partition_types([(("c", value),) for value in values])["c"]
    assert pa.array(values, pa.string()).cast(kind).null_count == 0


def test_columns_of_the_path_take_precedence_and_those_of_its_root_do_not(tmp_path, model_directory):
    """As Spark, pyarrow and DuckDB have it; the folders above what is read are no columns to them."""
    write(tmp_path, "a=1/b=2/c=3/p.parquet", a=[0, 0], c=[0, 0])
    assert passed(tmp_path, model_directory, "c", "in/a=1/b=2") == (pa.int64(), {"c=3/p.parquet": [3, 3]})
    assert passed(tmp_path, model_directory, "a", "in/a=1/b=2") == (pa.int64(), {"c=3/p.parquet": [0, 0]})
    assert passed(tmp_path, model_directory, "b", "in/a=1/b=2") == (pa.int64(), {"c=3/p.parquet": [2, 2]})
    assert passed(tmp_path, model_directory, "b", "in/a=1/b=2/*/*") == (pa.int64(), {"c=3/p.parquet": [2, 2]})
    assert passed(tmp_path, model_directory, "c", "in/a=1/b=2/c=3/p.parquet") == (pa.int64(), {"p.parquet": [0, 0]})
    assert pq.read_table(tmp_path / "in/a=1/b=2/c=3/p.parquet")["c"].to_pylist() == [0, 0]


def test_a_shard_outside_the_partitions_is_named(tmp_path, model_directory):
    write(tmp_path, "c=1/p.parquet", "q.parquet")
    corpus = read_corpus(find_input(Storage(f"{tmp_path}/in")), ["c"])
    options = encode_options(tmp_path / "in", model_directory, keep_columns=("c",), partitions=corpus.partitions)
    ends = {shard.path: [row["error"] for row in encode(shard, options)] for shard in corpus.shards}
    assert ends == {"c=1/p.parquet": [None], "q.parquet": ["ShardError: no column 'c'; its columns are 'id', 'text'"]}


def test_a_value_that_is_not_utf8_is_refused_if_it_is_kept(tmp_path):
    assert path_values("c=%FF/d=%20", ("d",)) == (("d", " "),)
    with pytest.raises(UsageError, match=r"c=%FF.*not UTF-8"):
        path_values("c=%FF", ("c",))


def test_a_job_keeps_partition_columns_and_names_documents_by_them(tmp_path, model_directory):
    write(tmp_path, "date=2026-01-01/p.parquet", "date=2026-01-02/p.parquet")
    places = {"input": f"{tmp_path}/in", "output": f"{tmp_path}/out", "model": str(model_directory)}
    job = make_job(ScoreConfig(**places, id_column="date", keep_columns=("id",), split_bytes=1 << 20))
    predictor = SplitPredictor(job.config.passed_columns, "date", model=str(model_directory), device="cpu")
    for shard in job.shards:
        (row,) = run_stages(shard, job.encode_options(1), predictor, job.output)
        assert row["error"] is None
    table = pq.read_table(tmp_path / "out", partitioning=None)
    assert table.column_names[0] == "date"
    assert table["date"].type == pa.date32()
    assert all(row["id"] == f"date={row['date']}/p.parquet" == row["shard"] for row in table.to_pylist())
