"""Where the model actors go: how many, on what, and whether the cluster has room for them beside the readers."""

import dataclasses
import time
from dataclasses import dataclass
from typing import Any

import ray

from .config import ScoreConfig
from .errors import UsageError


@dataclass(frozen=True)
class Placement:
    """num_actors actors, each with these CPUs (Ray's logical ones), GPUs and torch threads."""

    num_actors: int
    cpus_per_actor: float
    gpus_per_actor: float
    threads: int | None
    nodes: int

    @property
    def device(self) -> str:
        return "cuda" if self.gpus_per_actor else "cpu"

    @property
    def dtype(self) -> str:
        """What dtype "auto" means there."""
        return "bfloat16" if self.gpus_per_actor else "float32"

    def as_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "device": self.device}


def place(config: ScoreConfig, *, spare_cpus: float) -> Placement:
    """Choose the actors' number and resources from the cluster, and make sure that they fit.

    Actors that fill every CPU would leave none to the readers that feed them, and the run would hang
    (ray-project/ray#44687); so `spare_cpus` must stay free on some node.

    Raises:
        UsageError: they do not fit, also not after `wait_for_resources` seconds; says what there is and what is asked.
    """
    deadline = time.monotonic() + config.wait_for_resources
    asked = False
    while True:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        placement = _choose(config, nodes)
        problem = _misfit(placement, nodes, spare_cpus)
        if problem is None:
            return placement
        if time.monotonic() >= deadline:
            raise UsageError(problem)
        if not asked:
            # An autoscaling cluster starts nodes for what is asked of it.
            bundle = {"CPU": placement.cpus_per_actor, "GPU": placement.gpus_per_actor}
            bundles = [{name: amount for name, amount in bundle.items() if amount}] * placement.num_actors
            ray.autoscaler.sdk.request_resources(bundles=[*bundles, {"CPU": 1}])
            asked = True
        time.sleep(min(2.0, max(deadline - time.monotonic(), 0.1)))


def _choose(config: ScoreConfig, nodes: list[dict[str, float]]) -> Placement:
    cpus = sum(node.get("CPU", 0.0) for node in nodes)
    gpus = sum(node.get("GPU", 0.0) for node in nodes)
    gpus_per_actor = (1.0 if gpus else 0.0) if config.gpus_per_actor is None else config.gpus_per_actor
    if gpus_per_actor:
        num_actors = config.num_actors or max(1, int(gpus / gpus_per_actor))
        return Placement(num_actors, 1.0, gpus_per_actor, config.threads_per_actor, len(nodes))
    # On CPUs about four to an actor; its threads use the core that its reader mostly leaves idle too.
    num_actors = config.num_actors or max(1, int(cpus // 4))
    threads = config.threads_per_actor or max(1, int(cpus // num_actors))
    return Placement(num_actors, float(max(1, threads - 1)), 0.0, threads, len(nodes))


def _misfit(placement: Placement, nodes: list[dict[str, float]], spare_cpus: float) -> str | None:
    """Why the actors and a reader do not fit the nodes, by first fit; None if they do."""
    free = [[node.get("CPU", 0.0), node.get("GPU", 0.0)] for node in nodes]
    have = ", ".join(f"{cpu:g} CPUs and {gpu:g} GPUs" for cpu, gpu in free) or "none"
    want = f"{placement.num_actors} actors of {placement.cpus_per_actor:g} CPUs and {placement.gpus_per_actor:g} GPUs"
    for number in range(placement.num_actors):
        for node in free:
            if node[0] >= placement.cpus_per_actor and node[1] >= placement.gpus_per_actor:
                node[0] -= placement.cpus_per_actor
                node[1] -= placement.gpus_per_actor
                break
        else:
            return (
                f"the cluster has no room for {want}: only {number} fit its nodes ({have}); lower num_actors, "
                "gpus_per_actor or threads_per_actor, or wait for an autoscaling cluster with wait_for_resources"
            )
    if not any(node[0] >= spare_cpus for node in free):
        return (
            f"{want} leave no node {spare_cpus:g} CPUs for reading and writing (nodes: {have}), so nothing would ever "
            "reach them; lower num_actors or threads_per_actor"
        )
    return None
