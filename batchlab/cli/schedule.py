"""Commands of `batchlab schedule`, for jobs that run at due times.

Invariant: a schedule runs the files that `schedule add` has uploaded. `schedule show` reports a later change of a file.
The change takes effect only after `schedule add --replace`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchlab.cli import options, output
from batchlab.cli.groups import command_group
from batchlab.cli.option_values import cap_of, connect, home_of, names_by_user, parameters_of, seconds_of, share_of
from batchlab.cli.options import FILE, HOME, JSON, MAX_COST, SET, SHARE, argument, flag, option
from batchlab.core import due_times
from batchlab.core import text as units
from batchlab.core.errors import BatchlabError, NotFound, Refused, UsageError
from batchlab.core.job_definition import Dependency
from batchlab.core.model import Json
from batchlab.core.schedules import Missed, Overlap

if TYPE_CHECKING:
    from batchlab.client.http import Client
    from batchlab.core.api_usage_types import RunView, SchedulesView, ScheduleView
    from batchlab.jobs.job_file import JobFile
    from batchlab.runtime.home import Home

app = command_group("schedule")


NAME = argument("Name of the schedule.", "NAME", autocompletion=options.schedules)


@app.callback()
def schedule() -> None:
    """Run jobs on a schedule, once or repeatedly.

    \b
    Example: batchlab schedule add job.yaml --cron '0 2 * * 1-5' --timezone Europe/Berlin
    """


@app.command()
def add(
    file: Path = FILE,
    cron: str | None = option(
        "Cron expression of the due times: minute, hour, day of month, month, and weekday, such as '0 2 * * 1-5'.",
        "EXPR",
    ),
    at: str | None = option(
        "Run the job once at this time: a wait such as +10m, or a time such as 2026-03-29T06:00.", "TIME"
    ),
    timezone: str | None = option("IANA name of the time zone of the due times. Default: UTC.", "ZONE"),
    name: str | None = option("Name of the schedule. Default: the name of the job.", "NAME"),
    missed: Missed = option(
        "Policy for due times at which no manager ran: run-once, run-all, or skip.", default=Missed.RUN_ONCE
    ),
    missed_within: str | None = option("Skip missed runs whose due time was longer ago than SPAN, such as 6h.", "SPAN"),
    overlap: Overlap = option(
        "Policy for a due time at which the previous run has not ended: skip, queue, or replace.", default=Overlap.SKIP
    ),
    prewarm: str | None = option(
        "Time before a due time, such as 10m, at which the manager launches instances for the run.", "SPAN"
    ),
    capacity: int | None = option(
        "Number of instances that --prewarm launches. Default: as many instances as the last runs used.", min=1
    ),
    input_: str | None = option(
        "Prefix in the grid's bucket, such as raw/incoming/, whose objects at a due time replace the input in the"
        " job file.",
        "PREFIX",
        "--input",
    ),
    due_param: str | None = option("Name of the job parameter that receives the due time of a run.", "KEY"),
    after: list[str] | None = option(
        "Schedule whose latest run must succeed before a run begins, or with :ended must only end. Repeatable.",
        "NAME[:succeeded|ended]",
        autocompletion=options.schedules,
    ),
    set_: list[str] | None = SET,
    max_cost: str | None = MAX_COST,
    share: str | None = SHARE,
    replace: bool = flag("Replace an existing schedule with the same name.", "--replace"),
    home: Path | None = HOME,
    json: bool = JSON,
) -> None:
    """Add a job file as a schedule to the running grid.

    The command uploads the job's code and input. A later change of these files takes effect
    only with --replace. --cron, --timezone, and --at override the keys of the job file.

    \b
    Example: batchlab schedule add job.yaml --cron '0 2 * * *' --missed run-all --prewarm 10m
    """
    if cron and at:
        raise UsageError("--cron and --at exclude each other.", remedy="Leave one of them out.")
    if capacity is not None and prewarm is None:
        raise UsageError("--capacity needs --prewarm.", remedy="Add --prewarm 10m.")
    policies: dict[str, Json] = {
        "missed": missed.value,
        "missed_within_s": None if missed_within is None else seconds_of("--missed-within", missed_within),
        "overlap": overlap.value,
        "prewarm_s": seconds_of("--prewarm", prewarm) if prewarm else 0.0,
        "capacity": capacity,
        "due_param": due_param or "",
    }
    if after:
        policies["after"] = [str(Dependency.parse(text)).removesuffix(":succeeded") for text in after]
    cap_usd = cap_of(max_cost) if max_cost else None
    due = (cron, at, timezone)
    place, parameters = home_of(home), parameters_of(set_)
    job_fields: dict[str, Any] = {"max_cost_usd": cap_usd, "share": share_of(share) or None}
    changes = {key: value for key, value in job_fields.items() if value is not None}
    place.require_folder()  # The job's code and input are uploaded to the bucket.
    view = _upload_and_add(place, file, parameters, name, due, input_, policies, changes, replacing=replace)
    next_due = f"is due next at {_moment(view, view['next_s'])}" if view["next_s"] else "is not due"
    output.answer(json, view, f"{view['name']} {next_due}")


@app.command("list")
def list_(home: Path | None = HOME, json: bool = JSON) -> None:
    """List the schedules with their next due times and the results of their last runs.

    \b
    Example: batchlab schedule list
    """
    with connect(home) as client:
        view = client.schedules()
    schedules = view["schedules"]
    columns = ("name", "state", "when", "next", "last due", "last run", "job")
    nothing = "There are no schedules. `batchlab schedule add FILE` adds one."
    output.listing(json, schedules, columns, map(_row, schedules), nothing)
    for note in () if json else view["notes"]:
        output.say(f"Note: {output.clean(note)}")


def _row(view: ScheduleView) -> tuple[object, ...]:
    last: tuple[object, ...] = ("-", "-", "-")
    for run in view["runs"][:1]:
        last = (_moment(view, run["due_s"]), _result(run), run["job"] or "-")
    return (view["name"], view["state"], _when(view), _moment(view, view["next_s"]), *last)


def _when(view: ScheduleView) -> str:
    return "once" if view["at_s"] is not None else f"{view['cron']} {view['timezone']}"


def _moment(view: ScheduleView, at_s: float | None) -> str:
    return "-" if at_s is None else due_times.text_of_time(at_s, due_times.zone_of(view["timezone"]))


def _result(run: RunView) -> str:
    return run["result"] or run["state"]


@app.command()
def show(
    name: str = NAME,
    count: int = option("Number of shown due times.", default=3, min=1, max=1000),
    home: Path | None = HOME,
    json: bool = JSON,
) -> None:
    """Show a schedule with its next due times, and with its runs from new to old.

    The command shows the reason of each skipped run.

    \b
    Example: batchlab schedule show nightly
    """
    with connect(home) as client:
        view = client.schedule(name)
        coming = client.coming(name, count=count)
    changed = change_note(view)
    if json:
        output.show_json({**view, "changed": changed, "coming": coming})
        return
    warm = "-"
    if view["prewarm_s"]:
        used = "what the last runs used" if view["capacity"] is None else str(view["capacity"])
        warm = f"{output.span(view['prewarm_s'])} before, {used}"
    within = view["missed_within_s"]
    facts = {
        "schedule": view["name"],
        "job": view["job"],
        "state": view["state"],
        "when": _when(view),
        "missed": view["missed"] + ("" if within is None else f" within {output.span(within)}"),
        "overlap": view["overlap"],
        "warm": warm,
        "after": ", ".join(view.get("after", ())) or "-",
        "input": ", ".join(view["input"]) or "as it was uploaded",
        "file": view["source"] or "-",
        "added": _moment(view, view["added_s"]),
    }
    output.show("\n".join(f"{key:<10}{output.clean(value)}" for key, value in facts.items()))
    if changed:
        output.say(f"Note: {output.clean(changed)}")
    if coming:
        output.show("\n" + output.table(("next", "in UTC"), [(due["local"], due["utc"]) for due in coming]))
    if view["runs"]:
        rows = []
        for run in view["runs"]:
            due, started, took = _moment(view, run["due_s"]), _moment(view, run["started_s"]), "-"
            if run["started_s"] is not None and run["ended_s"] is not None:
                took = output.span(run["ended_s"] - run["started_s"])
            rows.append((due, _result(run), run["job"] or "-", started, took, run["reason"]))
        output.show("\n" + output.table(("due", "run", "job", "started", "took", "reason"), rows))


@app.command()
def pause(name: str = NAME, home: Path | None = HOME, json: bool = JSON) -> None:
    """Pause a schedule until `schedule resume`. The manager skips the due times of a paused schedule.

    \b
    Example: batchlab schedule pause nightly
    """
    _change(home, lambda client: client.pause_schedule(name), json)


@app.command()
def resume(name: str = NAME, home: Path | None = HOME, json: bool = JSON) -> None:
    """Resume a paused schedule. The schedule runs its job again from its next due time.

    \b
    Example: batchlab schedule resume nightly
    """
    _change(home, lambda client: client.resume_schedule(name), json)


@app.command()
def delete(name: str = NAME, home: Path | None = HOME, json: bool = JSON) -> None:
    """Delete a schedule. A running job of the deleted schedule continues.

    \b
    Example: batchlab schedule delete nightly
    """
    _change(home, lambda client: client.remove_schedule(name), json, "is deleted")


def _change(home: Path | None, verb: Callable[[Client], ScheduleView], json: bool, action: str = "") -> None:
    with connect(home) as client:
        view = verb(client)
    output.answer(json, view, f"{view['name']} {action or view['state']}")
    for run in view["runs"]:
        if run["state"] == "running" and not json:
            output.say(f"The job {run['job']} of this schedule is running.")


@app.command()
def run(name: str = NAME, home: Path | None = HOME, json: bool = JSON) -> None:
    """Run a schedule's job now, in addition to its due times, and print the job's id.

    \b
    Example: batchlab schedule run nightly
    """
    from batchlab.adapters.clock import RandomIds
    from batchlab.cli.session import Session

    token = RandomIds().fresh("asked")  # A repeated request with the same token starts one run.
    with Session.attach(home_of(home)) as session, names_by_user():
        view = session.call(lambda client: client.run_schedule(name, token))
    if view["state"] == "skipped" or view["result"] == "REFUSED":
        raise Refused(
            f"Schedule {name} has not run: {view['reason'].rstrip('.')}.",
            remedy=f"`batchlab schedule show {name}` shows its job and runs.",
        )
    output.answer(json, view, view["job"] or f"{name} waits for the run before it")


def _upload_and_add(
    home: Home,
    file: Path,
    parameters: Mapping[str, str],
    name: str | None,
    due: tuple[str | None, str | None, str | None],
    prefix: str | None,
    policies: Mapping[str, Json],
    changes: Mapping[str, Any],
    *,
    replacing: bool,
) -> ScheduleView:
    """Upload the files of a job file and add a schedule to the running grid.

    The tuple `due` contains the values of the options --cron, --at, and --timezone. The values in `changes` replace
    fields of the job.
    """
    from batchlab.cli.session import Session
    from batchlab.jobs import job_file
    from batchlab.jobs.submission import code_digest, own_keys, prepare
    from batchlab.runtime import factory

    with Session.attach(home) as session:
        backend = session.backend
        clock = backend.open_clock()
        jobfile = job_file.load(file, parameters, needs_input=prefix is None)
        keys = own_keys(jobfile, backend.bucket(home)) if prefix is None else [_check_prefix(prefix)]
        packed = code_digest(jobfile)
        name = name or jobfile.job.name
        schedule = {
            "name": name,
            **policies,
            **_due_times(jobfile, *due, now_s=clock.now_s()),
            "source": str(jobfile.path),
            "source_digest": _digest_of(file, packed[1], prefix is None),
        }
        preparing = prepare(
            jobfile,
            objects=backend.open_objects(home),
            clock=clock,
            patience=factory.patience(),
            # The token depends only on the name of the schedule and the content of the files, so an earlier upload is
            # reused.
            token=f"schedule/{name}/{job_file.source_digest(jobfile, packed[1])}",
            packed=packed,
            progress=output.ThrottledNotes().say_uploaded,
            keys=keys,
            recurring=True,
        )
        import asyncio

        job = replace(asyncio.run(preparing), **changes)
        with names_by_user():  # --after may name an unknown schedule.
            return session.call(lambda client: client.add_schedule(schedule, job, replace=replacing))


def _due_times(
    jobfile: JobFile, cron: str | None, at: str | None, timezone: str | None, *, now_s: float
) -> dict[str, Json]:
    """Return the due times of a schedule from the command's options, or else from the job file."""
    job = jobfile.job
    cron, at = cron or (None if at else job.cron), at or (None if cron else job.at)
    if not cron and not at:
        raise UsageError(
            "The schedule does not have a due time.",
            remedy="Add --cron '0 2 * * *' or --at 2026-03-29T06:00, or write cron: in the file.",
        )
    zone = timezone or job.timezone
    return {"cron": cron or "", "timezone": zone, "at_s": moment(at, zone, now_s) if at else None}


def moment(text: str, zone: str, now_s: float) -> float:
    """Return the epoch seconds of a text such as `+10m` or of an ISO 8601 time. Raise UsageError for another text.

    An ISO 8601 time without a time zone is in the time zone `zone`.
    """
    tz = due_times.zone_of(zone)
    try:
        if not text.startswith("+"):
            naive = datetime.fromisoformat(text)
            if naive.tzinfo is None:
                return due_times.of_local(naive, tz)
        return units.start_s(text, now_s)
    except (ValueError, OverflowError) as error:
        remedy = "Write +10m, or a time such as 2026-03-29T06:00 (in --timezone) or with its own zone."
        raise UsageError(f"{text[:60]!r} is not a time.", remedy=remedy) from error


def _check_prefix(text: str) -> str:
    """Return the prefix that `--input` names. Raise UsageError if the text is not a valid prefix."""
    from batchlab.jobs.submission import check_key

    check_key(text, text)
    if not text.endswith("/"):
        raise UsageError(
            f"--input {text} does not end in a slash, as a prefix must.",
            remedy=f"Write --input {text}/ for the objects below it.",
        )
    return text


def _digest_of(file: Path, code: str, needs_input: bool) -> str:
    """Return the source digest of a job file, computed without the values of the option --set."""
    from batchlab.jobs import job_file

    return job_file.source_digest(job_file.load(file, needs_input=needs_input), code)


def change_note(view: ScheduleView) -> str:
    """Return a sentence if the job file of a schedule has changed since its upload.

    Return "" if the job file is unchanged, or does not exist on this machine.
    """
    from batchlab.jobs import job_file
    from batchlab.jobs.submission import code_digest

    file = Path(view["source"]) if view["source"] else None
    if file is None or not file.exists():
        return ""
    needs_input = not view["input"]
    try:
        jobfile = job_file.load(file, needs_input=needs_input)
        digest = _digest_of(file, code_digest(jobfile)[1], needs_input)
    except BatchlabError:
        return f"{file} has changed since the schedule was added, and is not a valid job file now."
    except OSError as error:
        return f"{file} cannot be read: {error.strerror}."
    if digest == view["source_digest"]:
        return ""
    return (
        f"{file}, or a file that it names, has changed since the schedule was added. Runs use the uploaded files. "
        "`batchlab schedule add` with --replace uploads the changed ones."
    )


def read_schedules(client: Client) -> SchedulesView:
    """Return the schedules of the grid.

    If the manager does not support schedules, as in release 0.1.0, the list of schedules is empty.
    """
    try:
        return client.schedules()
    except NotFound:
        return {"schedules": [], "notes": []}
