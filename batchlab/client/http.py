"""The manager's HTTP API as Python calls, for the command line and the Python API.

Invariant: cheap to import and to make, since every command pays for it; every failure is one of
batchlab's own errors.

What a client asks of schedules.

Invariant: as the client itself: cheap to import, every failure one of batchlab's own errors.
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
    from batchlab.core.api_usage_types import (
        DueView,
        JobUseView,
        RunView,
        SchedulesView,
        ScheduleView,
        UseView,
    )
    from batchlab.core.job_definition import JobDef
    from batchlab.core.model import Json

_ALL = "/v1/schedules"


class ScheduleCalls(Calls):
    """The part of `Client` that is about schedules."""

    def add_schedule(
        self, schedule: Mapping[str, Json], job: JobDef, *, replace: bool = False
    ) -> ScheduleView:
        """Keep a schedule, described as in POST /v1/schedules, with the job that it runs; Refused
        where another one has its name, unless it is to `replace` that."""
        from batchlab.core.protocol import json_format

        body = {"schedule": schedule, "job": json_format.job_to_json(job), "replace": replace}
        return cast("ScheduleView", self._call("POST", _ALL, body=body))

    def schedules(self) -> SchedulesView:
        """All schedules by name, each with its last run, and what was missed."""
        return cast("SchedulesView", self._call("GET", _ALL))

    def schedule(self, name: str) -> ScheduleView:
        """One schedule with its runs."""
        return cast("ScheduleView", self._call("GET", _of(name)))

    def coming(self, name: str, *, count: int = 10) -> list[DueView]:
        """Its next due times."""
        return cast("list[DueView]", self._call("GET", _of(name, "/next"), count=count)["times"])

    def pause_schedule(self, name: str) -> ScheduleView:
        """Start nothing until it is resumed."""
        return cast("ScheduleView", self._call("POST", _of(name, "/pause")))

    def resume_schedule(self, name: str) -> ScheduleView:
        """Go on with what falls due from now on."""
        return cast("ScheduleView", self._call("POST", _of(name, "/resume")))

    def remove_schedule(self, name: str) -> ScheduleView:
        """Forget it; a job of it that runs is finished."""
        return cast("ScheduleView", self._call("POST", _of(name, "/remove")))

    def run_schedule(self, name: str, token: str) -> RunView:
        """Run it now; the same token again is the same run."""
        return cast("RunView", self._call("POST", _of(name, "/run"), body={"token": token}))


def _of(name: str, what: str = "") -> str:
    return f"{_ALL}/{quote(name, safe='')}{what}"


REBUILD_S = 3600.0
MOST = 1000
"""Rows that one answer of a listing has at the most."""


class Client(ScheduleCalls):
    """Connections to one manager, usable from several threads; a context manager.

    Every method raises Unreachable where the manager does not answer, NotFound for an unknown id,
    Refused where the manager declines, UsageError where the request is wrong, and BackendError
    where the manager cannot do its work at the moment. Times are seconds. No proxy is used.
    """

    # --- The manager -----------------------------------------------------------------------------

    def health(self) -> HealthView:
        """Whether it answers, and leads."""
        return cast("HealthView", self._call("GET", "/v1/health"))

    def shutdown(self) -> None:
        """Ask it to end; returns as soon as it has agreed."""
        self._call("POST", "/v1/shutdown")

    def open_session(self) -> SessionView:
        """A code that opens the web page once."""
        return cast("SessionView", self._call("POST", "/v1/sessions"))

    def code_waits(self, name: str) -> bool:
        """Whether the code of that name has not been used yet, and may be."""
        return bool(self._call("GET", f"/v1/sessions/{quote(name, safe='')}")["waits"])

    def rebuild(self) -> int:
        """Make the ledger anew from the bucket; answers how many jobs it found."""
        return self.rebuild_ledger()["jobs"]

    def rebuild_ledger(self) -> RebuiltView:
        """Make the ledger anew from the bucket; return what was found there."""
        return cast("RebuiltView", self._call("POST", "/v1/ledger/rebuild", answer_s=REBUILD_S))

    # --- Jobs ------------------------------------------------------------------------------------

    def submit(self, job: JobDef, items: Sequence[Json] | None = None) -> JobView:
        """Submit a job, with its encoded items where it brings some and they are few; again with
        the same client token answers with the job that is known."""
        return cast("JobView", self._call("POST", "/v1/jobs", body=_submission(job, items)))

    def submit_and_hear(
        self,
        job: JobDef,
        items: Sequence[Json] | None,
        accepted: Callable[[], None],
        *,
        wait_s: float,
    ) -> OutcomesView:
        """Submit a job as `submit`, and wait so long for its first outcomes. `accepted` is called
        once it is known to the grid."""
        body = _submission(job, items)
        with self._answer("POST", "/v1/jobs", body, ANSWER_S, {"wait_s": wait_s}) as answer:
            self._document(answer.line())
            accepted()
            return cast("OutcomesView", self._document(answer.read()))

    def jobs(
        self, *, limit: int = 100, before: str | None = None, active: bool = False
    ) -> list[JobView]:
        """Newest first; `before` is the id of the last one of the previous page."""
        answer = self._call("GET", "/v1/jobs", limit=limit, before=before, active=active)
        return cast("list[JobView]", answer["jobs"])

    def job(self, job: str, *, version: int | None = None, wait_s: float = 0.0) -> JobView:
        """One job; with `version` as soon as the job's is another, or after `wait_s`."""
        answer = self._call("GET", _of_client(job), version=version, wait_s=wait_s)
        return cast("JobView", answer)

    def cancel(self, job: str) -> JobView:
        """Returns once no task of the job can start any more."""
        return cast("JobView", self._call("POST", _of_client(job, "/cancel")))

    def pause(self, job: str) -> JobView:
        """Running tasks end, no further one starts."""
        return cast("JobView", self._call("POST", _of_client(job, "/pause")))

    def resume(self, job: str) -> JobView:
        """Go on with a paused job."""
        return cast("JobView", self._call("POST", _of_client(job, "/resume")))

    def retry(
        self,
        job: str,
        *,
        fingerprints: Sequence[str] = (),
        tasks: Mapping[str, Sequence[tuple[int, int]]] | None = None,
    ) -> JobView:
        """Run again what did not succeed; of what failed only the tasks with these fingerprints
        and, by stage, in these ranges [first, beyond the last), where any are named."""
        body = {"fingerprints": list(fingerprints), "tasks": tasks or {}}
        chosen = body if fingerprints or tasks else None
        return cast("JobView", self._call("POST", _of_client(job, "/retry"), body=chosen))

    def eta(self, job: str) -> EtaView:
        """How long it still takes."""
        return cast("EtaView", self._call("GET", _of_client(job, "/eta")))

    def why(self, job: str) -> str:
        """Why the job is not further than it is, in one line."""
        return str(self._call("GET", _of_client(job, "/why"))["why"])

    def outcomes(
        self,
        job: str,
        *,
        stage: str | None = None,
        after: int | None = None,
        limit: int = 1000,
        wait_s: float = 0.0,
    ) -> OutcomesView:
        """Outcomes folded after seq `after`, in that order; waits up to `wait_s` for the first."""
        path = _of_client(job, "/outcomes")
        answer = self._call("GET", path, stage=stage, after=after, limit=limit, wait_s=wait_s)
        return cast("OutcomesView", answer)

    def failures(
        self, job: str, *, limit: int = 100, fingerprint: str | None = None
    ) -> list[FailureView]:
        """Tasks that failed for good; with `fingerprint` those of one cause."""
        found: list[FailureView] = []
        after: str | None = None
        while len(found) < limit:
            answer = self._call(
                "GET",
                _of_client(job, "/failures"),
                limit=min(limit - len(found), MOST),
                after=after,
                fingerprint=fingerprint,
            )
            found += cast("list[FailureView]", answer["failures"])
            after = answer["next"]
            if after is None:
                break
        return found

    def failure_groups(self, job: str) -> list[FailureGroupView]:
        """The same by their fingerprints, the largest group first."""
        while True:
            answer = self._call("GET", _of_client(job, "/failures/groups"))
            if answer["is_whole"]:
                return cast("list[FailureGroupView]", answer["groups"])

    def task(self, job: str, stage: str, task: int) -> TaskView:
        """One task that has come to its end, with its input and its log."""
        path = _of_client(job, f"/stages/{quote(stage, safe='')}/tasks/{task}")
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
        """What tasks printed, by stage, task and attempt; of those that `failed` for good, or of
        attempts that ended within `since_s`."""
        answer = self._call(
            "GET",
            _of_client(job, "/logs"),
            stage=stage,
            task=task,
            limit=limit,
            failed=failed or None,
            since_s=since_s,
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
        """What was printed in outcomes folded after `seq`; waits up to `wait_s` for the first."""
        answer = self._call(
            "GET",
            _of_client(job, "/logs/after"),
            seq=seq,
            stage=stage,
            task=task,
            failed=failed or None,
            since_s=since_s,
            wait_s=wait_s,
        )
        return cast("NewLogsView", answer)

    def tails(self, job: str) -> TailsView:
        """What running tasks have printed so far, which workers store while it is asked for."""
        return cast("TailsView", self._call("POST", _of_client(job, "/tails")))

    # --- The grid --------------------------------------------------------------------------------

    def grid(self) -> GridView:
        """Pools with their instances, and queues with their depths."""
        return cast("GridView", self._call("GET", "/v1/grid"))

    def activities(self, *, pool: str | None = None, limit: int = 50) -> list[ActivityView]:
        """Scaling activities with their causes, newest first."""
        answer = self._call("GET", "/v1/grid/activities", pool=pool, limit=limit)
        return cast("list[ActivityView]", answer["activities"])

    def scale(
        self,
        pool: str,
        *,
        min: int | None = None,  # noqa: A002 - the request's own word
        max: int | None = None,  # noqa: A002 - the request's own word
        desired: int | None = None,
        auto: bool | None = None,
    ) -> PoolView:
        """Set limits, and capacity by hand; `auto` True hands the pool back to the policy."""
        body = {"min": min, "max": max, "desired": desired, "auto": auto}
        return cast(
            "PoolView", self._call("POST", f"/v1/grid/pools/{quote(pool, safe='')}", body=body)
        )

    def drain(self, pool: str | None = None) -> GridView:
        """Take one pool, or all, to no instances, and hold it there."""
        return cast("GridView", self._call("POST", "/v1/grid/drain", body={"pool": pool}))

    # --- What it uses ----------------------------------------------------------------------------

    def use(self) -> UseView:
        """What the grid has used, and what is billed now."""
        return cast("UseView", self._call("GET", "/v1/use"))

    def cap_grid(self, max_cost_usd: float | None) -> UseView:
        """Cap what the grid costs, in USD since its account was opened; None takes the cap away."""
        body = {"max_cost_usd": max_cost_usd}
        return cast("UseView", self._call("POST", "/v1/use/cap", body=body))

    def job_use(self, job: str) -> JobUseView:
        """What a job has used."""
        return cast("JobUseView", self._call("GET", _of_client(job, "/use")))

    def cap_job(self, job: str, max_cost_usd: float | None) -> JobUseView:
        """Cap what a job costs, in USD; None takes the cap away."""
        body = {"max_cost_usd": max_cost_usd}
        return cast("JobUseView", self._call("POST", _of_client(job, "/cap"), body=body))

    # --- Notifications ---------------------------------------------------------------------------

    def notify_targets(self) -> list[TargetView]:
        """Whom the grid tells, and whom the jobs name that have not ended."""
        return cast("list[TargetView]", self._call("GET", "/v1/notifications/targets")["targets"])

    def notify_test(self, target: str) -> TestedView:
        """Tell one of the grid's own targets that this is a test, once."""
        path = f"/v1/notifications/targets/{quote(target, safe='')}/test"
        return cast("TestedView", self._call("POST", path))

    def notifications(self, *, limit: int = 100) -> list[NotificationView]:
        """Those on their way first, then what came of the others."""
        answer = self._call("GET", "/v1/notifications", limit=limit)
        return cast("list[NotificationView]", answer["notifications"])


def _submission(job: JobDef, items: Sequence[Json] | None) -> Json:
    from batchlab.core.protocol import json_format

    return {"job": json_format.job_to_json(job), "items": items}


def _of_client(job: str, what: str = "") -> str:
    return f"/v1/jobs/{quote(job, safe='')}{what}"
