"""Text of the page: moments, shares, amounts, and untrusted text.

Invariant: the names of jobs and stages, logs, and errors cannot change how the surrounding text
reads. Non-printable characters become visible escapes, and long text is cut.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from datetime import UTC, datetime
from decimal import ROUND_FLOOR, Decimal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from batchlab.reports.html.source import Run

_RIGHT_TO_LEFT = frozenset({"R", "AL", "AN"})
ISOLATE, END = "\u2068", "\u2069"


def visible(text: str, most: int = 200) -> str:
    """Return `text` as one line of at most `most` characters, with control characters as escapes.

    Characters that change the writing direction are escaped too. Right-to-left text is isolated, so
    that the surrounding words keep their order.
    """
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(text.split()))
    line = line if len(line) <= most else f"{line[: most - 1]}…"
    if any(unicodedata.bidirectional(c) in _RIGHT_TO_LEFT for c in line):
        return f"{ISOLATE}{line}{END}"
    return line


def visible_lines(text: str, most: int = 4000) -> str:
    """Return `text` with its line breaks and tabs, and other control characters as escapes.

    If the text is longer than `most` characters, keep its beginning (a third of `most`) and its end
    (two thirds of `most`).
    """
    shown = "".join(
        c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text.replace("\r\n", "\n")
    )
    if len(shown) <= most:
        return shown
    head, tail = shown[: most // 3], shown[-(most * 2 // 3) :]
    left_out = len(shown) - len(head) - len(tail)
    return f"{head}\n… {left_out:,} characters are left out …\n{tail}"


def moment(at_s: float | None) -> str:
    """Format a moment in UTC, to the second."""
    if at_s is None:
        return "–"
    return f"{datetime.fromtimestamp(at_s, UTC):%Y-%m-%d %H:%M:%S} UTC"


def offset(seconds: float, span_s: float) -> str:
    """Format the time since the run's start. The precision depends on the length `span_s` of the
    run.
    """
    if span_s < 100:
        return f"{seconds:.2f} s" if span_s < 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if span_s < 3600:
        return f"{minutes}:{rest:02d} min"
    return f"{hours}:{minutes:02d}:{rest:02d} h"


def at(run: Run, part: int, parts: int) -> str:
    """Format the end of one of `parts` equal intervals of the run."""
    return offset((part + 1) * run.span_s / parts, run.span_s)


def share(part: float, whole: float) -> str:
    """Format a percentage, such as `42%` or `<0.1%`. Only a full share is shown as 100%."""
    if not whole or not part:
        return "0%"
    per_cent = part / whole * 100
    if per_cent < 0.1:
        return "<0.1%"
    if 99.5 <= per_cent < 100:
        return f"{min(per_cent, 99.9):.1f}%"
    return f"{per_cent:.1f}%" if per_cent < 9.95 else f"{per_cent:.0f}%"


def adding_up(parts: Sequence[Decimal], decimals: int) -> list[Decimal]:
    """Round the parts to `decimals` so that they add up to their rounded sum.

    The parts with the largest remainders are rounded up.
    """
    unit = Decimal(1).scaleb(-decimals)
    down = [part.quantize(unit, ROUND_FLOOR) for part in parts]
    missing = int((sum(parts, Decimal(0)).quantize(unit) - sum(down, Decimal(0))) / unit)
    order = sorted(range(len(parts)), key=lambda k: parts[k] - down[k], reverse=True)
    for k in order[:missing]:
        down[k] += unit
    return down
