"""Fingerprint of a failure, which is equal for tasks that failed for the same reason.

Invariant: the fingerprint is a function of the failure in the outcome, so every program that groups
or compares failures calculates the same one. It does not depend on the machine (folders, process
ids, the path of Python's own files) or on the item (numbers, quoted text).
"""

from __future__ import annotations

import hashlib
import re

from batchlab.core.model import Failure

LENGTH = 12
"""Length in hexadecimal digits. Among a million reasons, two have equal fingerprints with a
probability of 0.2%."""

_FRAME = re.compile(r'File "([^"\n]+)", line (\d+), in ([^\n]+)')
_COMPREHENSIONS = ("<listcomp>", "<dictcomp>", "<setcomp>")
"""Comprehensions have their own frames only before Python 3.12."""
_QUOTED = re.compile(r"""'[^'\n]*'|"[^"\n]*"|`[^`\n]*`""")
_PATH = re.compile(r"(?:[\w.~-]*/)+[\w.~-]*")
_NUMBERED = re.compile(r"[\w-]*\d[\w.-]*")
_INSTALLED = re.compile(r"^.*/(?:site|dist)-packages/|^.*/lib/python3[^/]*/")


def fingerprint(failure: Failure) -> str:
    """Return a fingerprint of twelve hexadecimal digits.

    An exception is identified by its class and the lines of the user's code that led to it. A
    failure without such lines is identified by its kind and its reason, without numbers, quoted
    text, and paths.
    """
    parts = [failure.kind.value, failure.error, str(failure.exit_code or "")]
    frames = _frames(failure.traceback)
    if frames:
        parts += frames
    else:
        parts.append(shape(failure.reason))
    return hashlib.sha256("\0".join(parts).encode(errors="replace")).hexdigest()[:LENGTH]


def shape(text: str) -> str:
    """Return a sentence without the parts that differ between tasks."""
    for pattern, mark in ((_QUOTED, "'…'"), (_PATH, "/…"), (_NUMBERED, "#")):
        text = pattern.sub(mark, text)
    return " ".join(text.split())


def _frames(traceback: str) -> list[str]:
    """Return `file:line:function` of the job's own code, outermost first.

    If the traceback does not contain code of the job, return all frames. Repeated frames of a
    recursion count once.
    """
    found = [one for one in _FRAME.findall(traceback) if one[2] not in _COMPREHENSIONS]
    # The worker writes paths in the code folder without that folder.
    own = [one for one in found if not one[0].startswith(("/", "<"))] or found
    named = [f"{_INSTALLED.sub('', path)}:{line}:{name}" for path, line, name in own]
    return list(dict.fromkeys(named))
