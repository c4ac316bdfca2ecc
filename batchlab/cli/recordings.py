"""From jobs that have ended, or the record of a replay, to a scenario file.

Invariant: a home is only read, whether or not its grid is up.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from batchlab.cli import bills, output
from batchlab.cli.session import connect
from batchlab.core.errors import Refused, UsageError
from batchlab.core.model import ENDED, JobId
from batchlab.runtime.home import Home

if TYPE_CHECKING:
    from batchlab.core.api_types import JobView
    from batchlab.core.job_definition import JobDef
    from batchlab.runtime.factory import Backend
    from batchlab.scenarios.model.values import PoolPlan
    from batchlab.scenarios.replay.measurements import Measurements
    from batchlab.scenarios.replay.recording import RecordedWorkload


@dataclass(frozen=True, slots=True)
class Request:
    """What the user asked for."""

    jobs: tuple[str, ...]
    record: Path | None
    out: Path | None
    name: str | None
    home: Home


def run(request: Request, *, json: bool) -> None:
    """Write the files, and tell what they hold."""
    from batchlab.scenarios.replay import recording

    if request.jobs and request.record:
        raise UsageError(
            "Either jobs are recorded or a replay is.", remedy="Leave out --from, or the jobs."
        )
    past = _of_record(request) if request.record else _of_jobs(request)
    path = request.out or Path(f"{past.name}.yaml")
    if path.exists() and request.out is None:
        raise Refused(f"There is a file {path} already.", remedy="Name one with --out.")
    if request.record and _is_same(request.record, path):
        raise UsageError(
            f"{path} is the record that is read.", remedy="Name another file with --out."
        )
    written = recording.write(past, path)
    if json:
        output.show_json(
            {
                "scenario": str(written.scenario),
                "trace": str(written.trace),
                "jobs": written.jobs,
                "tasks": written.tasks,
                "task_s": written.task_s,
                "left_out": written.left_out,
            }
        )
        return
    output.show(
        f"{written.scenario} has {output.count(written.jobs, 'job')} with "
        f"{output.count(written.tasks, 'task')} of {output.span(written.task_s)} in all; "
        f"its arrivals are in {written.trace}."
    )
    if written.left_out:
        output.say(
            f"Left out: {output.count(written.left_out, 'job')} of which too little is known."
        )


def _is_same(record: Path, path: Path) -> bool:
    # The trace is written beside the scenario, and would cover a record of that name too.
    written = {path.resolve(), path.with_suffix(".jsonl").resolve()}
    return record.resolve() in written


def _of_record(request: Request) -> RecordedWorkload:
    from batchlab.scenarios import record as records
    from batchlab.scenarios.replay import recording

    assert request.record
    found = records.read(request.record)
    return recording.from_record(found, _name(request.name or f"{found.scenario}-recorded"))


def _of_jobs(request: Request) -> RecordedWorkload:
    from batchlab.runtime import factory
    from batchlab.scenarios.replay import recording

    home = request.home
    facts = [bills.facts_of(home, text) for text in request.jobs or ("last",)]
    views: dict[str, JobView] = {one.job["id"]: one.job for one in facts}
    for view in views.values():
        if view["state"] not in ENDED:
            raise UsageError(
                f"The job {view['id']} has not ended.",
                remedy="Wait for it with `batchlab job watch`, or cancel it.",
            )
    backend = factory.load(facts[0].backend)
    jobs, measured = asyncio.run(_measured(backend, home, views))
    pools, policy = _fleet(home, backend)
    first = min(views.values(), key=lambda view: view["submitted_s"])
    name = _name(request.name or f"{first['name']}-recorded")
    return recording.from_jobs(jobs, measured, name, pools, policy)


async def _measured(
    backend: Backend, home: Home, views: Mapping[str, JobView]
) -> tuple[list[tuple[JobView, JobDef]], dict[str, Measurements]]:
    from batchlab.jobs.attempts import definition
    from batchlab.runtime.factory import patience
    from batchlab.scenarios.replay.measurements import ObservedJob, measure

    objects = backend.open_objects(home)
    jobs, measured = [], {}
    for job, view in views.items():
        jobs.append((view, await definition(objects, JobId(job), patience())))
        measured[job] = await measure([ObservedJob(view["name"], view)], 0, objects, patience())
    return jobs, measured


def _fleet(home: Home, backend: Backend) -> tuple[list[PoolPlan], Mapping[str, float]]:
    """Pools and policy as they are, or were when the grid was last up."""
    from batchlab.adapters.local.fleet_state_file import StateFile
    from batchlab.core.model import Pool
    from batchlab.fleet import saved_state
    from batchlab.runtime import settings
    from batchlab.scenarios.model.values import PoolPlan

    if home.record():
        with connect(home) as client:
            grid = client.grid()
        pools = [Pool(p["name"], p["min"], p["max"], p["slots"]) for p in grid["pools"]]
        return [PoolPlan(pool) for pool in pools], grid["settings"]
    kept = StateFile(home.fleet / "groups.json").load()
    groups = saved_state.decode(kept)[0] if kept else {}
    found = [PoolPlan(group.pool) for group in groups.values()]
    policy = asdict(settings.applied(backend, home).manager)
    return found or [PoolPlan(pool) for pool in backend.pools], policy


def _name(text: str) -> str:
    """`text` as a scenario may be called."""
    name = re.sub(r"[^a-z0-9_-]+", "-", text.lower()).strip("-_")[:40]
    return name or "recorded"
