"""Faults that strike the storage protocol itself: pauses, take-overs, torn splits, half deletions, another model.

Each takes the episode's run and its driver, does everything that belongs to it, and tells whether it was possible.
"""

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from pipeline.lock import LEASES
from pipeline.processes import this_process
from tests.chaos.cluster import ACTOR
from tests.chaos.verification import MARKERS, QUARANTINE, only_results, top_names
from tests.conftest import tiny_classifier

if TYPE_CHECKING:
    from tests.chaos.episodes import EpisodeRun

_WAIT_SECONDS = 150.0  # at most, for what a fault waits for: a lease lapses in between, and a run ends
_OLD = "0" * 12  # a version that no shard has
_OLD_OBJECTS = 200


def hang_actor(run: "EpisodeRun", driver: subprocess.Popen) -> bool:
    """One stands still, without dying."""
    workers = run.world.cluster.processes(ACTOR)
    if not workers:
        return False
    os.kill(run.random.choice(workers).pid, signal.SIGSTOP)
    return True


def pause_driver(run: "EpisodeRun", driver: subprocess.Popen) -> bool:
    """It stands still until another run has taken over; then both go on, and the first must end by itself."""
    number = max(_leases(run), default=0)
    os.killpg(driver.pid, signal.SIGSTOP)
    try:
        with _another(run) as second:
            _wait(lambda: max(_leases(run), default=0) > number or second.poll() is not None)
            time.sleep(run.random.uniform(0, 5))
            os.killpg(driver.pid, signal.SIGCONT)
            run.note_end(second.wait(_WAIT_SECONDS), "the run that took over", {0})
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(driver.pid, signal.SIGCONT)
    driver.wait(_WAIT_SECONDS)
    return True


def replace_model(run: "EpisodeRun", driver: subprocess.Popen) -> bool:
    """Other files lie where the model was, and the actors load it anew."""
    world, client, places = run.world, run.world.server.client, {}
    if not world.cluster.processes(ACTOR):
        return False
    other = world.directory / "other-model"
    tiny_classifier(1).save_pretrained(other)
    try:
        for path in sorted(other.iterdir()):
            place = {"Bucket": run.bucket, "Key": f"{run.model}/{path.name}"}
            places[path.name] = (place, client.get_object(**place)["Body"].read())
            client.put_object(**place, Body=path.read_bytes())
        for worker in world.cluster.processes(ACTOR):  # any that is left would do all the rest
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            driver.wait(_WAIT_SECONDS)
    finally:
        for place, data in places.values():
            client.put_object(**place, Body=data)
    return True


def torn_split(run: "EpisodeRun", driver: subprocess.Popen) -> bool:
    """The driver died between the two objects of a split, or another one's rejects are there."""
    torn = [name for name in _names(run, QUARANTINE) if not _is_marked(run, name)]
    if not torn:
        return False
    run.kill(driver)
    name = run.random.choice(torn)
    place = {"Bucket": run.bucket, "Key": f"{run.prefix}/{QUARANTINE}/{name}"}
    if run.random.random() < 0.5:
        run.world.server.client.delete_object(**place)
    else:
        run.world.server.client.put_object(**place, Body=b"PAR1 of somebody else")
    return True


def kill_deleting(run: "EpisodeRun", driver: subprocess.Popen) -> bool:
    """The objects of an older version of a shard go away when it is complete; the driver dies while they go."""
    client = run.world.server.client
    found = [
        name for name in only_results(top_names(run.world.server, run.bucket, run.prefix)) if not _is_marked(run, name)
    ]
    if not found:
        return False
    run.kill(driver)
    name = run.random.choice(sorted(found))
    key = name[: -len(f"-{_OLD}-000000.parquet")]
    data = client.get_object(Bucket=run.bucket, Key=f"{run.prefix}/{name}")["Body"].read()
    for index in range(_OLD_OBJECTS):
        for folder in ("", f"{QUARANTINE}/"):
            old = f"{run.prefix}/{folder}{key}-{_OLD}-{index:06d}.parquet"
            client.put_object(Bucket=run.bucket, Key=old, Body=data)

    def left() -> int:
        listing = {"Bucket": run.bucket, "Prefix": f"{run.prefix}/{key}-{_OLD}"}
        return client.list_objects_v2(**listing).get("KeyCount", 0)

    with _another(run) as second:
        _wait(lambda: left() < _OLD_OBJECTS or second.poll() is not None, 0.02)
        run.kill(second)
    return True


def foreign_lock(run: "EpisodeRun", driver: subprocess.Popen) -> bool:
    """A run in another container of this machine, with this host's name, holds the output; then it is gone."""
    run.kill(driver)
    number = max(_leases(run), default=0) + 1
    lease = {**this_process(), "pid_namespace": "pid:[1]", "pid": 1, "epoch": number, "run": "foreign"}
    over = threading.Event()

    def renew() -> None:
        renewals = 0
        while True:
            renewals += 1
            data = json.dumps(lease | {"released": False, "renewals": renewals, "renewed": time.time()})
            key = f"{run.prefix}/{LEASES}/{number:08d}.json"
            run.world.server.client.put_object(Bucket=run.bucket, Key=key, Body=data.encode())
            if over.wait(1.0):
                return

    holder = threading.Thread(target=renew, daemon=True)
    holder.start()
    try:
        with _another(run) as second:
            run.note_end(second.wait(_WAIT_SECONDS), "a run beside another container's", {5})
    finally:
        over.set()
        holder.join()
    return True


FAULTS: dict[str, Callable[["EpisodeRun", subprocess.Popen], bool]] = {
    each.__name__: each for each in (hang_actor, pause_driver, replace_model, torn_split, kill_deleting, foreign_lock)
}


@contextlib.contextmanager
def _another(run: "EpisodeRun") -> Iterator[subprocess.Popen]:
    """One more run on the same output; it does not outlive the block."""
    run.others += 1
    second = run.world.start_driver(run.prefix, Path(run.world.directory) / f"{run.prefix}-other-{run.others}.log")
    try:
        yield second
    finally:
        run.kill(second)


def _names(run: "EpisodeRun", folder: str) -> list[str]:
    return sorted(top_names(run.world.server, run.bucket, f"{run.prefix}/{folder}"))


def _leases(run: "EpisodeRun") -> list[int]:
    return [int(name.split(".")[0]) for name in _names(run, LEASES)]


def _is_marked(run: "EpisodeRun", name: str) -> bool:
    """Whether the shard of a split's object is complete."""
    return f"{name.rpartition('-')[0]}.json" in _names(run, MARKERS)


def _wait(condition: Callable[[], Any], interval: float = 0.25) -> None:
    deadline = time.monotonic() + _WAIT_SECONDS
    while not condition() and time.monotonic() < deadline:
        time.sleep(interval)
