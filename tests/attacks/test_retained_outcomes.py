"""Whole outcomes from workers, which take a bounded part of the manager's memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest

from batchlab.core.model import Bundle, JobId, Outcome, StageName, TaskSet
from batchlab.core.protocol import json_format
from batchlab.core.protocol.messages import Events
from batchlab.manager import state
from batchlab.manager.state import LiveJob, RetainedOutcomes
from batchlab.server.http.common import MAX_CAUSES, OTHERS, Groups
from tests.server.test_api_first_outcomes import outcomes_of
from tests.support.server.api import Rig, job

LARGE = "x" * 50_000
MOST_BYTES = 200_000


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    monkeypatch.setattr(state, "MAX_RETAINED_BYTES", MOST_BYTES)
    with Rig() as made:
        yield made


def _has_folded(live: LiveJob, count: int) -> bool:
    return live.folds == count


def test_large_outcomes_of_several_jobs_leave_the_memory(rig: Rig) -> None:
    """An honest worker sends only small outcomes whole, but a compromised worker may send large ones."""
    jobs = [replace(job(name, token=name), items=4, input=None) for name in ("one", "two", "three")]
    for one in jobs:
        rig.client.submit(one, [1, 2, 3, 4])
    for one in jobs:
        for outcome in outcomes_of(rig, one.id, 4)[:3]:
            large = replace(outcome, values=(LARGE,))
            rig.run(rig.tell(Events(outcomes=(large,))))
        live = rig.manager.lives[one.id]
        rig.until(partial(_has_folded, live, 3), "the folds")
    pages = [rig.client.outcomes(one.id)["outcomes"] for one in jobs]
    held = [one["outcome"] is not None for page in pages for one in page]
    assert len(held) == 9, "all of them are listed, in memory or not"
    assert 1 <= sum(held) <= MOST_BYTES // len(LARGE)
    assert held == sorted(held), "the oldest are released first"
    assert rig.manager._collector._retained_outcomes.size_bytes <= MOST_BYTES
    # A client reads a released outcome from the bucket, where the honest commit counts.
    released = pages[0][0]
    stored = json_format.outcome_from_json(json_format.loads(rig.run(rig.objects.get(released["key"]))))
    assert LARGE not in stored.values


def test_a_job_that_has_ended_leaves_nothing_in_memory(rig: Rig) -> None:
    """The memory is released even if no client has fetched the results."""
    one = replace(job("ends"), items=1, input=None)
    rig.client.submit(one, [1])
    live = rig.manager.lives[one.id]
    (outcome,) = outcomes_of(rig, one.id, 1)
    rig.run(rig.tell(Events(outcomes=(outcome,))))
    rig.ended(one.id)
    rig.until(lambda: one.id not in rig.manager.lives, "the end of its conduct")
    assert live.recent
    assert [its.outcome for _, its in live.recent if its] == [None]


def test_many_small_outcomes_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each small outcome takes more memory than its JSON text."""
    monkeypatch.setattr(state, "MAX_RETAINED_BYTES", MOST_BYTES)
    memory = RetainedOutcomes()
    bundle = Bundle(JobId("j"), StageName("s"), TaskSet.from_indices({0}), 1)
    outcome = Outcome(bundle, "x", "w", 0.0, 1.0)
    every = [memory.add(outcome, 1) for _ in range(1000)]
    held = [one for one in every if one.outcome]
    assert len(held) == MOST_BYTES // state.MIN_OUTCOME_BYTES
    assert held == every[-len(held) :]


def test_failures_with_many_causes_are_grouped_up_to_a_bound() -> None:
    """A compromised worker fails each task with a different cause and a long traceback."""
    groups = Groups(0)
    for task in range(2 * MAX_CAUSES):
        cause = f"{task:016x}"
        groups.add(
            {
                "seq": task,
                "stage": "map",
                "task": task,
                "attempt": 1,
                "kind": "exception",
                "reason": f"reason {task}",
                "error": "ValueError",
                "traceback": "x" * 1000,
                "exit_code": None,
                "fingerprint": cause,
            }
        )
    assert len(groups.first) == len(groups.tasks) == MAX_CAUSES + 1
    assert groups.tasks["map", OTHERS] == set(range(MAX_CAUSES, 2 * MAX_CAUSES))
    assert groups.others == {"map": set(range(MAX_CAUSES, 2 * MAX_CAUSES))}
    told = groups.first["map", OTHERS]["reason"]
    assert told == f"other causes, the first: reason {MAX_CAUSES}"
