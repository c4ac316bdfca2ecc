"""`batchlab job show-task|why`: what came of a job's tasks, and what to do about it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from batchlab.cli import output
from batchlab.cli.bucket import AnyBackendOption, TaskArgument, find, stage_of
from batchlab.cli.options import HomeOption, JobArgument, JsonOption, home_of
from batchlab.core.task_names import parse_task, task_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from batchlab.client.http import Client
    from batchlab.core.api_types import JobView, LogView
    from batchlab.core.model import Json
    from batchlab.core.ports import Objects
    from batchlab.core.retry import Patience
    from batchlab.jobs.attempts import Attempt

LAST_LINES = 5
"""Of a failed task's log, in `job why`."""
GROUPS = 3
"""Fingerprints that `job why` tells of, the most frequent first."""


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("show-task")(show_task)
    app.command()(why)


def show_task(
    job: JobArgument,
    task: TaskArgument,
    home: HomeOption = None,
    backend: AnyBackendOption = None,
    json: JsonOption = False,
) -> None:
    """Show one task: its input, each attempt with its end, worker and log, and where it ran.

    \b
    Example: batchlab job show-task last parse/3
    """
    from batchlab.core.model import JobId

    named, index = parse_task(task)
    place = home_of(home)
    bucket = find(place, backend, job)
    name = stage_of(bucket, named)

    async def read(objects: Objects, patience: Patience) -> dict[str, Any]:
        from batchlab.core.errors import BackendError, UsageError
        from batchlab.core.protocol.bundle_inputs import NoSuchTask
        from batchlab.jobs import attempts
        from batchlab.worker import environment

        spec = await attempts.definition(objects, JobId(bucket.job), patience)
        found = await attempts.attempts(objects, spec, name, index, patience)
        given: str
        try:
            bundle = (
                found[-1].bundle
                if found
                else await attempts.task_bundle(objects, spec, name, index, patience)
            )
            given = attempts.describe(await attempts.task_input(objects, spec, bundle, patience))
        except NoSuchTask as error:
            raise UsageError(error.message, remedy=error.remedy) from error
        except (BackendError, UsageError) as error:
            given = f"not to be had: {error.message}"
        rows = []
        for one in found:
            there = await environment.of(objects, one.outcome.worker, patience)
            rows.append(_attempt(one, environment.to_json(there) if there else None))
        return {
            "job": bucket.job,
            "stage": name,
            "task": index,
            "input": given,
            "attempts": rows,
            "replay": replay_command(bucket.job, task_name(name, index), home),
        }

    doc = bucket.read(read)
    if json:
        output.show_json(doc)
    else:
        _show(doc)


def _attempt(one: Attempt, there: dict[str, Json] | None) -> dict[str, Any]:
    outcome, failure = one.outcome, one.failure
    return {
        "round": outcome.bundle.round,
        "attempt": outcome.bundle.attempt,
        "state": one.state,
        "worker": outcome.worker,
        "execution": outcome.execution,
        "bundle": outcome.bundle.id,
        "bundle_started_s": outcome.started_s,
        "bundle_ended_s": outcome.ended_s,
        "run_s": one.run_s,
        "log_bytes": sum(stop - start for start, stop in one.spans),
        "fingerprint": one.fingerprint or None,
        "kind": failure.kind.value if failure else None,
        "reason": failure.reason if failure else None,
        "traceback": failure.traceback if failure else None,
        "environment": there,
    }


def _show(doc: dict[str, Any]) -> None:
    from batchlab.worker import environment

    columns = ("round", "attempt", "state", "ran", "ended", "worker", "log", "fingerprint")
    rows = [
        (
            one["round"],
            one["attempt"],
            one["state"],
            "-" if one["run_s"] is None else output.span(one["run_s"]),
            output.moment(one["bundle_ended_s"]),
            one["worker"],
            output.size(one["log_bytes"]),
            one["fingerprint"] or "-",
        )
        for one in doc["attempts"]
    ]
    output.show(f"{task_name(doc['stage'], doc['task'])} of {doc['job']}")
    output.show(f"{'input':<13}{output.clean(doc['input'])}")
    if not rows:
        output.show("No attempt of it has ended yet.")
        return
    output.show(f"\n{output.table(columns, rows)}\n")
    last = doc["attempts"][-1]
    if last["reason"]:
        output.show(f"{'failed':<13}{output.clean(last['kind'])}: {output.clean(last['reason'])}")
    there = last["environment"]
    told = str(environment.from_json(there)) if there else "not known: its worker has stored none"
    output.show(f"{'ran on':<13}{output.clean(told)}")
    output.show(f"{'run it again':<13}{doc['replay']}")


def replay_command(job: str, task: str, home: Path | None) -> str:
    """What brings a task to this machine, to be pasted into a shell."""
    where = ["--home", str(home)] if home else []
    return shlex.join(["batchlab", "job", "replay-task", job, task, "--local", *where])


# --- Why -----------------------------------------------------------------------------------------


def why(job: JobArgument, home: HomeOption = None, json: JsonOption = False) -> None:
    """Say why a job is not further than it is, in one line; and of what has failed, why.

    Below that line, for tasks that failed for good: a fingerprint for each reason, the last lines
    that one of them printed, and the command that runs it again on this machine.

    \b
    Example: batchlab job why last
    """
    from batchlab.cli.session import connect, resolve

    with connect(home_of(home)) as client:
        view = resolve(client, job)
        answer = client.why(view["id"])
        failed = _failed(client, view, home)
    if json:
        doc = {"id": view["id"], "state": view["state"], "why": answer, "failed": failed}
        output.show_json(doc)
        return
    output.show(output.clean(answer))
    for one in failed:
        others = one["tasks"] - 1
        more = f", and so did {output.count(others, 'other task')}" if others else ""
        output.show(
            f"\n{task_name(one['stage'], one['task'])} failed ({one['fingerprint']}): "
            f"{output.clean(one['reason'])}{more}"
        )
        for line in one["last_lines"]:
            output.show(f"  | {output.clean(line)}")
        output.show(f"  {one['replay']}")


def _failed(client: Client, view: JobView, home: Path | None) -> list[dict[str, Any]]:
    """One task of each fingerprint, the most frequent first."""
    if not any(stage["failed"] for stage in view["stages"]):
        return []
    found = []
    for group in client.failure_groups(view["id"])[:GROUPS]:
        first = group["first"]
        name = task_name(first["stage"], first["task"])
        logs = client.logs(view["id"], stage=first["stage"], task=first["task"])
        found.append(
            {
                "stage": first["stage"],
                "task": first["task"],
                "attempt": first["attempt"],
                "tasks": group["count"],
                "fingerprint": first["fingerprint"],
                "kind": first["kind"],
                "reason": first["reason"],
                "last_lines": _last_lines(logs),
                "replay": replay_command(view["id"], name, home),
            }
        )
    return found


def _last_lines(logs: Sequence[LogView]) -> list[str]:
    lines = [line for line in logs[-1]["text"].splitlines() if line.strip()] if logs else []
    return lines[-LAST_LINES:]
