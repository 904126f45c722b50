"""The storage protocol: written twice is the same object, a shard is complete when its marker is there."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.commit import (
    METADATA,
    bind_output,
    clear_output,
    open_output,
    output_identity,
    parquet_bytes,
    publish,
    publish_splits,
    settle_done,
    settle_split,
    write_marker,
)
from pipeline.corpus import QUARANTINE, Shard
from pipeline.encode import REJECTED_SCHEMA
from pipeline.errors import UsageError
from pipeline.plan import make_plan
from pipeline.predict import SplitPredictor
from pipeline.rows import ErrorKind, error_table, split_table
from pipeline.storage import Storage
from tests.pipeline.stages import encode_options, only_shard, run_stages, texts, write_shard

SHARD = Shard("dir/a.parquet", "0123456789ab", 100)
OTHER = Shard("dir/a.parquet", "ba9876543210", 101)


def results(*rows, label="x"):
    columns = {"shard": ["dir/a.parquet"] * len(rows), "row": pa.array(rows, pa.int64()), "label": [label] * len(rows)}
    return pa.table(columns, schema=pa.schema([("shard", pa.string()), ("row", pa.int64()), ("label", pa.string())]))


def rejected(*rows):
    made = [{"shard": "dir/a.parquet", "row": row, "id": None, "reason": "null", "detail": ""} for row in rows]
    return pa.Table.from_pylist(made, schema=REJECTED_SCHEMA)


@pytest.fixture
def output(tmp_path):
    return Storage(str(tmp_path / "out"))


def test_written_twice_is_one_object_and_the_first_stays(output):
    first = publish(output, SHARD, 0, results(0, 2), rejected(1))
    listing = output.files()
    again = publish(output, SHARD, 0, results(0, 2, label="computed elsewhere"), rejected(1))
    assert output.files() == listing
    assert again == first
    assert first.results == 2
    assert first.quarantined == 1
    assert settle_split(output, first.object) == first


@pytest.mark.parametrize("damage", ["lost", "another run's", "half"])
def test_quarantined_rows_are_those_of_the_results_whatever_died_between_the_two(output, damage):
    """Killed after the results; a rerun that rejects other rows; a quarantine object of who knows what."""
    first = publish(output, SHARD, 0, results(0, 2), rejected(1))
    path = f"{QUARANTINE}/{first.object}"
    good = output.read(path)
    if damage == "lost":
        output.delete([path])
    else:
        output.write(path, good[: len(good) // 2] if damage == "half" else parquet_bytes(rejected(0, 2)))
    assert publish(output, SHARD, 0, results(1), rejected(0, 2)) == first
    assert output.read(path) == good


def test_what_an_older_version_published_is_taken_as_long_as_it_is_whole(output):
    committed = publish(output, SHARD, 0, results(0, 2), rejected(1))
    table = pq.read_table(pa.BufferReader(output.read(committed.object)))
    old = table.replace_schema_metadata({METADATA: json.dumps({"results": 2, "quarantined": 1})})
    output.write(committed.object, parquet_bytes(old))
    assert settle_split(output, committed.object, "key").quarantine_sha256 == committed.quarantine_sha256
    output.delete([f"{QUARANTINE}/{committed.object}"])
    assert settle_split(output, committed.object, "key") is None
    assert settle_done(output, [(SHARD, frozenset([0]))], "key") == {}
    assert output.files() == [], "to be computed again"


def test_a_late_split_of_a_run_with_other_options_is_replaced(output):
    publish(output, SHARD, 0, results(0, label="of the other model"), rejected(), "theirs")
    assert settle_split(output, SHARD.object(0), "ours") is None
    publish(output, SHARD, 0, results(0, label="ours"), rejected(), "ours")
    assert pq.read_table(pa.BufferReader(output.read(SHARD.object(0))))["label"].to_pylist() == ["ours"]


def test_a_split_without_results_still_is_committed(output):
    committed = publish(output, SHARD, 0, results(), rejected(0, 1))
    assert committed.results == 0
    assert dict(make_plan([SHARD], output).pending) == {SHARD: frozenset([0])}


def test_what_is_no_object_of_ours_is_computed_again(output):
    output.write(SHARD.object(0), b"not parquet")
    assert settle_split(output, SHARD.object(0)) is None
    committed = publish(output, SHARD, 0, results(0), rejected())
    assert settle_split(output, SHARD.object(0)) == committed


def test_a_complete_shard_has_a_marker_that_says_what_it_holds(output):
    splits = [publish(output, SHARD, 0, results(0, 2), rejected(1)), publish(output, SHARD, 1, results(3), rejected())]
    write_marker(output, SHARD, splits, "run-1")
    marker = json.loads(output.read(SHARD.marker))
    assert (marker["shard"], marker["rows"], marker["results"], marker["quarantined"]) == ("dir/a.parquet", 4, 3, 1)
    assert [split["object"] for split in marker["splits"]] == [SHARD.object(0), SHARD.object(1)]
    plan = make_plan([SHARD], output)
    assert (plan.complete, plan.pending) == ([SHARD], [])


def test_readers_switch_to_a_new_version_at_its_marker(output):
    write_marker(output, SHARD, [publish(output, SHARD, 0, results(0, 2), rejected(1))], "run-1")
    publish(output, OTHER, 0, results(0, 1, 2, label="new"), rejected())
    assert open_output(output.uri).to_table()["label"].to_pylist() == ["x", "x"]
    superseded = make_plan([OTHER], output).superseded[OTHER.key]
    new = settle_split(output, OTHER.object(0))
    # Both markers are there for a moment; the newer one counts.
    write_marker(output, OTHER, [new], "run-2")
    assert open_output(output.uri).to_table()["label"].to_pylist() == ["new"] * 3
    write_marker(output, OTHER, [new], "run-2", superseded=superseded)
    assert {file.path for file in output.files()} == {OTHER.object(0), OTHER.marker}
    assert open_output(output.uri).to_table()["label"].to_pylist() == ["new"] * 3


def test_readers_go_by_the_latest_run_not_by_clocks(output):
    """A run that was paused writes the old version's marker after the new version's, whose objects are gone."""
    old = [publish(output, SHARD, 0, results(0), rejected())]
    write_marker(output, OTHER, [publish(output, OTHER, 0, results(0, label="new"), rejected())], "run-2", epoch=2)
    write_marker(output, SHARD, old, "run-1", epoch=1)
    output.delete([SHARD.object(0)])
    assert open_output(output.uri).to_table()["label"].to_pylist() == ["new"]
    plan = make_plan([OTHER], output)
    assert (plan.complete, plan.superseded) == ([OTHER], {OTHER.key: [SHARD.marker]})


@pytest.mark.parametrize("deleted", range(4))
def test_a_death_while_deleting_leaves_too_much_and_never_too_little(output, deleted):
    """A shard was rewritten; the process died while it deleted the old version, which then was restored."""
    write_marker(output, SHARD, [publish(output, SHARD, 0, results(0, 2), rejected(1))], "run")
    found = make_plan([OTHER], output).superseded[OTHER.key]
    assert len(found) == 3
    output.delete(found[:deleted])
    plan = make_plan([SHARD], output)
    assert bool(plan.complete) == (deleted == 0)
    for committed in settle_done(output, plan.pending, "").values():
        assert committed.quarantined == 1
        assert pq.read_table(pa.BufferReader(output.read(f"{QUARANTINE}/{SHARD.object(0)}"))).equals(rejected(1))


def test_open_output_shows_complete_shards_only(output):
    with pytest.raises(UsageError, match="no complete shard"):
        open_output(output.uri)
    complete = Shard("b.parquet", "0" * 12, 1)
    publish(output, SHARD, 0, results(0), rejected())
    write_marker(output, complete, [publish(output, complete, 0, results(7), rejected(8))], "run")
    assert open_output(output.uri).to_table()["row"].to_pylist() == [7]
    assert open_output(output.uri, quarantine=True).to_table()["row"].to_pylist() == [8]


def test_an_output_belongs_to_one_model_and_one_set_of_options(output):
    identity = {"model_digest": "aa", "overflow": "windows", "keep_columns": []}
    bind_output(output, identity, overwrite=False)
    bind_output(output, identity, overwrite=False)
    with pytest.raises(UsageError, match=r"model_digest 'aa' where this run has 'bb'.*overwrite"):
        bind_output(output, identity | {"model_digest": "bb"}, overwrite=False)
    publish(output, SHARD, 0, results(0), rejected(1))
    bind_output(output, identity, overwrite=True)
    assert len(output.files()) == 3, "overwriting with the same settings goes on where the last run stopped"
    bind_output(output, identity | {"model_digest": "bb"}, overwrite=True)
    assert [file.path for file in output.files()] == ["_output.json"]
    assert output_identity(output) == identity | {"model_digest": "bb"}


def test_an_output_of_a_version_without_an_option_did_what_is_its_default(output):
    bind_output(output, {"model_digest": "aa"}, overwrite=False)
    newer = {"model_digest": "aa", "n_best": 1}
    bind_output(output, newer, overwrite=False, defaults={"n_best": 1})
    assert output_identity(output) == {"model_digest": "aa"}
    with pytest.raises(UsageError, match="n_best 1 where this run has 2"):
        bind_output(output, newer | {"n_best": 2}, overwrite=False, defaults={"n_best": 1})


def test_clearing_leaves_run_reports_and_other_peoples_files(output):
    output.write("_runs/1.json", b"{}")
    output.write("notes/readme.txt", b"")
    output.write("labels.parquet", b"")
    publish(output, SHARD, 0, results(0), rejected(1))
    clear_output(output)
    assert [file.path for file in output.files()] == ["_runs/1.json", "labels.parquet", "notes/readme.txt"]


def test_a_split_that_cannot_be_written_comes_back_with_the_error(tmp_path, model_directory):
    write_shard(tmp_path / "in/a.parquet", {"id": range(5), "text": texts(5)})
    (tmp_path / "file").write_text("")
    options = encode_options(tmp_path / "in", model_directory)
    predictor = SplitPredictor(passed_columns=["id"], id_column="id", model=str(model_directory), device="cpu")
    (row,) = run_stages(only_shard(tmp_path / "in"), options, predictor, Storage(str(tmp_path / "file" / "below")))
    assert "cannot write" in row["error"]
    assert row["error_kind"] == ErrorKind.OUTPUT
    assert row["payload"] is None


def test_publishing_twice_through_the_stage_gives_the_same_bytes(tmp_path, model_directory):
    write_shard(tmp_path / "in/a.parquet", {"id": range(50), "text": [*texts(49), None]})
    options = encode_options(tmp_path / "in", model_directory, split_bytes=300)
    predictor = SplitPredictor(passed_columns=["id"], id_column="id", model=str(model_directory), device="cpu")
    contents = []
    for name in ("one", "two"):
        output = Storage(str(tmp_path / name))
        rows = run_stages(only_shard(tmp_path / "in"), options, predictor, output)
        assert all(row["error"] is None for row in rows)
        contents.append({file.path: output.read(file.path) for file in output.files()})
    assert contents[0] == contents[1]
    assert len(contents[0]) > 3
    tables = [pq.read_table(pa.BufferReader(d)) for path, d in contents[0].items() if not path.startswith("_")]
    assert sorted(pa.concat_tables(tables)["row"].to_pylist()) == list(range(49))


def test_errors_and_shard_ends_pass_through(output):
    end = {"shard": "a", "version": "v", "size": 1, "index": -1, "num_splits": 0}
    batch = pa.concat_tables([split_table(end), error_table(end | {"index": 3}, ValueError("no\nluck"))])
    rows = publish_splits(batch, output).to_pylist()
    assert [row["error"] for row in rows] == [None, "ValueError: no luck"]
    assert output.files() == []
