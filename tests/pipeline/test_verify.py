"""Verification and compaction of outputs: what is broken by hand is found, what is copied is all there."""

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import compact as compact_job
from jobs import verify as verify_job
from pipeline import open_output
from pipeline.commit import parquet_bytes
from pipeline.compact import CompactConfig, compact
from pipeline.errors import OutputBusyError, PipelineError, UsageError
from pipeline.lock import LEASES, OutputLock
from pipeline.manifest import SUCCESS, complete_markers, read_manifest, write_manifest
from pipeline.storage import Storage
from pipeline.verify import VerifyConfig, summary, verify
from tests.pipeline.stages import run_again, score_here, texts, write_shard

ROWS = {"a.parquet": 30, "sub/b.parquet": 12, "empty.parquet": 0}


@pytest.fixture
def output(tmp_path, model_directory):
    """A complete output of three shards; every fifth row is quarantined."""
    for name, rows in ROWS.items():
        documents = [None if i % 5 == 4 else text for i, text in enumerate(texts(rows))]
        columns = {"id": pa.array(range(rows), pa.int64()), "text": pa.array(documents, pa.string())}
        write_shard(tmp_path / "in" / name, columns)
    storage = Storage(str(tmp_path / "out"))
    score_here(tmp_path / "in", storage, model_directory)
    return storage


def verified(output, **changes):
    return verify(VerifyConfig(output=output.uri, **changes))


def results_of(output, shard: str) -> list[dict]:
    return next(marker["splits"] for marker in complete_markers(output) if marker["shard"] == shard)


def test_a_complete_output_holds(output, capsys):
    found = verified(output)
    assert found.holds
    assert (found.shards, found.rows, found.results, found.quarantined) == (3, 42, 34, 8)
    assert verify_job.main(["--output", output.uri]) == 0
    assert "every row exactly once" in capsys.readouterr().out


def lose_an_object(output):
    output.delete([results_of(output, "a.parquet")[1]["object"]])


def lose_a_quarantine(output):
    split = next(split for split in results_of(output, "a.parquet") if split["quarantined"])
    output.delete([f"_quarantine/{split['object']}"])


def lose_a_marker(output):
    (marker,) = [file.path for file in output.files("_shards") if "/b-" in file.path]
    output.delete([marker])


def double_a_row(output):
    name = results_of(output, "sub/b.parquet")[0]["object"]
    table = pq.read_table(pa.BufferReader(output.read(name)))
    output.write(name, parquet_bytes(pa.concat_tables([table, table.slice(0, 1)])))


def truncate_an_object(output):
    name = results_of(output, "a.parquet")[0]["object"]
    output.write(name, output.read(name)[:-20])


def mix_shards(output):
    ours, theirs = (results_of(output, shard)[0]["object"] for shard in ("a.parquet", "sub/b.parquet"))
    output.write(ours, output.read(theirs))


def leave_an_old_version(output):
    name = results_of(output, "a.parquet")[0]["object"]
    output.write(f"{name[:-28]}-{'0' * 12}-000000.parquet", output.read(name))


def put_something_there(output):
    output.write("theirs.parquet", parquet_bytes(pa.table({"x": [1]})))


def lose_success(output):
    output.delete([SUCCESS])


def stale_success(output):
    manifest = read_manifest(output)
    manifest["shards"][0]["version"] = "0" * 12
    output.write(SUCCESS, json.dumps(manifest).encode())


def rewrite_the_quarantine(output):
    """Another reason and another name for a row that is put aside."""
    split = next(split for split in results_of(output, "a.parquet") if split["quarantined"])
    name = f"_quarantine/{split['object']}"
    rows = pq.read_table(pa.BufferReader(output.read(name))).to_pylist()
    output.write(name, parquet_bytes(pa.Table.from_pylist([row | {"id": "x", "reason": "empty"} for row in rows])))


def score_a_quarantined_row(output):
    split = next(split for split in results_of(output, "a.parquet") if split["quarantined"])
    name = f"_quarantine/{split['object']}"
    table = pq.read_table(pa.BufferReader(output.read(name)))
    scored = pq.read_table(pa.BufferReader(output.read(split["object"])))["row"][0].as_py()
    rows = pa.array([scored, *table["row"].to_pylist()[1:]], pa.int64())
    output.write(name, parquet_bytes(table.set_column(table.schema.get_field_index("row"), "row", rows)))


def put_a_quarantine_beside_no_split(output):
    """As a run leaves that died between the two objects."""
    name = results_of(output, "a.parquet")[0]["object"]
    row = {"shard": "a.parquet", "row": 0, "id": "0", "reason": "killed_process", "detail": ""}
    path = f"_quarantine/{name.replace('000000.parquet', '000099.parquet')}"
    output.write(path, parquet_bytes(pa.Table.from_pylist([row])))


def change_marker(output, change):
    (path,) = [file.path for file in output.files("_shards") if "/a-" in file.path]
    marker = json.loads(output.read(path))
    change(marker)
    output.write(path, json.dumps(marker).encode())


def miscount_a_split(output):
    change_marker(output, lambda marker: marker["splits"][0].update(results=99))


def miscount_a_shard(output):
    change_marker(output, lambda marker: marker.update(quarantined=0, rows=1))


def forget_a_split(output):
    change_marker(output, lambda marker: marker["splits"].pop())


def success_without_a_split(output):
    manifest = read_manifest(output)
    manifest["shards"][0]["splits"].pop()
    output.write(SUCCESS, json.dumps(manifest).encode())


def success_with_wrong_counts(output):
    output.write(SUCCESS, json.dumps(read_manifest(output) | {"results": 7}).encode())


def truncate_success(output):
    output.write(SUCCESS, output.read(SUCCESS)[:50])


def truncate_a_marker(output):
    (path,) = [file.path for file in output.files("_shards") if "/a-" in file.path]
    output.write(path, output.read(path)[:50])


def put(*paths):
    """Objects that readers of the prefix, or of the quarantine, see."""

    def break_it(output):
        data = output.read(results_of(output, "a.parquet")[0]["object"])
        for path in paths:
            output.write(path, data)

    return break_it


@pytest.mark.parametrize(
    ("break_it", "counts", "problem"),
    [
        (lose_an_object, "missing", r"missing: a-\w+-\w+-000001\.parquet: the object is gone"),
        (lose_a_quarantine, "missing", r"missing: a\.parquet: rows \d"),
        (lose_a_marker, "missing", r"missing: sub/b\.parquet: not complete, 12 rows, \d+ splits of it are there"),
        (double_a_row, "doubled", r"doubled: sub/b\.parquet: rows 0"),
        (double_a_row, "doubled", r"damaged: b-.*: its checksum is not its marker's"),
        (truncate_an_object, "missing", r"damaged: a-.*: "),
        (mix_shards, "extra", r"extra: a\.parquet: its objects hold \d+ rows of other shards"),
        (
            leave_an_old_version,
            None,
            r"extra: a-.*-000000000000-000000\.parquet: not of its shard's present version; the next",
        ),
        (put_something_there, None, r"extra: theirs\.parquet: not of this pipeline; no run deletes it"),
        (lose_success, None, r"missing: _SUCCESS: no run has called"),
        (stale_success, None, r"damaged: _SUCCESS: its shards are not the markers'"),
        (rewrite_the_quarantine, None, r"damaged: _quarantine/a-.*: its checksum is not its marker's; delete it and"),
        (score_a_quarantined_row, "doubled", r"doubled: a\.parquet: rows \d+"),
        (put_a_quarantine_beside_no_split, None, r"extra: _quarantine/a-.*; the next run deletes it"),
        (miscount_a_split, None, r"damaged: _shards/a-.*: its counts of split 0 are not its objects'; delete it"),
        (miscount_a_shard, None, r"damaged: _shards/a-.*: its counts are not its objects'; delete it"),
        (forget_a_split, "missing", r"missing: a\.parquet: rows \d"),
        (success_without_a_split, None, r"damaged: _SUCCESS: .* the markers': a\.parquet; delete it and run again"),
        (success_with_wrong_counts, None, r"damaged: _SUCCESS: its counts are not its shards'; delete it and run"),
        (truncate_success, None, r"damaged: .*_SUCCESS: damaged: .*; run again to write it anew"),
        (truncate_a_marker, "missing", r"damaged: _shards/a-.*: no whole marker; delete it and run again"),
        (put("part-0"), None, r"extra: part-0: not of this pipeline; no run deletes it"),
        (put("x.parq"), None, r"extra: x\.parq: not of this pipeline"),
        (put("day=1/x.parquet"), None, r"extra: day=1/x\.parquet: not of this pipeline"),
        (put("_quarantine/x.parquet"), None, r"extra: _quarantine/x\.parquet: not of this pipeline"),
    ],
)
def test_what_is_broken_is_found(output, capsys, break_it, counts, problem):
    break_it(output)
    found = verified(output)
    assert not found.holds
    assert any(re.match(problem, line) for line in found.problems), found.problems
    for name in ("missing", "doubled", "extra"):
        if name == counts:
            assert getattr(found, name) > 0
    assert verify_job.main(["--output", output.uri]) == 3
    assert problem.split(":")[0] in capsys.readouterr().out


def test_a_copy_of_an_object_in_a_folder_is_extra(output):
    name = results_of(output, "a.parquet")[0]["object"]
    put(f"copy/{name}")(output)
    assert verified(output).problems == [f"extra: copy/{name}: not of this pipeline; no run deletes it"]


def test_splits_of_a_shard_that_is_not_complete_are_missing_and_not_extra(output):
    lose_a_marker(output)
    assert not [problem for problem in verified(output).problems if problem.startswith("extra")]


def test_what_readers_do_not_look_at_is_nobodys_business(output):
    put("_temporary/x.parquet", ".hidden", "_runs/1.json", "_leases/00000001.json")(output)
    assert verified(output).holds


REPAIRED = [
    *(lose_an_object, lose_a_quarantine, lose_a_marker, double_a_row, truncate_an_object),
    *(mix_shards, leave_an_old_version),
    *(lose_success, stale_success, rewrite_the_quarantine, score_a_quarantined_row, miscount_a_split, miscount_a_shard),
    *(put_a_quarantine_beside_no_split, forget_a_split, success_without_a_split, truncate_success),
    *(success_with_wrong_counts, truncate_a_marker),
]


@pytest.mark.parametrize("break_it", REPAIRED)
def test_the_next_run_does_what_verification_says_of_it(output, tmp_path, model_directory, break_it):
    """Delete what it says to delete, run again, and everything is there."""
    good = {file.path: output.read(file.path) for file in output.files() if not file.path.startswith("_")}
    break_it(output)
    for problem in verified(output).problems:
        what, path = problem.split(": ")[:2]
        if problem.endswith("delete it and run again"):
            output.delete([path])
        elif what == "extra" and "no run deletes it" in problem:
            pytest.fail(problem)
    run_again(tmp_path / "in", output, model_directory)
    found = verified(output)
    assert found.holds, found.problems
    assert {file.path: output.read(file.path) for file in output.files() if not file.path.startswith("_")} == good


def test_other_inputs_do_not_match(output, tmp_path):
    write_shard(tmp_path / "in/a.parquet", {"id": [0], "text": ["rewritten"]})
    write_shard(tmp_path / "in/new.parquet", {"id": [0, 1], "text": ["x", "y"]})
    (tmp_path / "in/sub/b.parquet").unlink()
    (tmp_path / "in/broken.parquet").write_bytes(b"PAR1")
    problems = "\n".join(verified(output).problems)
    assert "missing: a.parquet: not complete, 1 rows" in problems
    assert "missing: new.parquet: not complete, 2 rows" in problems
    assert "missing: broken.parquet: it cannot be read" in problems
    assert "extra: sub/b.parquet: no longer in the input, 12 rows (--delete-removed)" in problems
    with pytest.raises(UsageError, match="no Parquet files there"):
        verified(output, input=str(tmp_path / "nothing"))
    with pytest.raises(UsageError, match="not the output of a scoring run"):
        verify(VerifyConfig(output=str(tmp_path / "in")))


def test_very_many_problems_are_not_all_printed(output):
    found = verified(output)
    found.problems = [f"missing: {i}" for i in range(1000)]
    assert len(summary(found).splitlines()) < 120
    assert "and 900 more" in summary(found)


# Manifests.


def test_the_manifest_says_what_the_markers_say(output):
    manifest = read_manifest(output)
    assert (manifest["rows"], manifest["results"], manifest["quarantined"]) == (42, 34, 8)
    assert [marker["shard"] for marker in manifest["shards"]] == sorted(ROWS)
    before = open_output(output.uri).count_rows()
    output.delete([SUCCESS])
    assert read_manifest(output) is None
    assert complete_markers(output) == manifest["shards"], "one by one they are the same"
    assert open_output(output.uri).count_rows() == before


def test_an_older_success_is_never_replaced(output):
    with pytest.raises(PipelineError, match="_SUCCESS: another run wrote it meanwhile"):
        write_manifest(output, {}, [], [], "another run")


def test_a_damaged_marker_or_manifest_is_named(output):
    (marker, *_) = [file.path for file in output.files("_shards")]
    output.write(SUCCESS, b"{")
    with pytest.raises(PipelineError, match=r"_SUCCESS: damaged: .*; run again to write it anew"):
        read_manifest(output)
    output.delete([SUCCESS])
    output.write(marker, b"{")
    with pytest.raises(PipelineError, match="a damaged marker"):
        complete_markers(output)


# Compaction.


def rows_of(directory: str, below: str = "") -> list[tuple]:
    storage = Storage(directory)
    names = [file.path for file in storage.files(below) if file.path.endswith(".parquet")]
    tables = [pq.read_table(pa.BufferReader(storage.read(name))) for name in names if name.rpartition("/")[0] == below]
    return sorted((row["shard"], row["row"], str(row)) for table in tables for row in table.to_pylist())


def test_compaction_keeps_every_row_once(output, tmp_path, capsys):
    into = str(tmp_path / "compacted")
    before = [file.path for file in output.files() if not file.path.startswith(LEASES)]
    assert compact_job.main(["--output", output.uri, "--into", into]) == 0
    assert rows_of(into) == rows_of(output.uri)
    assert rows_of(into, "_quarantine") == rows_of(output.uri, "_quarantine")
    assert capsys.readouterr().out == "34 results and 8 quarantined rows in 2 objects\n"
    manifest = json.loads(Storage(into).read(SUCCESS))
    assert (manifest["rows"], len(manifest["parts"])) == (42, 2)
    assert [file.path for file in output.files() if not file.path.startswith(LEASES)] == before
    assert verified(output).holds


def test_a_compacted_copy_can_be_opened_and_is_no_output_to_go_on_with(output, tmp_path, model_directory):
    into = Storage(str(tmp_path / "compacted"))
    compact(CompactConfig(output=output.uri, into=into.uri, target_bytes=2000))
    before = {file.path: into.read(file.path) for file in into.files()}
    for quarantine in (False, True):
        mine, copied = (open_output(each.uri, quarantine=quarantine).to_table() for each in (output, into))
        key = ["shard", "row"]
        assert copied.select(key).to_pylist() == mine.select(key).to_pylist()
    with pytest.raises(UsageError, match="a compacted copy of"):
        compact(CompactConfig(output=into.uri, into=str(tmp_path / "again")))
    with pytest.raises(UsageError, match="a compacted copy of"):
        score_here(tmp_path / "in", into, model_directory)
    assert {path: into.read(path) for path in before} == before


def test_outputs_of_a_model_with_exits_are_verified_and_compacted(tmp_path, leaving_model):
    write_shard(tmp_path / "in/a.parquet", {"id": list(range(30)), "text": texts(30)})
    output, into = Storage(str(tmp_path / "out")), str(tmp_path / "compacted")
    score_here(tmp_path / "in", output, leaving_model)
    compact(CompactConfig(output=output.uri, into=into))
    for each in (output.uri, into):
        assert verify(VerifyConfig(output=each)).holds
    layers = [open_output(each).to_table()["exit_layer"].to_pylist() for each in (output.uri, into)]
    assert layers[0] == layers[1]
    assert len(set(layers[0])) > 1


def test_an_interrupted_compaction_is_finished(output, tmp_path):
    into = Storage(str(tmp_path / "compacted"))
    config = CompactConfig(output=output.uri, into=into.uri, target_bytes=2000)
    parts = compact(config)["parts"]
    assert len(parts) > 4
    into.delete([SUCCESS, parts[1]["object"], parts[3]["object"]])
    assert compact(config)["parts"] == parts
    assert rows_of(into.uri) == rows_of(output.uri)


def test_a_compacted_copy_is_verified_too(output, tmp_path, capsys):
    into = Storage(str(tmp_path / "compacted"))
    parts = compact(CompactConfig(output=output.uri, into=into.uri, target_bytes=2000))["parts"]
    found = verified(into)
    assert found.holds, found.problems
    assert (found.shards, found.rows, found.results, found.quarantined) == (3, 42, 34, 8)
    good = into.read(parts[0]["object"])
    table = pq.read_table(pa.BufferReader(good))
    for data, problem in [
        (good[:-30], r"damaged: part-00000.*: its checksum"),
        (parquet_bytes(pa.concat_tables([table, table.slice(0, 1)])), r"doubled: a\.parquet: rows 0"),
        (parquet_bytes(table.slice(1)), r"missing: a\.parquet: rows 0"),
    ]:
        into.write(parts[0]["object"], data)
        assert any(re.match(problem, line) for line in verified(into).problems), problem
    into.write(parts[0]["object"], good)
    into.write("part-99999.parquet", good)
    assert verified(into).problems == ["extra: part-99999.parquet: not of this copy"]
    into.delete(["part-99999.parquet", parts[1]["object"]])
    assert verified(into).problems[0].startswith(f"missing: {parts[1]['object']}: the object is gone")
    write_shard(tmp_path / "in/sub/b.parquet", {"id": [0], "text": ["rewritten"]})
    assert "stale: sub/b.parquet: rewritten since; score and compact again" in verified(into).problems
    assert verify_job.main(["--output", into.uri]) == 3


def test_what_cannot_be_compacted_is_refused(output, tmp_path):
    into = str(tmp_path / "compacted")
    config = CompactConfig(output=output.uri, into=into)
    with pytest.raises(UsageError, match="lie inside each other"):
        compact(CompactConfig(output=output.uri, into=f"{output.uri}/small"))
    (tmp_path / "link").symlink_to(output.root)
    for inside in ("link", "link/small"):
        with pytest.raises(UsageError, match="lie inside each other"):
            compact(CompactConfig(output=output.uri, into=str(tmp_path / inside)))
    with (
        OutputLock(output, "scoring", renewal_seconds=0.5),
        pytest.raises(OutputBusyError, match="run scoring is at work there"),
    ):
        compact(config)
    Storage(into).write("theirs.parquet", b"")
    with pytest.raises(UsageError, match=r"holds something else \(theirs.parquet\)"):
        compact(config)
    Storage(into).delete(["theirs.parquet"])
    (quarantined, *_) = [file.path for file in output.files() if file.path.startswith("_quarantine/")]
    before = output.read(quarantined)
    output.write(quarantined, parquet_bytes(pq.read_table(pa.BufferReader(before)).slice(0, 0)))
    with pytest.raises(PipelineError, match=r"_quarantine/.*: its checksum is not its marker's"):
        compact(config)
    output.write(quarantined, before)
    double_a_row(output)
    with pytest.raises(PipelineError, match="its checksum is not its marker's"):
        compact(config)
    assert not [file for file in Storage(into).files() if file.path == SUCCESS]
    output.delete([SUCCESS])
    with pytest.raises(UsageError, match="not complete: no _SUCCESS there"):
        compact(config)
