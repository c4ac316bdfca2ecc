"""Sizes of bundles.

Three effects determine the size. A bundle costs the same number of requests at any size, so bundles
are large. A lost or slow bundle delays all of its tasks, so a bundle has at most 0.75 s of work.
The last bundles determine the makespan, so bundles shrink toward the end of the stage. With chunks
of a fixed size, the tail takes a quarter of the makespan. With shrinking sizes, it takes no
measurable time.

Task times cannot be known in advance, so workers correct wrong sizes. They split a bundle that is
past its budget, and they give away the tasks that wait behind a long task (see
`worker.work_handoff`). So a long task delays its neighbors by at most the budget, and counts at
most the budget for the sizes of other bundles.
"""

from __future__ import annotations

TARGET_S = 0.75
"""Work in a bundle once the task time is known."""

BUDGET_S = 2 * TARGET_S
"""After this time, a worker starts no further task of a bundle and gives the rest away. One task
may still be running then."""

FIRST_WAVE = 2
"""Bundles per slot that are sent before the first measurement. The first one is a single task, so
its result arrives soonest. The second one keeps the slot busy until the next bundle arrives."""

FIRST_CAP = 8
FIRST_SHARES = 8
"""Limits of the second bundle: FIRST_CAP tasks, and 1/FIRST_SHARES of a slot's work. The task time
is not known yet."""

CAP = 4096
"""Maximum number of tasks in a bundle. It keeps outcome objects and messages well below their
limits."""

FLOOR_S = 0.05
"""Minimum work of a bundle while every slot gets one. A smaller bundle would be mostly overhead."""

SHARES = 2
"""A bundle has at most 1/SHARES of a slot's remaining work."""


def weight_s(tasks: int, run_s: float) -> float:
    """Return the seconds that a bundle's tasks count for the sizes of other bundles.

    Each task counts at most one budget. All of them together count at most two budgets, because
    only a long last task can exceed the first one.
    """
    return min(run_s, tasks * BUDGET_S, 2 * BUDGET_S)


def bundle_size(left: int, slots: int, mean_s: float | None, fixed: int | None) -> int:
    """Return the size of the next bundle of a stage with `left` uncut tasks and `slots` slots.

    `mean_s` is the measured time per task in seconds, None before the first measurement. `fixed` is
    the user's own size, which takes precedence.
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
    """Return the sizes of up to `room` bundles to cut now, in order."""
    slots = max(1, slots)
    if fixed is None and mean_s is None:
        return _first_wave(left, slots, room)
    last_s = slots * FLOOR_S
    sizes: list[int] = []
    while left and len(sizes) < room:
        if fixed is None and mean_s is not None and left * mean_s <= last_s and left > slots:
            # Halving would make bundles that are mostly overhead. The rest is cut into the smallest
            # number of bundles, all of the same size.
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
