"""A failure's fingerprint: the same for tasks that failed for the same reason, on whatever item.

Invariant: it is a function of what an outcome says of the failure, so that whoever groups failures,
or compares one with another, comes to the same. Nothing of a machine (folders, process ids, the
place of Python's own files) and nothing of an item (numbers, quoted text) is in it.
"""

from __future__ import annotations

import hashlib
import re

from batchlab.core.model import Failure

LENGTH = 12
"""Hexadecimal digits: of a million different reasons two have the same with a chance of 0.2%."""

_FRAME = re.compile(r'File "([^"\n]+)", line (\d+), in ([^\n]+)')
_COMPREHENSIONS = ("<listcomp>", "<dictcomp>", "<setcomp>")
"""Since Python 3.12 these have no frames of their own."""
_QUOTED = re.compile(r"""'[^'\n]*'|"[^"\n]*"|`[^`\n]*`""")
_PATH = re.compile(r"(?:[\w.~-]*/)+[\w.~-]*")
_NUMBERED = re.compile(r"[\w-]*\d[\w.-]*")
_INSTALLED = re.compile(r"^.*/(?:site|dist)-packages/|^.*/lib/python3[^/]*/")


def fingerprint(failure: Failure) -> str:
    """Twelve hexadecimal digits.

    An exception is known by its class and the lines of the user's own code that led to it; what has
    no such lines, by its kind and its sentence without numbers, quoted text and paths.
    """
    parts = [failure.kind.value, failure.error, str(failure.exit_code or "")]
    frames = _frames(failure.traceback)
    if frames:
        parts += frames
    else:
        parts.append(shape(failure.reason))
    return hashlib.sha256("\0".join(parts).encode(errors="replace")).hexdigest()[:LENGTH]


def shape(text: str) -> str:
    """A sentence without what differs from task to task."""
    for pattern, mark in ((_QUOTED, "'…'"), (_PATH, "/…"), (_NUMBERED, "#")):
        text = pattern.sub(mark, text)
    return " ".join(text.split())


def _frames(traceback: str) -> list[str]:
    """`file:line:function` of the job's own code, outermost first; of all code where the job has
    brought none. A recursion counts once."""
    found = [one for one in _FRAME.findall(traceback) if one[2] not in _COMPREHENSIONS]
    # The worker writes paths in the code folder without that folder.
    own = [one for one in found if not one[0].startswith(("/", "<"))] or found
    named = [f"{_INSTALLED.sub('', path)}:{line}:{name}" for path, line, name in own]
    return list(dict.fromkeys(named))
