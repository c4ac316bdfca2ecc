"""Commands `batchlab job show JOB TASK`, `why`, `failures`, and `retry`, which show or retry tasks of a job."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchlab.cli import output
from batchlab.cli.option_values import connect, home_of, resolve
from batchlab.cli.options import HOME, JOB, JSON, flag, option
from batchlab.core.errors import BackendError, Malformed, UsageError
from batchlab.core.job_definition import parse_task, parse_tasks, task_name
from batchlab.core.model import JobId, Json

if TYPE_CHECKING:
    from batchlab.client.http import Client
    from batchlab.core.api_types import FailureGroupView, FailureView, JobView
    from batchlab.core.port_retries import Patience
    from batchlab.core.ports import Objects
    from batchlab.jobs.attempts import Attempt

MAX_LOG_LINES = 5
"""Number of lines of a failed task's log that `job why` shows."""
MAX_FINGERPRINTS = 3
"""Number of the most frequent failure fingerprints that `job why` shows."""


def show_task(job: str, task: str, home: Path | None, backend: str | None, *, json: bool) -> None:
    """Show a task of a job: the task's input, its attempts with their workers and logs, and the machines on which the
    attempts ran.
    """
    from batchlab.cli.session import find_bucket, find_stage

    stage_name, index = parse_task(task)
    place = home_of(home)
    bucket = find_bucket(place, backend, job)
    name = find_stage(bucket, stage_name)

    async def read(objects: Objects, patience: Patience) -> dict[str, Any]:
        from batchlab.core.container_images import image_of_worker
        from batchlab.core.protocol.bundle_inputs import NoSuchTask
        from batchlab.jobs import attempts
        from batchlab.worker import environment

        spec = await attempts.definition(objects, JobId(bucket.job), patience)
        found = await attempts.attempts(objects, spec, name, index, patience)
        input_text: str
        try:
            bundle = found[-1].bundle if found else await attempts.task_bundle(objects, spec, name, index, patience)
            input_text = attempts.describe(await attempts.task_input(objects, spec, bundle, patience))
        except NoSuchTask as error:
            raise UsageError(error.message, remedy=error.remedy) from error
        except (BackendError, UsageError) as error:
            input_text = f"not available: {error.message}"
        rows = []
        try:
            images = await attempts.pool_images(objects, spec.stage(name).pool, patience) if found else []
        except Malformed as error:
            images = []
            output.show_warnings([f"{error.message} {error.remedy}"])
        for attempt in found:
            machine = await environment.load(objects, attempt.outcome.worker, patience)
            image = image_of_worker(images, machine.image if machine else "")
            rows.append(_attempt(attempt, image, environment.to_json(machine) if machine else None))
        return {
            "job": bucket.job,
            "stage": name,
            "task": index,
            "input": input_text,
            "attempts": rows,
            "replay": replay_command(bucket.job, task_name(name, index), home),
        }

    doc = bucket.read(read)
    if json:
        output.show_json(doc)
    else:
        _show(doc)


def _attempt(attempt: Attempt, image: str, machine: dict[str, Json] | None) -> dict[str, Any]:
    from batchlab.core.protocol.mended_inputs import mended_sha256

    outcome, failure = attempt.outcome, attempt.failure
    return {
        "round": outcome.bundle.round,
        "mended_sha256": mended_sha256(outcome.bundle.source) or None,
        "attempt": outcome.bundle.attempt,
        "state": attempt.state,
        "worker": outcome.worker,
        "execution": outcome.execution,
        "bundle": outcome.bundle.id,
        "bundle_started_s": outcome.started_s,
        "bundle_ended_s": outcome.ended_s,
        "run_s": attempt.run_s,
        "log_bytes": sum(stop - start for start, stop in attempt.spans),
        "fingerprint": attempt.fingerprint or None,
        "kind": failure.kind.value if failure else None,
        "reason": failure.reason if failure else None,
        "traceback": failure.traceback if failure else None,
        "image": image,
        "environment": machine,
    }


def _show(doc: dict[str, Any]) -> None:
    from batchlab.worker import environment

    columns = ("round", "attempt", "state", "ran", "ended", "worker", "log", "fingerprint")
    rows = []
    for attempt in doc["attempts"]:
        times = (output.optional_span(attempt["run_s"]), output.moment(attempt["bundle_ended_s"]))
        rest = (attempt["worker"], output.size(attempt["log_bytes"]), attempt["fingerprint"] or "-")
        rows.append((attempt["round"], attempt["attempt"], attempt["state"], *times, *rest))
    output.show(f"{task_name(doc['stage'], doc['task'])} of {doc['job']}")
    output.show(f"{'input':<13}{output.clean(doc['input'])}")
    if mended := [sha256 for attempt in doc["attempts"] if (sha256 := attempt["mended_sha256"])]:
        output.show(f"{'mended':<13}a retry gave the task a new input, SHA-256 {mended[-1]}")
    if not rows:
        output.show("No attempt of the task has ended yet.")
        return
    output.show(f"\n{output.table(columns, rows)}\n")
    last = doc["attempts"][-1]
    if last["reason"]:
        output.show(f"{'failed':<13}{output.clean(last['kind'])}: {output.clean(last['reason'])}")
    machine = last["environment"]
    description = str(environment.from_json(machine)) if machine else "unknown: the worker stored no environment"
    output.show(f"{'ran on':<13}{output.clean(description)}")
    if last["image"]:
        output.show(f"{'in the image':<13}{output.clean(last['image'])}")
    output.show(f"{'run it again':<13}{doc['replay']}")


def replay_command(job: str, task: str, home: Path | None) -> str:
    """Return the shell command that runs a task again on this machine."""
    where = ["--home", str(home)] if home else []
    return shlex.join(["batchlab", "job", "replay-task", job, task, *where])


# --- Reasons of waiting and failures -------------------------------------------------------------


def why(job: str = JOB, home: Path | None = HOME, json: bool = JSON) -> None:
    """Explain in one line why a job is waiting, and show why tasks of the job failed.

    For each cause, the command shows the last output of the first failed task, and the command
    that replays this task on this machine.

    \b
    Example: batchlab job why last
    """
    with connect(home) as client:
        view = resolve(client, job)
        answer = client.why(view["id"])
        failed = _failures(client, view, home)
    lines = [output.clean(answer)]
    for failure in failed:
        name, others = task_name(failure["stage"], failure["task"]), failure["tasks"] - 1
        more = f", and so did {output.count(others, 'other task')}" if others else ""
        lines += ["", f"{name} failed ({failure['fingerprint']}): {output.clean(failure['reason'])}{more}"]
        lines += [f"  | {output.clean(line)}" for line in failure["last_lines"]]
        lines.append(f"  {failure['replay']}")
    document = {"id": view["id"], "state": view["state"], "why": answer, "failed": failed}
    output.answer(json, document, "\n".join(lines))


def _failures(client: Client, view: JobView, home: Path | None) -> list[dict[str, Any]]:
    """Return one failed task for each of the job's most frequent failure fingerprints, ordered by falling frequency."""
    if not any(stage["failed"] for stage in view["stages"]):
        return []
    failed = []
    for group in client.failure_groups(view["id"])[:MAX_FINGERPRINTS]:
        first = group["first"]
        name = task_name(first["stage"], first["task"])
        logs = client.logs(view["id"], stage=first["stage"], task=first["task"])
        lines = [line for line in logs[-1]["text"].splitlines() if line.strip()] if logs else []
        failed.append(
            {
                "stage": first["stage"],
                "task": first["task"],
                "attempt": first["attempt"],
                "tasks": group["count"],
                "fingerprint": first["fingerprint"],
                "kind": first["kind"],
                "reason": first["reason"],
                "last_lines": lines[-MAX_LOG_LINES:],
                "replay": replay_command(view["id"], name, home),
            }
        )
    return failed


def failures(
    job: str = JOB,
    each: bool = flag("List every failed task, instead of one line per cause.", "--each"),
    fingerprint: str | None = option("List every task whose failure has this fingerprint.", "FINGERPRINT"),
    limit: int = option("Maximum number of tasks that are listed with --each or --fingerprint.", default=100, min=1),
    home: Path | None = HOME,
    json: bool = JSON,
) -> None:
    """Show why tasks of a job failed: one line for each cause, and the traceback of the first task with this cause.

    \b
    Example: batchlab job failures last
    """
    with connect(home) as client:
        name = resolve(client, job)["id"]
        if each or fingerprint:
            _show_each(client.failures(name, limit=limit, fingerprint=fingerprint), limit, json)
        else:
            _show_groups(name, client.failure_groups(name), json)


def _show_groups(job: str, groups: list[FailureGroupView], json: bool) -> None:
    rows = []
    for group in groups:
        first = group["first"]
        rows.append(
            (group["fingerprint"], group["count"], group["stage"], first["kind"], _exit(first), first["reason"])
        )
    columns = ("fingerprint", "tasks", "stage", "kind", "exit", "reason, of the first")
    output.listing(json, groups, columns, rows, "No task has failed for good.")
    if groups and not json:
        for group in groups:
            _show_traceback(group["first"])
        first = groups[0]["first"]
        name, fingerprint = task_name(first["stage"], first["task"]), groups[0]["fingerprint"]
        output.say(f"`batchlab job replay-task {job} {name}` runs {name} again on this machine.")
        output.say(f"`batchlab job retry {job} --fingerprint {fingerprint}` runs all tasks with this cause again.")


def _show_each(failures: list[FailureView], limit: int, json: bool) -> None:
    rows = []
    for failure in failures:
        name, cause = task_name(failure["stage"], failure["task"]), (failure["fingerprint"], failure["reason"])
        rows.append((name, failure["attempt"], failure["kind"], _exit(failure), *cause))
    columns = ("task", "attempt", "kind", "exit", "fingerprint", "reason")
    output.listing(json, failures, columns, rows, "No such task has failed for good.")
    if json:
        return
    firsts: dict[str, FailureView] = {}
    for failure in failures:
        firsts.setdefault(failure["fingerprint"], failure)
    for first in firsts.values():
        _show_traceback(first)
    if len(failures) == limit:
        output.say(f"There may be more than {limit}; --limit shows more.")


def _exit(failure: FailureView) -> object:
    return "-" if failure["exit_code"] is None else failure["exit_code"]


def _show_traceback(failure: FailureView) -> None:
    if failure["traceback"]:
        output.show(f"\n--- {task_name(failure['stage'], failure['task'])}")
        output.show(output.visible(failure["traceback"]).rstrip("\n"))


def retry(
    job: str = JOB,
    tasks: list[str] | None = option("Retry only the named failed tasks, such as parse/3,7-9. Repeatable.", "TASKS"),
    fingerprint: list[str] | None = option(
        "Retry only the tasks whose failure has this fingerprint. Repeatable.", "FINGERPRINT"
    ),
    task: list[str] | None = option(
        "Retry the named failed task, such as parse/3, with the input of the next --input. Repeatable.",
        "TASK",
        "--task",
    ),
    new: list[str] | None = option(
        "File with the new input of the task in --task, or - for standard input. Repeatable.", "FILE", "--input"
    ),
    home: Path | None = HOME,
    json: bool = JSON,
) -> None:
    """Run the unsuccessful tasks of an ended job again. The results of the job's succeeded tasks are kept.

    --tasks and --fingerprint select failed tasks. --task and --input run a failed task with a new input,
    which the task keeps in later retries: a file for a task whose input is a file or a part of a file,
    and one JSON value for any other task.

    \b
    Example: batchlab job retry last --task parse/3 --input corrected.csv
    """
    new_inputs = _new_inputs(task or (), new or ())
    ranges: dict[str, list[tuple[int, int]]] = {}
    for stage, stage_ranges in map(parse_tasks, tasks or ()):
        ranges.setdefault(stage, []).extend(stage_ranges)
    with connect(home) as client:
        found = resolve(client, job)
        inputs = _by_stage(found, new_inputs)
        if ranges or fingerprint or inputs:
            view = client.retry(found["id"], fingerprints=fingerprint or (), tasks=ranges, inputs=inputs)
        else:
            view = client.retry(found["id"])
    output.answer(json, view, f"{view['id']} {view['state']}")


_NewInputs = Sequence[tuple[str | None, int, bytes]]
"""New inputs of tasks, each with the stage and the index of its task. The stage may be missing."""


def _new_inputs(tasks: Sequence[str], files: Sequence[str]) -> _NewInputs:
    """Return the new input of each task, from the file at the same position. Raise UsageError for wrong options."""
    if len(tasks) != len(files):
        raise UsageError(
            "Each --task needs one --input, and each --input one --task.",
            remedy="Write for example --task parse/3 --input corrected.csv. --tasks selects tasks without a new input.",
        )
    if files.count("-") > 1:
        raise UsageError("Standard input can be the input of one task only.", remedy="Name files for the other tasks.")
    named = [(*parse_task(name), name, file) for name, file in zip(tasks, files, strict=True)]
    return [(stage, index, _read_input(name, file)) for stage, index, name, file in named]


def _by_stage(job: JobView, new: _NewInputs) -> dict[tuple[str, int], bytes]:
    """Return the new inputs by stage and index. In a job with one stage, the index is enough."""
    stages = [stage["name"] for stage in job["stages"]]
    inputs: dict[tuple[str, int], bytes] = {}
    for named, index, data in new:
        stage = named or (stages[0] if len(stages) == 1 else None)
        if stage is None:
            raise UsageError(
                f"--task {index} does not name a stage.",
                remedy=f"Job {job['id']} has the stages {', '.join(stages)}. Write for example "
                f"{task_name(stages[0], index)}.",
            )
        if (stage, index) in inputs:
            raise UsageError(
                f"--task names {task_name(stage, index)} twice.", remedy="Give one new input for each task."
            )
        inputs[stage, index] = data
    return inputs


def _read_input(task: str, file: str) -> bytes:
    """Return the content of a file with a new input. Raise UsageError if it is too large or cannot be read."""
    from batchlab.core.protocol.mended_inputs import MAX_INPUT_BYTES

    try:
        if file == "-":
            data = sys.stdin.buffer.read(MAX_INPUT_BYTES + 1)
        else:
            with Path(file).open("rb") as opened:
                data = opened.read(MAX_INPUT_BYTES + 1)
    except OSError as error:
        raise UsageError(
            f"The file {file} cannot be read: {error.strerror}.", remedy="Check the path after --input."
        ) from error
    if len(data) > MAX_INPUT_BYTES:
        raise UsageError(
            f"The new input of {task} is larger than {output.size(MAX_INPUT_BYTES)}.",
            remedy="Submit a job of its own for larger input.",
        )
    return data
