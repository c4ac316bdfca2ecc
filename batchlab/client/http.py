"""The manager's HTTP API as Python calls, for the command line and the Python API.

Invariant: the module and the client must be fast to import and to create, because every command
uses them. Every failure is an error class of batchlab.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, cast
from urllib.parse import quote

from batchlab.client.requests import ANSWER_S, Calls

if TYPE_CHECKING:
    from batchlab.core.api_types import (
        ActivityView,
        EtaView,
        FailureGroupView,
        FailureView,
        GridView,
        HealthView,
        JobView,
        LogView,
        NewLogsView,
        NotificationView,
        OutcomesView,
        PoolView,
        RebuiltView,
        SessionView,
        TailsView,
        TargetView,
        TaskView,
        TestedView,
    )
    from batchlab.core.api_usage_types import DueView, JobUseView, RunView, SchedulesView, ScheduleView, UseView
    from batchlab.core.job_definition import JobDef
    from batchlab.core.model import Json

_ALL = "/v1/schedules"


class ScheduleCalls(Calls):
    """The calls of `Client` for schedules."""

    def add_schedule(self, schedule: Mapping[str, Json], job: JobDef, *, replace: bool = False) -> ScheduleView:
        """Add a schedule, in the form of POST /v1/schedules, with the job that it runs.

        Raise Refused if a schedule with this name exists and `replace` is False."""
        from batchlab.core.protocol import json_format

        body = {"schedule": schedule, "job": json_format.job_to_json(job), "replace": replace}
        return cast("ScheduleView", self._call("POST", _ALL, body=body))

    def schedules(self) -> SchedulesView:
        """Return all schedules by name, each with its last run, and notes on missed runs."""
        return cast("SchedulesView", self._call("GET", _ALL))

    def schedule(self, name: str) -> ScheduleView:
        """Return one schedule with its runs."""
        return cast("ScheduleView", self._call("GET", _schedule_path(name)))

    def coming(self, name: str, *, count: int = 10) -> list[DueView]:
        """Return the next due times of a schedule."""
        return cast("list[DueView]", self._call("GET", _schedule_path(name, "/next"), count=count)["times"])

    def pause_schedule(self, name: str) -> ScheduleView:
        """Pause a schedule. Due times during the pause start no runs."""
        return cast("ScheduleView", self._call("POST", _schedule_path(name, "/pause")))

    def resume_schedule(self, name: str) -> ScheduleView:
        """Resume a schedule. It runs at its next due time."""
        return cast("ScheduleView", self._call("POST", _schedule_path(name, "/resume")))

    def remove_schedule(self, name: str) -> ScheduleView:
        """Remove a schedule. A running job of the schedule continues."""
        return cast("ScheduleView", self._call("POST", _schedule_path(name, "/remove")))

    def run_schedule(self, name: str, token: str) -> RunView:
        """Run the job of a schedule now. A repetition with the same token returns the same run."""
        return cast("RunView", self._call("POST", _schedule_path(name, "/run"), body={"token": token}))


def _schedule_path(name: str, what: str = "") -> str:
    return f"{_ALL}/{quote(name, safe='')}{what}"


REBUILD_S = 3600.0
MAX_LISTED = 1000
"""Limit of the rows in one answer."""


class Client(ScheduleCalls):
    """Connections to one manager. The client is thread-safe, and is a context manager.

    Each method raises Unreachable if the manager does not answer, NotFound for an unknown id,
    Refused if the manager refuses, UsageError for an invalid request, and BackendError if the
    manager cannot work at the moment. Times are in seconds. The client does not use proxies.
    """

    # --- The manager -----------------------------------------------------------------------------

    def health(self) -> HealthView:
        """Return whether the manager responds, and whether it is the leader."""
        return cast("HealthView", self._call("GET", "/v1/health"))

    def shutdown(self) -> None:
        """Request the manager's shutdown, and return when it has accepted the request."""
        self._call("POST", "/v1/shutdown")

    def open_session(self) -> SessionView:
        """Return a code that opens the web page once."""
        return cast("SessionView", self._call("POST", "/v1/sessions"))

    def code_waits(self, name: str) -> bool:
        """Return whether the code with this name is still valid and unused."""
        return bool(self._call("GET", f"/v1/sessions/{quote(name, safe='')}")["waits"])

    def rebuild(self) -> int:
        """Rebuild the ledger from the bucket, and return the number of jobs that were found."""
        return self.rebuild_ledger()["jobs"]

    def rebuild_ledger(self) -> RebuiltView:
        """Rebuild the ledger from the bucket, and return what was found."""
        return cast("RebuiltView", self._call("POST", "/v1/ledger/rebuild", answer_s=REBUILD_S))

    # --- Jobs ------------------------------------------------------------------------------------

    def submit(self, job: JobDef, items: Sequence[Json] | None = None) -> JobView:
        """Submit a job, with its encoded items if it has a few of its own. A repetition with the
        same client token returns the known job."""
        return cast("JobView", self._call("POST", "/v1/jobs", body=_submission(job, items)))

    def submit_and_hear(
        self, job: JobDef, items: Sequence[Json] | None, accepted: Callable[[], None], *, wait_s: float
    ) -> OutcomesView:
        """Submit a job as `submit` does, and wait up to `wait_s` for its first outcomes. `accepted`
        is called when the grid has accepted the job."""
        body = _submission(job, items)
        with self._answer("POST", "/v1/jobs", body, ANSWER_S, {"wait_s": wait_s}) as answer:
            self._document(answer.line())
            accepted()
            return cast("OutcomesView", self._document(answer.read()))

    def jobs(self, *, limit: int = 100, before: str | None = None, active: bool = False) -> list[JobView]:
        """Return jobs, newest first. `before` is the id of the last job of the previous page."""
        answer = self._call("GET", "/v1/jobs", limit=limit, before=before, active=active)
        return cast("list[JobView]", answer["jobs"])

    def job(self, job: str, *, version: int | None = None, wait_s: float = 0.0) -> JobView:
        """Return one job. With `version`, wait up to `wait_s` until the version of the job
        differs."""
        answer = self._call("GET", _job_path(job), version=version, wait_s=wait_s)
        return cast("JobView", answer)

    def cancel(self, job: str) -> JobView:
        """Cancel a job. Return when no further task of the job can start."""
        return cast("JobView", self._call("POST", _job_path(job, "/cancel")))

    def pause(self, job: str) -> JobView:
        """Pause a job. Running tasks continue, and no further task starts."""
        return cast("JobView", self._call("POST", _job_path(job, "/pause")))

    def resume(self, job: str) -> JobView:
        """Resume a paused job."""
        return cast("JobView", self._call("POST", _job_path(job, "/resume")))

    def retry(
        self,
        job: str,
        *,
        fingerprints: Sequence[str] = (),
        tasks: Mapping[str, Sequence[tuple[int, int]]] | None = None,
    ) -> JobView:
        """Run again all tasks that did not succeed. If `fingerprints` or `tasks` are given, run
        only the failed tasks with these fingerprints or in these ranges. A range includes its first
        task and excludes its end."""
        body = {"fingerprints": list(fingerprints), "tasks": tasks or {}}
        chosen = body if fingerprints or tasks else None
        return cast("JobView", self._call("POST", _job_path(job, "/retry"), body=chosen))

    def eta(self, job: str) -> EtaView:
        """Return the remaining time of a job."""
        return cast("EtaView", self._call("GET", _job_path(job, "/eta")))

    def why(self, job: str) -> str:
        """Return one line that explains why the job has not progressed further."""
        return str(self._call("GET", _job_path(job, "/why"))["why"])

    def outcomes(
        self, job: str, *, stage: str | None = None, after: int | None = None, limit: int = 1000, wait_s: float = 0.0
    ) -> OutcomesView:
        """Return outcomes with a seq above `after`, in the order of their seq. Wait up to `wait_s`
        for the first one."""
        path = _job_path(job, "/outcomes")
        answer = self._call("GET", path, stage=stage, after=after, limit=limit, wait_s=wait_s)
        return cast("OutcomesView", answer)

    def failures(self, job: str, *, limit: int = 100, fingerprint: str | None = None) -> list[FailureView]:
        """Return tasks that failed permanently. `fingerprint` selects one cause."""
        found: list[FailureView] = []
        after: str | None = None
        while len(found) < limit:
            answer = self._call(
                "GET",
                _job_path(job, "/failures"),
                limit=min(limit - len(found), MAX_LISTED),
                after=after,
                fingerprint=fingerprint,
            )
            found += cast("list[FailureView]", answer["failures"])
            after = answer["next"]
            if after is None:
                break
        return found

    def failure_groups(self, job: str) -> list[FailureGroupView]:
        """Return the failed tasks by fingerprint, the largest group first."""
        while True:
            answer = self._call("GET", _job_path(job, "/failures/groups"))
            if answer["is_whole"]:
                return cast("list[FailureGroupView]", answer["groups"])

    def task(self, job: str, stage: str, task: int) -> TaskView:
        """Return one ended task, with its input and its log."""
        path = _job_path(job, f"/stages/{quote(stage, safe='')}/tasks/{task}")
        return cast("TaskView", self._call("GET", path))

    def logs(
        self,
        job: str,
        *,
        stage: str | None = None,
        task: int | None = None,
        limit: int = 100,
        failed: bool = False,
        since_s: float | None = None,
    ) -> list[LogView]:
        """Return the logs of tasks, ordered by stage, task, and attempt. `failed` selects tasks
        that failed permanently. `since_s` selects attempts that ended within this number of
        seconds."""
        answer = self._call(
            "GET", _job_path(job, "/logs"), stage=stage, task=task, limit=limit, failed=failed or None, since_s=since_s
        )
        return cast("list[LogView]", answer["logs"])

    def logs_after(
        self,
        job: str,
        seq: int | None,
        *,
        stage: str | None = None,
        task: int | None = None,
        failed: bool = False,
        since_s: float | None = None,
        wait_s: float = 0.0,
    ) -> NewLogsView:
        """Return the logs of outcomes with a seq above `seq`. Wait up to `wait_s` for the first
        outcome."""
        answer = self._call(
            "GET",
            _job_path(job, "/logs/after"),
            seq=seq,
            stage=stage,
            task=task,
            failed=failed or None,
            since_s=since_s,
            wait_s=wait_s,
        )
        return cast("NewLogsView", answer)

    def tails(self, job: str) -> TailsView:
        """Return the live logs of running tasks. Workers store them only while a client requests
        them."""
        return cast("TailsView", self._call("POST", _job_path(job, "/tails")))

    # --- The grid --------------------------------------------------------------------------------

    def grid(self) -> GridView:
        """Return the pools with their instances, and the queues with their depths."""
        return cast("GridView", self._call("GET", "/v1/grid"))

    def activities(self, *, pool: str | None = None, limit: int = 50) -> list[ActivityView]:
        """Return scaling activities with their causes, newest first."""
        answer = self._call("GET", "/v1/grid/activities", pool=pool, limit=limit)
        return cast("list[ActivityView]", answer["activities"])

    def scale(
        self,
        pool: str,
        *,
        min: int | None = None,  # noqa: A002 - the name in the request
        max: int | None = None,  # noqa: A002 - the name in the request
        desired: int | None = None,
        auto: bool | None = None,
    ) -> PoolView:
        """Set the limits of a pool, and its desired capacity manually. `auto` True returns the pool
        to the autoscaler."""
        body = {"min": min, "max": max, "desired": desired, "auto": auto}
        return cast("PoolView", self._call("POST", f"/v1/grid/pools/{quote(pool, safe='')}", body=body))

    def drain(self, pool: str | None = None) -> GridView:
        """Scale one pool or all pools to zero instances, and keep them there."""
        return cast("GridView", self._call("POST", "/v1/grid/drain", body={"pool": pool}))

    # --- Usage and caps --------------------------------------------------------------------------

    def use(self) -> UseView:
        """Return the grid's usage, and the instances that are billed now."""
        return cast("UseView", self._call("GET", "/v1/use"))

    def cap_grid(self, max_cost_usd: float | None) -> UseView:
        """Set the cap in USD on the grid's cost since its account was opened. None removes the
        cap."""
        body = {"max_cost_usd": max_cost_usd}
        return cast("UseView", self._call("POST", "/v1/use/cap", body=body))

    def job_use(self, job: str) -> JobUseView:
        """Return the usage of a job."""
        return cast("JobUseView", self._call("GET", _job_path(job, "/use")))

    def cap_job(self, job: str, max_cost_usd: float | None) -> JobUseView:
        """Set the cap in USD on the cost of a job. None removes the cap."""
        body = {"max_cost_usd": max_cost_usd}
        return cast("JobUseView", self._call("POST", _job_path(job, "/cap"), body=body))

    # --- Notifications ---------------------------------------------------------------------------

    def notify_targets(self) -> list[TargetView]:
        """Return the grid's notification targets, and those of jobs that have not ended."""
        return cast("list[TargetView]", self._call("GET", "/v1/notifications/targets")["targets"])

    def notify_test(self, target: str) -> TestedView:
        """Send one test notification to one of the grid's own targets."""
        path = f"/v1/notifications/targets/{quote(target, safe='')}/test"
        return cast("TestedView", self._call("POST", path))

    def notifications(self, *, limit: int = 100) -> list[NotificationView]:
        """Return notifications: first the pending ones, then the results of recent ones."""
        answer = self._call("GET", "/v1/notifications", limit=limit)
        return cast("list[NotificationView]", answer["notifications"])


def _submission(job: JobDef, items: Sequence[Json] | None) -> Json:
    from batchlab.core.protocol import json_format

    return {"job": json_format.job_to_json(job), "items": items}


def _job_path(job: str, what: str = "") -> str:
    return f"/v1/jobs/{quote(job, safe='')}{what}"
