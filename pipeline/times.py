"""Durations and times of day as options give them."""

import re
from datetime import UTC, date, datetime, timedelta
from datetime import time as Time
from zoneinfo import ZoneInfo

from .errors import UsageError

_DURATION = re.compile(r"(\d+(?:\.\d+)?)([hms]?)", re.ASCII)
_MOMENT = re.compile(
    r"(?:(?P<date>\d{4}-\d\d-\d\d)[T ])?(?P<hour>\d\d?):(?P<minute>\d\d)(?::(?P<second>\d\d))?"
    r"(?: ?(?P<offset>Z|[+-]\d\d:\d\d)| (?P<zone>[A-Za-z][\w+-]*(?:/[\w+-]+)*))?",
    re.ASCII,
)


def seconds(name: str, text: str) -> float:
    """Parse a duration such as 6h, 90m or 45s into seconds; a number without a unit is in seconds.

    Raises:
        UsageError: it is none; `name` is the option's.
    """
    match = _DURATION.fullmatch(text.strip())
    if match is None or not float(match[1]):
        raise UsageError(f"{name} {text!r} must be a duration such as 6h, 90m or 45s")
    return float(match[1]) * {"h": 3600, "m": 60}.get(match[2], 1)


def finish_time(text: str, now: float) -> float:
    """The time that a `finish_by` means, in seconds since the epoch.

    Args:
        text: a duration with its unit, counted from now (3h, 90m); a time of day, which is the next one (06:00); or
            a date and time, which may be past (2026-11-28 06:00, 2026-11-28T06:00). A time may have an offset or a
            zone (06:00Z, 06:00+01:00, 06:00 Europe/Berlin); by default it is this machine's.
        now: the present, in seconds since the epoch.

    Raises:
        UsageError: it is none of these.
    """
    problem = f"finish_by {text!r} must be a time such as 06:00, 06:00 Europe/Berlin or 2026-11-28T06:00Z, or 3h or 90m"
    try:
        moment = _moment(text.strip(), now)
        datetime.fromtimestamp(moment, UTC)  # raises if the calendar does not go so far
        return moment
    except (ValueError, OverflowError, KeyError, OSError) as error:  # KeyError: no such zone; OSError: part of a name
        raise UsageError(f"{problem} ({error})") from error


def _moment(text: str, now: float) -> float:
    if _DURATION.fullmatch(text) and text[-1] in "hms":
        return now + seconds("finish_by", text)
    match = _MOMENT.fullmatch(text)
    if match is None:
        raise ValueError("it is neither")
    offset = {None: "", "Z": "+00:00"}.get(match["offset"], match["offset"])
    zone = ZoneInfo(match["zone"]) if match["zone"] else Time.fromisoformat(f"00:00{offset}").tzinfo
    clock = Time(int(match["hour"]), int(match["minute"]), int(match["second"] or 0), tzinfo=zone)
    if match["date"]:
        return datetime.combine(date.fromisoformat(match["date"]), clock).timestamp()
    today = datetime.fromtimestamp(now, zone).date()  # a datetime without a zone is in this machine's
    moments = (datetime.combine(today + timedelta(days), clock).timestamp() for days in range(3))
    return next(moment for moment in moments if moment > now)
