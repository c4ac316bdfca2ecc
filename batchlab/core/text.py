"""Numbers as a person reads them: durations, sizes, counts; names in a row; and text of others,
made harmless.

Invariant: the one place that turns them into text, and a number is never shown without its unit.
Money is told where it is reckoned, in core/pricing/money.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any


def span(seconds: float) -> str:
    """A duration: 0 s, <0.1 ms, 0.3 ms, 40 ms, 3.2 s, 12 min 05 s, 3 h 20 min, 2 days 7 h."""
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
    """A duration in whole units, where a sentence needs no more: 12 s, 66 min, 2 h 5 min."""
    rounded = max(0, round(seconds))
    if rounded < 120:
        return f"{rounded} s"
    if rounded < 7200:
        return f"{rounded // 60} min"
    if rounded < 172_800:
        return f"{rounded // 3600} h {rounded % 3600 // 60} min"
    return f"{rounded // 86_400} days"


def about(seconds: float) -> str:
    """A duration to the precision that an estimate has: 1 s at the least, 10 min, 2.5 h."""
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
    """A duration, or a difference of two, to three figures, for comparing: 12.3 ms, 4.56 s."""
    return f"{seconds * 1000:.3g} ms" if abs(seconds) < 1 else f"{seconds:.3g} s"


def size(size_bytes: float) -> str:
    """A size: 312 B, 4.0 KiB, 1.2 GiB."""
    if size_bytes < 1024:
        return f"{size_bytes:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        size_bytes /= 1024
        if size_bytes < 1024:
            return f"{size_bytes:.1f} {unit}"
    return f"{size_bytes / 1024:.1f} TiB"


def capital(text: str) -> str:
    """The same with a capital at its beginning, and all else as it is."""
    return text[:1].upper() + text[1:]


def count(number: int, noun: str) -> str:
    """`1 task`, `2 tasks`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def listed(names: Sequence[str], most: int = 4) -> str:
    """`a`, `a and b`, `a, b and 3 more`; at most so many parts."""
    names = list(names)
    if len(names) > most:
        names = [*names[: most - 1], f"{len(names) - most + 1} more"]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def first_of(names: Sequence[str], most: int = 6) -> str:
    """`a, b`, `a, b and 3 more`: the first ones by name, the rest counted."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


_LAYOUT = "\n\t"
_SPACES = "\u00a0\u202f"
"""Spaces that Python does not count as printable."""
_NOTHING = str.maketrans("", "", _LAYOUT + _SPACES)


def visible(text: str, layout: str = _LAYOUT) -> str:
    """`text` with its line breaks and tabs; what else is not printable is written as Python writes
    it. So no terminal takes a part of it for a command, and none of it stands in another order
    than it is read in."""
    if text.isprintable() or (layout == _LAYOUT and text.translate(_NOTHING).isprintable()):
        return text
    kept = layout + _SPACES
    return "".join(c if c.isprintable() or c in kept else repr(c)[1:-1] for c in text)


def visible_json(value: Any, *, indent: int | None = None) -> str:
    """`value` as JSON, in which what is not printable is escaped."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    if text.translate(_NOTHING).isprintable():
        return text
    # JSON's own way: none of these can stand outside of a text, but the line breaks.
    kept = "\n" + _SPACES
    return "".join(c if c.isprintable() or c in kept else json.dumps(c)[1:-1] for c in text)
