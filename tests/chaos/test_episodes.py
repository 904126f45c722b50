"""The plan of a long run, without running it."""

from collections import Counter
from itertools import islice

from tests.chaos.episodes import KINDS, READER_STRIKE, STRIKE, WINDOW_KINDS, Episode, plan


def test_a_seed_is_a_plan():
    assert list(islice(plan(7), 30)) == list(islice(plan(7), 30))
    assert list(islice(plan(7), 30)) != list(islice(plan(8), 30))


def test_every_kind_comes_equally_often():
    counts = Counter(fault.kind for episode in islice(plan(1), 40) for fault in episode.faults)
    assert set(counts) == set(KINDS)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_a_plan_holds_to_the_kinds_and_ranges_asked_for():
    episodes: list[Episode] = list(islice(plan(1, ("kill_reader", "mix", "s3_outage"), outage_seconds=3), 20))
    assert [episode.number for episode in episodes] == list(range(1, 21))
    for episode in episodes:
        assert 4 <= len(episode.faults) <= 6
        assert [fault.after for fault in episode.faults] == sorted(fault.after for fault in episode.faults)
        for fault in episode.faults:
            shares, seconds = READER_STRIKE if fault.kind == "kill_reader" else STRIKE
            assert shares[0] <= fault.after <= shares[1]
            assert seconds[0] <= fault.delay <= seconds[1]
            assert (fault.kind in WINDOW_KINDS) == (0.05 <= fault.share <= 0.2)
            assert fault.kind != "s3_outage" or fault.seconds == 3
