"""Identification of processes across machines, containers and reused PIDs."""

import os
import socket
import time
import uuid
from functools import cache
from pathlib import Path
from typing import Any


def clock() -> float:
    """Monotonic seconds for leases, which also count time while this process is paused or the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


@cache
def this_process() -> dict[str, Any]:
    """Describe this process so that other processes can check for it with `is_gone`.

    `host` is for people. `boot`, `pid_namespace` and `started` are None if the system does not provide them. `name` is
    unique.
    """
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "boot": _read("/proc/sys/kernel/random/boot_id"),
        "pid_namespace": _pid_namespace(),
        "started": start_time(os.getpid()),
        "name": uuid.uuid4().hex,
    }


os.register_at_fork(after_in_child=this_process.cache_clear)


def is_gone(process: dict[str, Any]) -> bool:
    """Whether a process is known to have ended.

    False if this cannot be determined: the process is on another machine, or in another container, which has PIDs of
    its own.
    """
    here = this_process()
    if not all(here[name] is not None and process.get(name) == here[name] for name in ("boot", "pid_namespace")):
        return False
    if process["pid"] == here["pid"]:
        return process.get("name") != here["name"]
    try:
        os.kill(process["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return start_time(process["pid"]) != process.get("started")


def start_time(pid: int) -> str | None:
    """When a process on this machine started, in clock ticks since boot; None if unknown."""
    stat = _read(f"/proc/{pid}/stat")
    return stat.rpartition(")")[2].split()[19] if stat else None  # the name in parentheses may contain anything


def _pid_namespace() -> str | None:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip() or None
    except OSError:
        return None
