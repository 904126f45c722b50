"""Delta and Iceberg tables: what their logs name is read, and nothing else; what cannot be applied is refused."""

import contextlib
import datetime
import gzip
import json
import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake
from pyiceberg.manifest import DataFileContent
from pyiceberg.partitioning import PartitionField, PartitionSpec
from pyiceberg.transforms import IdentityTransform

from pipeline.config import ScoreConfig
from pipeline.corpus import find_input, input_root, list_shards, read_corpus
from pipeline.errors import StorageError, UsageError
from pipeline.job import make_job
from pipeline.storage import Storage
from tests.pipeline.iceberg import add_delete_file, iceberg_table
from tests.pipeline.stages import write_shard
from tests.pipeline.verbatim_s3 import verbatim_s3

ROWS = pa.table({"id": range(6), "text": ["good"] * 6, "p": ["a", "b c", "d/é%", None, "a", "a"]})


def ids(uri: str) -> list[int]:
    """The ids in an input's shards."""
    root = Storage(input_root(uri))
    tables = [pq.ParquetFile(pa.BufferReader(root.read(shard.path))).read() for shard in list_shards(Storage(uri))]
    return sorted(i for table in tables for i in table["id"].to_pylist())


def delta(where: Path, **options) -> DeltaTable:
    """A table with rows deleted, and added again after a checkpoint."""
    write_deltalake(where, ROWS, **options)
    table = DeltaTable(where)
    table.delete("id < 2")
    table.create_checkpoint()
    write_deltalake(where, ROWS.slice(1, 1), mode="append")
    return table


def iceberg(where: Path):
    table = iceberg_table(where, ROWS)
    table.delete("id < 2")
    table.append(ROWS.slice(1, 1))
    return table


TABLES = {"Delta": delta, "Iceberg": iceberg}
PRESENT = [1, 2, 3, 4, 5]


@pytest.fixture
def on_s3(tmp_path):
    """Serves a folder's files; the URI of its copy."""
    with contextlib.ExitStack() as stack:

        def serve(folder: Path) -> str:
            files = {str(file.relative_to(tmp_path)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
            return f"{stack.enter_context(verbatim_s3(files))}/{folder.relative_to(tmp_path)}"

        yield serve


@pytest.mark.parametrize("name", TABLES)
def test_a_table_has_the_rows_that_its_log_has(tmp_path, on_s3, name):
    """Also within other folders, by a glob, from within, and after it was copied to another place."""
    TABLES[name](tmp_path / "t")
    where = tmp_path / "tables/odd name+%20 [1]"
    where.parent.mkdir()
    (tmp_path / "t").rename(where)
    write_shard(tmp_path / "tables/plain/x.parquet", {"id": [7]})
    assert len(list(where.rglob("*.parquet"))) > len(list_shards(Storage(str(where))))
    remote = on_s3(tmp_path / "tables")
    inner = {"Delta": "*.parquet", "Iceberg": "data/*.parquet"}[name]
    for tables in (str(tmp_path / "tables"), remote):
        table = f"{tables}/{where.name}"
        assert ids(table) == PRESENT
        assert ids(tables) == [*PRESENT, 7]
        assert ids(f"{tables}/**/*.parquet") == [*PRESENT, 7]
        assert ids(f"{tables}/o*/{inner}") == PRESENT
        assert ids(f"{table}/{inner}") == PRESENT
    assert [s.path for s in list_shards(Storage(remote))] == [
        s.path for s in list_shards(Storage(f"{tmp_path}/tables"))
    ]
    listed = {shard.path for shard in list_shards(Storage(str(where)))}
    removed = next(
        f for f in where.rglob("*.parquet") if str(f.relative_to(where)) not in listed and "_delta" not in str(f)
    )
    with pytest.raises(UsageError, match="no Parquet files there"):
        list_shards(Storage(str(removed)))


def test_deltas_partition_columns_come_from_its_log(tmp_path, on_s3):
    days = pa.array([0, 1, None, 3, 4, 5], pa.date32())
    where = tmp_path / "t"
    write_deltalake(where, ROWS.append_column("d", days), partition_by=["p", "d"])
    write_deltalake(where, ROWS.append_column("d", days).slice(4), partition_by=["p", "d"], mode="overwrite")
    expected = {(("p", "a"), ("d", "1970-01-05")), (("p", "a"), ("d", "1970-01-06"))}
    for uri in (str(where), f"{where}/p=a", on_s3(where)):
        corpus = read_corpus(find_input(Storage(uri)), ["p", "d", "text"])
        assert {shard.partition for shard in corpus.shards} == expected
        assert corpus.partitions.types == {"p": pa.string(), "d": pa.date32()}
    DeltaTable(where).restore(0)
    corpus = read_corpus(find_input(Storage(str(where))), ["p", "d"])
    values = [corpus.partitions.scalars(shard.partition, []) for shard in corpus.shards]
    found = sorted(((v["p"].as_py(), v["d"].as_py()) for v in values), key=str)
    wanted = zip(ROWS["p"].to_pylist(), days.to_pylist())
    assert found == sorted(wanted, key=str)
    assert datetime.date(1970, 1, 2) in {day for _, day in found}


def test_icebergs_partition_columns_are_in_its_files(tmp_path):
    spec = PartitionSpec(PartitionField(3, 1000, IdentityTransform(), "p"))
    iceberg_table(tmp_path / "t", ROWS, spec)
    corpus = read_corpus(find_input(Storage(str(tmp_path / "t"))), ["p"])
    assert {shard.partition for shard in corpus.shards} == {()}
    assert ids(str(tmp_path / "t")) == list(range(6))


@pytest.mark.parametrize("ending", [".gz.metadata.json", ".metadata.json.gz", ".gzip.metadata.json"])
def test_icebergs_metadata_may_be_compressed(tmp_path, ending):
    iceberg(tmp_path / "t")
    for file in (tmp_path / "t/metadata").glob("*.metadata.json"):
        (file.parent / file.name.replace(".metadata.json", ending)).write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    assert ids(str(tmp_path / "t")) == PRESENT


def test_a_job_reads_the_log(tmp_path, model_directory):
    delta(tmp_path / "in", partition_by=["p"])
    config = ScoreConfig(
        input=f"{tmp_path}/in",
        output=f"{tmp_path}/out",
        model=str(model_directory),
        id_column="id",
        keep_columns=("p",),
    )
    job = make_job(config)
    assert {dict(shard.partition)["p"] for shard in job.shards} == {"a", "b c", "d/é%", None}


MAPPING = "delta.columnMapping"


def log(where: Path, *actions: dict, features: tuple[str, ...] = (), schema: str = "", mapping: str = "none") -> None:
    """A Delta table of one file, with these actions besides."""
    write_shard(where / "p.parquet", {"id": [1], "text": ["good"]})
    fields = [
        {
            "name": name,
            "type": kind,
            "nullable": True,
            "metadata": {f"{MAPPING}.id": i, f"{MAPPING}.physicalName": name},
        }
        for i, (name, kind) in enumerate([("id", "long"), ("text", "string")], start=1)
    ]
    features = features if mapping == "none" else ("columnMapping",)
    protocol = {"minReaderVersion": 3, "minWriterVersion": 7, "readerFeatures": features, "writerFeatures": features}
    metadata = {
        "id": "00000000-0000-0000-0000-000000000001",
        "format": {"provider": "parquet", "options": {}},
        "schemaString": schema or json.dumps({"type": "struct", "fields": fields}),
        "partitionColumns": [],
        "configuration": {f"{MAPPING}.mode": mapping},
    }
    lines = [{"protocol": protocol}, {"metaData": metadata}, *actions]
    (where / "_delta_log").mkdir()
    (where / "_delta_log/00000000000000000000.json").write_text("\n".join(map(json.dumps, lines)))


def add(path: str, **entries) -> dict:
    return {
        "add": {"path": path, "partitionValues": {}, "size": 1, "modificationTime": 0, "dataChange": True, **entries}
    }


VECTOR = {
    "storageType": "u",
    "pathOrInlineDv": "ab^-aqEH.-t@S}K{vb[*k^",
    "offset": 4,
    "sizeInBytes": 40,
    "cardinality": 6,
}


def nothing(where: Path) -> None:
    (where / "_delta_log").mkdir(parents=True)
    (where / "_delta_log/.part.tmp").write_text("")


def damaged(where: Path) -> None:
    iceberg(where)
    (where / "metadata/00009-x.metadata.json").write_text("{")


def renamed(where: Path) -> None:
    table = iceberg(where)
    with table.update_schema() as update:
        update.rename_column("text", "body")
    with table.update_schema() as update:
        update.rename_column("body", "text")


def two_versions(where: Path) -> None:
    newest = Path(iceberg(where).metadata_location)
    shutil.copy(newest, newest.with_name(f"{newest.name[:5]}-x.metadata.json"))


def hudi(where: Path) -> None:
    write_shard(where / "p.parquet", {"id": [1]})
    write_shard(where / ".hoodie/x", {})


REFUSED = {
    "deletion vectors": lambda t: log(t, add("p.parquet", deletionVector=VECTOR), features=("deletionVectors",)),
    "column mapping": lambda t: log(t, add("p.parquet"), mapping="name"),
    "Feature 'new' is not supported": lambda t: log(t, add("p.parquet"), features=("new",)),
    r"files outside its folder \(s3://b/x.parquet\)": lambda t: log(t, add("s3://b/x.parquet")),
    "log of this Delta table cannot be read": lambda t: log(t, add("p.parquet"), schema="{}"),
    "log of this Delta table cannot be read: .*": nothing,
    "position deletes": lambda t: add_delete_file(iceberg(t), DataFileContent.POSITION_DELETES),
    "equality deletes": lambda t: add_delete_file(iceberg(t), DataFileContent.EQUALITY_DELETES),
    "column 'text' has another name": renamed,
    "log of this Iceberg table cannot be read": damaged,
    "only its catalog knows the present one of": two_versions,
    "a Hudi table": hudi,
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_applied_is_refused_by_name(tmp_path, what):
    REFUSED[what](tmp_path / "t")
    with pytest.raises(UsageError, match=f"^{tmp_path}/t: .*{what}") as refused:
        read_corpus(find_input(Storage(str(tmp_path))), ["id", "text"])
    assert "\n" not in str(refused.value)


def test_features_that_change_nothing_are_read(tmp_path):
    log(tmp_path, add("p.parquet"), features=("deletionVectors", "timestampNtz", "v2Checkpoint"))
    assert ids(str(tmp_path)) == [1]


def test_a_missing_file_is_named(tmp_path):
    log(tmp_path, add("p.parquet"), add("q%20r.parquet"))
    with pytest.raises(StorageError, match=r"q r\.parquet: the table's log names it, but it is not there"):
        list_shards(Storage(str(tmp_path)))


@pytest.mark.parametrize(("name", "package"), [("Delta", "deltalake"), ("Iceberg", "pyiceberg")])
def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, name, package):
    TABLES[name](tmp_path / "t")
    for module in [module for module in sys.modules if module.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=rf"t: .*{name} table.*{package} is not installed: pip install '.*\[tables\]'"):
        list_shards(Storage(str(tmp_path / "t")))
