"""The manager's HTTP API as Python calls, for the command line and the Python API.

Invariant: cheap to import and to make, since every command pays for it; every failure is one of
batchlab's own errors.
"""

from __future__ import annotations

import ssl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any, Self, cast
from urllib.parse import quote

from batchlab.errors import BackendError, BatchlabError, NotFound, Refused, Unreachable, UsageError

if TYPE_CHECKING:
    import httpx

    from batchlab.jobdef import JobDef
    from batchlab.views import (
        ActivityView,
        FailureView,
        GridView,
        HealthView,
        JobView,
        LogView,
        OutcomesView,
        PoolView,
    )

CONNECT_S = 5.0
ANSWER_S = 60.0
"""Beyond what a long poll waits by itself."""
REBUILD_S = 3600.0
IDLE_S = 2.0
"""A pooled connection idle for longer is not used again: the server closes it after 5 s, and a
request that meets that moment fails."""

_ERRORS: dict[int, type[BatchlabError]] = {
    401: Refused,
    404: NotFound,
    409: Refused,
    422: UsageError,
    503: BackendError,
}


class Client:
    """A connection pool to one manager, usable from several threads; a context manager.

    Every method raises Unreachable where the manager does not answer, NotFound for an unknown id,
    Refused where the manager declines, UsageError where the request is wrong, and BackendError
    where the manager cannot do its work at the moment. Times are seconds.
    """

    def __init__(self, url: str, token: str) -> None:
        with _without_its_command_line():
            import httpx
        secure = url.startswith("https:")
        self.url = url
        self._settings: dict[str, Any] = {
            "base_url": url,
            "headers": {"Authorization": f"Bearer {token}"},
            # Reading the system's certificates takes longer than all else here together. A bare
            # context trusts nobody, so nothing is lost should a redirect ever lead to https.
            "verify": secure or ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
            # A proxy from the environment cannot reach this machine's own address.
            "trust_env": secure,
        }
        self._http = httpx.Client(**self._settings, limits=httpx.Limits(keepalive_expiry=IDLE_S))

    def for_loop(self, connections: int) -> httpx.AsyncClient:
        """A client of the same manager for an event loop, which closes it; its requests wait for
        one of so many connections."""
        import httpx

        limits = httpx.Limits(max_connections=connections, keepalive_expiry=IDLE_S)
        timeout = httpx.Timeout(ANSWER_S, connect=CONNECT_S, pool=None)
        return httpx.AsyncClient(**self._settings, limits=limits, timeout=timeout)

    def close(self) -> None:
        """Close the pooled connections."""
        self._http.close()

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

    def rebuild(self) -> int:
        """Make the ledger anew from the bucket; answers how many jobs it found."""
        return int(self._call("POST", "/v1/ledger/rebuild", answer_s=REBUILD_S)["jobs"])

    # --- Jobs ------------------------------------------------------------------------------------

    def submit(self, job: JobDef) -> JobView:
        """Submit a job; again with the same client token answers with the job that is known."""
        from batchlab.protocol import wire

        return cast("JobView", self._call("POST", "/v1/jobs", body=wire.job_to_json(job)))

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

    def retry(self, job: str) -> JobView:
        """Run again what did not succeed."""
        return cast("JobView", self._call("POST", _of(job, "/retry")))

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

    def failures(self, job: str, *, limit: int = 100) -> list[FailureView]:
        """Tasks that failed for good."""
        answer = self._call("GET", _of(job, "/failures"), limit=limit)
        return cast("list[FailureView]", answer["failures"])

    def logs(
        self, job: str, *, stage: str | None = None, task: int | None = None, limit: int = 100
    ) -> list[LogView]:
        """What tasks printed, by stage, task and attempt."""
        answer = self._call("GET", _of(job, "/logs"), stage=stage, task=task, limit=limit)
        return cast("list[LogView]", answer["logs"])

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
        import httpx

        wait_s = float(query.get("wait_s") or 0.0)
        try:
            response = self._http.request(
                method,
                path,
                json=body,
                params={key: value for key, value in query.items() if value is not None},
                timeout=httpx.Timeout(answer_s + wait_s, connect=CONNECT_S),
            )
        except httpx.TransportError as error:
            raise Unreachable(
                f"The manager at {self.url} does not answer: {_told(error)}.",
                remedy="`batchlab grid up` starts one here.",
            ) from error
        if response.is_success:
            return response.json()
        raise _error(response)


def _of(job: str, what: str = "") -> str:
    return f"/v1/jobs/{quote(job, safe='')}{what}"


def _told(error: Exception) -> str:
    return str(error).rstrip(".") or type(error).__name__


def _error(response: httpx.Response) -> BatchlabError:
    kind = _ERRORS.get(response.status_code, BackendError)
    try:
        problem = response.json()
        return kind(problem["error"], remedy=problem["remedy"])
    except (ValueError, KeyError, TypeError):
        return BackendError(
            f"{response.url} answered with HTTP {response.status_code}, but not as a manager does.",
            remedy="Is another program listening there?",
        )


@contextmanager
def _without_its_command_line() -> Iterator[None]:
    """Import httpx without its own command line, which needs click and rich: more than half of
    the time that importing httpx takes, and for nothing. Where they are missing httpx does
    without, and a None in sys.modules is how Python says so."""
    modules = cast("dict[str, ModuleType | None]", sys.modules)
    before = modules.setdefault("httpx._main", None)
    try:
        yield
    finally:
        if before is None:
            modules.pop("httpx._main", None)
