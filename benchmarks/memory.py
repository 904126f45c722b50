"""The resident memory of a run's processes while it goes on."""

import threading
import time

import numpy as np
import psutil

# What the titles of Ray's processes contain; a worker has its task's name, or none while it waits.
ROLES = {"SplitPredictor": "actor", "Ledger": "ledger", "ray::": "workers", "raylet": "raylet", "gcs_server": "gcs"}


class RunMemory:
    """Samples this process and all that it started: MiB by role, summed over the role's processes.

    roles: what the titles of the processes contain, and what they are then called.
    """

    def __init__(self, interval: float = 0.5, roles: dict[str, str] = ROLES) -> None:
        self._interval, self._roles = interval, roles
        self.samples: dict[str, list[tuple[float, float]]] = {}  # role → (seconds, MiB)
        self.largest: dict[str, float] = {}  # role → MiB of one process at most
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "RunMemory":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        started, driver = time.monotonic(), psutil.Process()
        while not self._done.wait(self._interval):
            sizes = {"driver": driver.memory_info().rss}
            for process in driver.children(recursive=True):
                try:
                    title = " ".join(process.cmdline())
                    size = process.memory_info().rss
                except psutil.Error:
                    continue  # it has just ended
                role = next((role for part, role in self._roles.items() if part in title), "others")
                sizes[role] = sizes.get(role, 0) + size
                self.largest[role] = max(self.largest.get(role, 0), size / 2**20)
            sizes["all"] = sum(sizes.values())
            for role, size in sizes.items():
                self.samples.setdefault(role, []).append((time.monotonic() - started, size / 2**20))

    def peak(self, role: str) -> float:
        """MiB at most."""
        return max(size for _, size in self.samples[role])

    def slope(self, role: str) -> float:
        """MiB a minute over the last half of the samples, least squares."""
        last = np.array(self.samples[role][len(self.samples[role]) // 2 :])
        return float(np.polyfit(last[:, 0] / 60, last[:, 1], 1)[0])
