"""`batchlab schedule`: jobs that run at due times.

Upload of a job file for a schedule, and the check whether the file has changed since.

Invariant: a schedule runs the files that were uploaded when it was added. A later change of a file
is reported, and used only after `schedule add --replace`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from batchlab.cli import options, output
from batchlab.cli.options import FILE, HOME, JSON, MAX_COST, SET, argument, cap_of, flag, home_of, option, seconds_of
from batchlab.core.errors import BatchlabError, NotFound, UsageError
from batchlab.core.schedules import Missed, Overlap

if TYPE_CHECKING:
    from batchlab.client.http import Client
    from batchlab.core.api_usage_types import RunView, SchedulesView, ScheduleView
    from batchlab.core.job_definition import JobDef
    from batchlab.core.model import Json
    from batchlab.jobs.job_file import JobFile
    from batchlab.runtime.home import Home

app = typer.Typer(no_args_is_help=True)


def register(root: typer.Typer) -> None:
    """Add the group `schedule` to the root command."""
    root.add_typer(app, name="schedule")


NAME = argument("The schedule's name.", "NAME", autocompletion=options.schedules)


@app.callback()
def schedule() -> None:
    """Run jobs on a schedule, once or repeatedly.

    \b
    Example: batchlab schedule add job.yaml --cron '0 2 * * 1-5' --timezone Europe/Berlin
    """


@app.command()
def add(
    file: Path = FILE,
    cron: str | None = option("Minute, hour, day of month, month, and weekday, such as '0 2 * * 1-5'.", "EXPR"),
    at: str | None = option("Run once: +10m, or a time such as 2026-03-29T06:00.", "TIME"),
    timezone: str | None = option("IANA time zone of the due times. Default: UTC.", "ZONE"),
    name: str | None = option("Default: the job's name.", "NAME"),
    missed: Missed = option("Policy for due times while no manager was running.", default=Missed.RUN_ONCE),
    missed_within: str | None = option("Skip due times that were missed longer ago, such as 6h.", "SPAN"),
    overlap: Overlap = option("Policy while the previous run is active.", default=Overlap.SKIP),
    prewarm: str | None = option("Prepare the fleet this long before a due time, such as 10m.", "SPAN"),
    capacity: int | None = option("Instances to prepare. Default: as many as the last runs used.", min=1),
    input_: str | None = option(
        "Prefix in the grid's bucket, such as raw/incoming/. Its objects at the due time "
        "are the input of a run, instead of the file's own.",
        "PREFIX",
        "--input",
    ),
    due_param: str | None = option("Parameter of the job that receives the due time.", "KEY"),
    set_: list[str] | None = SET,
    max_cost: str | None = MAX_COST,
    replace: bool = flag("Replace the schedule of the same name.", "--replace"),
    home: Path | None = HOME,
    json: bool = JSON,
) -> None:
    """Add a job file as a schedule to the running grid.

    The command uploads code and input. Later changes of the files have no effect until the schedule
    is added again with --replace. Options override cron, timezone, and at of the file.

    \b
    Example: batchlab schedule add job.yaml --cron '0 2 * * *' --missed run-all --prewarm 10m
    """

    schedule_arguments = ScheduleArguments(
        name=name,
        cron=cron,
        at=at,
        timezone=timezone,
        missed=missed,
        missed_within=missed_within,
        overlap=overlap,
        prewarm=prewarm,
        capacity=capacity,
        input=input_,
        due_param=due_param,
        max_cost_usd=cap_of(max_cost) if max_cost else None,
    )
    view = add_with_upload(home_of(home), file, set_ or (), schedule_arguments, replacing=replace)
    if json:
        output.show_json(view)
        return
    coming = f"is due next at {_moment(view, view['next_s'])}" if view["next_s"] else "is not due"
    output.show(f"{view['name']} {coming}")


@app.command("list")
def list_(home: Path | None = HOME, json: bool = JSON) -> None:
    """List the schedules with their next due time and last result.

    \b
    Example: batchlab schedule list
    """
    from batchlab.cli.session import connect

    with connect(home_of(home)) as client:
        found = client.schedules()
    if json:
        output.show_json(found["schedules"])
        return
    if found["schedules"]:
        columns = ("name", "state", "when", "next", "last due", "last run", "job")
        output.show(output.table(columns, map(_row, found["schedules"])))
    else:
        output.say("There are no schedules: `batchlab schedule add FILE` makes one.")
    for note in found["notes"]:
        output.say(f"Note: {output.clean(note)}")


def _row(view: ScheduleView) -> tuple[object, ...]:
    last = next(iter(view["runs"]), None)
    return (
        view["name"],
        view["state"],
        _when(view),
        _moment(view, view["next_s"]),
        _moment(view, last["due_s"]) if last else "-",
        _result(last) if last else "-",
        (last["job"] if last else None) or "-",
    )


def _when(view: ScheduleView) -> str:
    if view["at_s"] is not None:
        return "once"
    return f"{view['cron']} {view['timezone']}"


def _moment(view: ScheduleView, at_s: float | None) -> str:
    from batchlab.core import due_times

    return "-" if at_s is None else due_times.shown(at_s, due_times.zone_of(view["timezone"]))


def _result(run: RunView) -> str:
    return run["result"] or run["state"]


@app.command()
def show(name: str = NAME, home: Path | None = HOME, json: bool = JSON) -> None:
    """Show a schedule with its runs, newest first, and the reasons of skipped due times.

    \b
    Example: batchlab schedule show nightly
    """
    from batchlab.cli.session import connect

    with connect(home_of(home)) as client:
        view = client.schedule(name)
    changed = since(view)
    if json:
        output.show_json({**view, "changed": changed})
        return
    warm = "-"
    if view["prewarm_s"]:
        count = "what the last runs used" if view["capacity"] is None else str(view["capacity"])
        warm = f"{output.span(view['prewarm_s'])} before, {count}"
    within = view["missed_within_s"]
    facts = {
        "schedule": view["name"],
        "job": view["job"],
        "state": view["state"],
        "when": _when(view),
        "next": _moment(view, view["next_s"]),
        "missed": view["missed"] + ("" if within is None else f" within {output.span(within)}"),
        "overlap": view["overlap"],
        "warm": warm,
        "input": ", ".join(view["input"]) or "as it was uploaded",
        "file": view["source"] or "-",
        "added": _moment(view, view["added_s"]),
    }
    output.show("\n".join(f"{key:<10}{output.clean(value)}" for key, value in facts.items()))
    if changed:
        output.say(f"Note: {output.clean(changed)}")
    if view["runs"]:
        columns = ("due", "run", "job", "started", "took", "reason")
        rows = [_run_row(view, run) for run in view["runs"]]
        output.show("\n" + output.table(columns, rows))


def _run_row(view: ScheduleView, run: RunView) -> tuple[object, ...]:
    took = "-"
    if run["started_s"] is not None and run["ended_s"] is not None:
        took = output.span(run["ended_s"] - run["started_s"])
    return (
        _moment(view, run["due_s"]),
        _result(run),
        run["job"] or "-",
        _moment(view, run["started_s"]),
        took,
        run["reason"],
    )


@app.command("next")
def next_(
    name: str = NAME,
    count: int = option("Number of due times.", default=10, min=1, max=1000),
    home: Path | None = HOME,
    json: bool = JSON,
) -> None:
    """List the next due times, in the schedule's zone and in UTC.

    \b
    Example: batchlab schedule next nightly --count 5
    """
    from batchlab.cli.session import connect

    with connect(home_of(home)) as client:
        found = client.coming(name, count=count)
    if json:
        output.show_json(found)
    elif not found:
        output.say(f"{name} is not due any more.")
    else:
        rows = [(one["local"], one["utc"]) for one in found]
        output.show(output.table(("local", "utc"), rows))


@app.command()
def pause(name: str = NAME, home: Path | None = HOME, json: bool = JSON) -> None:
    """Pause a schedule until `schedule resume`. Due times in between are skipped.

    \b
    Example: batchlab schedule pause nightly
    """
    _change(home, lambda client: client.pause_schedule(name), json)


@app.command()
def resume(name: str = NAME, home: Path | None = HOME, json: bool = JSON) -> None:
    """Resume a paused schedule from the next due time on.

    \b
    Example: batchlab schedule resume nightly
    """
    _change(home, lambda client: client.resume_schedule(name), json)


@app.command()
def remove(name: str = NAME, home: Path | None = HOME, json: bool = JSON) -> None:
    """Remove a schedule. A running job of it continues.

    \b
    Example: batchlab schedule remove nightly
    """
    _change(home, lambda client: client.remove_schedule(name), json, "is removed")


def _change(home: Path | None, verb: Callable[[Client], ScheduleView], json: bool, did: str = "") -> None:
    from batchlab.cli.session import connect

    with connect(home_of(home)) as client:
        view = verb(client)
    if json:
        output.show_json(view)
        return
    output.show(f"{view['name']} {did or view['state']}")
    for run in view["runs"]:
        if run["state"] == "running":
            output.say(f"Its job {run['job']} runs.")


@app.command()
def run(name: str = NAME, home: Path | None = HOME, json: bool = JSON) -> None:
    """Run a schedule's job now, in addition to its due times, and print the job's id.

    \b
    Example: batchlab schedule run nightly
    """
    from batchlab.cli.session import Session
    from batchlab.core.errors import Refused

    token = asked()
    with Session.attached(home_of(home)) as session:
        view = session.call(lambda client: client.run_schedule(name, token))
    if view["state"] == "skipped" or view["result"] == "REFUSED":
        raise Refused(
            f"Schedule {name} has not run: {view['reason'].rstrip('.')}.",
            remedy=f"`batchlab schedule show {name}` says what it runs.",
        )
    if json:
        output.show_json(view)
    elif view["job"]:
        output.show(view["job"])
    else:
        output.show(f"{name} waits for the run before it")


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


def add_with_upload(
    home: Home, file: Path, sets: Iterable[str], given: ScheduleArguments, *, replacing: bool
) -> ScheduleView:
    """Upload the files of a job file and add a schedule to the running grid."""
    from batchlab.cli.session import Session
    from batchlab.cli.submission import overrides
    from batchlab.jobs import job_file
    from batchlab.jobs.submission import Uploaded, code_digest, own_keys, prepare
    from batchlab.runtime import factory

    changes = overrides(sets)
    with Session.attached(home) as session:
        backend = session.backend
        clock = backend.open_clock()
        jobfile = job_file.load(file, changes, needs_input=given.input is None)
        keys = own_keys(jobfile, backend.bucket(home)) if given.input is None else [_prefix(given.input)]
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
            token=f"schedule/{name}/{job_file.source_digest(jobfile, packed[1])}",
            packed=packed,
            progress=note,
            keys=keys,
            recurring=True,
        )
        import asyncio

        job: JobDef = asyncio.run(preparing)
        if given.max_cost_usd is not None:
            job = replace(job, max_cost_usd=given.max_cost_usd)
        return session.call(lambda client: client.add_schedule(schedule, job, replace=replacing))


def _described(jobfile: JobFile, given: ScheduleArguments, name: str, now_s: float) -> dict[str, Json]:
    if given.cron and given.at:
        raise UsageError("--cron and --at exclude each other.", remedy="Say one of them.")
    job_spec = jobfile.job
    cron = given.cron or (None if given.at else job_spec.cron)
    at = given.at or (None if cron else job_spec.at)
    if not cron and not at:
        raise UsageError(
            "Nothing says when it is to run.",
            remedy="Say --cron '0 2 * * *' or --at 2026-03-29T06:00, or write cron: in the file.",
        )
    zone = given.timezone or job_spec.timezone
    if given.capacity is not None and given.prewarm is None:
        raise UsageError("--capacity is what --prewarm has ready.", remedy="Say --prewarm 10m as well.")
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
    from batchlab.core import due_times
    from batchlab.core import text as units

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
    from batchlab.jobs import job_file

    return job_file.source_digest(job_file.load(file, needs_input=needs_input), code)


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
        from batchlab.jobs import job_file

        jobfile = job_file.load(file, needs_input=needs_input)
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
