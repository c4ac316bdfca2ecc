"""The curves of the page, which are limited, thinned, and continued by the next manager."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from batchlab.core.model import GroupView, Instance, LifecycleState, Pool
from batchlab.core.ports import Depth
from batchlab.manager.manager import Manager
from batchlab.server.http.history import INTERVAL_S, MAX_MOMENTS, MAX_SHOWN_MOMENTS, History
from tests.support.fleet import ManualClock

POOL = Pool("default", max_size=9)


def manager(clock: ManualClock, *, recorder: Any = None, pools: tuple[str, ...] = ("default",)) -> Manager:
    """Return a manager with two instances, one of which boots, and a worker with three tasks."""
    instances = tuple(
        Instance(f"i-{state}", "default", state, 0.0) for state in (LifecycleState.IN_SERVICE, LifecycleState.PENDING)
    )
    beat = SimpleNamespace(pool="default", busy=3)
    return cast(
        Manager,
        SimpleNamespace(
            ports=SimpleNamespace(clock=clock),
            registry=SimpleNamespace(workers={"i": SimpleNamespace(beat=beat)}),
            groups={"default": GroupView(POOL, 4, instances), "gone": GroupView(POOL, 1, ())},
            depths={"default": Depth(visible=5, in_flight=6, delayed=7)},
            pools=dict.fromkeys(pools),
            recorder=recorder,
        ),
    )


def test_a_look_notes_what_the_last_tick_has_seen() -> None:
    history = History()
    history.record(manager(ManualClock()))
    (pool,) = history.view()["pools"]
    assert pool == {
        "name": "default",
        "desired": [4],
        "in_service": [1],
        "pending": [1],
        "running": [3],
        "waiting": [12],
        "in_flight": [6],
    }


def test_stored_and_shown_history_is_bounded() -> None:
    history, clock = History(), ManualClock()
    for _ in range(MAX_MOMENTS + 50):
        clock.time_s += INTERVAL_S
        history.record(manager(clock))
    view = history.view()
    assert len(history.moments) == MAX_MOMENTS
    assert MAX_SHOWN_MOMENTS / 2 < len(view["at_s"]) <= MAX_SHOWN_MOMENTS
    assert view["at_s"][-1] == clock.now_s()  # the newest point is always included
    assert view["at_s"] == sorted(view["at_s"])


def test_new_pool_has_no_earlier_history() -> None:
    history, clock = History(), ManualClock()
    history.record(manager(clock, pools=()))
    history.record(manager(clock))
    assert history.view()["pools"][0]["desired"] == [0, 4]


def test_history_without_samples_has_no_curve() -> None:
    assert History().view() == {"at_s": [], "pools": []}


def test_history_of_an_earlier_manager_comes_first() -> None:
    clock = ManualClock()
    asked: list[float] = []

    def samples(since_s: float) -> dict[str, list[list[Any]]]:
        asked.append(since_s)
        return {"default": [[clock.now_s() - 60, 1.0, 5, 6, 1, 20, 4, 2, 3, 0, 3, 3, 2.6]]}

    history = History()
    for _ in range(2):
        history.record(manager(clock, recorder=SimpleNamespace(samples=samples)))
    assert asked == [clock.now_s() - MAX_MOMENTS * INTERVAL_S]
    (pool,) = history.view()["pools"]
    assert (pool["desired"][0], pool["in_service"][0], pool["pending"][0]) == (4, 3, 2)
    assert (pool["running"][0], pool["waiting"][0], pool["in_flight"][0]) == (3, 6, 6)
