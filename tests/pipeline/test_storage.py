"""Places: atomic, create-once writes; listings with versions; no credentials in anything that is kept."""

import os
import pickle
import threading
import time

import pytest

from pipeline.errors import StorageError, UsageError
from pipeline.storage import Storage, fetch_model, model_digest


def test_files_come_with_paths_sizes_and_versions(tmp_path):
    storage = Storage(str(tmp_path))
    for path in ("b.txt", "sub/a name #%=é.txt", "sub/deeper/c"):
        storage.write(path, b"12")
    files = storage.files()
    assert [file.path for file in files] == ["b.txt", "sub/a name #%=é.txt", "sub/deeper/c"]
    assert {file.size for file in files} == {2}
    assert [file.path for file in storage.files("sub")] == ["sub/a name #%=é.txt", "sub/deeper/c"]
    assert [file.version for file in files] == [storage.version(file.path) for file in files]
    assert Storage(str(tmp_path / "nothing")).files() == []


def test_a_rewritten_file_has_another_version(tmp_path):
    storage = Storage(str(tmp_path))
    storage.write("a", b"12")
    before = storage.version("a")
    time.sleep(0.01)
    storage.write("a", b"34")
    assert storage.version("a") != before


def test_of_many_creators_one_wins_and_nothing_partial_is_seen(tmp_path):
    storage, wins = Storage(str(tmp_path)), []

    def create(i):
        if storage.create("a", bytes([i]) * 100_000):
            wins.append(i)

    threads = [threading.Thread(target=create, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 1
    assert storage.read("a") == bytes(wins) * 100_000
    assert os.listdir(tmp_path) == ["a"]


def test_a_write_replaces_the_whole_file(tmp_path):
    storage = Storage(str(tmp_path))
    storage.write("a", b"long" * 100)
    storage.write("a", b"short")
    assert storage.read("a") == b"short"
    assert os.listdir(tmp_path) == ["a"]


def test_deleting_what_is_gone_is_no_error(tmp_path):
    storage = Storage(str(tmp_path))
    storage.write("a", b"")
    storage.delete(["a", "never-was"])
    assert storage.files() == []


def test_errors_name_the_place(tmp_path):
    with pytest.raises(StorageError, match="nowhere: cannot read"):
        Storage(str(tmp_path)).read("nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        Storage(str(tmp_path / "file")).write("below", b"")


def test_a_pickle_holds_the_uri_alone(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    storage = Storage("s3://bucket/prefix/")
    assert storage.root == "bucket/prefix"
    assert b"very-secret" not in pickle.dumps(storage)
    assert "very-secret" not in repr(storage)
    assert pickle.loads(pickle.dumps(storage)).uri == "s3://bucket/prefix"  # noqa: S301 - our own


def test_local_paths_are_absolute_wherever_a_worker_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for uri in ("some/where", "./some/where/", f"file://{tmp_path}/some/where"):
        assert Storage(uri).uri == str(tmp_path / "some/where")


def test_uris_that_cannot_work_are_refused():
    with pytest.raises(UsageError, match="private to one process"):
        Storage("memory://x")
    with pytest.raises(UsageError, match="credentials do not belong in a URI") as refused:
        Storage("s3://key:secret@bucket/x")
    assert "secret@" not in str(refused.value)
    with pytest.raises(UsageError, match="nosuch"):
        Storage("nosuch://x").files()


def test_a_local_model_is_used_where_it_is(model_directory, tmp_path):
    assert fetch_model(str(model_directory)) == model_directory
    with pytest.raises(UsageError, match=r"no config\.json"):
        fetch_model(str(tmp_path))


def test_the_digest_changes_with_what_decides_results(model_directory, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(model_directory, copy)
    assert model_digest(copy) == model_digest(model_directory)
    (copy / "training.json").write_text("{}")
    (copy / "notes.md").write_text("")
    assert model_digest(copy) == model_digest(model_directory)
    config = (copy / "config.json").read_text()
    (copy / "config.json").write_text(config.replace("0.5", "0.4"))
    assert model_digest(copy) != model_digest(model_directory)
