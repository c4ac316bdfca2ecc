"""`batchlab job show-task`, `why`, `failures`, and `retry`: tasks of a job and their failures."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchlab.cli import output
from batchlab.cli.options import ANY_BACKEND, HOME, JOB, JSON, TASK, flag, home_of, option
from batchlab.core.job_definition import parse_task, parse_tasks, task_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from batchlab.client.http import Client
    from batchlab.core.api_types import FailureGroupView, FailureView, JobView, LogView
    from batchlab.core.model import Json
    from batchlab.core.port_retries import Patience
    from batchlab.core.ports import Objects
    from batchlab.jobs.attempts import Attempt

LAST_LINES = 5
"""Lines of a failed task's log in `job why`."""
GROUPS = 3
"""Fingerprints in `job why`, the most frequent first."""


def show_task(
    job: str = JOB, task: str = TASK, home: Path | None = HOME, backend: str | None = ANY_BACKEND, json: bool = JSON
) -> None:
    """Show a task: its input, its attempts with worker and log, and where it ran.

    \b
    Example: batchlab job show-task last parse/3
    """
    from batchlab.cli.session import find, stage_of
    from batchlab.core.model import JobId

    stage_name, index = parse_task(task)
    place = home_of(home)
    bucket = find(place, backend, job)
    name = stage_of(bucket, stage_name)

    async def read(objects: Objects, patience: Patience) -> dict[str, Any]:
        from batchlab.core.errors import BackendError, UsageError
        from batchlab.core.protocol.bundle_inputs import NoSuchTask
        from batchlab.jobs import attempts
        from batchlab.worker import environment

        spec = await attempts.definition(objects, JobId(bucket.job), patience)
        found = await attempts.attempts(objects, spec, name, index, patience)
        given: str
        try:
            bundle = found[-1].bundle if found else await attempts.task_bundle(objects, spec, name, index, patience)
            given = attempts.describe(await attempts.task_input(objects, spec, bundle, patience))
        except NoSuchTask as error:
            raise UsageError(error.message, remedy=error.remedy) from error
        except (BackendError, UsageError) as error:
            given = f"not to be had: {error.message}"
        rows = []
        for attempt in found:
            there = await environment.load(objects, attempt.outcome.worker, patience)
            rows.append(_attempt(attempt, environment.to_json(there) if there else None))
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
    """Return the shell command that runs a task on this machine."""
    where = ["--home", str(home)] if home else []
    return shlex.join(["batchlab", "job", "replay-task", job, task, "--local", *where])


# --- Why -----------------------------------------------------------------------------------------


def why(job: str = JOB, home: Path | None = HOME, json: bool = JSON) -> None:
    """Explain in one line why a job is waiting, and show why tasks failed.

    For each fingerprint of tasks that failed for good, the command shows the last lines that one of
    them printed, and the command that runs it again on this machine.

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
    """Return a task of each fingerprint, the most frequent fingerprint first."""
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


def failures(
    job: str = JOB,
    each: bool = flag("List every failed task instead of one line per cause.", "--each"),
    fingerprint: str | None = option("List every task that failed for this cause.", "FINGERPRINT"),
    limit: int = option("Most tasks with --each or --fingerprint.", default=100, min=1),
    home: Path | None = HOME,
    json: bool = JSON,
) -> None:
    """Show why tasks failed for good: a line for each cause, with its first traceback.

    \b
    Example: batchlab job failures last
    """
    from batchlab.cli.session import connect, resolve

    with connect(home_of(home)) as client:
        name = resolve(client, job)["id"]
        if each or fingerprint:
            _show_each(client.failures(name, limit=limit, fingerprint=fingerprint), limit, json)
        else:
            _show_groups(client.failure_groups(name), json)


def _show_groups(found: list[FailureGroupView], json: bool) -> None:
    if json:
        output.show_json(found)
        return
    if not found:
        output.say("No task has failed for good.")
        return
    rows = [
        (
            one["fingerprint"],
            one["count"],
            one["stage"],
            one["first"]["kind"],
            _exit(one["first"]),
            one["first"]["reason"],
        )
        for one in found
    ]
    columns = ("fingerprint", "tasks", "stage", "kind", "exit", "reason, of the first")
    output.show(output.table(columns, rows))
    for one in found:
        _show_traceback(one["first"])
    output.say("`batchlab job retry JOB --fingerprint FINGERPRINT` runs the tasks of one again.")


def _show_each(found: list[FailureView], limit: int, json: bool) -> None:
    if json:
        output.show_json(found)
        return
    if not found:
        output.say("No such task has failed for good.")
        return
    columns = ("task", "attempt", "kind", "exit", "fingerprint", "reason")
    rows = [
        (task_name(f["stage"], f["task"]), f["attempt"], f["kind"], _exit(f), f["fingerprint"], f["reason"])
        for f in found
    ]
    output.show(output.table(columns, rows))
    shown: set[str] = set()
    for one in found:
        if one["fingerprint"] not in shown:
            shown.add(one["fingerprint"])
            _show_traceback(one)
    if len(found) == limit:
        output.say(f"There may be more than {limit}; --limit shows more.")


def _exit(failure: FailureView) -> object:
    return "-" if failure["exit_code"] is None else failure["exit_code"]


def _show_traceback(failure: FailureView) -> None:
    if failure["traceback"]:
        output.show(f"\n--- {task_name(failure['stage'], failure['task'])}")
        output.show(output.visible(failure["traceback"]).rstrip("\n"))


def retry(
    job: str = JOB,
    tasks: list[str] | None = option("Retry only these failed tasks, such as parse/3,7-9. May be repeated.", "TASKS"),
    fingerprint: list[str] | None = option("Retry only failed tasks with this cause. May be repeated.", "FINGERPRINT"),
    home: Path | None = HOME,
    json: bool = JSON,
) -> None:
    """Run the unsuccessful tasks of an ended job again. Results of the others are kept.

    With --tasks or --fingerprint the other failures stay as they are.

    \b
    Example: batchlab job retry last
    """
    from batchlab.cli.session import connect, resolve

    ranges: dict[str, list[tuple[int, int]]] = {}
    for stage, some in map(parse_tasks, tasks or ()):
        ranges.setdefault(stage, []).extend(some)
    with connect(home_of(home)) as client:
        name = resolve(client, job)["id"]
        if ranges or fingerprint:
            view = client.retry(name, fingerprints=fingerprint or (), tasks=ranges)
        else:
            view = client.retry(name)
    if json:
        output.show_json(view)
    else:
        output.show(f"{view['id']} {view['state']}")
