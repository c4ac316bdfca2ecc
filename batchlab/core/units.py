"""Durations, sizes, and start times as people write them.

Invariant: a text without a unit is refused. A plain number has one fixed unit.
"""

from __future__ import annotations

import re
from datetime import datetime

DURATION_FORMS = "30s, 5m, 1h30m, 2d, 250ms or a number of seconds"
SIZE_FORMS = "512 MiB, 8 GiB, 100 MB or a number of bytes"
AT_FORMS = "+10m or a time with its zone such as 2026-01-31T06:00:00Z"

LONGEST_S = 100 * 366 * 86_400.0
LARGEST_BYTES = 2**60
_LAST_YEAR = 9998
"""Limits. A larger number is probably a mistake, and some store, timer, or calendar cannot
represent it."""

DURATION_PATTERN = r"^\s*(\d+(\.\d+)?\s*(ms|s|m|min|h|d)\s*)+$"
SIZE_PATTERN = r"^\s*\d+(\.\d+)?\s*([KMGT]i?)?B\s*$"

_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86_400.0}
_STEPS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_PIECE = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|min|s|m|h|d)")
_CLOCK = re.compile(r"\s*(\d{1,2}:\d\d|\d{4}-\d\d-\d\d|\d{1,2}[./]\d{1,2}[./]\d{4})")
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B\s*", re.IGNORECASE)


def shown(value: object) -> str:
    """Return `value` for an error, shortened because a mistake may have made it long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:40]}…{text[-10:]}"


def seconds(value: object) -> float:
    """Return a duration in seconds.

    Raise ValueError if the value is not a duration, or is longer than a century.
    """
    if isinstance(value, str) and re.match(DURATION_PATTERN, value):
        number: float = sum(float(n) * _SECONDS[unit] for n, unit in _PIECE.findall(value))
    elif isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        is_clock = isinstance(value, str) and _CLOCK.match(value)
        raise ValueError(
            f"{shown(value)} is not a duration{', but a time of day or a date' if is_clock else ''}"
        )
    else:
        number = value
    if number > LONGEST_S:
        raise ValueError(f"{shown(value)} is longer than a century")
    return float(number)


def size_bytes(value: object) -> int:
    """Return a size in bytes (KiB = 1024, kB = 1000).

    Raise ValueError if the value is not a size, or is over 1 EiB.
    """
    number: float | None = None
    if isinstance(value, str) and (match := _SIZE.fullmatch(value)):
        digits, prefix, binary = match.groups()
        if prefix or not binary:
            base = 1024 if binary else 1000
            number = float(digits) * base ** _STEPS[prefix.upper()]
    elif isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        number = value
    if number is None:
        raise ValueError(f"{shown(value)} is not a size")
    if number > LARGEST_BYTES:
        raise ValueError(f"{shown(value)} is larger than any disk")
    return int(number)


def start_s(text: str, now_s: float) -> float:
    """Return the epoch second of a start time. `+10m` counts from `now_s`.

    Raise ValueError for any other text.
    """
    if text.startswith("+"):
        return now_s + seconds(text[1:])
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{shown(text)} is not a start time") from None
    if moment.tzinfo is None:
        raise ValueError(f"{text!r} has no time zone")
    if moment.year > _LAST_YEAR:
        raise ValueError(f"{text!r} is too far away")
    return moment.timestamp()
