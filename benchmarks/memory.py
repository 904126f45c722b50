"""The resident memory of a run's processes over time."""

import threading
import time

import numpy as np
import psutil

# Part of a Ray process's title → role. A worker's title has the name of its task, and no name while it is idle.
ROLES = {"SplitPredictor": "actor", "Ledger": "ledger", "ray::": "workers", "raylet": "raylet", "gcs_server": "gcs"}


class RunMemory:
    """Samples the memory of this process and all its descendants: MiB by role, summed over the role's processes.

    Args:
        interval: seconds between samples.
        roles: parts of process titles, and their roles.
    """

    def __init__(self, interval: float = 0.5, roles: dict[str, str] = ROLES) -> None:
        self._interval, self._roles = interval, roles
        self.samples: dict[str, list[tuple[float, float]]] = {}  # role → (seconds, MiB)
        self.largest: dict[str, float] = {}  # role → peak MiB of a single process
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
        """Peak MiB of a role."""
        return max(size for _, size in self.samples[role])

    def slope(self, role: str) -> float:
        """Growth of a role in MiB per minute: least squares over the last half of the samples."""
        last = np.array(self.samples[role][len(self.samples[role]) // 2 :])
        return float(np.polyfit(last[:, 0] / 60, last[:, 1], 1)[0])
