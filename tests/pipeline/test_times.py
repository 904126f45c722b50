"""Times of day and durations in options: what they mean, and what is refused."""

import os
import time
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UsageError
from pipeline.times import finish_time

NOW = datetime(2026, 11, 27, 22, 30, tzinfo=UTC).timestamp()


def utc(text):
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


@pytest.fixture
def berlin(monkeypatch):
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3h", "2026-11-28T01:30"),
        ("90m", "2026-11-28T00:00"),
        ("0.5h", "2026-11-27T23:00"),
        ("06:00", "2026-11-28T05:00"),
        ("6:00", "2026-11-28T05:00"),
        ("23:45", "2026-11-27T22:45"),
        ("23:30", "2026-11-28T22:30"),  # now: the next one
        ("06:00Z", "2026-11-28T06:00"),
        ("06:00 UTC", "2026-11-28T06:00"),
        ("06:00:30+02:00", "2026-11-28T04:00:30"),
        ("06:00 -05:00", "2026-11-28T11:00"),
        ("06:00 America/New_York", "2026-11-28T11:00"),
        ("18:00 America/New_York", "2026-11-27T23:00"),
        ("2026-11-29 06:00", "2026-11-29T05:00"),
        ("2026-11-29T06:00Z", "2026-11-29T06:00"),
        ("2026-11-29 06:00 Asia/Tokyo", "2026-11-28T21:00"),
        ("2026-11-01 06:00", "2026-11-01T05:00"),  # past: a run that was started too late
        (" 06:00 ", "2026-11-28T05:00"),
    ],
)
def test_a_time_is_the_next_one_in_its_zone(berlin, text, expected):
    assert finish_time(text, NOW) == utc(expected)


@pytest.mark.parametrize(
    "text",
    [
        *("", "6", "360", "0h", "-3h", "3d", "06", "0600", "24:00", "06:60", "06:00:60", "tomorrow", "06:00+25:00"),
        *("06:00 Nowhere/City", "06:00 Europe", "06:00 ../etc/passwd", "06:00 /etc", "06:00 am", "06:00Z UTC"),
        *("2026-02-30 06:00", "2026-11-28", "06:00\n07:00", "٠٦:٠٠", "9" * 12 + "h", "9" * 400 + "h"),
        "9999-12-31T23:59 -23:00",
    ],
)
def test_what_is_no_time_is_refused(text):
    with pytest.raises(UsageError, match=r"finish_by .* must be a (time|duration)"):
        finish_time(text, NOW)


@given(
    st.datetimes(datetime(2020, 1, 1), datetime(2030, 1, 1)),
    st.times(),
    st.sampled_from(["UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Kolkata"]),
)
def test_a_time_of_day_is_less_than_two_days_ahead_and_shown_by_that_clock(moment, clock, zone):
    now = moment.replace(tzinfo=UTC).timestamp()
    found = finish_time(f"{clock.hour:02d}:{clock.minute:02d}:{clock.second:02d} {zone}", now)
    assert now < found <= now + 26 * 3600
    shown = datetime.fromtimestamp(found, ZoneInfo(zone))
    if (shown.hour, shown.minute, shown.second) != (clock.hour, clock.minute, clock.second):
        before, after = (datetime.fromtimestamp(found + delta, ZoneInfo(zone)).utcoffset() for delta in (-7200, 7200))
        assert before != after, "only an hour that the clocks skip is shown as another"


def test_the_machines_zone_is_restored():
    assert os.environ.get("TZ") != "Europe/Berlin"
