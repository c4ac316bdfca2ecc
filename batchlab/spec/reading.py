"""The text of a file that a person wrote, and the mistakes in it as errors.

Invariant: whatever lies at the path, looking at it ends, and with one sentence.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from batchlab.errors import JobFileError
from batchlab.spec import source
from batchlab.spec.problems import JobFileErrors, Problem

_MOST_TOLD = 50
"""Mistakes of one file: nobody reads more, and the first may be the cause of all."""


def text_of(path: Path, what: str, none: str) -> str:
    """The text of the file at `path`, which is to be a `what`; JobFileError where it cannot be
    read, with `none` as the remedy where there is none."""
    try:
        # A pipe would be waited for, and a device might never end.
        if path.exists() and not path.is_file():
            raise _unreadable(path, what, "it is no file", _inside(path))
        with path.open(encoding="utf-8") as file:
            return file.read(source.MAX_CHARACTERS + 1)
    except FileNotFoundError as error:
        raise JobFileError(
            f"There is no such {what}.",
            file=str(path),
            remedy=none,
        ) from error
    except UnicodeDecodeError as error:
        raise _unreadable(
            path, what, f"it is not UTF-8 text, from byte {error.start} on"
        ) from error
    except (OSError, ValueError) as error:
        raise _unreadable(path, what, getattr(error, "strerror", None) or str(error)) from error


def _inside(path: Path) -> str:
    """What to write in place of the folder that a file lies in."""
    found = sorted(path.glob("*.yaml")) if path.is_dir() else []
    return f"Did you mean {found[0]}?" if len(found) == 1 else ""


def _unreadable(path: Path, what: str, why: str, remedy: str = "") -> JobFileError:
    return JobFileError(
        f"The {what} cannot be read: {why}.",
        file=str(path),
        remedy=remedy or "Write the path of a text file in UTF-8.",
    )


def another(path: Path, message: str, remedy: str) -> JobFileErrors:
    """The file at `path` is one of another kind: its keys would all be mistakes, and are none."""
    return JobFileErrors([JobFileError(message, file=str(path), remedy=remedy)])


def errors(path: Path, document: source.Document, problems: Sequence[Problem]) -> JobFileErrors:
    """What `document`, read from `path`, has wrong with it: each mistake once, at its line."""
    found = {}
    for problem in problems:
        line = document.line(problem)
        # A mistake in an anchored part shows once, however many aliases repeat it.
        found[line, problem.message] = JobFileError(
            problem.message, file=str(path), line=line, remedy=problem.remedy
        )
    told = [found[key] for key in sorted(found, key=lambda key: key[0] or 0)]
    if len(told) > _MOST_TOLD:
        more = f"There are {len(told) - _MOST_TOLD} more mistakes."
        told[_MOST_TOLD:] = [
            JobFileError(more, file=str(path), remedy="Mend the first ones first.")
        ]
    return JobFileErrors(told)
