"""What of the environment a job's code is not given when it runs on somebody's own machine.

Invariant: a variable reaches the task only if it is named or `environment.is_harmless` lists it.
No rule recognizes each secret, so it is not enough that a variable does not look like one.
It is no sandbox: the task runs with its user's rights, and can read what they can. Imported by the
process that runs the task: standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from batchlab.worker.environment import is_harmless

NAMED = 5
"""Variables that are named before the rest is counted."""
_LOGIN = re.compile(r"://[^/@\s]*:[^/@\s]+@")
"""A password in an address."""


def withheld(environ: Mapping[str, str], passed: Collection[str] = ()) -> list[str]:
    """Names of the variables that are kept back, but for those that are to be `passed`."""
    return sorted(
        name
        for name, value in environ.items()
        if name not in passed and (not is_harmless(name) or _LOGIN.search(value))
    )


def given(environ: Mapping[str, str], passed: Collection[str] = ()) -> dict[str, str]:
    """The environment without them."""
    kept_back = frozenset(withheld(environ, passed))
    return {name: value for name, value in environ.items() if name not in kept_back}


def told(names: list[str]) -> str:
    """A sentence about what is kept back, "" where nothing is."""
    if not names:
        return ""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    are = "is" if len(names) == 1 else "are"
    return (
        f"{', '.join(names[:NAMED])}{more} {are} set here and {are} not given to it: --env NAME "
        "gives it one."
    )
