"""The growth and shrinking of a pool in a burst of work, compared with the simulator's forecast."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.docker.chaos import Containers
from tests.support.docker.grid import need_containers
from tests.support.docker.timeline import Step, apart, foretold, watch_burst
from tests.support.grid.local_grid import LocalGrid

NAPS_S = [0.5] * 60 + [9.0, 30.0]
"""Two tasks continue after all others have ended, while the pool shrinks."""


@pytest.fixture(scope="module")
def containers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containers]:
    folder = tmp_path_factory.mktemp("scaling")
    need_containers(folder)
    grid = LocalGrid(folder / "home", backend="localstack")
    try:
        yield Containers(grid)
    finally:
        grid.stop()


def test_pool_scales_out_and_in_as_forecast(
    containers: Containers, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backend = containers.grid.backend
    seen = watch_burst(containers, tmp_path / "job", NAPS_S)
    pool = replace(seen.pool, boot_s=seen.boot_s)
    told = foretold(backend, pool, tmp_path / "job" / "job.yaml", NAPS_S)
    with capsys.disabled():
        for name, one in (("seen", seen), ("foretold", told)):
            steps = " ".join(f"{step.level}@{step.at_s:.1f}s" for step in one.steps)
            print(f"\n{name}: {steps}, first task after {one.first_task_s:.1f} s", end="")
    assert 0 < seen.peak <= seen.needed(backend) <= pool.max_size
    assert max(look.desired for look in seen.looks) <= pool.max_size
    assert seen.flaps(backend.manager.cooldown_in_s) == 0
    assert seen.steps[-1].level == pool.min_size
    levels, expected = ([step.level for step in one.steps] for one in (seen, told))
    assert levels[:2] == expected[:2], "the pool did not grow in one step to the forecast size"
    assert levels[1:] == sorted(levels[1:], reverse=True), "the pool grew again while its work ended"
    # The first step down depends on the work that is left at that moment, so load changes its level.
    assert apart(seen.steps, told.steps) <= 2


def test_steps_are_compared_in_their_order() -> None:
    def steps(*levels: int) -> list[Step]:
        return [Step(float(n), level) for n, level in enumerate(levels)]

    assert apart(steps(0, 6, 0), steps(0, 6, 0)) == 0
    assert apart(steps(0, 6, 0), steps(0, 6, 5, 0)) == 1
    assert apart(steps(0, 6, 0), steps(0, 6, 3, 0)) == 3
    assert apart(steps(0, 6, 0), steps(0, 4, 0)) == 2
    assert apart(steps(0, 6, 0), steps(0, 6, 0, 6, 0)) == 6
    assert apart(steps(0, 6, 5, 4, 0), steps(0, 6, 4, 1, 0)) == 1
