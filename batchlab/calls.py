"""One request to the manager, over connections that are kept.

Invariant: cheap to import and to make, since every command pays for it; every failure is one of
batchlab's own errors.
"""

from __future__ import annotations

import json
import os
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException, HTTPResponse
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlencode, urlsplit

from batchlab.errors import BackendError, BatchlabError, NotFound, Refused, Unreachable, UsageError
from batchlab.keepalive import Connections

if TYPE_CHECKING:
    import httpx

CONNECT_S = 5.0
ANSWER_S = 60.0
"""Beyond what a long poll waits by itself."""
IDLE_S = 2.0
"""A kept connection idle for longer is not used again: the server closes it after 5 s, and a
request that meets that moment fails."""

PATIENCE_S = 20.0
"""How long a manager that runs may fail to answer, or to lead, before somebody hears of it."""
RESTARTED_S = 60.0
"""The same where Docker starts it again, on a busy machine."""

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


def patience_s(*, restarted: bool = False) -> float:
    """How long a manager may fail to answer; `restarted` where Docker starts it again."""
    return RESTARTED_S if restarted else PATIENCE_S


class Calls:
    """Connections to one manager, usable from several threads; a context manager."""

    def __init__(self, url: str, token: str) -> None:
        self.url = url
        parts = urlsplit(url)
        # Reading the system's certificates takes longer than all else here together.
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._headers = {"Authorization": f"Bearer {token}"}
        if above := _trace(os.environ.get(TRACE_VARIABLE, "")):
            self._headers["traceparent"] = above
        self._connections = Connections(parts.netloc, self._tls, connect_s=CONNECT_S, idle_s=IDLE_S)

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
        self._connections.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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
            connection = self._connections.take()
            connection.sock.settimeout(answer_s + float(given.get("wait_s", 0.0)))
            connection.request(method, target, data, headers)
            # Closed here: its finalizer would do that too, and lose an interrupt that comes then.
            with connection.getresponse() as response:
                if response.status >= BAD:
                    raise _error(f"{self.url}{target}", response.status, response.read())
                yield response
                is_read = response.isclosed()
            if is_read and not response.will_close:
                self._connections.give_back(connection)
                connection = None
        except (OSError, HTTPException) as error:
            raise Unreachable(
                f"The manager at {self.url} does not answer: {_told(error)}.",
                remedy="`batchlab grid up` starts one here.",
            ) from error
        finally:
            if connection:
                connection.close()


def _trace(given: str) -> str:
    """The trace that this process is called in, "" where there is none, or no such thing."""
    if not given:
        return ""
    from batchlab.tracing import is_context

    return given if is_context(given) else ""


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
