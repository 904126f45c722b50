"""A Ray that lacks what it does not document: runs go on without, and one warning says what is lacking."""

import importlib.util
import logging
import sys

import pytest
import ray.data

from pipeline import ray_internals

CALLBACKS = "custom_execution_callback_classes"


@pytest.fixture(autouse=True)
def _nothing_said_yet():
    ray_internals._warn.cache_clear()
    yield
    ray_internals._warn.cache_clear()


def settings() -> tuple:
    return ray_internals.ray_constants.ENABLE_RAY_CLUSTER, getattr(ray.data.DataContext.get_current(), CALLBACKS)


def use_all() -> tuple:
    """What is set while everything is in use."""
    with ray_internals.listening_on_loopback(), ray_internals.ending_when(lambda: True):
        return settings()


def test_what_is_set_is_put_back(caplog):
    before = settings()
    assert use_all() == (False, [*before[1], ray_internals.EndWhenOver])
    assert settings() == before
    assert not caplog.records


def test_another_version_of_ray_is_left_alone_and_said_once(monkeypatch, caplog):
    monkeypatch.setattr(ray_internals.ray, "__version__", "3.0.0")
    before = settings()
    with caplog.at_level(logging.WARNING):
        assert use_all() == use_all() == before
    loopback, callbacks = (record.getMessage() for record in caplog.records)
    assert loopback.startswith("Ray 3.0.0 has no ENABLE_RAY_CLUSTER that is known here: a local Ray listens on all")
    assert callbacks.startswith(f"Ray 3.0.0 has no {CALLBACKS} that is known here: a stopped run that waits")


@pytest.mark.parametrize("module", ["ray._private.ray_constants", "ray.data._internal.execution.execution_callback"])
def test_a_part_that_is_gone_is_done_without(module, monkeypatch, caplog):
    """The module, imported where that part is not there."""
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delattr(module)
    spec = importlib.util.spec_from_file_location("without_it", ray_internals.__file__)
    without_it = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(without_it)
    with (
        caplog.at_level(logging.WARNING),
        without_it.listening_on_loopback(),
        without_it.ending_when(lambda: True),
    ):
        without_it.EndWhenOver()
    (warning,) = caplog.records
    assert "that is known here" in warning.getMessage()
