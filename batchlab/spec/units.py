"""Durations, sizes and start times as people write them.

Invariant: a text without a unit is refused, never guessed at; a plain number has one fixed unit.
"""

from __future__ import annotations

import math
import re
from datetime import datetime

DURATION_FORMS = "30s, 5m, 1h30m, 2d, 250ms or a number of seconds"
SIZE_FORMS = "512 MiB, 8 GiB, 100 MB or a number of bytes"
AT_FORMS = "+10m or a time with its zone such as 2026-01-31T06:00:00Z"

DURATION_PATTERN = r"^\s*(\d+(\.\d+)?\s*(ms|s|m|min|h|d)\s*)+$"
SIZE_PATTERN = r"^\s*\d+(\.\d+)?\s*([KMGT]i?)?B\s*$"

_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86_400.0}
_STEPS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_PIECE = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|min|s|m|h|d)")
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B\s*", re.IGNORECASE)


def _number(value: object) -> float | None:
    """`value` as a number that is finite and not negative, None for everything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if math.isfinite(value) and value >= 0 else None


def seconds(value: object) -> float:
    """A duration in seconds; ValueError naming the accepted forms."""
    if isinstance(value, str) and re.match(DURATION_PATTERN, value):
        return sum(float(n) * _SECONDS[unit] for n, unit in _PIECE.findall(value))
    number = _number(value)
    if number is None:
        raise ValueError(f"{value!r} is not a duration")
    return float(number)


def size_bytes(value: object) -> int:
    """A size in bytes (KiB = 1024, kB = 1000); ValueError naming the accepted forms."""
    if isinstance(value, str) and (match := _SIZE.fullmatch(value)):
        number, prefix, binary = match.groups()
        if prefix or not binary:
            base = 1024 if binary else 1000
            return int(float(number) * base ** _STEPS[prefix.upper()])
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is not a size")
    return value


def start_s(text: str, now_s: float) -> float:
    """The epoch second that `text` names, seen from `now_s`; ValueError for anything else."""
    if text.startswith("+"):
        return now_s + seconds(text[1:])
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a start time") from None
    if moment.tzinfo is None:
        raise ValueError(f"{text!r} has no time zone")
    return moment.timestamp()
