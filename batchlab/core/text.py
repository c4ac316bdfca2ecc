"""Text for people: durations, sizes, counts, lists of names, and safe output of foreign text.

Invariant: only this module converts these numbers to text, and it always adds the unit.
`core.pricing.money` does this for money.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any


def span(seconds: float) -> str:
    """Return a duration: 0 s, <0.1 ms, 0.3 ms, 40 ms, 3.2 s, 12 min 05 s, 3 h 20 min, 2 days 7
    h."""
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


def size(size_bytes: float) -> str:
    """Return a size: 312 B, 4.0 KiB, 1.2 GiB."""
    if size_bytes < 1024:
        return f"{size_bytes:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        size_bytes /= 1024
        if size_bytes < 1024:
            return f"{size_bytes:.1f} {unit}"
    return f"{size_bytes / 1024:.1f} TiB"


def capital(text: str) -> str:
    """Return the text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def count(number: int, noun: str) -> str:
    """Return a count: `1 task`, `2 tasks`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def listed(names: Sequence[str], most: int = 4) -> str:
    """Return names as `a`, `a and b`, or `a, b and 3 more`, with at most `most` parts."""
    names = list(names)
    if len(names) > most:
        names = [*names[: most - 1], f"{len(names) - most + 1} more"]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def first_of(names: Sequence[str], most: int = 6) -> str:
    """Return the first `most` names and the number of the others: `a, b and 3 more`."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


_LAYOUT = "\n\t"
_SPACES = "\u00a0\u202f"
"""Spaces that Python does not count as printable."""
_NOTHING = str.maketrans("", "", _LAYOUT + _SPACES)


def visible(text: str, layout: str = _LAYOUT) -> str:
    """Return `text` with escapes for all unprintable characters except line breaks and tabs.

    So a terminal cannot execute a part of it, and its characters appear in their actual order.
    """
    if text.isprintable() or (layout == _LAYOUT and text.translate(_NOTHING).isprintable()):
        return text
    kept = layout + _SPACES
    return "".join(c if c.isprintable() or c in kept else repr(c)[1:-1] for c in text)


def visible_json(value: Any, *, indent: int | None = None) -> str:
    """Return `value` as JSON with unprintable characters escaped."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    if text.translate(_NOTHING).isprintable():
        return text
    # Outside of strings, the only such character in JSON is the line break. So JSON's own escapes
    # are valid for all others.
    kept = "\n" + _SPACES
    return "".join(c if c.isprintable() or c in kept else json.dumps(c)[1:-1] for c in text)
