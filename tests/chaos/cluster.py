"""A real Ray cluster of three nodes on loopback whose processes can be killed, one kind or all at once.

Its processes are started by a helper process (`python -m tests.chaos.cluster`), so that whoever runs the tests is no
part of Ray: a client of Ray's control store (GCS) ends its process when the store stays away. Nothing is ever stopped
by asking; processes are found below the helper and get SIGKILL by pid.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from queue import Empty, Queue
from random import Random

import psutil

ROOT = Path(__file__).parent.parent.parent
NODES, OBJECT_STORE = 3, 200 << 20
ACTOR, READER = "SplitPredictor", "read_shards"  # what the titles of their processes contain
START_SECONDS = 90
# Ray replaces an address of loopback by the machine's outer one unless clusters are not for its operating system.
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
# How soon Ray believes that a process is gone: a driver its control store (60 s by default), the control store a node
# (5 checks, one every 3 s); nothing but waiting happens meanwhile. Workers are as nice as others, or they would starve
# beside anything else on the machine.
SETTINGS = {
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
    "RAY_health_check_period_ms": "1000",
    "RAY_worker_niceness": "0",
    # Workers beyond a node's CPUs are ended after a second without work, and starting one takes seconds of imports.
    "RAY_idle_worker_killing_time_threshold_ms": "60000",
    "RAY_USAGE_STATS_ENABLED": "0",
}


class RayCluster:
    """Starts on construction; `close` leaves nothing running and nothing on disk.

    Args:
        environment: for all of Ray's processes, beside this process's own.
        cpus: logical ones of each node.

    Attributes:
        driver_environment: what a driver needs to connect; another one after `kill_all` and `start`.
    """

    def __init__(self, environment: Mapping[str, str], cpus: int = 2):
        # Directly below the system's temporary directory: sockets' paths may have 107 characters.
        self.directory, self.cpus = Path(tempfile.mkdtemp(prefix="chaos-")), cpus
        self.environment = {**os.environ, **environment, "RAY_TMPDIR": str(self.directory)}
        self.environment |= LOOPBACK | SETTINGS
        self.environment.pop("RAY_ADDRESS", None)
        try:
            self.start()
        except BaseException:
            self.close()
            raise

    def start(self) -> None:
        """Start a cluster, the first one or one in the place of one that was killed."""
        self._log = (self.directory / "cluster.log").open("ab")
        self._helper = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.cluster"],
            cwd=ROOT,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,  # an interrupt at the terminal is this process's to handle
        )
        self._answers: Queue[str] = Queue()
        threading.Thread(target=self._read_answers, args=(self._helper,), daemon=True).start()
        self._raylets: list[int] = []  # pids of the nodes alive, the head's first
        self.driver_environment = {"RAY_ADDRESS": self._add_node(), **LOOPBACK, **SETTINGS}
        for _ in range(NODES - 1):
            self._add_node()

    def _read_answers(self, helper: subprocess.Popen) -> None:
        answers = self._answers
        for line in helper.stdout or ():
            if line.startswith('{"raylet"'):  # Ray prints, too
                answers.put(line)
        answers.put("")

    def _add_node(self) -> str:
        """Add a node; the cluster's address."""
        assert self._helper.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._helper.stdin.write(f"{self.cpus}\n")
            self._helper.stdin.flush()
        answer = ""
        with contextlib.suppress(Empty):
            answer = self._answers.get(timeout=START_SECONDS)
        if not answer:
            raise RuntimeError(f"Ray did not start:\n{(self.directory / 'cluster.log').read_text()[-3000:]}")
        node = json.loads(answer)
        self._raylets.append(node["raylet"])
        return node["address"]

    def processes(self, title: str = "") -> list[psutil.Process]:
        """The cluster's processes whose title contains `title`, in the order of their pids."""
        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self._helper.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess, IndexError):  # one that just ended has no title
                    if title in process.cmdline()[0] and _is_running(process):
                        found.append(process)
        return sorted(found, key=lambda process: process.pid)

    def kill_worker(self, title: str, random: Random) -> bool:
        """Kill one of the workers that run `title` (ACTOR or READER); False if there is none."""
        workers = self.processes(title)
        with contextlib.suppress(psutil.NoSuchProcess, IndexError):
            random.choice(workers).kill()
            return True
        return False

    def kill_node(self, random: Random) -> None:
        """Kill a node that is not the head, with everything on it, and add another."""
        raylet = random.choice(self._raylets[1:])
        _kill_tree(raylet)
        self._raylets.remove(raylet)
        self._add_node()

    def kill_all(self) -> None:
        """Kill every process of the cluster: control store, nodes, workers. `start` starts another."""
        _kill_tree(self._helper.pid)
        self._helper.wait()
        for stream in (self._helper.stdin, self._helper.stdout):
            with contextlib.suppress(OSError):
                assert stream is not None
                stream.close()
        self._log.close()

    def close(self) -> None:
        if self._helper.poll() is None:
            self.kill_all()
        for process in psutil.process_iter():  # had the helper died, what it started would not be below it any more
            with contextlib.suppress(psutil.Error):
                if any(str(self.directory) in word for word in process.cmdline()):
                    _kill_tree(process.pid)
        shutil.rmtree(self.directory, ignore_errors=True)


def _kill_tree(pid: int) -> None:
    """SIGKILL a process and all below it. They are stopped first, the parents before their children are looked up, so
    that none can start another meanwhile."""
    try:
        todo = [psutil.Process(pid)]
    except psutil.NoSuchProcess:
        return
    stopped: list[psutil.Process] = []
    while todo:
        process = todo.pop()
        with contextlib.suppress(psutil.NoSuchProcess):
            process.suspend()
            stopped.append(process)
            todo += process.children()
    for process in stopped:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    deadline = time.monotonic() + 10
    while running := [process for process in stopped if _is_running(process)]:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{running} did not die")
        time.sleep(0.02)


def _is_running(process: psutil.Process) -> bool:
    """Whether it is there; one that is dead but not waited for by its parent (a zombie) is not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _helper() -> None:
    """For every line on stdin, a number of CPUs, start a node and tell how to reach it; end with the parent."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(shutdown_at_exit=False)
    options = {"object_store_memory": OBJECT_STORE, "node_ip_address": "127.0.0.1"}
    head = {"include_dashboard": False, "no_monitor": True, "dashboard_agent_listen_port": 0}
    for line in sys.stdin:
        for dead in cluster.list_all_nodes():  # their raylets would stay zombies
            for infos in dead.all_processes.values():
                for info in infos:
                    info.process.poll()
        node = cluster.add_node(num_cpus=int(line), **options, **({} if cluster.head_node else head))
        raylet = node.all_processes["raylet"][0].process.pid
        print(json.dumps({"raylet": raylet, "address": cluster.address}), flush=True)
    for child in psutil.Process().children():  # the parent is gone
        _kill_tree(child.pid)


if __name__ == "__main__":
    _helper()
