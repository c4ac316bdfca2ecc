"""Task times of the earlier runs of a job, from the task list of a real manager."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest

from batchlab.client import task_times
from batchlab.client.task_times import last_times, size_warnings_of
from batchlab.core.commit import commit
from batchlab.core.errors import BatchlabError, NotFound, Refused, Unreachable
from batchlab.core.model import JobId, Ran
from batchlab.core.protocol import settlement
from batchlab.core.protocol.messages import Events
from batchlab.manager.state import Outstanding
from tests.support.server.api import Rig, job

POOLS = {"map": "default"}


@pytest.fixture(scope="module")
def grid() -> Iterator[Rig]:
    with Rig() as rig:
        yield rig


def ran(rig: Rig, name: str, token: str, run_s: Sequence[float], bundles: int | None = None) -> str:
    """Run a job whose tasks take these times, in bundles of ten tasks, and return its id. Without `bundles`, all tasks
    end, and otherwise the tasks of so many bundles."""
    id_ = rig.submit(job(name, f"{name}-{token}", tasks=len(run_s), bundle=10))
    expected = len(run_s) if bundles is None else 10 * bundles
    live = rig.manager.lives[JobId(id_)]
    done: set[int] = set()

    async def work(one: Outstanding) -> None:
        results = [Ran(task, run_s[task], task) for task in one.bundle.tasks]
        outcome = settlement.settle(
            job=live.job, bundle=one.bundle, ran=results, execution="x", worker="w", started_s=1.0, ended_s=2.0
        )
        key = await rig.manager.ports.keys.key_of(live.job)
        await commit(rig.objects, outcome, rig.manager.ports.patience, key)
        await rig.tell(Events(completions=(settlement.completion(outcome),)))

    def new_bundles() -> list[Outstanding]:
        return [one for one in live.all_outstanding() if one.bundle.tasks.first not in done]

    while len(done) < expected:
        one = rig.until(new_bundles, "a bundle")[0]
        rig.run(work(one))
        done |= set(one.bundle.tasks)
    rig.until(lambda: rig.client.job(id_)["stages"][0]["succeeded"] == expected, "the fold")
    return id_


def test_samples_are_spread_over_the_stage(grid: Rig) -> None:
    """The second half of the tasks is slow, so the first tasks alone would give another median."""
    first = ran(grid, "spread", "a", [0.01] * 80 + [1.5] * 120)
    (times,) = last_times(nullcontext(grid.client), "spread", POOLS)
    assert (times.median_s, times.tasks, times.is_whole) == (1.5, 200, True)
    assert (
        times.source
        == f"Half of the {task_times.PAGES * task_times.TASKS_PER_PAGE} sampled tasks of {first} took at most"
    )
    assert size_warnings_of(nullcontext(grid.client), "spread", POOLS) == []


@pytest.mark.parametrize(("mean_s", "asked"), [(0.9, True), (1.1, False), (299.0, False), (301.0, True), (None, True)])
def test_a_mean_within_the_limits_needs_no_samples(mean_s: float | None, asked: bool) -> None:
    pages: list[str] = []

    class Fake:
        def jobs(self, limit: int) -> list[dict[str, Any]]:
            stage = {"name": "map", "pool": "default", "planned": 20, "succeeded": 20, "mean_s": mean_s}
            return [{"id": "a-1", "name": "a", "stages": [stage]}]

        def tasks(self, job: str, **query: Any) -> dict[str, Any]:
            pages.append(query["after"])
            return {"tasks": [{"task": n, "run_s": 0.2} for n in range(20)]}

    client: Any = Fake()
    assert len(last_times(nullcontext(client), "a", POOLS)) == asked
    assert pages == (["map/0"] if asked else [])


def test_one_slow_task_does_not_hide_tiny_tasks_and_does_not_make_a_stage_long(grid: Rig) -> None:
    tiny = ran(grid, "tiny", "a", [0.01] * 29 + [50_000.0])
    assert last_times(nullcontext(grid.client), "tiny", POOLS)[0].source.startswith("Half of the 30 sampled tasks of ")
    (warning,) = size_warnings_of(nullcontext(grid.client), "tiny", POOLS)
    assert (warning.check, warning.median_s) == ("task size", 0.01)
    assert tiny in warning.figure
    ran(grid, "once", "a", [1.0] * 29 + [50_000.0])
    assert size_warnings_of(nullcontext(grid.client), "once", POOLS) == []


def test_the_newest_run_with_enough_tasks_counts(grid: Rig) -> None:
    fast = ran(grid, "runs", "a", [0.01] * 30)
    few = ran(grid, "runs", "b", [1.0] * 30, bundles=1)
    (warning,) = size_warnings_of(nullcontext(grid.client), "runs", POOLS)
    assert fast in warning.figure
    many = ran(grid, "runs", "c", [1.0] * 30, bundles=2)
    assert few != many
    assert size_warnings_of(nullcontext(grid.client), "runs", POOLS) == []
    assert len(size_warnings_of(nullcontext(grid.client), "runs", POOLS, new=many)) == 1, (
        "a new job is not an earlier run"
    )
    assert last_times(nullcontext(grid.client), "runs", {"other": "default"}) == []
    assert last_times(nullcontext(grid.client), "unknown", POOLS) == []


@pytest.mark.parametrize(
    ("billed", "pool", "warns"),
    [
        ([("default", "spot"), ("default", "on-demand")], "default", True),
        ([("default", "on-demand"), ("large", "spot")], "default", False),
        ([("default", "spot")], "large", False),
        (None, "default", False),
    ],
)
def test_spot_is_known_from_the_bill_of_the_earlier_run(
    grid: Rig, monkeypatch: pytest.MonkeyPatch, billed: list[tuple[str, str]] | None, pool: str, warns: bool
) -> None:
    if not task_times.earlier_runs(grid.client, "long"):
        ran(grid, "long", "a", [700.0] * 20)
    lines = None if billed is None else [{"pool": name, "market": market} for name, market in billed]
    use: Any = {"account": None if lines is None else {"billed": lines}}
    monkeypatch.setattr(type(grid.client), "job_use", lambda self, job: use)
    found = size_warnings_of(nullcontext(grid.client), "long", {"map": pool})
    assert [one.check for one in found] == (["long tasks on Spot"] if warns else [])
    assert all("pool default had Spot Instances in that run" in one.figure for one in found)


@pytest.mark.parametrize("error", [NotFound("Not Found"), Refused("The token has expired.")])
def test_no_warning_if_the_manager_does_not_list_tasks(
    grid: Rig, monkeypatch: pytest.MonkeyPatch, error: BatchlabError
) -> None:
    """A manager of an earlier release does not know the request, and another may refuse it."""
    if not task_times.earlier_runs(grid.client, "old"):
        ran(grid, "old", "a", [0.01] * 20)
    assert len(size_warnings_of(nullcontext(grid.client), "old", POOLS)) == 1

    def missing(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(type(grid.client), "tasks", missing)
    assert size_warnings_of(nullcontext(grid.client), "old", POOLS) == []


def test_no_warning_if_the_grid_cannot_be_reached() -> None:
    @contextmanager
    def connect() -> Iterator[Any]:
        raise Unreachable("No grid is up.")
        yield

    assert size_warnings_of(connect(), "old", POOLS) == []
