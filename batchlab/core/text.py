"""Conversion of durations, sizes, counts, names, and start times to and from text for people.

Invariants: only this module converts durations, sizes, and counts to text, and always with a unit
(`core.pricing.price_book` converts amounts of money). A duration or a size that a user writes as text must have a unit.
A plain number is a duration in seconds or a size in bytes.
"""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Sequence
from datetime import datetime
from typing import Any


def span(seconds: float) -> str:
    """Return a duration as text, such as 0 s, <0.1 ms, 0.3 ms, 40 ms, 3.2 s, 12 min 05 s, 3 h 20 min, 2 days 7 h."""
    if seconds <= 0:
        return "0 s"
    if seconds < 0.00005:
        return "<0.1 ms"
    if seconds < 0.00995:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 100:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} days {hours % 24} h"


def whole(seconds: float) -> str:
    """Return a duration in whole units for a sentence: 12 s, 66 min, 2 h 5 min."""
    rounded = max(0, round(seconds))
    if rounded < 120:
        return f"{rounded} s"
    if rounded < 7200:
        return f"{rounded // 60} min"
    if rounded < 172_800:
        return f"{rounded // 3600} h {rounded % 3600 // 60} min"
    return f"{rounded // 86_400} days"


def about(seconds: float) -> str:
    """Return a duration with the precision of an estimate: 1 s (the minimum), 10 min, 2.5 h."""
    if seconds < 1:
        return "1 s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    if seconds < 172_800:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86_400:.1f} days"


def figures(seconds: float) -> str:
    """Return a duration or a difference with three significant digits: 12.3 ms, 4.56 s."""
    return f"{seconds * 1000:.3g} ms" if abs(seconds) < 1 else f"{seconds:.3g} s"


def significant(number: float, digits: int, separator: str = "") -> str:
    """Return a finite number with at most `digits` significant digits and without an exponent, such as 0.00000332.

    `separator` is "" or "," and separates thousands.
    """
    if not number:
        return "0"
    _, _, exponent = f"{number:.{digits - 1}e}".partition("e")
    decimals = digits - 1 - int(exponent)
    if decimals <= 0:
        return f"{round(number, decimals):{separator}.0f}"
    return f"{number:{separator}.{decimals}f}".rstrip("0").rstrip(".")


def size(size_bytes: float) -> str:
    """Return a size as text, such as 312 B, 4.0 KiB, or 1.2 GiB."""
    if size_bytes < 1024:
        return f"{size_bytes:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        size_bytes /= 1024
        if size_bytes < 1024:
            return f"{size_bytes:.1f} {unit}"
    return f"{size_bytes / 1024:.1f} TiB"


def signal_name(number: int) -> str:
    """Return the name of a signal, such as SIGKILL."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def process_end(code: int) -> str:
    """Return how a process ended, such as `exit 3`, or `killed by SIGKILL, exit -9` for the exit code -9."""
    return f"exit {code}" if code >= 0 else f"killed by {signal_name(-code)}, exit {code}"


KILLED = process_end(-signal.SIGKILL)
TERMINATED = process_end(-signal.SIGTERM)


def capital(text: str) -> str:
    """Return the text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def count(number: int, noun: str) -> str:
    """Return a number with its noun, such as `1 task` or `2 tasks`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def join_list(names: Sequence[str], most: int = 4) -> str:
    """Return a list of names as text, such as `a`, `a and b`, or `a, b and 3 more`, with at most `most` parts."""
    names = list(names)
    if len(names) > most:
        names = [*names[: most - 1], f"{len(names) - most + 1} more"]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def first_of(names: Sequence[str], most: int = 6) -> str:
    """Return the first `most` names and the number of further names, such as `a, b and 3 more`."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


_LAYOUT = "\n\t"
_SPACES = "\u00a0\u202f"
"""Spaces that Python does not count as printable."""
_NOTHING = str.maketrans("", "", _LAYOUT + _SPACES)


def visible(text: str, layout: str = _LAYOUT) -> str:
    """Return `text` with escapes for all unprintable characters except line breaks and tabs.

    The escapes prevent a terminal from executing a part of the text or reordering the characters of the text.
    """
    if text.isprintable() or (layout == _LAYOUT and text.translate(_NOTHING).isprintable()):
        return text
    allowed = layout + _SPACES
    return "".join(c if c.isprintable() or c in allowed else repr(c)[1:-1] for c in text)


def visible_json(value: Any, *, indent: int | None = None) -> str:
    """Return `value` as JSON with unprintable characters escaped."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    if text.translate(_NOTHING).isprintable():
        return text
    # The only unprintable character outside of JSON strings is the line break, so JSON escapes are valid for all other
    # unprintable characters.
    allowed = "\n" + _SPACES
    return "".join(c if c.isprintable() or c in allowed else json.dumps(c)[1:-1] for c in text)


DURATION_FORMS = "30s, 5m, 1h30m, 2d, 250ms or a number of seconds"
SIZE_FORMS = "512 MiB, 8 GiB, 100 MB or a number of bytes"
AT_FORMS = "+10m or a time with its zone such as 2026-01-31T06:00:00Z"

LONGEST_S = 100 * 366 * 86_400.0
LARGEST_BYTES = 2**60
_LAST_YEAR = 9998
"""LONGEST_S, LARGEST_BYTES, and _LAST_YEAR are the maximum of a duration, of a size, and of the year of a start time.

A larger duration, size, or year is probably a mistake, and some stores, timers, or calendars cannot represent it.
"""

DURATION_PATTERN = r"^\s*(\d+(\.\d+)?\s*(ms|s|m|min|h|d)\s*)+$"
SIZE_PATTERN = r"^\s*\d+(\.\d+)?\s*([KMGT]i?)?B\s*$"

_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86_400.0}
_STEPS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_PIECE = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|min|s|m|h|d)")
_CLOCK = re.compile(r"\s*(\d{1,2}:\d\d|\d{4}-\d\d-\d\d|\d{1,2}[./]\d{1,2}[./]\d{4})")
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B\s*", re.IGNORECASE)


def show_value(value: object) -> str:
    """Return `value` as text for an error message, shortened because an invalid value may be long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:40]}…{text[-10:]}"


def seconds(value: object) -> float:
    """Return a duration in seconds. Raise ValueError if the value is not a duration, or is longer than a century."""
    if isinstance(value, str) and re.match(DURATION_PATTERN, value):
        number: float = sum(float(n) * _SECONDS[unit] for n, unit in _PIECE.findall(value))
    elif isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        is_clock = isinstance(value, str) and _CLOCK.match(value)
        raise ValueError(f"{show_value(value)} is not a duration{', but a time of day or a date' if is_clock else ''}")
    else:
        number = value
    if number > LONGEST_S:
        raise ValueError(f"{show_value(value)} is longer than a century")
    return float(number)


def size_bytes(value: object) -> int:
    """Return a size in bytes (KiB = 1024, kB = 1000). Raise ValueError if the value is not a size, or is over 1 EiB."""
    number: float | None = None
    if isinstance(value, str) and (match := _SIZE.fullmatch(value)):
        digits, prefix, binary = match.groups()
        if prefix or not binary:
            base = 1024 if binary else 1000
            number = float(digits) * base ** _STEPS[prefix.upper()]
    elif isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        number = value
    if number is None:
        raise ValueError(f"{show_value(value)} is not a size")
    if number > LARGEST_BYTES:
        raise ValueError(f"{show_value(value)} is larger than any disk")
    return int(number)


def start_s(text: str, now_s: float) -> float:
    """Return the epoch second of a start time, which may be relative to `now_s`, such as `+10m`.

    Raise ValueError if the text is not a start time.
    """
    if text.startswith("+"):
        return now_s + seconds(text[1:])
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{show_value(text)} is not a start time") from None
    if moment.tzinfo is None:
        raise ValueError(f"{text!r} does not have a time zone")
    if moment.year > _LAST_YEAR:
        raise ValueError(f"{text!r} is too far in the future")
    return moment.timestamp()
