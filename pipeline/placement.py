"""Placement of the model actors: how many, with which resources, and whether they fit the cluster with the readers."""

import dataclasses
import time
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from trbert_model.engine.precision import cpu_is_fast_in_bfloat16

from .config import ScoreConfig
from .errors import UsageError
from .stopping import StopRequest

# A GPU actor keeps one core busy launching kernels. It requests less than 1, so that a machine with as many GPUs as
# CPUs has room for readers, and not the readers' share, so that Ray Data does not fuse the two stages.
GPU_ACTOR_CPUS = 0.75

_ANSWER_SECONDS = 30.0


@dataclass(frozen=True)
class Placement:
    """The number and resources of the model actors.

    Attributes:
        num_actors: number of actors.
        cpus_per_actor: Ray's logical CPUs that each actor takes.
        gpus_per_actor: GPUs that each actor takes; 0 runs it on the CPU.
        threads: torch threads of each actor; None: torch's default.
        nodes: number of live nodes in the cluster.
    """

    num_actors: int
    cpus_per_actor: float
    gpus_per_actor: float
    threads: int | None
    nodes: int

    @property
    def device(self) -> str:
        return "cuda" if self.gpus_per_actor else "cpu"

    def as_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "device": self.device}


def auto_dtype(placement: Placement) -> tuple[str, str]:
    """The dtype that "auto" means for these actors, and why.

    bfloat16 on GPUs, and on CPUs if those of all nodes with room for an actor are fast in it.
    """
    if placement.gpus_per_actor:
        return "bfloat16", "the actors have GPUs"
    fast = _fast_in_bfloat16(placement.cpus_per_actor)
    if all(fast):
        return "bfloat16", "the CPUs are fast in it (AMX or AVX-512 BF16)"
    return "float32", f"the CPUs of {fast.count(False)} of {len(fast)} nodes are not fast in bfloat16"


def _fast_in_bfloat16(least_cpus: float) -> list[bool]:
    """Whether the CPUs of each live node with so many of them are fast in bfloat16; False if it does not answer."""
    here, fast, asked = ray.get_runtime_context().get_node_id(), [], []
    for node in ray.nodes():
        if not node["Alive"] or node["Resources"].get("CPU", 0.0) < least_cpus:
            continue
        if node["NodeID"] == here:
            fast.append(cpu_is_fast_in_bfloat16())
        else:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            asked.append(ray.remote(num_cpus=0, scheduling_strategy=there)(cpu_is_fast_in_bfloat16).remote())
    answered, _ = ray.wait(asked, num_returns=len(asked), timeout=_ANSWER_SECONDS) if asked else ([], [])
    for answer in asked:
        try:
            fast.append(answer in answered and ray.get(answer))
        except RayError:  # the node died; others may still have room for the actors
            fast.append(False)
    return fast


def place_actors(config: ScoreConfig, *, spare_cpus: float, stop: StopRequest) -> Placement:
    """Choose the number and resources of the actors from the cluster's nodes, and make sure that they fit.

    Actors that take every CPU would leave none for the readers that feed them, and the run would hang
    (ray-project/ray#44687). So `spare_cpus` must stay free on some node.

    Raises:
        UsageError: they do not fit, even after `wait_for_resources` seconds; names the resources found and requested.
        StoppedError: the run was stopped while waiting.
    """
    deadline = time.monotonic() + config.wait_for_resources
    asked = False
    try:
        while True:
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            placement = _choose(config, nodes, spare_cpus)
            problem = _misfit(placement, nodes, spare_cpus)
            if problem is None:
                return placement
            if time.monotonic() >= deadline:
                raise UsageError(problem)
            if not asked:
                # An autoscaling cluster starts nodes for requested resources.
                bundle = {"CPU": placement.cpus_per_actor, "GPU": placement.gpus_per_actor}
                bundles = [{name: amount for name, amount in bundle.items() if amount}] * placement.num_actors
                ray.autoscaler.sdk.request_resources(bundles=[*bundles, {"CPU": 1}])
                asked = True
            stop.wait(min(2.0, max(deadline - time.monotonic(), 0.1)))
            stop.check()
    finally:
        if asked:
            # A request keeps its nodes until it is withdrawn. The actors start before idle nodes are removed.
            ray.autoscaler.sdk.request_resources(bundles=[])


def _choose(config: ScoreConfig, nodes: list[dict[str, float]], spare_cpus: float) -> Placement:
    """The configured placement, by default with as many actors as fit, at least one."""
    cpus = [node.get("CPU", 0.0) for node in nodes]
    gpus = sum(node.get("GPU", 0.0) for node in nodes)
    gpus_per_actor = (1.0 if gpus else 0.0) if config.gpus_per_actor is None else config.gpus_per_actor
    if gpus_per_actor:
        cpus_per_actor, threads = GPU_ACTOR_CPUS, config.threads_per_actor
        most = int(gpus / gpus_per_actor)
    else:
        threads = config.threads_per_actor or _threads(config.num_actors, [count for count in cpus if count >= 1])
        # One less than its threads, which also use the reader's core, as it is mostly idle.
        cpus_per_actor = float(max(1, threads - 1))
        most = sum(int(count // threads) for count in cpus)
    for num_actors in range(most, 0, -1) if config.num_actors is None else ():
        placement = Placement(num_actors, cpus_per_actor, gpus_per_actor, threads, len(nodes))
        if _misfit(placement, nodes, spare_cpus) is None:
            return placement
    return Placement(config.num_actors or 1, cpus_per_actor, gpus_per_actor, threads, len(nodes))


def _threads(num_actors: int | None, cpus: list[float]) -> int:
    """Torch threads of a CPU actor: its share of the CPUs if `num_actors` is given, otherwise about four."""
    smallest = int(min(cpus, default=1))
    if num_actors is not None:
        return max(1, min(smallest, int(sum(cpus) // num_actors)))
    return smallest // max(1, smallest // 4)


def _misfit(placement: Placement, nodes: list[dict[str, float]], spare_cpus: float) -> str | None:
    """Why the actors, placed first-fit, and a reader do not fit the nodes; None if they do."""
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
