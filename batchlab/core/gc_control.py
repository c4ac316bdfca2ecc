"""Python's collector of garbage, in a process that is being started.

Invariant: it runs again in whatever serves. What a service is made of (hundreds of modules, some
300,000 objects) stays until its end: to look through it again and again while it is loaded is a
tenth of a start, and later a pause of many milliseconds in the middle of somebody's call.
"""

from __future__ import annotations

import gc


def begins() -> None:
    """Nothing is looked for until `ended`."""
    gc.disable()


def ended() -> None:
    """What is there now is not looked through again; what is made from now on is."""
    gc.freeze()
    gc.enable()
