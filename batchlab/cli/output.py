"""What a person reads: sentences, tables, durations; and JSON for programs.

Invariant: no control character of anybody's text reaches the terminal, whoever prints it.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from batchlab.core.errors import BatchlabError, JobFileError, UsageError
from batchlab.core.text import count as count
from batchlab.core.text import size as size
from batchlab.core.text import span as span
from batchlab.core.text import visible as visible
from batchlab.core.text import visible_json

_NUMBER = re.compile(r"-|[\d.,/+]*( (ms|s|min|h|days|B|[KMGT]iB)( \d\d? (s|min|h))?)?")


def say(text: str) -> None:
    """A note for the person in front, on stderr."""
    print(visible(text), file=sys.stderr, flush=True)  # noqa: T201 - the one place that does


class Sometimes:
    """Notes on something that may take long: none at first, then one every few seconds."""

    def __init__(self, every_s: float = 3.0) -> None:
        self._every_s = every_s
        self._said_s = time.monotonic()

    def say(self, text: str) -> None:
        if time.monotonic() - self._said_s >= self._every_s:
            self._said_s = time.monotonic()
            say(text)


def show(text: str) -> None:
    """Output that somebody asked for, on stdout."""
    print(visible(text), flush=True)  # noqa: T201 - the one place that does


def show_exact(text: str) -> None:
    """The same for a program; at a terminal there is a person after all."""
    print(visible(text) if sys.stdout.isatty() else text, flush=True)  # noqa: T201 - as above


def show_json(value: Any, *, indent: int | None = 2) -> None:
    """`value` as JSON on stdout."""
    show(visible_json(value, indent=indent))


def complain(error: BatchlabError) -> None:
    """One error on stderr: a sentence, and below it what to do."""
    errors: Sequence[BatchlabError] = getattr(error, "errors", ()) or [error]
    for one in errors:
        where = ""
        if isinstance(one, JobFileError) and one.file:
            where = f"{one.file}:{one.line}: " if one.line else f"{one.file}: "
        say(clean(f"{where or 'Error: '}{one.message}"))
        if one.remedy:
            say(f"  {clean(one.remedy)}")


def check_writable(file: Path, *, folder: bool = False) -> None:
    """UsageError where it cannot be written: found out before the hours that lead to what is to
    be written there. With `folder` that of the file is made, the file itself is not."""
    try:
        _try_to_write(file, folder=folder)
    except OSError as error:
        raise UsageError(
            f"{file} cannot be written: {error.strerror}.", remedy="Name another file."
        ) from error


def check_folder(folder: Path) -> None:
    """The same for a folder of results, which is made."""
    try:
        _try_to_write(folder / "summary.json", folder=True)
    except OSError as error:
        raise UsageError(
            f"The results cannot be written to {folder}: {error.strerror}.",
            remedy="Name another folder with --out.",
        ) from error


def _try_to_write(file: Path, *, folder: bool) -> None:
    if folder:
        file.parent.mkdir(parents=True, exist_ok=True)
    if file.exists():
        file.open("ab").close()
    else:
        # A link to nothing stays: what is made is what it names.
        made = Path(os.path.realpath(file))
        made.open("xb").close()
        made.unlink()


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Aligned columns with one blank pair between them; numbers to the right.

    Plain text rather than rich's table: the same in a terminal, a pipe and a ticket, and a long
    reason is not cut off at 80 columns where nobody sees a terminal.
    """
    cells = [[clean(str(cell)) for cell in row] for row in rows]
    right = [bool(cells) and all(_is_number(row[i]) for row in cells) for i in range(len(columns))]
    widths = [max(len(name), *(len(row[i]) for row in cells), 0) for i, name in enumerate(columns)]
    lines = [
        "  ".join(
            text.rjust(width) if to_right else text.ljust(width)
            for text, width, to_right in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in [[name.upper() for name in columns], *cells]
    ]
    return "\n".join(lines)


def _is_number(text: str) -> bool:
    return _NUMBER.fullmatch(text) is not None


def clean(text: str) -> str:
    """`text` in one line, what is not printable replaced."""
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))


def moment(at_s: float | None) -> str:
    """A time of day in the reader's own zone, with the date."""
    if at_s is None:
        return "-"
    return datetime.fromtimestamp(at_s).astimezone().strftime("%Y-%m-%d %H:%M:%S")
