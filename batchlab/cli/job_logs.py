"""Command `batchlab job logs`, which prints the stored or the live output of a job's tasks.

Invariant: `job logs --follow` prints a line of a task's output at most once, live or after the end of the task. Output
that the live log misses is printed after the end of the task, or a note reports the missing output.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchlab.cli import options, output
from batchlab.cli.option_values import connect, home_of, resolve, seconds_of
from batchlab.cli.options import HOME, JOB, JSON, argument, flag, option
from batchlab.cli.output import Stopped
from batchlab.core.errors import UsageError
from batchlab.core.job_definition import attempt_name, parse_task, task_name

if TYPE_CHECKING:
    from batchlab.client.http import Client
    from batchlab.core.api_types import JobView, LogView, NewLogsView, TailsView, TailView
    from batchlab.runtime.home import Home


def logs(
    job: str = JOB,
    task: str | None = argument(
        "Task whose output is printed, such as parse/3. The number 3 means task 3 of every stage.",
        "TASK",
        default=None,
        autocompletion=options.tasks,
    ),
    stage: str | None = option("Stage whose output is printed.", "NAME"),
    follow: bool = flag("Print new lines of the output as soon as they exist, until the job ends.", "--follow", "-f"),
    failed: bool = flag("Print only the output of tasks that failed and are not retried.", "--failed"),
    since: str | None = option(
        "Print only the output of attempts that run, or that ended within this time, such as 10m.", "DURATION"
    ),
    limit: int = option("Maximum number of attempts whose output is printed without --follow.", default=100, min=1),
    home: Path | None = HOME,
    json: bool = JSON,
) -> None:
    """Print the output of a job's tasks, including failed attempts.

    With --follow, each line begins with the task's name, or is a JSON object with --json.

    \b
    Example: batchlab job logs last --follow
    """
    index: int | None = None
    if task is not None:
        if stage is not None:
            raise UsageError(
                "A task and --stage exclude each other.", remedy="Write the stage and the index, such as parse/3."
            )
        stage, index = parse_task(task)
    which = LogFilter(stage, index, failed, seconds_of("--since", since) if since else None)
    if follow:
        _follow(home_of(home), job, which, json=json)
    else:
        _print(home_of(home), job, which, limit, json=json)


def _print(home: Home, job: str, which: LogFilter, limit: int, *, json: bool) -> None:
    with connect(home) as client:
        view = resolve(client, job)
        _check(view, which)
        logs = client.logs(
            view["id"], stage=which.stage, task=which.task, limit=limit, failed=which.failed, since_s=which.since_s
        )
    if json:
        output.show_json(logs)
    for log in [] if json else logs:
        output.show(f"--- {attempt_name(log['stage'], log['task'], log['attempt'])}")
        output.show(output.visible(log["text"]).rstrip("\n"))
    if not logs:
        task = "No task" if which.stage is None and which.task is None else "No selected task"
        output.say(f"{task} has printed anything{'' if view['ended_s'] else ' yet'}.")
    elif len(logs) == limit:
        output.say(f"There may be more than {limit}; --limit shows more.")


def _check(view: JobView, which: LogFilter) -> None:
    """Raise UsageError if the job does not have the stage or the task of the filter."""
    planned = {stage["name"]: stage["planned"] for stage in view["stages"]}
    if which.stage is not None and which.stage not in planned:
        raise UsageError(
            f"Job {view['id']} does not have a stage {which.stage!r}.", remedy=f"It has {', '.join(planned)}."
        )
    counts = [planned[which.stage]] if which.stage is not None else list(planned.values())
    if which.task is None or any(count is None or which.task < count for count in counts):
        return
    name = str(which.task) if which.stage is None else task_name(which.stage, which.task)
    raise UsageError(
        f"Job {view['id']} does not have a task {name}.",
        remedy=f"`batchlab job show {view['id']}` shows the number of tasks of each stage, and the first task is 0.",
    )


def _follow(home: Home, job: str, which: LogFilter, *, json: bool) -> None:
    from batchlab.cli.session import Session

    with Session.attach(home) as session:
        view = session.call(lambda client: resolve(client, job))
        name = view["id"]
        _check(view, which)

        def print_line(line: Line) -> None:
            if json:
                output.show_json(to_json(name, line), indent=None)
            elif line.is_note:
                output.show(f"{line.name} | [{output.clean(line.text)}]")
            else:
                output.show(f"{line.name} | {output.visible(line.text)}")

        follower = Follower(name, which, session.call, print_line)
        try:
            follower.run()
        except Stopped:
            # Also print the last line of each task, even if the line does not end with a line break.
            with suppress(Stopped):
                follower.close()
            raise
    if not json:
        with connect(home) as client:
            state = client.job(name)["state"]
        if which.task is None:
            output.say(f"{name} is {state}.")


ManagerCall = Callable[[Callable[["Client"], Any]], Any]
Key = tuple[str, int, int, int, str]
"""Key of an execution: stage, task, round, attempt, and id of the execution."""

MAX_WAIT_S = 1.0
"""Maximum time in seconds for which a request for logs waits for the end of an attempt."""
MIN_REQUEST_INTERVAL_S = 0.1
"""Minimum time in seconds between two requests for logs, unless an attempt has ended."""
LOG_RETRY_INTERVAL_S = 5.0
"""Interval in seconds of the requests for a log that is not stored yet."""
MAX_LOG_RETRIES = 20
"""Maximum number of missing logs that are requested again before the next request for news of the job."""
_CUT = "[... batchlab left out "


@dataclass(frozen=True, slots=True)
class Line:
    """A line that an attempt of a task printed, or a note of batchlab about the attempt's output."""

    stage: str
    task: int
    attempt: int
    round: int
    execution: str
    text: str
    is_note: bool = False

    @property
    def name(self) -> str:
        """Name of a task's attempt, such as `parse/3`. The name of a second or later attempt also contains the
        attempt's number.
        """
        return attempt_name(self.stage, self.task, self.attempt)


@dataclass(slots=True)
class _Shown:
    """Number of bytes of an attempt's output that were received, and the text after the last line break, which is not
    printed yet.
    """

    printed: int = 0
    rest: str = ""


@dataclass(frozen=True, slots=True)
class LogFilter:
    """Filter of attempts by stage, task, failure, and seconds since the end of the attempt."""

    stage: str | None = None
    task: int | None = None
    failed: bool = False
    since_s: float | None = None

    def matches(self, tail: TailView) -> bool:
        """Return whether the filter selects the output of a running attempt."""
        return self.stage in (None, tail["stage"]) and self.task in (None, tail["task"])


class Follower:
    """Follower of a job's output, which prints each line as soon as the line is available.

    The argument `call` sends a request to the manager, and waits for a replacement if the manager does not respond.
    """

    def __init__(self, job: str, which: LogFilter, call: ManagerCall, on_line: Callable[[Line], None]) -> None:
        self._job = job
        self._which = which
        self._call = call
        self._on_line = on_line
        self._shown: dict[Key, _Shown] = {}
        self._done: set[Key] = set()
        self._late_logs: dict[Key, float] = {}
        """Times of the last requests for logs that are not stored yet."""
        self._seq: int | None = None

    def run(self) -> None:
        """Print the job's output until the job, or the selected task, has ended."""
        every_s, due_s = MAX_WAIT_S, 0.0
        while True:
            asked_s = time.monotonic()
            news = self._news(min(MAX_WAIT_S, every_s))
            for log in news["logs"]:
                self._on_end(log)
            self._seq = news["seq"]
            self._request_late_logs(last=news["ended"])
            if news["ended"]:
                break
            # A manager that has just become the leader may respond without waiting, so limit the rate of requests.
            time.sleep(max(0.0, 0 if news["logs"] else asked_s + MIN_REQUEST_INTERVAL_S - time.monotonic()))
            # With the filter `failed`, do not request live output, because a running task has not failed yet.
            if not self._which.failed and time.monotonic() >= due_s:
                tails: TailsView = self._call(lambda client: client.tails(self._job))
                every_s = tails["every_s"]
                due_s = time.monotonic() + every_s
                for tail in tails["tails"]:
                    if self._which.matches(tail):
                        self._runs(tail)
        self.close()

    def close(self) -> None:
        """Print the last line of each attempt if the line does not end with a line break."""
        for key, output_state in self._shown.items():
            if output_state.rest:
                self._say(key, output_state.rest)
                output_state.rest = ""

    def _news(self, wait_s: float) -> NewLogsView:
        which = self._which

        def ask(client: Client) -> NewLogsView:
            return client.logs_after(
                self._job,
                self._seq,
                stage=which.stage,
                task=which.task,
                failed=which.failed,
                since_s=which.since_s,
                wait_s=wait_s,
            )

        news: NewLogsView = self._call(ask)
        return news

    # --- Running attempts ------------------------------------------------------------------------

    def _runs(self, tail: TailView) -> None:
        key = _key(tail)
        if key in self._done:
            return
        progress = self._shown.setdefault(key, _Shown())
        if tail["start"] > progress.printed:
            self._note(key, f"{tail['start'] - progress.printed:,} bytes came too fast to be followed")
            progress.rest = ""
            progress.printed = tail["start"]
        if tail["stop"] > progress.printed:
            new = tail["text"].encode()[progress.printed - tail["start"] :]
            progress.printed = tail["stop"]
            self._lines(key, progress, new.decode(errors="replace"))

    def _lines(self, key: Key, progress: _Shown, text: str) -> None:
        *lines, progress.rest = (progress.rest + text).split("\n")
        for line in lines:
            self._say(key, line)

    # --- Ended attempts --------------------------------------------------------------------------

    def _on_end(self, log: LogView) -> None:
        key = _key(log)
        if key in self._done:
            return
        if not log["stored"]:
            self._late_logs.setdefault(key, time.monotonic())
            return
        self._late_logs.pop(key, None)
        self._done.add(key)
        progress = self._shown.pop(key, _Shown())
        data = log["text"].encode()
        if progress.printed and _CUT in log["text"]:
            # The middle of the stored log is missing, so byte positions in the stored log differ from byte positions in
            # the live output.
            self._note(key, "it has printed more than is kept of it; the rest is in `job logs`")
            return
        self._lines(key, progress, data[progress.printed :].decode(errors="replace"))
        if progress.rest:
            self._say(key, progress.rest)

    def _request_late_logs(self, *, last: bool) -> None:
        now_s = time.monotonic()
        due = [key for key, at_s in self._late_logs.items() if last or now_s - at_s >= LOG_RETRY_INTERVAL_S]
        for key in due if last else due[:MAX_LOG_RETRIES]:
            self._late_logs[key] = now_s
            stage, task = key[0], key[1]

            def ask(client: Client, stage: str = stage, task: int = task) -> list[LogView]:
                return client.logs(self._job, stage=stage, task=task)

            for log in self._call(ask):
                if _key(log) == key:
                    self._on_end(log)
        if last:
            for key in self._late_logs:
                self._note(key, "what it printed was never stored: its worker is gone")

    # --- Printing --------------------------------------------------------------------------------

    def _say(self, key: Key, text: str) -> None:
        stage, task, round_, attempt, execution = key
        self._on_line(Line(stage, task, attempt, round_, execution, text.removesuffix("\r")))

    def _note(self, key: Key, text: str) -> None:
        stage, task, round_, attempt, execution = key
        self._on_line(Line(stage, task, attempt, round_, execution, text, is_note=True))


def _key(view: TailView | LogView) -> Key:
    return (view["stage"], view["task"], view["round"], view["attempt"], view["execution"])


def to_json(job: str, line: Line) -> Mapping[str, Any]:
    """Return a line of a task's output, or a note about the output, as a JSON object."""
    return {
        "job": job,
        "stage": line.stage,
        "task": line.task,
        "attempt": line.attempt,
        "round": line.round,
        "execution": line.execution,
        **({"note": line.text} if line.is_note else {"line": line.text}),
    }
