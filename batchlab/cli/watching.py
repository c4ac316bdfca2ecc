"""A job that a grid runs: watched until it ends, its results fetched."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from batchlab import fetches
from batchlab.cli import output
from batchlab.cli.progress import Progress
from batchlab.cli.session import Session
from batchlab.client import Client
from batchlab.model import ENDED
from batchlab.results import Fetched, fetch, listed
from batchlab.views import GridView, JobView

if TYPE_CHECKING:
    from batchlab.cli.billing import Burn

POLL_S = 1.0
"""Longest wait for news of the job, which is how often the workers are looked at too."""
GAP_S = 0.1
"""Least time between two looks: a busy job has news all the time."""


def watch(
    session: Session,
    view: JobView,
    shown: Progress,
    slots: dict[str, int],
    burn: Burn | None = None,
) -> JobView:
    """Show the job until it ends, and with `burn` what it costs, where that applies; `slots` learns
    the most slots seen in service by pool."""
    looked_s, grid = float("-inf"), None
    if burn and not burn.applies(session.backend.name):
        burn = None
    while True:
        asked_s = time.monotonic()
        if asked_s - looked_s >= POLL_S / 2 or view["state"] in ENDED:
            grid, looked_s = session.call(lambda client: client.grid()), asked_s
            _note_slots(grid, slots)
            if burn:
                shown.cost(session.call(partial(burn.line, job=view["id"], grid=grid)))
        shown.show(view, grid)
        if view["state"] in ENDED:
            return view
        view = session.call(partial(_news, view))
        if view["state"] not in ENDED:
            time.sleep(max(0.0, asked_s + GAP_S - time.monotonic()))


def _news(view: JobView, client: Client) -> JobView:
    return client.job(view["id"], version=view["version"], wait_s=POLL_S)


def _note_slots(grid: GridView, slots: dict[str, int]) -> None:
    for pool in grid["pools"]:
        up = sum(one["state"] == "InService" for one in pool["instances"]) * pool["slots"]
        slots[pool["name"]] = max(slots.get(pool["name"], 0), up)


def default_folder(job: str) -> Path:
    """Where the results of a job of that name go unless somebody says."""
    return Path("out") / job


def fetch_results(
    session: Session, view: JobView, out: Path | None, stages: Sequence[str] = ()
) -> Fetched:
    """The results of what has succeeded, in `out` or out/<job name>."""
    from batchlab.backends import patience

    listing = listed(
        lambda after: session.call(partial(Client.outcomes, job=view["id"], after=after))
    )
    objects = session.backend.open_objects(session.home)
    folder = out or default_folder(view["name"])
    notes = output.Sometimes()

    def note(done: int, of: int) -> None:
        notes.say(f"Fetching results: {done:,} of {of:,} outcomes are read.")

    found = asyncio.run(
        fetch(objects, view, listing, folder, patience=patience(), stages=stages, progress=note)
    )
    fetches.note(session.home, view["id"], found.read_bytes)
    return found
