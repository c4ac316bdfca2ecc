"""How many tasks travel in one bundle, by themselves.

Three forces: a bundle costs the same requests however full it is (so: large), a lost or long
bundle costs all that is in it (so: at most three quarters of a second), and the last bundles
decide the makespan (so: shrinking as the stage runs out). Fixed chunks lose a quarter of the
makespan to the tail; guided sizes lose nothing measurable.

What durations nobody can know spoils, the worker mends: a bundle that is past its budget is split,
and what waits behind a long task is given away while that runs (worker.shedding). So a long task
keeps its neighbours no longer than the budget, and counts no more than that for their sizes.
"""

from __future__ import annotations

TARGET_S = 0.75
"""Work in a bundle once the task time is known."""

BUDGET_S = 2 * TARGET_S
"""A worker past this starts no further task of a bundle, and gives the rest away, though one may
still run."""

FIRST_WAVE = 2
"""Bundles per slot sent before anything has been measured. The first is a single task, and has an
answer soonest; the second covers the way of that answer to the next bundle."""

FIRST_CAP = 8
FIRST_SHARES = 8
"""Tasks in the second one at most, and at most this share of what a slot has to do: nobody knows
yet how long they take."""

CAP = 4096
"""Tasks in a bundle at most: keeps an outcome object and a message well under their limits."""

FLOOR_S = 0.05
"""Work below which a bundle is not cut while every slot gets one: it would be all overhead."""

SHARES = 2
"""A bundle is at most this share of what a slot still has to do."""


def weight_s(tasks: int, run_s: float) -> float:
    """Seconds that so many tasks of one bundle count for the sizes of others: at most one budget
    each, and one more than that together, which only a last long one may have used."""
    return min(run_s, tasks * BUDGET_S, 2 * BUDGET_S)


def bundle_size(left: int, slots: int, mean_s: float | None, fixed: int | None) -> int:
    """Tasks for the next bundle of a stage with `left` uncut tasks and `slots` slots to serve.

    `mean_s` is the measured seconds per task, None before the first; `fixed` the user's own
    number, which wins.
    """
    if left <= 0:
        return 0
    if fixed is not None:
        return min(fixed, CAP, left)
    if mean_s is None:
        return 1
    by_time = int(TARGET_S / mean_s) if mean_s > TARGET_S / CAP else CAP
    slots = max(1, slots)
    guided = left // (slots * SHARES)
    floor = min(int(FLOOR_S / mean_s) if mean_s > FLOOR_S / CAP else CAP, left // slots)
    return max(1, min(by_time, max(guided, floor), CAP, left))


def wave(left: int, slots: int, mean_s: float | None, fixed: int | None, room: int) -> list[int]:
    """Sizes of up to `room` bundles to cut now, in order."""
    slots = max(1, slots)
    if fixed is None and mean_s is None:
        return _first_wave(left, slots, room)
    last_s = slots * FLOOR_S
    sizes: list[int] = []
    while left and len(sizes) < room:
        if fixed is None and mean_s is not None and left * mean_s <= last_s and left > slots:
            # Halved again and again it would be all overhead: as few as they may be, of one size.
            count = slots * -(-left // (slots * CAP))
            even = -(-left // count)
            sizes += [min(even, left - at) for at in range(0, left, even)][: room - len(sizes)]
            break
        size = bundle_size(left, slots, mean_s, fixed)
        sizes.append(size)
        left -= size
    return sizes


def _first_wave(left: int, slots: int, room: int) -> list[int]:
    room = max(0, room)
    singles = min(left, slots, room)
    sizes = [1] * singles
    left -= singles
    size = max(1, min(FIRST_CAP, left // (slots * FIRST_SHARES)))
    more = min(left // size, (FIRST_WAVE - 1) * slots, room - singles)
    return sizes + [size] * more
