"""One run at a time: a living holder is left alone, a dead one's lease is taken over."""

import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from pipeline import lock
from pipeline.errors import OutputBusyError, StorageError
from pipeline.lock import LOCK, TAKE_OVER, OutputLock
from pipeline.storage import Storage


@pytest.fixture
def output(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "LEASE_SECONDS", 1.5)
    monkeypatch.setattr(lock, "_RENEWAL_SECONDS", 0.2)
    monkeypatch.setattr(lock, "_LOOK_SECONDS", 0.05)
    return Storage(str(tmp_path))


def left_behind(output, **changes) -> None:
    holder = {"run": "other", "host": "elsewhere", "pid": 1, "process": "elsewhere:1:x", "renewed": 0.0} | changes
    output.write(LOCK, json.dumps(holder).encode())


def dead_process() -> int:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    return dead.pid


def test_held_while_the_block_runs(output):
    with OutputLock(output, "mine"):
        first = json.loads(output.read(LOCK))
        time.sleep(0.5)
        second = json.loads(output.read(LOCK))
    assert first["run"] == second["run"] == "mine"
    assert second["renewed"] > first["renewed"]
    assert output.files() == []


def test_a_run_that_lives_is_left_alone(output):
    with (
        OutputLock(output, "first"),
        pytest.raises(OutputBusyError, match=r"run first is at work there \(process \d+ on .*\); one run at a time"),
        OutputLock(output, "second"),
    ):
        pass
    assert OutputBusyError.exit_code == 5


def test_of_many_that_come_at_once_one_gets_it(output):
    got, refused = [], []

    def run(name):
        try:
            with OutputLock(output, name):
                got.append(name)
                time.sleep(1.0)
        except OutputBusyError:
            refused.append(name)

    left_behind(output)  # and first they all have to take it over
    threads = [threading.Thread(target=run, args=(f"run-{i}",)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 5)


def test_a_slow_run_does_not_take_over_what_a_faster_one_just_took_over(output, monkeypatch):
    left_behind(output, host=socket.gethostname(), pid=dead_process())
    slow, fast = Storage(output.uri), OutputLock(output, "fast")
    create = slow.create

    def after_the_faster(path, data):
        if path == TAKE_OVER.format(0):  # the slow one has seen that the lease lapsed
            fast.__enter__()
        return create(path, data)

    monkeypatch.setattr(slow, "create", after_the_faster)
    with pytest.raises(OutputBusyError, match="run fast is at work"), OutputLock(slow, "slow"):
        pass
    assert json.loads(output.read(LOCK))["run"] == "fast"
    fast.__exit__()
    assert output.files() == []


@pytest.mark.parametrize("here", [True, False])
def test_a_run_that_died_while_it_took_over_holds_up_nobody_for_long(output, here):
    host = socket.gethostname() if here else "elsewhere"
    left_behind(output, host=host, pid=dead_process())
    output.write(TAKE_OVER.format(0), output.read(LOCK))
    started = time.monotonic()
    with OutputLock(output, "mine"):
        assert time.monotonic() - started < (1.0 if here else 4.0)
    assert output.files() == []


def test_a_dead_process_of_this_machine_is_taken_over_at_once(output):
    started, dead = time.monotonic(), dead_process()
    for pid in (dead, os.getpid()):  # our own number with another name: a container's earlier process
        left_behind(output, host=socket.gethostname(), pid=pid)
        with OutputLock(output, "mine"):
            assert json.loads(output.read(LOCK))["run"] == "mine"
    assert time.monotonic() - started < 1.0


def test_a_dead_process_elsewhere_is_taken_over_when_its_lease_lapses(output):
    left_behind(output)
    started = time.monotonic()
    with OutputLock(output, "mine"):
        assert time.monotonic() - started > 1.5


def test_a_lost_lease_is_told_and_not_deleted(output):
    lost = threading.Event()
    with OutputLock(output, "mine", lost.set):
        left_behind(output)
        assert lost.wait(2.0)
    assert json.loads(output.read(LOCK))["run"] == "other"


def test_a_damaged_lock_is_named(output):
    output.write(LOCK, b"{")
    with (
        pytest.raises(StorageError, match=r"_lock\.json: damaged: .*; delete it if no run is at work"),
        OutputLock(output, "x"),
    ):
        pass
