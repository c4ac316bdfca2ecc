"""Output of commands on stdout and stderr, as sentences, tables, times, and JSON.

The module also contains the exception Stopped for Ctrl-C and SIGTERM. asyncio, Typer, and finalizers do not swallow
Stopped. Invariant: control characters in a text are replaced before the text is printed on a terminal.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from batchlab.core.errors import BatchlabError, JobFileError, UsageError
from batchlab.core.text import count as count
from batchlab.core.text import size as size
from batchlab.core.text import span as span
from batchlab.core.text import visible as visible
from batchlab.core.text import visible_json

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

    from batchlab.jobs.submission import Uploaded

_NUMBER = re.compile(r"-|[\d.,/+]*( (ms|s|min|h|days|B|[KMGT]iB)( \d\d? (s|min|h))?)?")


def say(text: str) -> None:
    """Print a note on stderr."""
    print(visible(text), file=sys.stderr, flush=True)  # noqa: T201 - the only function that prints to stderr


def show_warnings(warnings: Iterable[object]) -> None:
    """Print warnings on stderr."""
    for warning in warnings:
        say(clean(f"Warning: {warning}"))


class ThrottledNotes:
    """Printer of notes on long work.

    The printer prints at most one note every `every_s` seconds. The first note is printed after `every_s` seconds at
    the earliest.
    """

    def __init__(self, every_s: float = 3.0) -> None:
        self._every_s = every_s
        self._said_s = time.monotonic()

    def say(self, text: str) -> None:
        if time.monotonic() - self._said_s >= self._every_s:
            self._said_s = time.monotonic()
            say(text)

    def say_uploaded(self, progress: Uploaded) -> None:
        self.say(f"Uploaded {progress.files:,} of {progress.of:,} files, {size(progress.size_bytes)}.")


def show(text: str) -> None:
    """Print a result on stdout."""
    print(visible(text), flush=True)  # noqa: T201 - prints results for the user


def show_exact(text: str) -> None:
    """Print a result for a program on stdout. If stdout is a terminal, control characters are replaced."""
    print(visible(text) if sys.stdout.isatty() else text, flush=True)  # noqa: T201 - prints results for programs


def show_json(value: Any, *, indent: int | None = 2) -> None:
    """Print `value` as JSON on stdout."""
    show(visible_json(value, indent=indent))


def agrees(question: str, *, typed: str = "") -> bool:
    """Ask the user a question, and return whether the user agrees. If `typed` is given, the user must type this text.

    Raise UsageError if stdin is not a terminal.
    """
    if not sys.stdin.isatty():
        raise UsageError("The question needs a terminal.", remedy="Add --yes to agree without a question.")
    how = f"type {typed} to go on" if typed else "y/N"
    print(f"{clean(question)} [{how}] ", end="", file=sys.stderr, flush=True)  # noqa: T201
    try:
        text = input().strip()
    except EOFError:
        text = ""
    agreed = text == typed if typed else text.lower() in ("y", "yes")
    if not agreed:
        say("Nothing is changed.")
    return agreed


def answer(json: bool, value: Any, text: str) -> None:
    """Print `value` as JSON if `json` is true, and otherwise `text`."""
    show_json(value) if json else show(text)


def listing(json: bool, value: Any, columns: Sequence[str], rows: Iterable[Sequence[object]], nothing: str) -> None:
    """Print `value` as JSON if `json` is true, and otherwise the rows as a table.

    Print the note `nothing` instead of an empty table.
    """
    if json:
        show_json(value)
    elif value:
        show(table(columns, rows))
    else:
        say(nothing)


def attributes(value: object, *names: str) -> dict[str, Any]:
    """Return the named attributes of a value by name, for output as JSON."""
    return {name: getattr(value, name) for name in names}


def cells(view: Mapping[str, object], *keys: str) -> tuple[object, ...]:
    """Return the values of `view` in the order of `keys`, as the cells of one row of a table."""
    return tuple(view[key] for key in keys)


def show_error(error: BatchlabError) -> None:
    """Print the message of an error on stderr, and the error's remedy on the next line."""
    errors: Sequence[BatchlabError] = getattr(error, "errors", ()) or [error]
    for one in errors:
        where = ""
        if isinstance(one, JobFileError) and one.file:
            where = f"{one.file}:{one.line}: " if one.line else f"{one.file}: "
        say(clean(f"{where or 'Error: '}{one.message}"))
        if one.remedy:
            say(f"  {clean(one.remedy)}")


def check_writable(file: Path, *, folder: bool = False) -> None:
    """Raise UsageError if the file cannot be written. Commands call `check_writable` before long work begins.

    If `folder` is true, create the folder of the file.
    """
    try:
        _try_to_write(file, folder=folder)
    except OSError as error:
        raise UsageError(f"{file} cannot be written: {error.strerror}.", remedy="Name another file.") from error


def check_folder(folder: Path) -> None:
    """Raise UsageError if results cannot be written to the folder. A folder that does not exist is not created, because
    the run may still be refused."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        _try_to_write(folder / "summary.json", folder=True)
        for path in missing:
            path.rmdir()
    except OSError as error:
        raise UsageError(
            f"The results cannot be written to {folder}: {error.strerror}.", remedy="Name another folder with --out."
        ) from error


def _try_to_write(file: Path, *, folder: bool) -> None:
    if folder:
        file.parent.mkdir(parents=True, exist_ok=True)
    if file.exists():
        file.open("ab").close()
    else:
        # If `file` is a symbolic link to a missing file, create and remove the missing file, and keep the link.
        path = Path(os.path.realpath(file))
        path.open("xb").close()
        path.unlink()


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a text table with aligned columns, two blanks between columns, and right-aligned numbers.

    Unlike a table of the package rich, the text table looks the same in a terminal, a pipe, and a ticket. Long cells
    are not cut off at 80 columns.
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
    """Return `text` in one line, with unprintable characters replaced."""
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))


def moment(at_s: float | None) -> str:
    """Return the date and the time in the local time zone, or "-" for None."""
    if at_s is None:
        return "-"
    return datetime.fromtimestamp(at_s).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def optional_span(span_s: float | None) -> str:
    """Return a duration as text, or "-" if `span_s` is None."""
    return "-" if span_s is None else span(span_s)


INTERRUPTED = 130
RERAISE_DELAY_S = 0.05
"""Delay in seconds before SIGINT is sent again, if Python has dropped the exception of a signal handler."""
_BOTH = (signal.SIGINT, signal.SIGTERM)


class Stopped(SystemExit):
    """Interruption of the command by Ctrl-C or SIGTERM.

    The base class is SystemExit, because asyncio propagates only SystemExit and KeyboardInterrupt, and Typer converts
    KeyboardInterrupt to exit code 1.
    """


def install_signal_handlers() -> None:
    """Make SIGINT and SIGTERM raise Stopped in the main thread."""
    for number in _BOTH:
        signal.signal(number, _stop)
    sys.unraisablehook = _on_dropped


@contextmanager
def as_keyboard_interrupt() -> Iterator[None]:
    """Make SIGINT and SIGTERM raise KeyboardInterrupt inside the `with` block.

    A KeyboardInterrupt that leaves the `with` block becomes Stopped. The simulator runs a user's code in this process,
    and attributes a SystemExit to the user's code.
    """
    before = {number: signal.signal(number, signal.default_int_handler) for number in _BOTH}
    try:
        yield
    except KeyboardInterrupt:
        raise Stopped(INTERRUPTED) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(_number: int, _frame: FrameType | None) -> None:
    raise Stopped(INTERRUPTED)


def _on_dropped(dropped: UnraisableHookArgs) -> None:
    """Send SIGINT again if Python dropped an exception that a signal handler raised.

    Python drops an exception that is raised in a finalizer or in a callback of a weak reference. Each task of asyncio
    has a callback of a weak reference.
    """
    if not issubclass(dropped.exc_type, (Stopped, KeyboardInterrupt)):
        sys.__unraisablehook__(dropped)
        return
    main = threading.main_thread().ident
    again = threading.Timer(RERAISE_DELAY_S, signal.pthread_kill, (main, signal.SIGINT))
    again.daemon = True
    again.start()
