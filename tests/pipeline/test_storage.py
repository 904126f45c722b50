"""Places: atomic, create-once writes; listings with versions; no credentials in anything that is kept."""

import errno
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path

import aiohttp
import botocore.exceptions
import pytest
from botocore.exceptions import ClientError
from fsspec.implementations.memory import MemoryFileSystem
from s3fs.errors import translate_boto_error

from pipeline.errors import StorageError, UsageError
from pipeline.model import fetch_model
from pipeline.storage import Storage, is_passing
from trbert_model.checkpoints.files import model_digest, model_files


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


@pytest.fixture
def full_disk(tmp_path, monkeypatch):
    """A directory on a file system with room for 64 KiB; where none may be mounted, one that fails as if."""
    directory = tmp_path / "full"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(directory)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    if not mounted:

        def fail(handle):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", fail)
    yield directory
    if mounted:
        subprocess.run(["umount", str(directory)], check=True)


@pytest.mark.parametrize("write", [Storage.write, Storage.create])
def test_a_full_disk_leaves_nothing_behind(full_disk, write):
    storage = Storage(str(full_disk))
    for _ in range(2):
        with pytest.raises(StorageError, match=r"sub/a: cannot write: .*No space left on device"):
            write(storage, "sub/a", b"1" * 100_000)
    assert os.listdir(full_disk / "sub") == []


@pytest.mark.parametrize("fails", ["fsync", "chmod", "replace"])
def test_a_write_that_fails_at_any_step_leaves_nothing_behind(tmp_path, monkeypatch, fails):
    def fail(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, fails, fail)
    with pytest.raises(StorageError, match="No space left on device"):
        Storage(str(tmp_path)).write("a", b"1")
    assert os.listdir(tmp_path) == []


def test_what_a_killed_writer_left_is_swept_away(tmp_path):
    """Not what another one is writing now, nor files of others, whatever they are called."""
    code = """
import os, sys
from pipeline.storage import Storage
os.fsync = lambda handle: os.kill(os.getpid(), 9)
Storage(sys.argv[1]).write("sub/deeper/a", b"1")
"""
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60).returncode == -9
    storage = Storage(str(tmp_path))
    assert storage.sweep() == 0
    old, young = (tmp_path / "sub/deeper").iterdir()
    (tmp_path / "._another-programs").write_text("")
    (tmp_path / "a.parquet").write_text("")
    (tmp_path / "._trbert-directory").mkdir()
    for path in (old, *tmp_path.iterdir()):
        os.utime(path, (0, time.time() - 3700))
    assert storage.sweep() == 1
    assert list((tmp_path / "sub/deeper").iterdir()) == [young]
    assert sorted(os.listdir(tmp_path)) == ["._another-programs", "._trbert-directory", "a.parquet", "sub"]
    assert Storage(str(tmp_path / "nowhere")).sweep() == 0
    assert Storage("s3://bucket/prefix").sweep() == 0, "an object store has no temporary files"


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
    storage = Storage("s3://bucket/prefix/", retry_seconds=5.0)
    assert storage.root == "bucket/prefix"
    assert b"very-secret" not in pickle.dumps(storage)
    assert "very-secret" not in repr(storage)
    copy = pickle.loads(pickle.dumps(storage))  # noqa: S301 - our own
    assert (copy.uri, copy.retry_seconds) == ("s3://bucket/prefix", 5.0)


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
    copy = tmp_path / "copy"
    shutil.copytree(model_directory, copy)
    assert model_digest(copy) == model_digest(model_directory)
    (copy / "training.json").write_text("{}")
    (copy / "notes.md").write_text("")
    assert model_digest(copy) == model_digest(model_directory)
    config = (copy / "config.json").read_text()
    (copy / "config.json").write_text(config.replace("0.5", "0.4"))
    assert model_digest(copy) != model_digest(model_directory)


def answer(status: int, code: str) -> ClientError:
    """What botocore raises for an object store's answer."""
    response = {"Error": {"Code": code, "Message": "said so"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(response, "PutObject")


@pytest.mark.parametrize(
    ("error", "passing"),
    [
        (answer(503, "SlowDown"), True),
        (answer(500, "InternalError"), True),
        (answer(429, "TooManyRequestsException"), True),
        (answer(409, "ConditionalRequestConflict"), True),
        (answer(400, "RequestTimeout"), True),
        (answer(400, "IncompleteBody"), True),
        (answer(403, "AccessDenied"), False),
        (answer(403, "ExpiredToken"), False),
        (answer(404, "NoSuchBucket"), False),
        (answer(412, "PreconditionFailed"), False),
        (botocore.exceptions.EndpointConnectionError(endpoint_url="http://x"), True),
        (botocore.exceptions.ReadTimeoutError(endpoint_url="http://x"), True),
        (botocore.exceptions.NoCredentialsError(), False),
        (aiohttp.ClientPayloadError("not enough data"), True),
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (PermissionError(), False),
        (FileNotFoundError(), False),
        (OSError("Couldn't deserialize thrift"), False),
        (OSError(28, "No space left on device"), False),
    ],
)
def test_what_is_tried_again(error, passing):
    assert is_passing(error) is passing
    assert is_passing(translate_boto_error(error)) is passing, "also as s3fs raises it"


class Flaky:
    """Fails its first calls."""

    def __init__(self, *errors: Exception, result=b"data"):
        self.errors, self.result, self.calls = list(errors), result, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return self.result


def test_a_request_is_made_again_until_it_succeeds(tmp_path, monkeypatch):
    storage, request = Storage(str(tmp_path)), Flaky(ConnectionResetError(), answer(503, "SlowDown"))
    monkeypatch.setattr(storage.fs, "cat_file", request)
    assert storage.read("a") == b"data"
    assert (request.calls, storage.retries) == (3, 2)


def test_a_lasting_error_is_named_at_once(tmp_path, monkeypatch):
    request = Flaky(*[translate_boto_error(answer(403, "ExpiredToken"))] * 5)
    storage = Storage(str(tmp_path))
    monkeypatch.setattr(storage.fs, "cat_file", request)
    with pytest.raises(StorageError, match=r"/a: cannot read: the credentials have expired \(ExpiredToken\)"):
        storage.read("a")
    assert request.calls == 1


def test_the_budget_ends_the_attempts(tmp_path, monkeypatch):
    storage, request = Storage(str(tmp_path), retry_seconds=0.6), Flaky(*[ConnectionResetError("reset by peer")] * 99)
    monkeypatch.setattr(storage.fs, "pipe_file", request)
    monkeypatch.setattr(Storage, "is_local", False)
    started = time.monotonic()
    with pytest.raises(StorageError, match=r"/a: cannot write: reset by peer"):
        storage.write("a", b"")
    assert 2 <= request.calls < 99
    assert time.monotonic() - started < 5


def test_a_remote_file_reads_on_after_short_and_broken_reads(tmp_path, monkeypatch):
    memory = MemoryFileSystem()
    memory.pipe_file("/file", bytes(range(100)))
    storage = Storage(str(tmp_path))
    storage._fs, storage._root = memory, ""
    monkeypatch.setattr(Storage, "is_local", False)
    opened = memory.open("/file")
    whole, faults = opened.read, [ConnectionResetError(), b"short", None, aiohttp.ClientPayloadError()]

    def read(size):
        fault = faults.pop(0) if faults else None
        if isinstance(fault, Exception):
            raise fault
        return fault or whole(size)

    monkeypatch.setattr(opened, "read", read)
    monkeypatch.setattr(memory, "open", lambda *args, **kwargs: opened)
    file = storage.open("file")
    assert file.read(10) == bytes(range(10))
    assert file.seek(-20, os.SEEK_END) == 80
    assert file.read() == bytes(range(80, 100))
    assert file.read(1) == b""
    assert storage.retries == 3


def test_errors_show_no_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "marked-secret-value")
    text = "http://user:password@host/x?X-Amz-Signature=abc&X-Amz-Credential=me/1 marked-secret-value"
    storage = Storage(str(tmp_path))
    monkeypatch.setattr(storage.fs, "cat_file", Flaky(OSError(text)))
    with pytest.raises(StorageError) as raised:
        storage.read("a")
    message = str(raised.value)
    assert "//***@host/x?X-Amz-Signature=***&X-Amz-Credential=***" in message
    for secret in ("password", "abc", "marked-secret-value"):
        assert secret not in message


def test_many_files_come_in_the_order_asked_for(tmp_path):
    storage = Storage(str(tmp_path))
    for name in "cab":
        storage.write(name, name.encode())
    assert list(storage.read_many(["b", "c", "a"])) == [("b", b"b"), ("c", b"c"), ("a", b"a")]
    with pytest.raises(StorageError, match="/d: cannot read: there is no such file"):
        list(storage.read_many(["a", "d"]))


def test_a_remote_model_is_fetched_with_all_that_counts_and_nothing_else(model_directory, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    place = tmp_path / "model"
    shutil.copytree(model_directory, place)
    (place / "shards").mkdir()
    (place / "model.safetensors").rename(place / "shards/1.safetensors")
    (place / "model.safetensors.index.json").write_text('{"weight_map": {"x": "shards/1.safetensors"}}')
    for name in ("pytorch_model.bin", "shards/other.safetensors", "shards/config.json", "calibration.json"):
        (place / name).write_text("{}")
    copy = fetch_model(zipped(place))
    assert copy.is_relative_to(tmp_path / "cache")
    counted = [*model_files(place), "calibration.json"]
    assert sorted(str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()) == sorted(counted)
    assert model_digest(copy) == model_digest(place)

    (place / "shards/1.safetensors").write_bytes(b"others")
    assert model_digest(fetch_model(zipped(place))) == model_digest(place)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ('{"weight_map": {"x": "../w.safetensors"}}', r"model\.safetensors\.index\.json names .*, outside the"),
        ('{"weight_map": {"x": "/w.safetensors"}}', r"model\.safetensors\.index\.json names .*, outside the"),
        ('{"weight_map": {"x": "shards/1.safetensors"}}', r".*names \['shards/1\.safetensors'\], which are not there"),
        ('{"weight_map": []}', r"model\.safetensors\.index\.json is damaged"),
    ],
)
def test_a_remote_model_whose_index_leads_astray_is_refused_by_name(
    index, message, model_directory, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    place = tmp_path / "model"
    shutil.copytree(model_directory, place)
    (place / "model.safetensors").unlink()
    (place / "model.safetensors.index.json").write_text(index)
    uri = zipped(place)
    with pytest.raises(UsageError, match=f"^{re.escape(uri)}: {message}"):
        fetch_model(uri)
    assert not (tmp_path / "cache").exists()


def test_a_copy_that_has_lost_something_is_fetched_again(model_directory, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    uri = zipped(Path(shutil.copytree(model_directory, tmp_path / "model")))
    copy = fetch_model(uri)
    fetched = {path: path.stat().st_mtime_ns for path in copy.iterdir()}
    assert fetch_model(uri) == copy
    assert {path: path.stat().st_mtime_ns for path in copy.iterdir()} == fetched, "not again while it is whole"
    for damage in (
        lambda: (copy / "tokenizer_config.json").unlink(),
        lambda: os.truncate(copy / "model.safetensors", 100),
        lambda: [path.unlink() for path in copy.iterdir()],
    ):
        damage()
        assert fetch_model(uri) == copy
        assert model_digest(copy) == model_digest(model_directory)
    assert os.listdir(tmp_path / "cache/trbert-pipeline") == [copy.name]


def test_a_cache_that_cannot_be_written_is_replaced_by_a_temporary_one(model_directory, tmp_path, monkeypatch, caplog):
    uri = zipped(Path(shutil.copytree(model_directory, tmp_path / "model")))
    (tmp_path / "file").write_text("")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file/cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    copy = fetch_model(uri)
    assert model_digest(copy) == model_digest(model_directory)
    assert fetch_model(uri) == copy, "all processes share it"
    cache = copy.parent
    assert (cache.parent, cache.stat().st_mode & 0o777) == (tmp_path / "tmp", 0o700)
    assert f"the model is copied to {cache}" in caplog.text

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home directory")))
    assert fetch_model(uri) == copy


@pytest.mark.parametrize("planted", ["writable for others", "a link", "a file"])
def test_a_temporary_cache_that_others_could_write_is_refused(planted, model_directory, tmp_path, monkeypatch):
    uri = zipped(Path(shutil.copytree(model_directory, tmp_path / "model")))
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cache = tmp_path / f"trbert-pipeline-{os.getuid()}"
    if planted == "a file":
        cache.write_text("")
    elif planted == "a link":
        cache.symlink_to(tmp_path / "model")
    else:
        cache.mkdir()
        cache.chmod(0o777)
    with pytest.raises(StorageError, match=f"^{cache}: "):
        fetch_model(uri)


def zipped(directory: Path) -> str:
    """The directory as a place that is not local."""
    archive = Path(f"{directory}.zip")
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(directory.rglob("*")):
            file.write(path, path.relative_to(directory.parent))
    return f"zip://{directory.name}::{archive}"
