"""One run at a time: a living holder is left alone, a dead one's lease taken over; who lost it changes nothing."""

import json
import subprocess
import sys
import threading
import time

import pytest

from pipeline import lock
from pipeline.errors import LeaseLostError, OutputBusyError, StoppedError, StorageError, UsageError
from pipeline.lock import LEASES, OutputLock
from pipeline.processes import is_gone, start_time, this_process
from pipeline.stopping import StopRequest
from pipeline.storage import Storage

QUICK = {"lease_seconds": 1.5, "renewal_seconds": 0.2, "look_seconds": 0.05}


@pytest.fixture
def output(tmp_path):
    return Storage(str(tmp_path))


def take(output, name="mine", *arguments, **changes) -> OutputLock:
    return OutputLock(output, name, *arguments, **QUICK | changes)


def lease(output) -> dict:
    """The highest number's."""
    return json.loads(output.read(output.files(LEASES)[-1].path))


def left_behind(output, epoch=1, **changes) -> None:
    holder = {**this_process(), "host": "elsewhere", "boot": "elsewhere", "name": "x"}
    content = {"epoch": epoch, "run": "other", "released": False, "renewals": 0, "renewed": 0.0, **holder, **changes}
    output.write(lock._path(epoch), json.dumps(content).encode())


def here(pid: int) -> dict:
    return {**this_process(), "pid": pid, "name": "x"}


def dead_process() -> int:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    return dead.pid


def test_held_while_the_block_runs(output):
    with take(output):
        first = lease(output)
        time.sleep(0.5)
        second = lease(output)
    assert first["run"] == second["run"] == "mine"
    assert second["renewals"] > first["renewals"]
    assert lease(output)["released"]


def test_numbers_go_up_and_little_is_left(output):
    epochs = []
    for name in "abc":
        with take(output, name) as held:
            epochs.append(held.epoch)
    assert epochs == [1, 2, 3]
    assert len(output.files()) == 1


def test_a_run_that_lives_is_left_alone(output):
    with (
        take(output, "first"),
        pytest.raises(OutputBusyError, match=r"run first is at work there \(process \d+ on .*\); one run at a time"),
        take(output, "second"),
    ):
        pass
    assert OutputBusyError.exit_code == 5


def test_of_many_that_come_at_once_one_gets_it(output):
    got, refused = [], []

    def run(name):
        try:
            with take(Storage(output.uri), name):
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


def test_a_slow_run_does_not_take_what_faster_ones_have_taken_and_given_back(output):
    """It has seen that number 1 lapsed; meanwhile another took number 2 and gave it back, a third holds number 3."""
    left_behind(output, **here(dead_process()))
    slow = Storage(output.uri)
    create, third = slow.create, take(output, "third")

    def after_the_faster(path, data):
        if path == lock._path(2) and not output.files(lock._path(3)):
            with take(output, "second"):
                pass
            third.__enter__()
        return create(path, data)

    slow.create = after_the_faster
    with pytest.raises(OutputBusyError, match="run third is at work"), take(slow, "slow"):
        pass
    third.check()
    assert lease(output)["run"] == "third"
    third.__exit__()


def test_a_dead_process_of_this_machine_is_taken_over_at_once(output):
    started, dead = time.monotonic(), dead_process()
    for epoch, pid in ((1, dead), (3, this_process()["pid"])):  # a number that has another process by now
        left_behind(output, epoch, **here(pid))
        with take(output, lease_seconds=60.0):
            assert lease(output)["run"] == "mine"
    assert time.monotonic() - started < 10


def test_a_process_that_has_a_dead_ones_number_is_another(output):
    living = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert is_gone({**here(living.pid), "started": "1"})
        assert not is_gone({**here(living.pid), "started": start_time(living.pid)})
    finally:
        living.communicate(b"\n")


HOLD = """
import sys, time
from pipeline.lock import OutputLock
from pipeline.storage import Storage
with OutputLock(Storage(sys.argv[1]), "contained", renewal_seconds=0.2, lease_seconds=20):
    print("held", flush=True)
    time.sleep(30)
"""


def test_a_holder_in_another_pid_namespace_is_not_taken_for_dead(output):
    """Two containers with the host's network have one host name, and numbers of their own."""
    run = ["unshare", "--pid", "--fork", "--kill-child", sys.executable, "-c", HOLD, output.uri]
    if subprocess.run([*run[:3], "true"], capture_output=True).returncode:  # not root: without a namespace of its own
        run = ["unshare", "--user", "--map-root-user", *run[1:]]
    holder = subprocess.Popen(run, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(OutputBusyError, match="run contained is at work"), take(output, lease_seconds=20.0):
            pass
    finally:
        holder.kill()
        holder.communicate()


def test_a_dead_process_elsewhere_is_taken_over_when_its_lease_lapses(output):
    left_behind(output)
    started = time.monotonic()
    with take(output):
        assert time.monotonic() - started > 1.5


def test_a_stop_ends_the_wait_for_a_lease(output):
    left_behind(output)
    stop = StopRequest()
    threading.Timer(0.3, stop.request, ["SIGTERM"]).start()
    started = time.monotonic()
    with pytest.raises(StoppedError), take(output, "mine", lambda: None, stop, lease_seconds=60.0):
        pass
    assert time.monotonic() - started < 10


def test_who_was_paused_for_longer_than_the_lease_changes_nothing(output):
    """Its renewals came late, or not at all; the next holder is not disturbed by the ones that arrive."""
    lost = threading.Event()
    with take(output, "paused", lost.set, renewal_seconds=0.8) as paused:
        fenced = output.fenced(paused.check)
        fenced.write("before", b"")
        left_behind(output, epoch=paused.epoch + 1, run="next")
        paused._valid_until = 0.0  # by the clock that goes on while a process is paused
        for change in (
            lambda: fenced.write("marker", b""),
            lambda: fenced.create("_SUCCESS", b""),
            lambda: fenced.delete(["before"]),
        ):
            with pytest.raises(LeaseLostError, match="another run has taken the output over"):
                change()
        assert lost.wait(3.0)
    assert lease(output)["run"] == "next"
    assert not lease(output)["released"]
    assert {file.path for file in output.files() if not file.path.startswith(LEASES)} == {"before"}


def test_within_its_time_a_lease_is_not_asked_for(output, monkeypatch):
    with take(output, renewal_seconds=60.0, lease_seconds=60.0) as held:
        monkeypatch.setattr(held, "_renew", lambda: pytest.fail("asked"))
        held.check()


def test_a_store_that_replaces_what_was_to_be_created_is_refused(output, monkeypatch):
    def careless(path, data):
        output.write(path, data)
        return True

    monkeypatch.setattr(output, "create", careless)
    with pytest.raises(UsageError, match="ignores If-None-Match"), take(output):
        pass
    assert lease(output)["released"]


def test_a_damaged_lease_is_named(output):
    output.write(lock._path(4), b"{")
    with pytest.raises(StorageError, match=r"_leases/00000004\.json: damaged: .*; delete it if no run"), take(output):
        pass
