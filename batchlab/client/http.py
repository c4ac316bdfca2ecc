"""HTTP client of a grid's manager. The command line and the Python API use the client.

Invariant: the import of the module and the creation of a client are fast, because most commands use a client. A failed
request raises an exception of a class in `batchlab.core.errors`.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote, urlencode

from batchlab.client.requests import ANSWER_S, Calls, Form

if TYPE_CHECKING:
    from batchlab.core.api_types import (
        ActivityView,
        AuditRecordView,
        DeletedView,
        EtaView,
        FailureGroupView,
        FailureView,
        GridView,
        HealthView,
        JobView,
        LogView,
        NewLogsView,
        NewUserView,
        NotificationView,
        OutcomesView,
        PoolView,
        RebuiltView,
        SessionView,
        TailsView,
        TargetView,
        TasksView,
        TaskView,
        TestedView,
        UserView,
    )
    from batchlab.core.api_usage_types import (
        DueView,
        JobUseView,
        RunView,
        SchedulesView,
        ScheduleView,
        SharesView,
        UseView,
    )
    from batchlab.core.job_definition import JobDef
    from batchlab.core.model import Json

REBUILD_S = 3600.0
UPLOAD_S = DOWNLOAD_S = 600.0
DELETE_S = 3600.0
MAX_LISTED = 1000
"""Maximum number of rows in one answer of the manager."""


class Client(Calls):
    """Connections to one manager. A client is thread-safe, and is a context manager.

    Each method raises Unreachable if the manager does not answer, and BackendError if the manager cannot serve requests
    at the moment. Each method raises NotFound for an unknown id, UsageError for an invalid request, and Refused if the
    manager refuses the request. Times in the API are in seconds. A client does not use HTTP proxies.
    """

    # --- Manager ---------------------------------------------------------------------------------

    def health(self) -> HealthView:
        """Return whether the manager responds, and whether the manager is the leader."""
        return cast("HealthView", self._call("GET", "/v1/health"))

    def shutdown(self) -> None:
        """Request the manager's shutdown, and return when the manager has accepted the request."""
        self._call("POST", "/v1/shutdown")

    def open_session(self) -> SessionView:
        """Request a one-time code that opens a session of the web page, and return the code."""
        return cast("SessionView", self._call("POST", "/v1/sessions"))

    def code_waits(self, name: str) -> bool:
        """Return whether the one-time code with the name `name` is still valid and unused."""
        return bool(self._call("GET", _path("sessions", name))["waits"])

    def rebuild(self) -> int:
        """Rebuild the ledger from the bucket, and return the number of jobs in the bucket."""
        return self.rebuild_ledger()["jobs"]

    def rebuild_ledger(self) -> RebuiltView:
        """Rebuild the ledger from the bucket, and return a report of the rebuild."""
        return cast("RebuiltView", self._call("POST", "/v1/ledger/rebuild", answer_s=REBUILD_S))

    # --- Users -----------------------------------------------------------------------------------

    def users(self) -> list[UserView]:
        """Return the users of the grid in the order of their names."""
        return cast("list[UserView]", self._call("GET", "/v1/users")["users"])

    def add_user(self, name: str, role: str, *, expires_s: float | None = None, replace: bool = False) -> NewUserView:
        """Add a user, and return the user with the token. `expires_s` is in epoch seconds.

        Raise Refused if a user has or had the name, unless `replace`.
        """
        body = {"name": name, "role": role, "expires_s": expires_s, "replace": replace}
        return cast("NewUserView", self._call("POST", "/v1/users", body=body))

    def set_role(self, name: str, role: str) -> UserView:
        """Change the role of a user, whose token stays valid.

        Raise NotFound if the user does not exist, and Refused if the user's token is expired or revoked.
        """
        return cast("UserView", self._call("POST", _path("users", name, "/role"), body={"role": role}))

    def revoke_user(self, name: str) -> UserView:
        """Revoke the token of a user."""
        return cast("UserView", self._call("POST", _path("users", name, "/revoke")))

    def audit(
        self,
        *,
        user: str = "",
        action: str = "",
        outcome: str = "",
        since_s: float = 0.0,
        until_s: float | None = None,
        limit: int = 100,
    ) -> list[AuditRecordView]:
        """Return audit records with the newest first. `since_s` and `until_s` are in epoch seconds."""
        records: list[AuditRecordView] = []
        before: str | None = ""
        while before is not None and len(records) < limit:
            query: dict[str, Any] = {
                "user": user,
                "action": action,
                "outcome": outcome,
                "since_s": since_s,
                "until_s": until_s,
            }
            page_limit = min(limit - len(records), MAX_LISTED)
            page = self._call("GET", "/v1/audit", **query, before=before, limit=page_limit)
            records += cast("list[AuditRecordView]", page["records"])
            before = page["next"]
        return records[:limit]

    # --- Jobs ------------------------------------------------------------------------------------

    def submit(self, job: JobDef, items: Sequence[Json] | None = None) -> JobView:
        """Submit a job. `items` contains the encoded items of a small job whose items are not in the bucket.

        A repeated submission with the same client token returns the job of the first submission.
        """
        return cast("JobView", self._call("POST", "/v1/jobs", body=_submission(job, items)))

    def submit_files(
        self,
        files: Mapping[str, bytes],
        job_file: str,
        sets: Sequence[str],
        token: str,
        *,
        after: Sequence[str] = (),
        share: str = "",
    ) -> JobView:
        """Submit the job file with the path `job_file` in `files`, which has the contents of files by their paths.

        `sets` are texts such as KEY=VALUE, which replace parameters of the job. `token` is the client token. `after`
        has the dependencies of the job, such as ID:ended. `share` replaces the share of the job file.
        """
        import httpx

        sent = [("files", (name, content)) for name, content in files.items()]
        data = {"job_file": job_file, "set": list(sets), "after": list(after), "share": share, "token": token}
        form = httpx.Request("POST", "http://localhost", files=sent, data=data)
        body = Form(form.read(), form.headers["Content-Type"])
        return cast("JobView", self._call("POST", "/v1/jobs/files", body=body, answer_s=UPLOAD_S))

    def results_archive(self, job: str, stages: Sequence[str] = ()) -> bytes:
        """Return a ZIP archive of the job's results. The manager refuses an archive of more than 2 GiB."""
        path = _job_path(job, "/results")
        target = f"{path}?{urlencode([('stage', stage) for stage in stages])}" if stages else path
        with self._answer("GET", target, None, DOWNLOAD_S, {}) as answer:
            return answer.read()

    def submit_and_hear(
        self,
        job: JobDef,
        items: Sequence[Json] | None,
        accepted: Callable[[], None],
        *,
        wait_s: float,
        is_sent: bool = False,
    ) -> OutcomesView:
        """Submit a job as `submit` does, and wait up to `wait_s` seconds for the job's first outcomes.

        `accepted` is called when the manager has accepted the job. `is_sent` reports that the client has committed the
        job and has sent its message.
        """
        body = {**_submission(job, items), **({"is_sent": True} if is_sent else {})}
        with self._answer("POST", "/v1/jobs", body, ANSWER_S, {"wait_s": wait_s}) as answer:
            self._document(answer.line())
            accepted()
            return cast("OutcomesView", self._document(answer.read()))

    def report_calls(self, jobs: Sequence[str]) -> None:
        """Report direct calls that have a committed outcome, so that the ledger has them."""
        self._call("POST", "/v1/calls", body={"jobs": jobs})

    def jobs(self, *, limit: int = 100, before: str | None = None, active: bool = False) -> list[JobView]:
        """Return a page of the jobs. The newest job comes first. `before` is the id of the last job of the previous
        page.
        """
        answer = self._call("GET", "/v1/jobs", limit=limit, before=before, active=active)
        return cast("list[JobView]", answer["jobs"])

    def job(self, job: str, *, version: int | None = None, wait_s: float = 0.0) -> JobView:
        """Return one job.

        If `version` is given, wait up to `wait_s` seconds until the version number of the job differs from `version`.
        """
        return cast("JobView", self._call("GET", _job_path(job), version=version, wait_s=wait_s))

    def cancel(self, job: str) -> JobView:
        """Cancel a job, and return when no further task of the job can start."""
        return cast("JobView", self._call("POST", _job_path(job, "/cancel")))

    def pause(self, job: str) -> JobView:
        """Pause a job. Running tasks of a paused job continue, but no further task starts."""
        return cast("JobView", self._call("POST", _job_path(job, "/pause")))

    def resume(self, job: str) -> JobView:
        """Resume a paused job."""
        return cast("JobView", self._call("POST", _job_path(job, "/resume")))

    def delete(self, job: str) -> DeletedView:
        """Delete an ended job with all its objects."""
        return cast("DeletedView", self._call("DELETE", _job_path(job), answer_s=DELETE_S))

    def retry(
        self,
        job: str,
        *,
        fingerprints: Sequence[str] = (),
        tasks: Mapping[str, Sequence[tuple[int, int]]] | None = None,
        inputs: Mapping[tuple[str, int], bytes] | None = None,
    ) -> JobView:
        """Run all tasks of an ended job again that did not succeed.

        With `fingerprints` or `tasks`, run only the failed tasks with one of the fingerprints or in one of the ranges.
        `tasks` contains ranges by stage. A range (first, stop) includes task `first` and excludes task `stop`. `inputs`
        has new inputs of failed tasks, by stage and index. These tasks run as well.
        """
        choice: dict[str, Any] = {}
        if fingerprints or tasks or inputs:
            choice |= {"fingerprints": list(fingerprints), "tasks": tasks or {}}
        if inputs:
            choice["inputs"] = [
                {"stage": stage, "task": task, "data": base64.b64encode(data).decode()}
                for (stage, task), data in inputs.items()
            ]
        answer_s = UPLOAD_S if inputs else ANSWER_S
        return cast("JobView", self._call("POST", _job_path(job, "/retry"), body=choice or None, answer_s=answer_s))

    def eta(self, job: str) -> EtaView:
        """Return the remaining time of a job."""
        return cast("EtaView", self._call("GET", _job_path(job, "/eta")))

    def why(self, job: str) -> str:
        """Return one line that explains why the job is waiting."""
        return str(self._call("GET", _job_path(job, "/why"))["why"])

    def outcomes(
        self, job: str, *, stage: str | None = None, after: int | None = None, limit: int = 1000, wait_s: float = 0.0
    ) -> OutcomesView:
        """Return the outcomes of a job whose seq is greater than `after`, ordered by seq.

        Wait up to `wait_s` seconds until at least one outcome exists.
        """
        query: dict[str, Any] = {"stage": stage, "after": after, "limit": limit, "wait_s": wait_s}
        return cast("OutcomesView", self._call("GET", _job_path(job, "/outcomes"), **query))

    def failures(self, job: str, *, limit: int = 100, fingerprint: str | None = None) -> list[FailureView]:
        """Return the tasks of a job that failed permanently. `fingerprint` selects the failures with one cause."""
        failures: list[FailureView] = []
        path, after = _job_path(job, "/failures"), None
        while len(failures) < limit:
            page_limit = min(limit - len(failures), MAX_LISTED)
            page = self._call("GET", path, limit=page_limit, after=after, fingerprint=fingerprint)
            failures += cast("list[FailureView]", page["failures"])
            after = page["next"]
            if after is None:
                break
        return failures

    def failure_groups(self, job: str) -> list[FailureGroupView]:
        """Return the failed tasks of a job in groups by fingerprint. The largest group comes first."""
        while True:
            answer = self._call("GET", _job_path(job, "/failures/groups"))
            if answer["is_whole"]:
                return cast("list[FailureGroupView]", answer["groups"])

    def tasks(
        self, job: str, *, stage: str | None = None, state: str | None = None, after: str | None = None, limit: int = 50
    ) -> TasksView:
        """Return a page of a job's tasks. `state` is a state of a TaskRowView, and `after` is the `next` of the
        previous page, or the name of the first task, such as parse/3.
        """
        query: dict[str, Any] = {"stage": stage, "state": state, "after": after, "limit": limit}
        return cast("TasksView", self._call("GET", _job_path(job, "/tasks"), **query))

    def task(self, job: str, stage: str, task: int) -> TaskView:
        """Return one ended task of a job, with the input and the log of the task."""
        return cast("TaskView", self._call("GET", _job_path(job, f"/stages/{quote(stage, safe='')}/tasks/{task}")))

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
        """Return the logs of a job's tasks, ordered by stage, task, and attempt.

        `failed` selects tasks that failed permanently. `since_s` selects attempts that ended within the last `since_s`
        seconds.
        """
        query: dict[str, Any] = {
            "stage": stage,
            "task": task,
            "limit": limit,
            "failed": failed or None,
            "since_s": since_s,
        }
        return cast("list[LogView]", self._call("GET", _job_path(job, "/logs"), **query)["logs"])

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
        """Return the logs of outcomes whose seq is greater than `seq`.

        Wait up to `wait_s` seconds until at least one outcome exists.
        """
        query: dict[str, Any] = {"stage": stage, "task": task, "failed": failed or None, "since_s": since_s}
        answer = self._call("GET", _job_path(job, "/logs/after"), seq=seq, wait_s=wait_s, **query)
        return cast("NewLogsView", answer)

    def tails(self, job: str) -> TailsView:
        """Return the live logs of running tasks. Workers store live logs only while a client requests them."""
        return cast("TailsView", self._call("POST", _job_path(job, "/tails")))

    # --- Grid ------------------------------------------------------------------------------------

    def grid(self) -> GridView:
        """Return the pools of the grid with their instances, and the queues with their numbers of messages."""
        return cast("GridView", self._call("GET", "/v1/grid"))

    def activities(self, *, pool: str | None = None, limit: int = 50) -> list[ActivityView]:
        """Return the scaling activities of pools with the cause of each activity. The newest activity comes first."""
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
        """Set the minimum, the maximum, and the desired capacity of a pool.

        If `auto` is True, the autoscaler sets the desired capacity again.
        """
        body = {"min": min, "max": max, "desired": desired, "auto": auto}
        return cast("PoolView", self._call("POST", _path("grid/pools", pool), body=body))

    def drain(self, pool: str | None = None) -> GridView:
        """Scale one pool or all pools to zero instances, and keep the pools at zero instances."""
        return cast("GridView", self._call("POST", "/v1/grid/drain", body={"pool": pool}))

    # --- Usage and caps --------------------------------------------------------------------------

    def use(self) -> UseView:
        """Return the recorded usage of the grid, and the instances that are billed at the moment."""
        return cast("UseView", self._call("GET", "/v1/use"))

    def cap_grid(self, max_cost_usd: float | None) -> UseView:
        """Set the cap in USD on the grid's total cost since its account was opened. The value None removes the cap."""
        return cast("UseView", self._call("POST", "/v1/use/cap", body={"max_cost_usd": max_cost_usd}))

    def job_use(self, job: str) -> JobUseView:
        """Return the usage of a job."""
        return cast("JobUseView", self._call("GET", _job_path(job, "/use")))

    def cap_job(self, job: str, max_cost_usd: float | None) -> JobUseView:
        """Set the cap in USD on the cost of a job. The value None removes the cap."""
        return cast("JobUseView", self._call("POST", _job_path(job, "/cap"), body={"max_cost_usd": max_cost_usd}))

    # --- Notifications ---------------------------------------------------------------------------

    def notify_targets(self) -> list[TargetView]:
        """Return the notification targets of the grid and of jobs that have not ended."""
        return cast("list[TargetView]", self._call("GET", "/v1/notifications/targets")["targets"])

    def notify_test(self, target: str) -> TestedView:
        """Send a test notification to a target of the grid."""
        return cast("TestedView", self._call("POST", _path("notifications/targets", target, "/test")))

    def notifications(self, *, limit: int = 100) -> list[NotificationView]:
        """Return the pending notifications, and then the results of recent notifications."""
        answer = self._call("GET", "/v1/notifications", limit=limit)
        return cast("list[NotificationView]", answer["notifications"])

    # --- Shares ----------------------------------------------------------------------------------

    def shares(self) -> SharesView:
        """Return the fair-share policy of the grid, and the state of each share in each pool."""
        return cast("SharesView", self._call("GET", "/v1/shares"))

    def set_share(self, entry: Mapping[str, Json]) -> SharesView:
        """Change an entry of the fair-share policy in the format of POST /v1/shares."""
        return cast("SharesView", self._call("POST", "/v1/shares", body=entry))

    def set_share_policy(self, policy: Mapping[str, Json]) -> SharesView:
        """Change the decay or the compute reservation in the format of POST /v1/shares/policy."""
        return cast("SharesView", self._call("POST", "/v1/shares/policy", body=policy))

    def remove_share(self, identifier: str | None) -> SharesView:
        """Remove an entry of the fair-share policy, or the whole policy if `identifier` is None."""
        return cast("SharesView", self._call("POST", "/v1/shares/remove", body={"identifier": identifier}))

    # --- Schedules -------------------------------------------------------------------------------

    def add_schedule(self, schedule: Mapping[str, Json], job: JobDef, *, replace: bool = False) -> ScheduleView:
        """Add a schedule in the format of POST /v1/schedules. `job` is the job that the schedule runs.

        Raise Refused if a schedule with the same name exists and `replace` is False.
        """
        from batchlab.core.protocol import json_format

        body = {"schedule": schedule, "job": json_format.job_to_json(job), "replace": replace}
        return cast("ScheduleView", self._call("POST", "/v1/schedules", body=body))

    def schedules(self) -> SchedulesView:
        """Return all schedules in the order of their names, each with its last run, and notes on missed runs."""
        return cast("SchedulesView", self._call("GET", "/v1/schedules"))

    def schedule(self, name: str) -> ScheduleView:
        """Return one schedule with its runs."""
        return cast("ScheduleView", self._call("GET", _path("schedules", name)))

    def coming(self, name: str, *, count: int = 10) -> list[DueView]:
        """Return the next due times of a schedule."""
        return cast("list[DueView]", self._call("GET", _path("schedules", name, "/next"), count=count)["times"])

    def pause_schedule(self, name: str) -> ScheduleView:
        """Pause a schedule. Due times during the pause of a schedule start no runs."""
        return cast("ScheduleView", self._call("POST", _path("schedules", name, "/pause")))

    def resume_schedule(self, name: str) -> ScheduleView:
        """Resume a schedule. The next run of a resumed schedule starts at the next due time."""
        return cast("ScheduleView", self._call("POST", _path("schedules", name, "/resume")))

    def remove_schedule(self, name: str) -> ScheduleView:
        """Remove a schedule. A running job of the schedule continues."""
        return cast("ScheduleView", self._call("POST", _path("schedules", name, "/remove")))

    def run_schedule(self, name: str, token: str) -> RunView:
        """Run the job of a schedule now, in addition to the schedule's due times.

        A repeated request with the same `token` returns the run of the first request.
        """
        return cast("RunView", self._call("POST", _path("schedules", name, "/run"), body={"token": token}))


def _submission(job: JobDef, items: Sequence[Json] | None) -> dict[str, Json]:
    from batchlab.core.protocol import json_format

    return {"job": json_format.job_to_json(job), "items": items}


def _path(kind: str, name: str, suffix: str = "") -> str:
    return f"/v1/{kind}/{quote(name, safe='')}{suffix}"


def _job_path(job: str, suffix: str = "") -> str:
    return _path("jobs", job, suffix)
