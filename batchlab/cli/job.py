"""`batchlab job`: submit, list, show, and control jobs of a running grid, and check job files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from batchlab.cli import output
from batchlab.cli.options import AS_IF, CAP, FILE, HOME, JOB, JSON, MAX_COST, OUT, SET, cap_of, flag, home_of, option

if TYPE_CHECKING:
    from batchlab.client.http import Client
    from batchlab.core.api_types import JobView, StageView

app = typer.Typer(no_args_is_help=True)


def register(root: typer.Typer) -> None:
    """Add the group `job` to the root command."""
    from batchlab.cli.job_logs import logs
    from batchlab.cli.job_replay import replay_task
    from batchlab.cli.job_tasks import failures, retry, show_task, why

    app.command()(logs)
    app.command()(failures)
    app.command()(retry)
    app.command()(why)
    app.command("show-task")(show_task)
    app.command("replay-task")(replay_task)
    root.add_typer(app, name="job")


@app.callback()
def job() -> None:
    """Submit jobs to a running grid, and manage them.

    \b
    Example: batchlab job list
    """


@app.command()
def submit(
    file: Path = FILE,
    set_: list[str] | None = SET,
    max_cost: str | None = MAX_COST,
    home: Path | None = HOME,
    json: bool = JSON,
) -> None:
    """Submit a job file to the running grid, and print the job's id.

    An unchanged file gives the same job until that job has ended.

    \b
    Example: batchlab job submit job.yaml
    """
    from batchlab.cli.submission import submit as submit_file

    cap = cap_of(max_cost) if max_cost else None
    view = submit_file(home_of(home), file, set_ or (), max_cost_usd=cap)
    output.say(f"{view['name']} is {view['state']}; watch it: batchlab job watch {view['id']}")
    if json:
        output.show_json(view)
    else:
        output.show(view["id"])


@app.command("list")
def list_(
    active: bool = flag("Only jobs that have not ended.", "--active"),
    limit: int = option("Most jobs, newest first.", default=20, min=1),
    home: Path | None = HOME,
    json: bool = JSON,
) -> None:
    """List jobs, newest first.

    \b
    Example: batchlab job list --active
    """
    from batchlab.cli.session import connect

    with connect(home_of(home)) as client:
        jobs = client.jobs(limit=limit, active=active)
    if json:
        output.show_json(jobs)
    elif not jobs:
        output.say("There are no jobs.")
    else:
        columns = ("id", "state", "submitted", "took", "tasks", "failed", "reason")
        output.show(output.table(columns, map(_row, jobs)))


def _row(view: JobView) -> tuple[object, ...]:
    took_s = _took_s(view)
    return (
        view["id"],
        view["state"],
        output.moment(view["submitted_s"]),
        "-" if took_s is None else output.span(took_s),
        _done(view["stages"]),
        sum(stage["failed"] for stage in view["stages"]),
        view["reason"],
    )


def _took_s(view: JobView) -> float | None:
    if view["started_s"] is None or view["ended_s"] is None:
        return None
    return view["ended_s"] - view["started_s"]


def _done(stages: list[StageView]) -> str:
    ended = sum(s["succeeded"] + s["failed"] + s["cancelled"] for s in stages)
    planned = sum(s["planned"] or 0 for s in stages)
    more = "+" if any(s["planned"] is None for s in stages) else ""
    return f"{ended}/{planned}{more}"


@app.command()
def show(job: str = JOB, as_if_aws: bool = AS_IF, home: Path | None = HOME, json: bool = JSON) -> None:
    """Show a job with its stages, and why it is waiting.

    \b
    Example: batchlab job show last
    """
    from batchlab.cli.bills import LiveCost
    from batchlab.cli.session import connect, resolve

    place = home_of(home)
    live_cost, cost = LiveCost(place, as_if_aws=as_if_aws), None
    with connect(place) as client:
        view = resolve(client, job)
        why, eta = client.why(view["id"]), client.eta(view["id"])
        record = place.record()
        if record and live_cost.applies(record.backend):
            cost = live_cost.job(client, view["id"], client.grid())
    if json:
        output.show_json({**view, "why": why, "eta": eta, **({"cost": cost} if cost else {})})
        return
    tags = ", ".join(f"{key}={value}" for key, value in view["tags"].items())
    facts = {
        "job": view["id"],
        "state": view["state"],
        "why": why,
        **({} if view["ended_s"] else {"to go": eta["text"]}),
        "submitted": output.moment(view["submitted_s"]),
        "started": output.moment(view["started_s"]),
        "ended": output.moment(view["ended_s"]),
        "priority": str(view["priority"]),
        "tags": tags or "-",
        "retries": str(view["round"]),
        **({"cost": str(cost["text"])} if cost else {}),
        **({"report": _unwritten(view)} if view.get("report") else {}),
    }
    columns = ("stage", "planned", "succeeded", "failed", "cancelled", "running", "retried", "mean")
    rows = [
        (
            s["name"],
            "-" if s["planned"] is None else s["planned"],
            s["succeeded"],
            s["failed"],
            s["cancelled"],
            s["running"],
            s["retried"],
            "-" if s["mean_s"] is None else output.span(s["mean_s"]),
        )
        for s in view["stages"]
    ]
    lines = [f"{key:<11}{output.clean(value)}" for key, value in facts.items()]
    output.show("\n".join([*lines, "", output.table(columns, rows)]))


@app.command()
def watch(job: str = JOB, as_if_aws: bool = AS_IF, home: Path | None = HOME) -> None:
    """Watch a job until it ends. The exit code is 1 unless it succeeds.

    \b
    Example: batchlab job watch last
    """
    from batchlab.cli.bills import LiveCost
    from batchlab.cli.progress import JobDisplay
    from batchlab.cli.session import Session, resolve
    from batchlab.cli.submission import watch as watch_job

    place = home_of(home)
    with Session.attached(place) as session:
        view = session.call(lambda client: resolve(client, job))
        with JobDisplay() as shown:
            live_cost = LiveCost(place, as_if_aws=as_if_aws)
            view = watch_job(session, view, shown, {}, live_cost)
    reason = f": {output.clean(view['reason'])}" if view["reason"] else ""
    output.show(f"{view['id']} {view['state']}{reason}")
    if view["state"] != "SUCCEEDED":
        raise typer.Exit(1)


def _unwritten(view: JobView) -> str:
    return f"its performance data is not written: {view['report']}; `batchlab report write {view['id']}` tries again"


def _tell(job: str, home: Path | None, verb: Callable[[Client, str], JobView], json: bool) -> None:
    from batchlab.cli.session import connect, steer

    with connect(home_of(home)) as client:
        view = steer(client, job, verb)
    if json:
        output.show_json(view)
    else:
        output.show(f"{view['id']} {view['state']}")


@app.command()
def cancel(job: str = JOB, home: Path | None = HOME, json: bool = JSON) -> None:
    """Cancel a job, and wait until none of its tasks can start.

    \b
    Example: batchlab job cancel last
    """
    _tell(job, home, lambda client, name: client.cancel(name), json)


@app.command()
def pause(job: str = JOB, home: Path | None = HOME, json: bool = JSON) -> None:
    """Pause a job: running tasks end, and no task starts until `job resume`.

    \b
    Example: batchlab job pause last
    """
    _tell(job, home, lambda client, name: client.pause(name), json)


@app.command()
def resume(job: str = JOB, home: Path | None = HOME, json: bool = JSON) -> None:
    """Resume a paused job.

    \b
    Example: batchlab job resume last
    """
    _tell(job, home, lambda client, name: client.resume(name), json)


@app.command()
def results(
    job: str = JOB,
    out: Path | None = OUT,
    stage: list[str] | None = option(
        "Stage with the results to fetch. May be repeated. Default: the last stages.", "NAME"
    ),
    home: Path | None = HOME,
    json: bool = JSON,
) -> None:
    """Fetch a job's results into a folder. A running job has those of its succeeded tasks.

    \b
    Example: batchlab job results last --out out/claims
    """
    from batchlab.cli.session import Session, resolve
    from batchlab.cli.submission import fetch_results

    with Session.attached(home_of(home)) as session:
        view = session.call(lambda client: resolve(client, job))
        fetched = fetch_results(session, view, out, stage or ())
    if json:
        output.show_json(
            {
                "folder": str(fetched.folder),
                "results": dict(fetched.results),
                "files": fetched.files,
                "size_bytes": fetched.size_bytes,
            }
        )
        return
    for name, number in fetched.results.items():
        output.show(f"{fetched.folder / f'{name}.jsonl'}: {output.count(number, 'result')}")
    if fetched.files:
        files = output.count(fetched.files, "file")
        output.show(f"{fetched.folder / 'files'}: {files}, {output.size(fetched.size_bytes)}")


@app.command()
def check(file: Path = FILE, set_: list[str] | None = SET, json: bool = JSON) -> None:
    """Check a job file, its code, and its input without running them.

    \b
    Example: batchlab job check job.yaml
    """
    from batchlab.cli.submission import overrides
    from batchlab.jobs.job_file import load
    from batchlab.jobs.submission import check_input, code_digest

    jobfile = load(file, overrides(set_ or ()))
    check_input(jobfile)
    data, _ = code_digest(jobfile)
    stages = [stage.name for stage in jobfile.job.stages]
    if json:
        output.show_json(
            {
                "name": jobfile.job.name,
                "stages": stages,
                "inputs": len(jobfile.files),
                "code": str(jobfile.code),
                "code_bytes": len(data),
                "params": dict(jobfile.params),
            }
        )
        return
    output.show(
        f"{file} is fine: job {jobfile.job.name}, {output.count(len(jobfile.files), 'input')}, "
        f"{output.count(len(stages), 'stage')} ({', '.join(stages)}), "
        f"{output.size(len(data))} of code"
    )


@app.command()
def cap(job: str = JOB, amount: str = CAP, home: Path | None = HOME, json: bool = JSON) -> None:
    """Cap the cost of a job on AWS. Beyond it no instance is launched, and running tasks finish.

    A job that has reached its cap continues when the cap is raised.

    \b
    Example: batchlab job cap last 10USD
    """
    from batchlab.cli.session import connect, resolve

    usd = cap_of(amount)
    with connect(home_of(home)) as client:
        view = client.cap_job(resolve(client, job)["id"], usd)
    if json:
        output.show_json(view)
    else:
        said = "is not capped" if usd is None else f"is capped at {usd:g} USD"
        output.show(f"What {view['job']} costs {said}.")
