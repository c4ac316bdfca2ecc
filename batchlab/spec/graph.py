"""The order of a job's stages: which follow which, and what is wrong with it.

Invariant: stages without a problem here form a graph without a cycle.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from batchlab.spec.problems import Loc, Problem, suggest


class Staged(Protocol):
    """What is looked at of a stage, in a job file or elsewhere."""

    @property
    def name(self) -> str: ...

    @property
    def after(self) -> Sequence[str] | None: ...

    @property
    def gather(self) -> object | None: ...


def upstream(stages: Sequence[Staged], stage: int) -> tuple[str, ...]:
    """Names of the stages that the `stage`-th follows, the default filled in."""
    named = stages[stage].after
    if named is not None:
        return tuple(named)
    return (stages[stage - 1].name,) if stage else ()


def unique_names(stages: Sequence[Staged], at: Loc) -> Iterator[Problem]:
    """Names that are there twice; the list of stages is at `at` in the file."""
    first: dict[str, int] = {}
    for i, stage in enumerate(stages):
        if stage.name in first:
            number = first[stage.name] + 1
            message = f"Stage {number} is named '{stage.name}' already."
            yield Problem((*at, i, "name"), message, "Give this stage another name.")
        first.setdefault(stage.name, i)


def order(stages: Sequence[Staged], at: Loc) -> Iterator[Problem]:
    """Stages to come after that there are not or that are listed later, and circles."""
    names = [stage.name for stage in stages]
    for i, stage in enumerate(stages):
        for j, before in enumerate(stage.after or ()):
            if before not in names:
                message = f"There is no stage '{before}' to come after."
                yield Problem((*at, i, "after", j), message, suggest(before, names, "stages"))
            elif before in (stage.after or ())[:j]:
                message = f"'{before}' is named twice."
                yield Problem((*at, i, "after", j), message, "Delete one of the two.")
    upstream_of = {name: upstream(stages, i) for i, name in enumerate(names)}
    cycle = _cycle(upstream_of) if len(upstream_of) == len(names) else []
    if cycle:
        loc = (*at, names.index(cycle[-1]), "after")
        message = f"The stages run in a circle: {' → '.join(cycle)}."
        yield Problem(loc, message, "Change 'after' so that one of them comes first.")
        return
    for i, stage in enumerate(stages):
        for j, before in enumerate(stage.after or ()):
            if before in names[i + 1 :]:
                message = f"The stage '{before}' is listed after this one, which follows it."
                remedy = "List the stages in an order in which they can run."
                yield Problem((*at, i, "after", j), message, remedy)


def _cycle(before: dict[str, tuple[str, ...]]) -> list[str]:
    """One circle in the direction of the data, its first stage repeated at the end."""
    left = dict(before)
    while ready := [name for name, some in left.items() if not any(b in left for b in some)]:
        for name in ready:
            del left[name]
    if not left:
        return []
    path = [next(iter(left))]
    while path[-1] not in path[:-1]:
        path.append(next(b for b in left[path[-1]] if b in left))
    return path[path.index(path[-1]) :][::-1]


def gathers(stages: Sequence[Staged], at: Loc) -> Iterator[Problem]:
    """Stages that gather nothing."""
    for i, stage in enumerate(stages):
        if stage.gather is not None and not upstream(stages, i):
            message = f"Stage '{stage.name}' follows no stage, so it has nothing to gather."
            remedy = "Delete gather, or name the stages before in 'after'."
            yield Problem((*at, i, "gather"), message, remedy, at_key=True)
