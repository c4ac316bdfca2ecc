"""The manager's HTTP API as Python calls, for the command line and the Python API.

Invariant: cheap to import and to make, since every command pays for it; every failure is one of
batchlab's own errors.
"""

from __future__ import annotations

import json
import os
import ssl
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import TYPE_CHECKING, Any, Self, cast
from urllib.parse import quote, urlencode, urlsplit

from batchlab.errors import BackendError, BatchlabError, NotFound, Refused, Unreachable, UsageError
from batchlab.schedule_client import ScheduleCalls

if TYPE_CHECKING:
    import httpx

    from batchlab.jobdef import JobDef
    from batchlab.model import Json
    from batchlab.notified import NotificationView, TargetView, TestedView
    from batchlab.usage import JobUseView, UseView
    from batchlab.views import (
        ActivityView,
        EtaView,
        FailureGroupView,
        FailureView,
        GridView,
        HealthView,
        JobView,
        LogView,
        NewLogsView,
        OutcomesView,
        PoolView,
        SessionView,
        TailsView,
        TaskView,
    )

CONNECT_S = 5.0
ANSWER_S = 60.0
"""Beyond what a long poll waits by itself."""
REBUILD_S = 3600.0
IDLE_S = 2.0
"""A kept connection idle for longer is not used again: the server closes it after 5 s, and a
request that meets that moment fails."""

MOST = 1000
"""Rows that one answer of a listing has at the most."""

TRACE_VARIABLE = "TRACEPARENT"
"""Environment variable with the W3C trace context that a command was called in."""
BAD = 300
"""HTTP statuses from here on are errors: the manager redirects nobody."""

_JSON = {"Content-Type": "application/json"}
_ERRORS: dict[int, type[BatchlabError]] = {
    401: Refused,
    404: NotFound,
    409: Refused,
    422: UsageError,
    503: BackendError,
}


class Client(ScheduleCalls):
    """Connections to one manager, usable from several threads; a context manager.

    Every method raises Unreachable where the manager does not answer, NotFound for an unknown id,
    Refused where the manager declines, UsageError where the request is wrong, and BackendError
    where the manager cannot do its work at the moment. Times are seconds. No proxy is used.
    """

    def __init__(self, url: str, token: str) -> None:
        self.url = url
        parts = urlsplit(url)
        self._host = parts.netloc
        # Reading the system's certificates takes longer than all else here together.
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._headers = {"Authorization": f"Bearer {token}"}
        if above := _trace(os.environ.get(TRACE_VARIABLE, "")):
            self._headers["traceparent"] = above
        self._idle: deque[tuple[float, HTTPConnection]] = deque()
        """When each was last used (monotonic), and the connection; the last used comes last."""

    def for_loop(self, connections: int) -> httpx.AsyncClient:
        """A client of the same manager for an event loop, which closes it; its requests wait for
        one of so many connections."""
        import httpx

        return httpx.AsyncClient(
            base_url=self.url,
            headers=self._headers,
            # A bare context trusts nobody, so nothing is lost should a redirect lead to https.
            verify=self._tls or ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
            trust_env=False,
            limits=httpx.Limits(max_connections=connections, keepalive_expiry=IDLE_S),
            timeout=httpx.Timeout(ANSWER_S, connect=CONNECT_S, pool=None),
        )

    def close(self) -> None:
        """Close the kept connections."""
        while self._idle:
            self._idle.pop()[1].close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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

    def rebuild(self) -> int:
        """Make the ledger anew from the bucket; answers how many jobs it found."""
        return int(self._call("POST", "/v1/ledger/rebuild", answer_s=REBUILD_S)["jobs"])

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
        with self._answer("POST", "/v1/jobs", body, ANSWER_S, {"wait_s": wait_s}) as response:
            self._document(response.readline())
            accepted()
            return cast("OutcomesView", self._document(response.read()))

    def jobs(
        self, *, limit: int = 100, before: str | None = None, active: bool = False
    ) -> list[JobView]:
        """Newest first; `before` is the id of the last one of the previous page."""
        answer = self._call("GET", "/v1/jobs", limit=limit, before=before, active=active)
        return cast("list[JobView]", answer["jobs"])

    def job(self, job: str, *, version: int | None = None, wait_s: float = 0.0) -> JobView:
        """One job; with `version` as soon as the job's is another, or after `wait_s`."""
        answer = self._call("GET", _of(job), version=version, wait_s=wait_s)
        return cast("JobView", answer)

    def cancel(self, job: str) -> JobView:
        """Returns once no task of the job can start any more."""
        return cast("JobView", self._call("POST", _of(job, "/cancel")))

    def pause(self, job: str) -> JobView:
        """Running tasks end, no further one starts."""
        return cast("JobView", self._call("POST", _of(job, "/pause")))

    def resume(self, job: str) -> JobView:
        """Go on with a paused job."""
        return cast("JobView", self._call("POST", _of(job, "/resume")))

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
        return cast("JobView", self._call("POST", _of(job, "/retry"), body=chosen))

    def eta(self, job: str) -> EtaView:
        """How long it still takes."""
        return cast("EtaView", self._call("GET", _of(job, "/eta")))

    def why(self, job: str) -> str:
        """Why the job is not further than it is, in one line."""
        return str(self._call("GET", _of(job, "/why"))["why"])

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
        path = _of(job, "/outcomes")
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
                _of(job, "/failures"),
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
            answer = self._call("GET", _of(job, "/failures/groups"))
            if answer["is_whole"]:
                return cast("list[FailureGroupView]", answer["groups"])

    def task(self, job: str, stage: str, task: int) -> TaskView:
        """One task that has come to its end, with its input and its log."""
        path = _of(job, f"/stages/{quote(stage, safe='')}/tasks/{task}")
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
            _of(job, "/logs"),
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
            _of(job, "/logs/after"),
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
        return cast("TailsView", self._call("POST", _of(job, "/tails")))

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
        return cast("JobUseView", self._call("GET", _of(job, "/use")))

    def cap_job(self, job: str, max_cost_usd: float | None) -> JobUseView:
        """Cap what a job costs, in USD; None takes the cap away."""
        body = {"max_cost_usd": max_cost_usd}
        return cast("JobUseView", self._call("POST", _of(job, "/cap"), body=body))

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

    # --- One request -----------------------------------------------------------------------------

    def _call(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        answer_s: float = ANSWER_S,
        **query: str | float | None,
    ) -> Any:
        """The answer's JSON. What is None in `query` is left out."""
        with self._answer(method, path, body, answer_s, query) as response:
            return self._document(response.read())

    def _document(self, content: bytes) -> Any:
        try:
            return json.loads(content)
        except ValueError:
            raise _no_manager(self.url, 200) from None

    @contextmanager
    def _answer(
        self,
        method: str,
        path: str,
        body: Any,
        answer_s: float,
        query: Mapping[str, str | float | None],
    ) -> Iterator[HTTPResponse]:
        """The answer, where it is a good one. Read to its end, its connection is used again."""
        given = {key: _text(value) for key, value in query.items() if value is not None}
        target = f"{path}?{urlencode(given)}" if given else path
        data = None if body is None else json.dumps(body).encode()
        headers = self._headers if data is None else {**self._headers, **_JSON}
        connection: HTTPConnection | None = None
        try:
            connection = self._connected()
            connection.sock.settimeout(answer_s + float(given.get("wait_s", 0.0)))
            connection.request(method, target, data, headers)
            response = connection.getresponse()
            if response.status >= BAD:
                raise _error(f"{self.url}{target}", response.status, response.read())
            yield response
            if response.isclosed() and not response.will_close:
                self._idle.append((time.monotonic(), connection))
                connection = None
        except (OSError, HTTPException) as error:
            raise Unreachable(
                f"The manager at {self.url} does not answer: {_told(error)}.",
                remedy="`batchlab grid up` starts one here.",
            ) from error
        finally:
            if connection:
                connection.close()

    def _connected(self) -> HTTPConnection:
        with suppress(IndexError):  # other threads take connections too
            while True:
                used_s, connection = self._idle.pop()
                if time.monotonic() - used_s < IDLE_S:
                    return connection
                connection.close()
        if self._tls:
            connection = HTTPSConnection(self._host, timeout=CONNECT_S, context=self._tls)
        else:
            connection = HTTPConnection(self._host, timeout=CONNECT_S)
        connection.connect()
        return connection


def _trace(given: str) -> str:
    """The trace that this process is called in, "" where there is none, or no such thing."""
    if not given:
        return ""
    from batchlab.tracing import is_context

    return given if is_context(given) else ""


def _submission(job: JobDef, items: Sequence[Json] | None) -> Json:
    from batchlab.protocol import wire

    return {"job": wire.job_to_json(job), "items": items}


def _of(job: str, what: str = "") -> str:
    return f"/v1/jobs/{quote(job, safe='')}{what}"


def _told(error: Exception) -> str:
    return str(error).rstrip(".") or type(error).__name__


def _error(url: str, status: int, content: bytes) -> BatchlabError:
    kind = _ERRORS.get(status, BackendError)
    try:
        problem = json.loads(content)
        return kind(problem["error"], remedy=problem["remedy"])
    except (ValueError, KeyError, TypeError):
        return _no_manager(url, status)


def _no_manager(url: str, status: int) -> BackendError:
    return BackendError(
        f"{url} answered with HTTP {status}, but not as a manager does.",
        remedy="Is another program listening there?",
    )


def _text(value: str | float) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
