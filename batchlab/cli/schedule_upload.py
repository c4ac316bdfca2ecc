"""Upload of a job file for a schedule, and the check whether the file has changed since.

Invariant: a schedule runs the files that were uploaded when it was added. A later change of a file
is reported, and used only after `schedule add --replace`.
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
class ScheduleArguments:
    """Arguments of `schedule add`. The job file may give the values that are None."""

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
    home: Home, file: Path, sets: Iterable[str], given: ScheduleArguments, *, replacing: bool
) -> ScheduleView:
    """Upload the files of a job file and add a schedule to the running grid."""
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
            # The token depends on the content only, so files of an earlier upload are reused.
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


def _described(
    jobfile: JobFile, given: ScheduleArguments, name: str, now_s: float
) -> dict[str, Json]:
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
    """Parse `+10m` or an ISO 8601 time to epoch seconds; raise UsageError.

    A time without a zone is in `zone`.
    """
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
        raise UsageError(f"{text[:60]!r} is not a time.", remedy=_AT) from error


def _span(option: str, text: str | None) -> float | None:
    return None if text is None else seconds_of(option, text)


def _prefix(text: str) -> str:
    """Return the prefix of `--input`; raise UsageError."""
    from batchlab.jobs.submission import check_key

    check_key(text, text)
    if not text.endswith("/"):
        raise UsageError(
            f"--input {text} does not end in a slash, as a prefix must.",
            remedy=f"Write --input {text}/ for the objects below it.",
        )
    return text


def _digest_of(file: Path, code: str, needs_input: bool) -> str:
    """Return the source digest of the file without --set."""
    from batchlab.jobs import api

    return api.source_digest(api.load(file, needs_input=needs_input), code)


def since(view: ScheduleView) -> str:
    """Return a sentence on a changed job file of a schedule.

    Return "" if the file is unchanged or on another machine.
    """
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
    """Return the schedules of the grid. Managers of release 0.1.0 may have none."""
    try:
        return client.schedules()
    except NotFound:
        return {"schedules": [], "notes": []}


def asked() -> str:
    """Return an id for one request, so that a retry has no further effect."""
    from batchlab.adapters.clock import RandomIds

    return RandomIds().fresh("asked")
