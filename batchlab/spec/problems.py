"""What is wrong with a job file or a scenario, collected so that one look shows every mistake.

Invariant: each mistake is one sentence at one line, with a remedy.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from batchlab.errors import JobFileError

Loc = tuple[str | int, ...]
"""Where in the document: keys and list indices from the root."""


def lies(loc: Loc, places: Collection[Loc]) -> bool:
    """Whether `loc` is one of `places`, where "*" is any index or key."""
    return any(
        len(loc) == len(place) and all(b in (a, "*") for a, b in zip(loc, place, strict=True))
        for place in places
    )


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake, at the line of the value, or with `at_key` of the key; `loc` None: not in the
    file but on the command line."""

    loc: Loc | None
    message: str
    remedy: str
    at_key: bool = False


class JobFileErrors(JobFileError):
    """All mistakes of a file in the order of its lines; its own fields are the first one's."""

    def __init__(self, errors: Sequence[JobFileError]) -> None:
        first = errors[0]
        super().__init__(first.message, file=first.file, line=first.line, remedy=first.remedy)
        self.errors = tuple(errors)

    def __str__(self) -> str:
        return "\n".join(str(e) for e in self.errors)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` was probably meant to be."""
    found = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return found[0] if found else None


def suggest(name: str, known: Iterable[str], what: str) -> str:
    """A remedy for an unknown name: the nearest one, or all of them."""
    names = list(known)
    close = nearest(name, names)
    if close is not None:
        return f"Did you mean '{close}'?"
    return f"Write one of the {what}: {', '.join(names)}." if names else f"There are no {what}."
