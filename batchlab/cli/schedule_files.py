"""A job file on its way to a schedule, and what has become of the file since.

Invariant: what a schedule runs is what was uploaded when it was added; a file that has changed
since is told of, and never used unasked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from batchlab.cli import output
from batchlab.cli.options import seconds_of
from batchlab.core.errors import BatchlabError, NotFound, UsageError
from batchlab.core.schedules.model import Missed, Overlap

if TYPE_CHECKING:
    from batchlab.client.http import Client
    from batchlab.core.api_usage_types import SchedulesView, ScheduleView
    from batchlab.core.job_definition import JobDef
    from batchlab.core.model import Json
    from batchlab.jobs.job_file import JobFile
    from batchlab.runtime.home import Home

_AT = "Write +10m, or a time such as 2026-03-29T06:00 (in --timezone) or with its own zone."


@dataclass(frozen=True, slots=True)
class Given:
    """What the command line says; what is None the job file may say, or nobody."""

    name: str | None = None
    cron: str | None = None
    at: str | None = None
    timezone: str | None = None
    missed: Missed = Missed.RUN_ONCE
    missed_within: str | None = None
    overlap: Overlap = Overlap.SKIP
    prewarm: str | None = None
    capacity: int | None = None
    input: str | None = None
    due_param: str | None = None
    max_cost_usd: float | None = None


def add(
    home: Home, file: Path, sets: Iterable[str], given: Given, *, replacing: bool
) -> ScheduleView:
    """Upload what the job file names, and keep it as a schedule of the grid that is up."""
    from batchlab.cli.session import Session
    from batchlab.cli.submission import overrides
    from batchlab.jobs import api
    from batchlab.jobs.submission import Uploaded, code_digest, own_keys, prepare
    from batchlab.runtime import factory

    changes = overrides(sets)
    with Session.attached(home) as session:
        backend = session.backend
        clock = backend.open_clock()
        jobfile = api.load(file, changes, needs_input=given.input is None)
        keys = (
            own_keys(jobfile, backend.bucket(home))
            if given.input is None
            else [_prefix(given.input)]
        )
        packed = code_digest(jobfile)
        name = given.name or jobfile.job.name
        schedule = _described(jobfile, given, name, clock.now_s())
        schedule["source_digest"] = _digest_of(file, packed[1], given.input is None)
        notes = output.Sometimes()

        def note(up: Uploaded) -> None:
            notes.say(f"Uploaded {up.files:,} of {up.of:,} files, {output.size(up.size_bytes)}.")

        preparing = prepare(
            jobfile,
            objects=backend.open_objects(home),
            clock=clock,
            patience=factory.patience(),
            # Of the same content the same: what was uploaded before is found there.
            token=f"schedule/{name}/{api.source_digest(jobfile, packed[1])}",
            packed=packed,
            progress=note,
            keys=keys,
            recurring=True,
        )
        job: JobDef = asyncio.run(preparing)
        if given.max_cost_usd is not None:
            job = replace(job, max_cost_usd=given.max_cost_usd)
        return session.call(lambda client: client.add_schedule(schedule, job, replace=replacing))


def _described(jobfile: JobFile, given: Given, name: str, now_s: float) -> dict[str, Json]:
    if given.cron and given.at:
        raise UsageError("--cron and --at exclude each other.", remedy="Say one of them.")
    said = jobfile.job
    cron = given.cron or (None if given.at else said.cron)
    at = given.at or (None if cron else said.at)
    if not cron and not at:
        raise UsageError(
            "Nothing says when it is to run.",
            remedy="Say --cron '0 2 * * *' or --at 2026-03-29T06:00, or write cron: in the file.",
        )
    zone = given.timezone or said.timezone
    if given.capacity is not None and given.prewarm is None:
        raise UsageError(
            "--capacity is what --prewarm has ready.", remedy="Say --prewarm 10m as well."
        )
    return {
        "name": name,
        "cron": cron or "",
        "timezone": zone,
        "at_s": moment(at, zone, now_s) if at else None,
        "missed": given.missed.value,
        "missed_within_s": _span("--missed-within", given.missed_within),
        "overlap": given.overlap.value,
        "prewarm_s": _span("--prewarm", given.prewarm) or 0.0,
        "capacity": given.capacity,
        "due_param": given.due_param or "",
        "source": str(jobfile.path),
    }


def moment(text: str, zone: str, now_s: float) -> float:
    """The epoch second that `--at` names: `+10m`, or an ISO 8601 time, in `zone` where it names
    none of its own; UsageError."""
    from batchlab.core import units
    from batchlab.core.schedules import due_times

    tz = due_times.zone_of(zone)
    try:
        if not text.startswith("+"):
            naive = datetime.fromisoformat(text)
            if naive.tzinfo is None:
                return due_times.of_local(naive, tz)
        return units.start_s(text, now_s)
    except (ValueError, OverflowError) as error:
        raise UsageError(f"{text[:60]!r} is no time.", remedy=_AT) from error


def _span(option: str, text: str | None) -> float | None:
    return None if text is None else seconds_of(option, text)


def _prefix(text: str) -> str:
    """What `--input` names; UsageError."""
    from batchlab.jobs.submission import check_key

    check_key(text, text)
    if not text.endswith("/"):
        raise UsageError(
            f"--input {text} is no prefix, which ends in a slash.",
            remedy=f"Write --input {text}/ for what lies below it.",
        )
    return text


def _digest_of(file: Path, code: str, needs_input: bool) -> str:
    """Of the file by itself, without what --set has changed."""
    from batchlab.jobs import api

    return api.source_digest(api.load(file, needs_input=needs_input), code)


def since(view: ScheduleView) -> str:
    """What has become of the schedule's job file since it was added; "" where it is as it was, or
    lies on another machine."""
    from batchlab.jobs.submission import code_digest

    file = Path(view["source"]) if view["source"] else None
    if file is None or not file.exists():
        return ""
    needs_input = not view["input"]
    try:
        from batchlab.jobs import api

        jobfile = api.load(file, needs_input=needs_input)
        now = _digest_of(file, code_digest(jobfile)[1], needs_input)
    except BatchlabError:
        return f"{file} has changed since, and is no job file that can be run now."
    except OSError as error:
        return f"{file} cannot be looked at: {error.strerror}."
    if now == view["source_digest"]:
        return ""
    return (
        f"{file}, or what it names, has changed since: runs are as it was when it was added; "
        f"`batchlab schedule add` with --replace takes what it is now."
    )


def kept(client: Client) -> SchedulesView:
    """The schedules of the grid; none where its manager is of a release that has none."""
    try:
        return client.schedules()
    except NotFound:
        return {"schedules": [], "notes": []}


def asked() -> str:
    """A name for one request, so that asking again asks for nothing more."""
    from batchlab.adapters.clock import RandomIds

    return RandomIds().fresh("asked")
