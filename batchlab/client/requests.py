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
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlencode, urlsplit

from batchlab.core import request_signatures
from batchlab.core.errors import (
    BackendError,
    BatchlabError,
    NotFound,
    Refused,
    Unreachable,
    UsageError,
)
from batchlab.core.http_connections import Connections
from batchlab.core.request_signatures import PROOF, Expected, Signed, Unproven

if TYPE_CHECKING:
    import httpx

    from batchlab.runtime.home import Home, ManagerRecord

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
    """Connections to one manager, usable from several threads; a context manager.

    Only a Unix socket gets the token, since nobody but its user can open it. A program may hold the
    manager's port in the manager's absence, so a request to a port is signed with the token, and
    its answer must be signed as well.
    """

    def __init__(self, url: str, token: str, unix: Path | None = None) -> None:
        """`unix` is the manager's Unix socket, which is used in place of the port in `url`."""
        self.url = url
        self._token = token
        self._unix = str(unix or "")
        parts = urlsplit(url)
        # Reading the system's certificates takes longer than all else here together.
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._headers = {"Authorization": f"Bearer {token}"} if unix else {}
        if above := _trace(os.environ.get(TRACE_VARIABLE, "")):
            self._headers["traceparent"] = above
        self._connections = Connections(
            parts.netloc, self._tls, connect_s=CONNECT_S, idle_s=IDLE_S, unix=self._unix
        )

    @classmethod
    def of(cls, home: Home, record: ManagerRecord) -> Self:
        """Return a client of the manager that runs in `home`."""
        return cls(record.url, home.token(), home.socket(record))

    def for_loop(self, connections: int) -> httpx.AsyncClient:
        """A client of the same manager for an event loop, which closes it; its requests wait for
        one of so many connections."""
        import httpx

        from batchlab.client.signed_http import Signing

        limits = httpx.Limits(max_connections=connections, keepalive_expiry=IDLE_S)
        # A bare context trusts nobody, so nothing is lost should a redirect lead to https.
        tls = self._tls or ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        return httpx.AsyncClient(
            base_url=self.url,
            headers=self._headers,
            auth=None if self._unix else Signing(self._token),
            transport=httpx.AsyncHTTPTransport(verify=tls, limits=limits, uds=self._unix or None),
            timeout=httpx.Timeout(ANSWER_S, connect=CONNECT_S, pool=None),
        )

    def close(self) -> None:
        """Close the kept connections."""
        self._connections.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get(self, path: str, *, answer_s: float) -> Any:
        """Return the JSON that is at a path of the API, for a caller with little time."""
        return self._call("GET", path, answer_s=answer_s)

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
        with self._answer(method, path, body, answer_s, query) as answer:
            return self._document(answer.read())

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
    ) -> Iterator[_Answer]:
        """The answer, where it is a good one. Read to its end, its connection is used again."""
        given = {key: _text(value) for key, value in query.items() if value is not None}
        target = f"{path}?{urlencode(given)}" if given else path
        data = None if body is None else json.dumps(body).encode()
        headers = self._headers if data is None else {**self._headers, **_JSON}
        connection: HTTPConnection | None = None
        try:
            connection = self._connections.take()
            connection.sock.settimeout(answer_s + float(given.get("wait_s", 0.0)))
            signed = None
            if not self._unix:
                signed = request_signatures.sign(self._token, method, target, data or b"")
                headers = {**headers, "Authorization": signed.header}
            connection.request(method, target, data, headers)
            # Closed here: its finalizer would do that too, and lose an interrupt that comes then.
            with connection.getresponse() as response:
                answer = _Answer(self._token, signed, response)
                if response.status >= BAD:
                    raise _error(f"{self.url}{target}", response.status, answer.read())
                yield answer
                is_read = response.isclosed()
            if is_read and not response.will_close:
                self._connections.give_back(connection)
                connection = None
        except (OSError, HTTPException) as error:
            raise Unreachable(
                f"The manager at {self.url} does not answer: {_told(error)}.",
                remedy="`batchlab grid up` starts one here.",
            ) from error
        except Unproven as error:
            raise Unreachable(
                f"The program at {self.url} does not prove that it is this grid's manager.",
                remedy="Another program listens there, the manager has another token, or its "
                "release is 0.1.0. Nothing that it sent was used, and the token was not sent.",
            ) from error
        finally:
            if connection:
                connection.close()


class _Answer:
    """The body of an answer, which must be signed if its request was. Raises Unproven."""

    def __init__(self, token: str, signed: Signed | None, response: HTTPResponse) -> None:
        self._response = response
        self._line = b""
        self._expected = (
            Expected(token, signed, response.status, response.headers.get(PROOF))
            if signed
            else None
        )

    def line(self) -> bytes:
        """Return the first line as soon as it is there. Its signature is checked by `read`."""
        self._line = self._response.readline()
        return self._line

    def read(self) -> bytes:
        """Return the rest of the body."""
        rest = self._response.read()
        if self._expected is None:
            return rest
        return self._expected.checked(self._line + rest)[len(self._line) :]


def _trace(given: str) -> str:
    """The trace that this process is called in, "" where there is none, or no such thing."""
    if not given:
        return ""
    from batchlab.core.tracing import is_context

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
