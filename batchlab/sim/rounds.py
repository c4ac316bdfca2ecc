"""Checks of retries: each runs again the failures that a user chose, and no others.

Invariant: this module uses only the objects in the bucket and the users' requests, not the planner
of the product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from batchlab.manager.retries import Chosen, Retry
from batchlab.model import Outcome, StageName, TaskSet
from batchlab.sim.watch import Violated


def check_rounds(
    job: str,
    retries: Sequence[Retry],
    outcomes: Sequence[Outcome],
    choices: Sequence[Chosen | None],
) -> None:
    """Check that each retry runs the choice of one request. A choice of None is all failures."""
    for round_, retry in enumerate(retries, start=1):
        standing = _standing(retries[: round_ - 1], outcomes, round_)
        replanned = {one.stage for one in retry.reopened if one.replan}
        again = {
            stage: tasks if stage in replanned else tasks - (tasks - retry.redone(stage))
            for stage, tasks in standing.items()
        }
        if not any(_is_choice(one, standing, again, replanned) for one in choices):
            facts = f"round {round_} of {job} runs {again} again of {standing}, asked: {choices}"
            raise Violated(f"retries is violated: {facts}")


def _standing(
    earlier: Sequence[Retry], outcomes: Sequence[Outcome], round_: int
) -> dict[StageName, TaskSet]:
    """Return the failures of the rounds before `round_` that no earlier retry has taken back."""
    found: dict[StageName, TaskSet] = {}
    for outcome in outcomes:
        stage, made = outcome.bundle.stage, outcome.bundle.round
        failed = TaskSet.of(sorted(one.task for one in outcome.failed if one.final))
        for retry in earlier[made:]:
            is_void = any(one.stage == stage and one.replan for one in retry.reopened)
            failed = TaskSet() if is_void else failed - retry.redone(stage)
        if failed and made < round_:
            found[stage] = TaskSet.union([found.get(stage, TaskSet()), failed])
    return found


def _is_choice(
    choice: Chosen | None,
    standing: Mapping[StageName, TaskSet],
    again: Mapping[StageName, TaskSet],
    replanned: set[StageName],
) -> bool:
    for stage, tasks in standing.items():
        asked = tasks if choice is None else choice.get(stage, TaskSet())
        if asked - again[stage] or (stage not in replanned and again[stage] - asked):
            return False
    return True
