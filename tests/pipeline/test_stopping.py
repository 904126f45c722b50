"""SIGTERM and deadlines: asked for once, passed on twice, and the handler put back."""

import os
import signal
import threading
import time

import pytest

from pipeline.ledger import LedgerClient, Stop
from pipeline.stopping import EndWhenOver, OverError, StopRequest, StopWatch


class Told(LedgerClient):
    def __init__(self):
        super().__init__()
        self.told: list[Stop] = []

    def stop(self, how):
        self.told.append(how)


def test_sigterm_asks_and_the_handler_is_put_back():
    before = signal.getsignal(signal.SIGTERM)
    stop = StopRequest()
    with stop.on_sigterm() as install:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as ray.init puts its own in
        install()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
    assert stop.reason == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before


def test_another_thread_leaves_the_handler_alone():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def run():
        with StopRequest().on_sigterm() as install:
            install()
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]


def test_the_first_reason_counts():
    stop = StopRequest()
    stop.request("one")
    since = stop.since
    stop.request("two")
    assert (stop.reason, stop.since) == ("one", since)


def test_splits_may_finish_and_are_abandoned_when_the_grace_is_over():
    stop, ledger, said = StopRequest(), Told(), []
    with StopWatch(stop, ledger, None, 1.0, said.append) as watch:
        time.sleep(0.7)
        assert ledger.told == []
        stop.request("SIGTERM")
        time.sleep(0.7)
        assert ledger.told == [Stop.AFTER_SPLIT]
        time.sleep(1.2)
        assert ledger.told == [Stop.AFTER_SPLIT, Stop.NOW]
        assert not watch.is_over
    assert said == [
        "stopping (SIGTERM): splits under way have 1 s to finish",
        "stopping (SIGTERM): abandoning splits under way",
    ]


def test_a_run_without_hope_stops_and_says_why(monkeypatch):
    monkeypatch.setattr("pipeline.stopping._HOPE_INTERVAL", 0.0)
    stop, reasons = StopRequest(), iter([None, "no actor can load the model"])
    with StopWatch(stop, Told(), None, 60.0, print, lambda: next(reasons)):
        time.sleep(1.3)
    assert stop.reason == "no actor can load the model"


def test_ray_datas_execution_ends_when_the_grace_is_over():
    class Watch:
        is_over = False

    token = EndWhenOver.watch.set(Watch())
    callback = EndWhenOver()
    EndWhenOver.watch.reset(token)
    callback.on_execution_step(None)
    EndWhenOver().on_execution_step(None)
    Watch.is_over = True
    with pytest.raises(OverError):
        callback.on_execution_step(None)


def test_a_deadline_is_a_reason():
    stop, ledger = StopRequest(), Told()
    with StopWatch(stop, ledger, (time.time() - 1, "6h are over"), 60.0, print):
        time.sleep(0.7)
    assert stop.reason == "6h are over"
    assert ledger.told == [Stop.AFTER_SPLIT]
