"""Who kills whom: deaths are counted by work, blame needs care and a repetition, and without need nothing is asked."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.deaths import DEATHS, read_deaths, write_deaths
from pipeline.encode import read_shards, shard_groups
from pipeline.errors import StorageError
from pipeline.ledger import (
    DEATHS_BEFORE_CARE,
    DEATHS_OF_A_DOCUMENT,
    KILLED,
    NO_LEDGER,
    WHOLE,
    Care,
    Entry,
    Ledger,
    LedgerClient,
    Stop,
    UnderWay,
)
from pipeline.predict import SplitPredictor
from pipeline.rows import ErrorKind, from_ipc
from pipeline.storage import Storage
from tests.pipeline.stages import encode_options, only_shard, texts, write_shard
from trbert_model.errors import CheckpointError


class Deaths:
    """A ledger and processes that die in turn at the same work."""

    def __init__(self):
        self.ledger, self.number = Ledger(), 0

    def begin(self) -> Care:
        self.number += 1
        return self.ledger.begin("work", f"process {self.number}")[0]

    def die_at(self, document: int | None) -> None:
        self.begin()
        self.ledger.touch("work", f"process {self.number}", document)


def test_work_that_ends_leaves_nothing():
    ledger = Ledger()
    for process in ("a", "b", "a"):
        assert ledger.begin("work", process) == (Care(), Stop.NO)
        ledger.end("work", process)
    assert ledger.deaths() == (0, 0, {})
    assert ledger._work == {}


def test_the_same_process_may_begin_again():
    ledger = Ledger()
    ledger.begin("work", "a")
    assert ledger.begin("work", "a") == (Care(), Stop.NO)


def test_care_comes_after_some_deaths_and_blame_after_two_more():
    deaths = Deaths()
    for _ in range(DEATHS_BEFORE_CARE):
        assert not deaths.begin().one_at_a_time
    for _ in range(DEATHS_OF_A_DOCUMENT):
        care = deaths.begin()
        assert care.one_at_a_time
        assert not care.killers
        deaths.ledger.touch("work", f"process {deaths.number}", 7)
    assert deaths.begin() == Care(DEATHS_BEFORE_CARE + DEATHS_OF_A_DOCUMENT, frozenset({7}))
    assert deaths.ledger.deaths()[0] == DEATHS_BEFORE_CARE + DEATHS_OF_A_DOCUMENT


def test_deaths_that_are_spread_blame_nobody():
    deaths = Deaths()
    for document in (None, None, None, 1, 2, WHOLE, 3, None, 4):
        deaths.die_at(document)
    assert deaths.begin().killers == frozenset()


def test_two_documents_that_kill_are_both_found():
    deaths = Deaths()
    for document in (None, None, None, 3, 3, 8, 8):
        deaths.die_at(document)
    assert deaths.begin().killers == {3, 8}


def test_a_process_that_was_thought_dead_changes_nothing():
    ledger = Ledger()
    ledger.begin("work", "old")
    ledger.begin("work", "new")
    ledger.touch("work", "old", 5)
    ledger.end("work", "old")
    assert ledger._work["work"].process == "new"
    assert ledger._work["work"].document is None


def test_how_far_a_split_is_can_be_asked_until_it_ends():
    ledger = Ledger()
    ledger.begin("work", "a")
    assert ledger.under_way() == []
    ledger.progress("work", "a", under_way=UnderWay("shard", 3, 0.5, 1.0))
    ledger.progress("work", "another's", under_way=UnderWay("shard", 4, 0.6, 1.0))
    assert ledger.under_way() == [UnderWay("shard", 3, 0.5, 1.0)]
    ledger.end("work", "a")
    assert ledger.under_way() == []


def test_an_actor_says_how_far_its_split_is(encoded, model_directory):
    (split,) = encoded()
    ledger = FixedLedger()
    predictor(model_directory, ledger, stop_interval=0.0)(split)
    said = [under_way for under_way in ledger.under_way_said if under_way is not None]
    assert [under_way.documents for under_way in said] == list(range(7))
    assert {under_way.shard for under_way in said} == {"a.parquet"}
    assert said[-1].share == pytest.approx(6 / 7)


def test_a_stop_is_never_taken_back():
    ledger = Ledger()
    ledger.stop(Stop.NOW)
    ledger.stop(Stop.AFTER_SPLIT)
    assert ledger.begin("work", "a")[1] is Stop.NOW


class FixedLedger(LedgerClient):
    """Gives every work the same care, and remembers what was touched."""

    def __init__(self, care: Care = Care(), stop: Stop = Stop.NO, stopping: Stop | None = None):  # noqa: B008
        super().__init__()
        self.care, self.stop_now, self.asked = care, stop, stop if stopping is None else stopping
        self.touched: list[int | None] = []
        self.under_way_said: list[UnderWay | None] = []

    def _ask(self, method, *arguments):
        if method == "begin":
            return self.care, self.stop_now
        if method == "touch":
            self.touched.append(arguments[-1])
        if method == "progress":
            self.under_way_said.append(arguments[-1])
        return self.asked if method == "progress" else None


CARE = DEATHS_BEFORE_CARE + DEATHS_OF_A_DOCUMENT


@pytest.fixture
def encoded(tmp_path, model_directory):
    write_shard(tmp_path / "a.parquet", {"id": [f"n{i}" for i in range(8)], "text": [None, *texts(7)]})
    batch = pa.Table.from_pylist(shard_groups([(only_shard(tmp_path), frozenset())]))
    options = encode_options(tmp_path, model_directory)
    return lambda ledger=NO_LEDGER: list(read_shards(batch, options, ledger))


def predictor(model_directory, ledger, **options):
    return SplitPredictor(["id"], "id", ledger, model=str(model_directory), device="cpu", probabilities=True, **options)


def test_one_at_a_time_scores_the_same_and_puts_the_killer_aside(encoded, model_directory):
    (split,) = encoded()
    expected = from_ipc(predictor(model_directory, NO_LEDGER)(split)["payload"][0])
    ledger = FixedLedger(Care(CARE, frozenset({2})))
    scored = predictor(model_directory, ledger)(split)
    assert scored["error"].to_pylist() == [None]
    results, rejected = from_ipc(scored["payload"][0]), from_ipc(scored["rejected"][0])
    assert results["row"].to_pylist() == [1, 2, 4, 5, 6, 7]  # row 0 is null, document 2 is row 3
    assert [(row["row"], row["id"], row["reason"]) for row in rejected.to_pylist()] == [
        (0, "n0", "null"),
        (3, "n3", KILLED),
    ]
    expected = expected.filter(pa.compute.not_equal(expected["row"], 3))
    assert results["kept_tokens"] == expected["kept_tokens"]
    np.testing.assert_allclose(
        np.stack(results["probabilities"].to_numpy()), np.stack(expected["probabilities"].to_numpy()), atol=1e-4
    )
    assert ledger.touched == [WHOLE, 0, 1, 3, 4, 5, 6, WHOLE]


def test_a_text_that_kills_the_tokenizer_is_quarantined(encoded):
    ledger = FixedLedger(Care(CARE, frozenset({5})))
    (split,) = encoded(ledger)
    documents, rejected = from_ipc(split["payload"][0]), from_ipc(split["rejected"][0])
    assert documents["row"].to_pylist() == [1, 2, 3, 4, 6, 7]
    assert [(row["row"], row["reason"]) for row in rejected.to_pylist()] == [(0, "null"), (5, KILLED)]
    assert ledger.touched == [WHOLE, 1, 2, 3, 4, 6, 7, WHOLE, WHOLE, None]


def test_work_that_kills_as_a_whole_is_named(encoded, model_directory):
    ledger = FixedLedger(Care(CARE, frozenset({WHOLE})))
    (unreadable,) = encoded(ledger)
    assert unreadable["index"].to_pylist() == [-1]
    assert unreadable["error"].to_pylist() == [f"ShardError: reading it killed its process {CARE} times"]
    (split,) = encoded()
    failed = predictor(model_directory, ledger)(split)
    assert failed["error"].to_pylist() == [f"PipelineError: scoring it killed its process {CARE} times"]


def test_nothing_begins_and_nothing_goes_on_once_the_run_stops(encoded, model_directory):
    assert [split["error"].to_pylist() for split in encoded(FixedLedger(stop=Stop.AFTER_SPLIT))] == [["stopped"]]
    (split,) = encoded()
    stopped = predictor(model_directory, FixedLedger(stop=Stop.AFTER_SPLIT))(split)
    assert stopped["error"].to_pylist() == ["stopped"]
    under_way = predictor(model_directory, FixedLedger(stopping=Stop.AFTER_SPLIT), stop_interval=-1.0)(split)
    assert under_way["error"].to_pylist() == [None], "what has begun may finish"
    abandoned = predictor(model_directory, FixedLedger(stopping=Stop.NOW), stop_interval=-1.0)(split)
    assert abandoned["error_kind"].to_pylist() == [ErrorKind.STOPPED]
    assert abandoned["error"].to_pylist() == ["stopped"]


def test_an_actor_tries_again_to_load_the_model_and_says_so(model_directory, monkeypatch):
    class Told(FixedLedger):
        told: list = []

        def _ask(self, method, *arguments):
            self.told.append((method, *arguments))

    failures = iter([StorageError("m: cannot read: SlowDown"), CheckpointError("m: half of it is missing")])

    def fetch(model):
        for error in failures:
            raise error
        return Path(model)

    slept = []
    monkeypatch.setattr("pipeline.predict.fetch_model", fetch)
    monkeypatch.setattr("pipeline.predict.time.sleep", slept.append)
    assert list(predictor(model_directory, Told()).task.labels) == ["bad", "fine", "good"]
    assert [method for method, *_ in Told.told] == ["begin_load", "load_failed"] * 2 + ["begin_load", "loaded"]
    assert Told.told[1][2].endswith(": StorageError: m: cannot read: SlowDown")
    assert slept == [1, 2]


def test_loads_that_fail_are_counted_apart_from_deaths():
    """With one actor a document kills it five times before it is to blame: it loads the model anew each time."""
    ledger = Ledger()
    for number in range(6):
        ledger.begin_load(f"process {number}")
        ledger.loaded(f"process {number}")
        ledger.begin("work", f"process {number}")
    assert ledger.loads().tries == 0
    for number in range(3):
        ledger.begin_load("process 7")
        ledger.load_failed("process 7", f"why {number}", for_good=number == 1)
    ledger.begin_load("process 8")  # and dies at it
    assert dataclasses.astuple(ledger.loads())[:3] == (4, "why 1", True), "what is for good stays the reason"


def test_what_is_known_of_deaths_goes_on_in_the_next_run(tmp_path):
    output, deaths = Storage(str(tmp_path)), Deaths()
    for document in (None, None, None, 7):
        deaths.die_at(document)
    deaths.begin()
    write_deaths(output, deaths.ledger.deaths()[2])
    again = Deaths()
    again.ledger = Ledger(read_deaths(output))
    assert again.begin() == Care(4, frozenset())
    again.ledger.touch("work", "process 1", 7)
    assert again.begin() == Care(5, frozenset({7}))
    again.ledger.end("work", "process 2")
    write_deaths(output, again.ledger.deaths()[2])
    assert output.files() == [], "nothing is left of what is done"
    output.write(DEATHS, b"[1]")
    assert read_deaths(output) == {}


def test_work_that_gives_no_sign_is_named_once_and_blamed_the_second_time():
    ledger = Ledger()
    ledger.begin("work", "a")
    ledger.begin("waits", "b")
    ledger.progress("waits", "b", True)
    assert ledger.overdue(60.0, 0.0) == []
    assert ledger.overdue(-1.0, 0.0) == [("work", "a")]
    assert ledger.overdue(-1.0, 0.0) == []
    care, _ = ledger.begin("work", "c")
    assert care.one_at_a_time, "it was no pre-emption"
    ledger.touch("work", "c", 3)
    assert ledger.overdue(-1.0, 0.0) == [("work", "c")]
    assert ledger.begin("work", "d")[0].killers == {3}
    ledger.begin("scoring x", "s")
    assert ledger.overdue(-1.0, 60.0) == [("scoring x", "s")], "others may be waiting for the storage"
    ledger.begin_load("e")
    assert ("loading the model", "e") in ledger.overdue(-1.0, 0.0)
    assert ledger.deaths()[:2] == (2, 5)


def test_an_actor_that_stands_still_between_two_splits_is_named_once():
    """It has entered no work, so nobody else would miss it."""
    ledger = Ledger()
    ledger.alive("actor", "a")
    ledger.alive("actor", "b")  # started anew: the first one's silence says nothing
    ledger.alive("other", "c")
    ledger.begin("scoring x", "c")
    assert ledger.overdue(60.0, 0.0) == []
    assert ledger.overdue(-1.0, 0.0) == [("scoring x", "c"), ("an actor between two splits", "b")]
    assert ledger.overdue(-1.0, 0.0) == []
    assert ledger.deaths()[1] == 2


def test_without_a_ledger_nothing_is_asked():
    with NO_LEDGER.work("anything") as entry:
        assert entry == Entry(NO_LEDGER, "anything")
        entry.touch(1)
        assert entry.stopping() is Stop.NO
        with entry.waiting():
            pass
    assert NO_LEDGER.deaths() is None


def test_a_split_keeps_the_operating_point_it_was_begun_at():
    """Also if its process dies, since another that has it half done may still publish it; the next splits get the new
    one."""
    ledger = Ledger()
    ledger.begin("one", "a")
    assert ledger.point("one") == 0
    ledger.set_point(2)
    assert ledger.point("one") == 0
    ledger.begin("one", "b")
    assert ledger.point("one") == 0
    ledger.begin("two", "c")
    assert ledger.point("two") == 2
    ledger.end("one", "b")
    ledger.begin("one", "d")
    assert ledger.point("one") == 2
    assert Ledger().point("begun before it was started again") == 0
    assert Entry(NO_LEDGER, "anything").point() == 0
