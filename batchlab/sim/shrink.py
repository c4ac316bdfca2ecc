"""The fewest of a list's parts that still do what the whole list does: delta debugging.

Invariant: what it returns was tried and did it, but for parts that played no role. It depends on
nothing but the list and what the attempts come to, as long as time does not run out.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)

TRIES = 400


@dataclass(frozen=True, slots=True)
class Shrunk(Generic[T]):
    """`least` is True where nothing more can be left out, False where tries or time ran out."""

    parts: tuple[T, ...]
    tries: int
    least: bool


class _Enough(Exception):
    """Tries or time have run out."""


def shrink(
    parts: Sequence[T],
    attempt: Callable[[tuple[T, ...]], Sequence[T] | None],
    *,
    tries: int = TRIES,
    out_of_time: Callable[[], bool] = lambda: False,
) -> Shrunk[T] | None:
    """The fewest of `parts` (all different) for which `attempt` still does not return None.

    `attempt` returns those of the parts it was given that played a role; the others are left out
    at once. None where not even the whole list does it.
    """
    search = _Search(tuple(parts), attempt, tries, out_of_time)
    try:
        if not search.holds(()):
            if not search.holds(search.parts):
                return None
            search.halve()
    except _Enough:
        return Shrunk(search.parts, search.tried, least=False)
    return Shrunk(search.parts, search.tried, least=True)


class _Search(Generic[T]):
    def __init__(
        self,
        parts: tuple[T, ...],
        attempt: Callable[[tuple[T, ...]], Sequence[T] | None],
        tries: int,
        out_of_time: Callable[[], bool],
    ) -> None:
        self._attempt = attempt
        self._tries = tries
        self._out_of_time = out_of_time
        self._vain: set[tuple[T, ...]] = set()
        self.parts = parts
        self.tried = 0

    def holds(self, parts: tuple[T, ...]) -> bool:
        """Whether these do it; if so, they are what is left."""
        if parts in self._vain:
            return False
        if self.tried >= self._tries or self._out_of_time():
            raise _Enough
        self.tried += 1
        needed = self._attempt(parts)
        if needed is None:
            self._vain.add(parts)
            return False
        role = set(needed)
        self.parts = tuple(part for part in parts if part in role)
        return True

    def halve(self) -> None:
        """Zeller's ddmin: ever smaller pieces, alone or left out. It ends where no single part can
        be left out."""
        pieces = 2
        while len(self.parts) > 1:
            whole = self.parts
            size = -(-len(whole) // pieces)
            starts = range(0, len(whole), size)
            if any(self.holds(whole[at : at + size]) for at in starts):
                pieces = 2
            elif any(self.holds(whole[:at] + whole[at + size :]) for at in starts):
                pieces = max(pieces - 1, 2)
            elif size == 1:
                return
            else:
                pieces = min(pieces * 2, len(whole))
