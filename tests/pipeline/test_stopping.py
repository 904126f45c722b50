"""Signals and deadlines: asked for once, passed on twice, the handlers put back, every wait ended."""

import os
import signal
import threading
import time

import pytest

from pipeline.errors import AbandonedError, StoppedError, StorageError
from pipeline.ledger import LedgerClient, Stop
from pipeline.ray_internals import EndWhenOver, OverError, ending_when
from pipeline.stopping import StopRequest
from pipeline.storage import Storage
from pipeline.watch import StopWatch


class Told(LedgerClient):
    def __init__(self):
        super().__init__()
        self.told: list[Stop] = []

    def stop(self, how):
        self.told.append(how)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_asks_and_the_handler_is_put_back(number):
    before = signal.getsignal(number)
    stop = StopRequest()
    with stop.on_signals() as install:
        signal.signal(number, signal.SIG_IGN)  # as ray.init puts its own in
        install()
        os.kill(os.getpid(), number)
        time.sleep(0.1)
    assert stop.reason == {signal.SIGINT: "Ctrl-C"}.get(number, number.name)
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_interrupts():
    stop = StopRequest()
    with stop.on_signals():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        stop = StopRequest()
        with stop.on_signals():
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.1)
        assert stop.reason is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_thread_leaves_the_handler_alone():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def run():
        with StopRequest().on_signals() as install:
            install()
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]


def test_what_a_run_returns_or_raises_comes_out():
    stop = StopRequest()
    assert stop.run(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        stop.run(lambda: 1 // 0)


def test_whatever_a_run_waits_for_it_ends_within_the_grace():
    """Without the thread that waits: its lock goes, and what it does later it may not."""
    stop, released = StopRequest(grace=0.2, last_words=0.2), []
    stop.deadline = (time.time() + 0.3, "6h are over")
    stop.when_abandoned.append(lambda: released.append(True))
    started, hangs = time.monotonic(), threading.Event()
    try:
        with pytest.raises(AbandonedError, match=r"stopped \(6h are over\) while something did not answer") as error:
            stop.run(lambda: hangs.wait(60))
    finally:
        hangs.set()
    assert error.value.exit_code == 4
    assert 0.5 < time.monotonic() - started < 5
    assert released == [True]


def test_waits_end_at_a_stop():
    stop = StopRequest(grace=0.5)
    threading.Timer(0.3, stop.request, ["SIGTERM"]).start()
    started = time.monotonic()
    stop.wait(60)
    assert time.monotonic() - started < 2
    with pytest.raises(StoppedError, match=r"stopped \(SIGTERM\); run again"):
        stop.check()
    stop.wait_in_grace(60)
    assert 0.7 < time.monotonic() - started < 3


def test_a_request_is_not_made_again_when_the_grace_is_over(tmp_path, monkeypatch):
    """Not for the three minutes of its budget, while S3 answers 503."""
    stop = StopRequest(grace=1.0)
    place = Storage(str(tmp_path), retry_seconds=180, stop=stop)
    monkeypatch.setattr(place.fs, "cat_file", lambda *_: (_ for _ in ()).throw(ConnectionError("SlowDown")))
    threading.Timer(0.5, stop.request, ["SIGTERM"]).start()
    started = time.monotonic()
    with pytest.raises(StorageError, match="SlowDown"):
        place.read("x")
    assert 1.0 < time.monotonic() - started < 5


def test_the_first_reason_counts():
    stop = StopRequest()
    stop.request("one")
    since = stop.since
    stop.request("two")
    assert (stop.reason, stop.since) == ("one", since)


def test_splits_may_finish_and_are_abandoned_when_the_grace_is_over():
    stop, ledger, said = StopRequest(grace=1.0), Told(), []
    with StopWatch(stop, ledger, said.append) as watch:
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


def test_a_run_without_hope_stops_and_says_why():
    stop, reasons = StopRequest(60.0), iter([None, "no actor can load the model"])
    with StopWatch(stop, Told(), print, lambda: next(reasons), look_seconds=0.0):
        time.sleep(1.3)
    assert stop.reason == "no actor can load the model"


def test_ray_datas_execution_ends_when_the_grace_is_over():
    over = threading.Event()
    with ending_when(over.is_set):
        callback = EndWhenOver()
    callback.on_execution_step(None)
    EndWhenOver().on_execution_step(None)
    over.set()
    with pytest.raises(OverError):
        callback.on_execution_step(None)
