"""What a check of a run comes to.

Invariant: a finding names the figure it rests on, and what is to be changed the setting too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum

from batchlab.report.html.signs import Signs
from batchlab.report.html.text import visible

MATTERS_S = 5.0
"""What lasts less is not worth a word, however large its share of a short run is."""


class Level(IntEnum):
    """How much a finding matters: the higher, the sooner."""

    GOOD = 0
    NOTE = 1
    ACT = 2
    WRONG = 3


@dataclass(frozen=True, slots=True)
class Finding:
    """`check` names the check; `figure` is what it rests on, `setting` what to change, with code
    between backticks. Of what is GOOD, `setting` is empty."""

    check: str
    level: Level
    title: str
    figure: str
    setting: str = ""


Check = Callable[[Signs], Iterator[Finding]]


def good(check: str, title: str, figure: str) -> Finding:
    return Finding(check, Level.GOOD, title, figure)


def name(text: str) -> str:
    """A stage's or a pool's name, as it may stand in a sentence."""
    return visible(text, 40).replace("`", "'")


def limits(pool: str, option: str) -> str:
    """The command that changes a pool's limits."""
    return f"`batchlab grid scale {name(pool) or 'POOL'} {option} N`"


def slots_of(pool: str) -> str:
    """The option that changes how many slots a pool's instances have."""
    return f"`--pool {name(pool) or 'NAME'}:MIN-MAXxSLOTS` of `batchlab grid up`"
