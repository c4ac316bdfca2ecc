"""Commands of `batchlab job`, which submit, list, show, and control jobs of a running grid, and check job files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from batchlab.cli import options, output
from batchlab.cli.groups import command_group
from batchlab.cli.job_logs import logs
from batchlab.cli.job_replay import replay_task
from batchlab.cli.job_tasks import failures, retry, show_task, why
from batchlab.cli.option_values import (
    call_with_job,
    cap_of,
    cap_text,
    connect,
    home_of,
    is_whole_id,
    jobs_in,
    no_grid,
    parameters_of,
    resolve,
    share_of,
    states_of,
)
from batchlab.cli.options import ANY_BACKEND, AS_IF, CAP, FILE, HOME, JOB, JSON, MAX_COST, OUT, SET, SHARE, flag, option
from batchlab.core.errors import NotFound, Refused, UsageError
from batchlab.core.fair_share import DEFAULT_SHARE
from batchlab.core.users import OWNER

if TYPE_CHECKING:
    from batchlab.client.http import Client
    from batchlab.core.api_types import JobView
    from batchlab.runtime.home import Home

app = command_group("job")


@app.callback()
def job() -> None:
    """Submit jobs to a running grid, and inspect, control, and delete jobs.

    \b
    Example: batchlab job list
    """


@app.command()
def submit(
    file: Path = FILE,
    set_: list[str] | None = SET,
    max_cost: str | None = MAX_COST,
    share: str | None = SHARE,
    after: list[str] | None = options.AFTER,
    home: Path | None = HOME,
    json: bool = JSON,
) -> None:
    """Submit a job file to the running grid, and print the job's id.

    If a job from the unchanged job file has not ended, the command prints the id of this job and
    does not submit another job.

    If the tasks of the last run with the job's name were too short or too long, the command prints
    a warning.

    With --after, the job waits in the state PENDING until the other job has succeeded, or with
    --after JOB:ended until the other job has ended. If a job that must succeed ends without success,
    the waiting job is FAILED.

    \b
    Example: batchlab job submit job.yaml --after last
    """
    from batchlab.cli.submission import submit as submit_file
    from batchlab.client.task_times import size_warnings_of

    place, cap = home_of(home), cap_of(max_cost) if max_cost else None
    view = submit_file(place, file, set_ or (), max_cost_usd=cap, after=after or (), share=share_of(share))
    pools = {stage["name"]: stage["pool"] for stage in view["stages"]}
    warnings = size_warnings_of(connect(place), view["name"], pools, new=view["id"])
    output.show_warnings(warnings)
    if share and view.get("share") != share:
        # The job was submitted before and is still active.
        kept = view.get("share") or DEFAULT_SHARE
        output.say(f"Note: {view['id']} was submitted before and stays in the share {kept}.")
    output.say(f"{view['name']} is {view['state']}; watch it: batchlab job watch {view['id']}")
    output.answer(json, {**view, "warnings": [one.to_json() for one in warnings]}, view["id"])


@app.command("list")
def list_(
    state: list[str] | None = options.STATE,
    active: bool = flag("List only jobs that have not ended.", "--active", hidden=True),
    owner: str | None = option("List only jobs of this user.", "NAME"),
    share: str | None = option("List only jobs of this share identifier.", "NAME"),
    limit: int = option("Maximum number of listed jobs.", default=20, min=1),
    home: Path | None = HOME,
    json: bool = JSON,
) -> None:
    """List the jobs of the grid, with the newest job first.

    \b
    Example: batchlab job list --state failed
    """
    names = [*(state or ()), *(["active"] if active else [])]
    states = states_of(names)
    with connect(home) as client:
        jobs = jobs_in(client, states, limit, owner, share)
    columns: tuple[str, ...] = ("id", "state", "submitted", "took", "tasks", "failed", "reason")
    rows = [_row(one) for one in jobs]
    if any(one.get("owner", OWNER) != OWNER for one in jobs):  # A grid with one user has one owner.
        columns = ("id", "owner", *columns[1:])
        rows = [(row[0], one.get("owner", OWNER), *row[1:]) for one, row in zip(jobs, rows, strict=True)]
    if any(one.get("share") for one in jobs):  # A grid without fair share has no column of shares.
        columns = (columns[0], "share", *columns[1:])
        rows = [(row[0], one.get("share") or DEFAULT_SHARE, *row[1:]) for one, row in zip(jobs, rows, strict=True)]
    of = f" of {output.clean(owner)}" if owner else ""
    of += f" of the share {output.clean(share)}" if share else ""
    which = f" {' or '.join(names).lower()}" if names else ""
    output.listing(json, jobs, columns, rows, f"There are no{which} jobs{of}.")
    place = home_of(home)
    if place.record() is None and not json and any(view["ended_s"] is None for view in jobs):
        output.say(f"No grid is up in {place.path}. `batchlab grid up` starts a grid, which continues unfinished jobs.")


def _row(job: JobView) -> tuple[object, ...]:
    started_s, ended_s, stages = job["started_s"], job["ended_s"], job["stages"]
    took = "-" if started_s is None or ended_s is None else output.span(ended_s - started_s)
    failed = sum(stage["failed"] for stage in stages)
    ended = failed + sum(stage["succeeded"] + stage["cancelled"] for stage in stages)
    planned = sum(stage["planned"] or 0 for stage in stages)
    more = "+" if any(stage["planned"] is None for stage in stages) else ""
    submitted = output.moment(job["submitted_s"])
    reason = job["reason"]
    if started_s is None and ended_s is None and job.get("after"):
        reason = f"after {_dependencies(job)}"
    return (job["id"], job["state"], submitted, took, f"{ended}/{planned}{more}", failed, reason)


def _dependencies(job: JobView) -> str:
    """Return the jobs that the job depends on, with the conditions that are not `succeeded`."""
    return ", ".join(
        other["job"] if other["condition"] == "succeeded" else f"{other['job']}:{other['condition']}"
        for other in job["after"]
    )


@app.command()
def show(
    job: str = JOB,
    task: str | None = options.SHOWN_TASK,
    as_if_aws: bool = AS_IF,
    home: Path | None = HOME,
    backend: str | None = ANY_BACKEND,
    json: bool = JSON,
) -> None:
    """Show a job with its stages and the reason why it waits, or one task of a job with its attempts.

    For a task, the command shows the input, and for each attempt the state, the size of the log, and the machine.

    \b
    Example: batchlab job show last parse/3
    """
    if task is not None:
        show_task(job, task, home, backend, json=json)
    else:
        _show(home_of(home), job, as_if_aws=as_if_aws, json=json)


def _show(place: Home, job: str, *, as_if_aws: bool, json: bool) -> None:
    from batchlab.cli.bills import LiveCost

    live_cost, cost = LiveCost(place, as_if_aws=as_if_aws), None
    with connect(place) as client:
        view = resolve(client, job)
        why, eta = client.why(view["id"]), client.eta(view["id"])
        record = place.record()
        if record and live_cost.applies(record.backend):
            cost = live_cost.job(client, view, client.grid())
    if json:
        output.show_json({**view, "why": why, "eta": eta, **({"cost": cost} if cost else {})})
        return
    tags = ", ".join(f"{key}={value}" for key, value in view["tags"].items())
    facts = {
        "job": view["id"],
        "owner": view.get("owner", OWNER),
        "state": view["state"],
        "why": why,
        **({} if view["ended_s"] else {"to go": eta["text"]}),
        "submitted": output.moment(view["submitted_s"]),
        "started": output.moment(view["started_s"]),
        "ended": output.moment(view["ended_s"]),
        **({"after": _dependencies(view)} if view.get("after") else {}),
        "priority": str(view["priority"]),
        **({"share": view["share"]} if view.get("share") else {}),
        "tags": tags or "-",
        "retries": str(view["round"]),
        **({"cost": str(cost["text"])} if cost else {}),
    }
    if problem := view.get("report"):
        facts["report"] = (
            f"its performance data is not written: {problem}; `batchlab report write {view['id']}` tries again"
        )
    counts = ("succeeded", "failed", "cancelled", "running", "retried")
    rows: list[tuple[object, ...]] = []
    more = ("GPUs per task",) if any(stage.get("gpus") for stage in view["stages"]) else ()
    for stage in view["stages"]:
        planned = "-" if stage["planned"] is None else stage["planned"]
        gpus = [stage.get("gpus", 0)] if more else []
        mean = output.optional_span(stage["mean_s"])
        rows.append((stage["name"], planned, *output.cells(stage, *counts), mean, *gpus))
    lines = [f"{key:<11}{output.clean(value)}" for key, value in facts.items()]
    output.show("\n".join([*lines, "", output.table(("stage", "planned", *counts, "mean", *more), rows)]))


@app.command()
def watch(job: str = JOB, as_if_aws: bool = AS_IF, home: Path | None = HOME) -> None:
    """Watch a job until the job ends. The exit code is 1 unless the job succeeds.

    \b
    Example: batchlab job watch last
    """
    from batchlab.cli.bills import LiveCost
    from batchlab.cli.progress import JobDisplay
    from batchlab.cli.session import Session
    from batchlab.cli.submission import watch as watch_job

    place = home_of(home)
    with Session.attach(place) as session:
        view = session.call(lambda client: resolve(client, job))
        with JobDisplay() as display:
            view = watch_job(session, view, display, {}, LiveCost(place, as_if_aws=as_if_aws))
    reason = f": {output.clean(view['reason'])}" if view["reason"] else ""
    output.show(f"{view['id']} {view['state']}{reason}")
    if view["state"] != "SUCCEEDED":
        raise typer.Exit(1)


def _control(job: str, home: Path | None, verb: Callable[[Client, str], JobView], json: bool) -> None:
    with connect(home) as client:
        view = call_with_job(client, job, verb)
    output.answer(json, view, f"{view['id']} {view['state']}")


@app.command()
def cancel(job: str = JOB, home: Path | None = HOME, json: bool = JSON) -> None:
    """Cancel a job, and wait until none of its tasks can start.

    \b
    Example: batchlab job cancel last
    """
    from batchlab.core.model import JobState

    with connect(home) as client:
        view = call_with_job(client, job, lambda client, name: client.cancel(name))
    state = view["state"] if JobState(view["state"]).ended else "is being canceled"
    output.answer(json, view, f"{view['id']} {state}")


@app.command()
def pause(job: str = JOB, home: Path | None = HOME, json: bool = JSON) -> None:
    """Pause a job. Running tasks of the job continue, and no other task of the job starts until `job resume`.

    \b
    Example: batchlab job pause last
    """
    _control(job, home, lambda client, name: client.pause(name), json)


@app.command()
def resume(job: str = JOB, home: Path | None = HOME, json: bool = JSON) -> None:
    """Resume a paused job.

    \b
    Example: batchlab job resume last
    """
    _control(job, home, lambda client, name: client.resume(name), json)


@app.command()
def delete(
    job: str = JOB,
    yes: bool = flag("Delete the job without asking for confirmation.", "--yes"),
    home: Path | None = HOME,
    json: bool = JSON,
) -> None:
    """Delete an ended job with its input, logs, results, and reports.

    Code, which other jobs may share, and the cost of the grid stay. The results that the user has
    fetched stay, too. A deleted job cannot be restored.

    A File that another job got from this job is deleted, too: fetch the file first. The input of an
    active job cannot be deleted.

    \b
    Example: batchlab job delete last
    """
    place = home_of(home)
    if place.record() is None:
        raise no_grid(place)
    with connect(place) as client:
        try:
            view = resolve(client, job)
        except UsageError as error:
            # Workers may have written objects of a deleted job after its deletion.
            if not is_whole_id(job):
                raise
            try:
                deleted = client.delete(job)
            except NotFound:
                raise error from None
            output.answer(json, deleted, f"{job} was deleted before: {output.count(deleted['objects'], 'object')}.")
            return
        if view["ended_s"] is None:
            raise Refused(
                f"Job {view['id']} is {view['state']}, and only an ended job can be deleted.",
                remedy=f"`batchlab job cancel {view['id']}` ends the job.",
            )
        if not yes and not output.agrees(f"Delete {view['id']} ({view['state']}) with all its results?"):
            raise typer.Exit(1)
        deleted = client.delete(view["id"])
    for copy in place.reports.glob(f"*/{view['id']}"):
        shutil.rmtree(copy, ignore_errors=True)
    output.answer(json, deleted, f"{deleted['id']} is deleted: {output.count(deleted['objects'], 'object')}.")


@app.command()
def results(
    job: str = JOB,
    out: Path | None = OUT,
    stage: list[str] | None = option(
        "Stage whose results are fetched. Repeatable. Default: the last stages of the job.", "NAME"
    ),
    home: Path | None = HOME,
    json: bool = JSON,
) -> None:
    """Fetch a job's results into a folder. The results of a running job are the results of its succeeded tasks.

    \b
    Example: batchlab job results last --out out/claims
    """
    from batchlab.cli.session import Session
    from batchlab.cli.submission import fetch_json, fetch_results

    with Session.attach(home_of(home), reads=True) as session:
        view = session.call(lambda client: resolve(client, job))
        fetched = fetch_results(session, view, out, stage or ())
    if json:
        output.show_json(fetch_json(fetched))
        return
    for name, number in fetched.results.items():
        output.show(f"{fetched.folder / f'{name}.jsonl'}: {output.count(number, 'result')}")
    if fetched.files:
        files = output.count(fetched.files, "file")
        output.show(f"{fetched.folder / 'files'}: {files}, {output.size(fetched.size_bytes)}")


@app.command()
def check(file: Path = FILE, set_: list[str] | None = SET, home: Path | None = HOME, json: bool = JSON) -> None:
    """Check a job file, its code, and its input without running the job.

    If the tasks of the last run with the job's name were too short or too long, the command prints
    a warning.

    \b
    Example: batchlab job check job.yaml
    """
    from batchlab.client.task_times import size_warnings_of
    from batchlab.jobs.job_file import load
    from batchlab.jobs.submission import check_input, code_digest

    jobfile = load(file, parameters_of(set_))
    check_input(jobfile)
    data, _ = code_digest(jobfile)
    stages = [stage.name for stage in jobfile.job.stages]
    pools = {stage.name: stage.pool for stage in jobfile.job.stages}
    warnings = size_warnings_of(connect(home_of(home)), jobfile.job.name, pools)
    output.show_warnings(warnings)
    output.answer(
        json,
        {
            "name": jobfile.job.name,
            "stages": stages,
            "inputs": len(jobfile.files),
            "code": str(jobfile.code),
            "code_bytes": len(data),
            "params": dict(jobfile.params),
            "warnings": [one.to_json() for one in warnings],
        },
        f"{file} is fine: job {jobfile.job.name}, {output.count(len(jobfile.files), 'input')}, "
        f"{output.count(len(stages), 'stage')} ({', '.join(stages)}), "
        f"{output.size(len(data))} of code",
    )


@app.command()
def cap(job: str = JOB, amount: str = CAP, home: Path | None = HOME, json: bool = JSON) -> None:
    """Cap the cost of a job on AWS. At the cap, no instance is launched for the job, and running tasks of the job
    finish.

    A job that has reached its cap continues when a user raises the cap.

    \b
    Example: batchlab job cap last 10USD
    """
    usd = cap_of(amount)
    with connect(home) as client:
        view = client.cap_job(resolve(client, job)["id"], usd)
    output.answer(json, view, f"The cost of {view['job']} is {cap_text(usd)}.")


for _command in (logs, failures, retry, why, replay_task):
    app.command()(_command)
