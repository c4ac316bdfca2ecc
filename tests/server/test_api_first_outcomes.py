"""The answer to a submission that waits for first outcomes."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from batchlab.core.api_types import UNCOUNTED
from batchlab.core.commit import commit
from batchlab.core.model import JobId, Outcome, Ran
from batchlab.core.ports import ChangeResult, Fold, FoldResult
from batchlab.core.protocol import json_format, settlement
from batchlab.core.protocol.messages import Events
from tests.support.server.api import DEADLINE_S, Rig, job


def outcomes_of(rig: Rig, name: JobId, count: int) -> list[Outcome]:
    """Return committed outcomes of the job's bundles, ordered by their tasks."""
    live = rig.manager.lives[name]
    found = sorted(rig.outstanding(name, count), key=lambda one: one.bundle.tasks.first)
    now_s = time.time()
    outcomes = [
        settlement.settle(
            live.job,
            one.bundle,
            [Ran(task, 0.01, task) for task in one.bundle.tasks],
            execution="x",
            worker="w",
            started_s=now_s,
            ended_s=now_s + 0.01,
        )
        for one in found
    ]
    key = rig.run(rig.manager.ports.keys.key_of(live.job))
    for outcome in outcomes:
        rig.run(commit(rig.objects, outcome, rig.manager.ports.patience, key))
    return outcomes


def test_outcomes_are_announced_on_commit_and_counted_later(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    apply, may_fold = rig.ledger.apply, threading.Event()

    async def hold_up(change: Any) -> FoldResult | ChangeResult:
        while isinstance(change, Fold) and not may_fold.is_set():
            await asyncio.sleep(0.01)
        answer: FoldResult | ChangeResult = await apply(change)
        return answer

    monkeypatch.setattr(rig.ledger, "apply", hold_up)
    one = replace(job(), items=2, input=None)
    accepted = threading.Event()
    with ThreadPoolExecutor() as threads:
        asked = threads.submit(rig.client.submit_and_hear, one, [1, 2], accepted.set, wait_s=DEADLINE_S)
        assert accepted.wait(DEADLINE_S)
        first, second = outcomes_of(rig, one.id, 2)
        rig.until(lambda: rig.manager.lives[one.id].listeners, "whoever waits")
        rig.run(rig.tell(Events(outcomes=(first,))))
        page = asked.result(DEADLINE_S)
    (told,) = page["outcomes"]
    assert not page["ended"]
    assert (told["seq"], json_format.outcome_from_json(told["outcome"])) == (UNCOUNTED, first)
    live = rig.manager.lives[one.id]
    assert live.listeners == 0
    assert rig.client.job(one.id)["stages"][0]["succeeded"] == 0

    may_fold.set()
    rig.run(rig.tell(Events(outcomes=(second,))))
    assert rig.ended(one.id)["state"] == "SUCCEEDED"
    everything = rig.client.outcomes(one.id, after=UNCOUNTED)["outcomes"]
    assert [one["seq"] for one in everything] == [1, 2]
    assert [tuple(one["tasks"][0]) for one in everything] == [(0, 1), (1, 2)]


def test_outcomes_are_announced_only_to_watchers(rig: Rig) -> None:
    one = replace(job(), items=2, input=None)
    rig.client.submit(one, [1, 2])
    live = rig.manager.lives[one.id]
    first, second = outcomes_of(rig, one.id, 2)
    rig.run(rig.tell(Events(outcomes=(first,))))
    rig.until(lambda: live.folds == 1, "the fold")
    assert live.early_outcomes == []
    # A later client receives all counted outcomes.
    page = rig.client.submit_and_hear(one, [1, 2], lambda: None, wait_s=1.0)
    assert [one["seq"] for one in page["outcomes"]] == [1]
    rig.run(rig.tell(Events(outcomes=(second,))))
    rig.ended(one.id)
