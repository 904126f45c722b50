"""Actors beside readers, on every shape of cluster."""

import threading
import time

import pytest

from pipeline import placement
from pipeline.config import ScoreConfig
from pipeline.errors import StoppedError, UsageError
from pipeline.placement import Placement, auto_dtype, place_actors
from pipeline.stopping import StopRequest
from tests.conftest import cpu_is_fast_in_bfloat16

PLACES = {"input": "in", "output": "out", "model": "m"}


@pytest.fixture
def cluster(monkeypatch):
    def make(*nodes):
        alive = [{"Alive": True, "Resources": {"CPU": cpus, "GPU": gpus}} for cpus, gpus in nodes]
        monkeypatch.setattr(placement.ray, "nodes", lambda: alive)

    return make


def test_one_actor_a_gpu_in_bfloat16(cluster):
    cluster((8, 1), (8, 4), (4, 0))
    placed = place_actors(ScoreConfig(**PLACES), spare_cpus=0.75, stop=StopRequest())
    assert (placed.num_actors, placed.gpus_per_actor, placed.device) == (5, 1.0, "cuda")
    assert auto_dtype(placed)[0] == "bfloat16"


@pytest.mark.parametrize(("cpus", "actors", "threads"), [(2, 1, 2), (4, 1, 4), (8, 2, 4), (16, 4, 4), (64, 16, 4)])
def test_without_gpus_the_cores_are_shared_out(cluster, cpus, actors, threads):
    cluster((cpus, 0))
    placed = place_actors(ScoreConfig(**PLACES), spare_cpus=0.75, stop=StopRequest())
    assert (placed.num_actors, placed.threads, placed.device) == (actors, threads, "cpu")


@pytest.mark.parametrize(
    ("fast", "dtype", "reason"),
    [
        ([True, True], "bfloat16", "the CPUs are fast in it"),
        ([True, False, True], "float32", "the CPUs of 1 of 3 nodes are not fast in bfloat16"),
    ],
)
def test_on_cpus_bfloat16_is_chosen_where_all_of_them_are_fast_in_it(monkeypatch, fast, dtype, reason):
    monkeypatch.setattr(placement, "_fast_in_bfloat16", lambda least_cpus: fast)
    chosen, why = auto_dtype(Placement(2, 1.0, 0.0, 2, len(fast)))
    assert (chosen, why[: len(reason)]) == (dtype, reason)


@pytest.mark.parametrize(
    ("flags", "fast"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16 sse\n", True),
        ("flags\t\t: fpu amx_tile amx_bf16\n", True),
        ("flags\t\t: fpu avx2 avx512f amx_int8\n", False),
        ("Features\t: fp asimd bf16\n", False),
        ("", False),
    ],
)
def test_a_cpu_is_known_by_its_flags(tmp_path, flags, fast):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\n" + flags)
    assert cpu_is_fast_in_bfloat16(str(tmp_path / "cpuinfo")) is fast
    assert not cpu_is_fast_in_bfloat16(str(tmp_path / "not Linux"))


@pytest.mark.parametrize(
    ("nodes", "actors", "threads"),
    [([2, 2, 2], 3, 2), ([0, 8, 8], 4, 4), ([4, 1], 4, 1), ([6], 1, 6), ([16, 4], 5, 4)],
)
def test_every_node_is_used_and_room_is_left(cluster, nodes, actors, threads):
    cluster(*[(cpus, 0) for cpus in nodes])
    placed = place_actors(ScoreConfig(**PLACES), spare_cpus=0.75, stop=StopRequest())
    assert (placed.num_actors, placed.threads) == (actors, threads)


def test_as_many_gpus_as_cpus(cluster):
    cluster((8, 8))
    assert place_actors(ScoreConfig(**PLACES), spare_cpus=0.75, stop=StopRequest()).num_actors == 8


def test_the_cpu_of_a_machine_with_gpus(cluster):
    cluster((8, 1))
    assert place_actors(ScoreConfig(**PLACES, gpus_per_actor=0.0), spare_cpus=0.75, stop=StopRequest()).device == "cpu"


@pytest.mark.parametrize(
    ("nodes", "options", "message"),
    [
        ([(8, 0)], {"gpus_per_actor": 1.0}, "no room for 1 actors of 0.75 CPUs and 1 GPUs: only 0 fit"),
        ([(8, 1), (8, 1)], {"num_actors": 3, "gpus_per_actor": 1.0}, "only 2 fit"),
        ([(2, 0)], {"num_actors": 2, "threads_per_actor": 1}, "leave no node 0.75 CPUs for reading"),
        ([(1, 0)], {}, "leave no node"),
        ([(4, 1)], {"gpus_per_actor": 2.0}, "no room"),
        ([], {}, r"nodes \(none\)"),
    ],
)
def test_what_does_not_fit_is_refused_before_it_hangs(cluster, nodes, options, message):
    cluster(*nodes)
    with pytest.raises(UsageError, match=message):
        place_actors(ScoreConfig(**PLACES, **options), spare_cpus=0.75, stop=StopRequest())


def test_an_autoscaling_cluster_is_asked_and_waited_for(cluster, monkeypatch):
    cluster((4, 0))
    asked = []
    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", lambda bundles: asked.append(bundles))
    monkeypatch.setattr(StopRequest, "wait", lambda self, seconds: cluster((4, 0), (8, 1)))
    placed = place_actors(
        ScoreConfig(**PLACES, gpus_per_actor=1.0, wait_for_resources=60.0), spare_cpus=0.75, stop=StopRequest()
    )
    assert placed.num_actors == 1
    assert asked == [[{"CPU": 0.75, "GPU": 1.0}, {"CPU": 1}], []], "the request must be withdrawn"


def test_a_stop_ends_the_wait_for_room(cluster, monkeypatch):
    cluster((4, 0))
    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", lambda bundles: None)
    stop = StopRequest()
    threading.Timer(0.3, stop.request, ["SIGTERM"]).start()
    started = time.monotonic()
    with pytest.raises(StoppedError):
        place_actors(ScoreConfig(**PLACES, gpus_per_actor=1.0, wait_for_resources=900.0), spare_cpus=0.75, stop=stop)
    assert time.monotonic() - started < 2
