"""Single HTTP requests to the manager of a grid, over persistent connections.

Invariant: the import of the module and the creation of its objects are fast, because most commands use the module. A
failed request raises an exception of a class in `batchlab.core.errors`.
"""

from __future__ import annotations

import json
import logging
import os
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlencode, urlsplit

from batchlab.core import http_connections
from batchlab.core.errors import BackendError, BatchlabError, NotFound, Refused, Unreachable, UsageError
from batchlab.core.http_connections import PROOF, Connections, Expected, Signed, Unproven

if TYPE_CHECKING:
    import httpx

    from batchlab.runtime.home import Home, ManagerRecord

CONNECT_S = 5.0
ANSWER_S = 60.0
"""Timeout in seconds of an answer. For a long poll, the requested wait is added to the timeout."""
IDLE_S = 2.0
"""Idle time in seconds after which a persistent connection is not reused.

The server closes an idle connection after 5 s, and a request during the close of its connection would fail.
"""

PATIENCE_S = 20.0
"""Time in seconds for which a client retries a request while a running manager does not answer or does not lead."""
RESTARTED_S = 60.0
"""Time in seconds for which a client retries a request while Docker restarts the manager, even on a busy machine."""

TRACE_VARIABLE = "TRACEPARENT"
"""Environment variable with the W3C trace context of the program that called the command."""
MIN_ERROR_STATUS = 300
"""Lowest HTTP status that counts as an error. A redirect is an error, because the manager does not send redirects."""

_JSON = {"Content-Type": "application/json"}
_ERRORS: dict[int, type[BatchlabError]] = {
    401: Refused,
    403: Refused,
    404: NotFound,
    409: Refused,
    422: UsageError,
    503: BackendError,
}


class _PollFilter(logging.Filter):
    """Filter that removes the log lines of httpx for the requests to managers. Other lines of httpx remain."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        url = str(record.args[1]) if isinstance(record.args, tuple) and len(record.args) > 1 else ""
        return not url.startswith(tuple(self.urls))


_POLLS = _PollFilter()


def patience_s(*, restarted: bool = False) -> float:
    """Return the time in seconds for which a client retries failed requests.

    `restarted` is True if Docker restarts the manager.
    """
    return RESTARTED_S if restarted else PATIENCE_S


@dataclass(frozen=True, slots=True)
class Form:
    """Encoded form with files. `kind` is the content type of the form."""

    content: bytes
    kind: str


class Calls:
    """Connections to one manager.

    A Calls object is thread-safe, and is a context manager. The token itself is sent only over a Unix socket,
    which only the user can open. Another program may listen on the manager's port while the manager is down. A request
    to a port is therefore signed with the token, and the answer must also be signed. The token is the grid's token or
    the token of a user.
    """

    def __init__(self, url: str, token: str, unix: Path | None = None) -> None:
        """`unix` is the manager's Unix socket, which replaces the port in `url`."""
        self.url = url
        self._token = token
        self._unix = str(unix or "")
        parts = urlsplit(url)
        # The system's certificates are read only for HTTPS, because the read takes longer than the rest of the
        # constructor.
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._headers = {"Authorization": f"Bearer {token}"} if unix else {}
        if parent := _trace(os.environ.get(TRACE_VARIABLE, "")):
            self._headers["traceparent"] = parent
        self._connections = Connections(parts.netloc, self._tls, connect_s=CONNECT_S, idle_s=IDLE_S, unix=self._unix)

    @classmethod
    def of(cls, home: Home, record: ManagerRecord) -> Self:
        """Return a client of the manager that `record` describes, with the token in `home`."""
        return cls(record.url, home.token(), home.socket(record))

    def for_loop(self, connections: int) -> httpx.AsyncClient:
        """Return an httpx client of the same manager for an event loop, with `connections` connections.

        The caller must close the httpx client.
        """
        import httpx

        from batchlab.client.signed_http import Signing

        # httpx logs each request at the level INFO, and a program that logs its own steps at INFO polls all the time.
        _POLLS.urls.add(self.url)
        logging.getLogger("httpx").addFilter(_POLLS)
        limits = httpx.Limits(max_connections=connections, keepalive_expiry=IDLE_S)
        # For HTTP, the TLS context does not trust any certificate, so a redirect to HTTPS fails safely.
        tls = self._tls or ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        return httpx.AsyncClient(
            base_url=self.url,
            headers=self._headers,
            auth=None if self._unix else Signing(self._token),
            transport=httpx.AsyncHTTPTransport(verify=tls, limits=limits, uds=self._unix or None),
            timeout=httpx.Timeout(ANSWER_S, connect=CONNECT_S, pool=None),
        )

    def close(self) -> None:
        """Close the persistent connections."""
        self._connections.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get(self, path: str, *, answer_s: float) -> Any:
        """Send a GET request for a path of the API, and return the JSON of the answer. `answer_s` is the timeout in
        seconds.
        """
        return self._call("GET", path, answer_s=answer_s)

    def _call(
        self, method: str, path: str, *, body: Any = None, answer_s: float = ANSWER_S, **query: str | float | None
    ) -> Any:
        """Send a request, and return the JSON of the answer. Query parameters with the value None are left out."""
        with self._answer(method, path, body, answer_s, query) as answer:
            return self._document(answer.read())

    def _document(self, content: bytes) -> Any:
        try:
            return json.loads(content)
        except ValueError:
            raise _no_manager(self.url, 200) from None

    @contextmanager
    def _answer(
        self, method: str, path: str, body: Any, answer_s: float, query: Mapping[str, str | float | None]
    ) -> Iterator[_Answer]:
        """Send a request, and yield the successful answer. If the caller reads the whole answer, a later request reuses
        the connection.
        """
        values = {
            key: str(value).lower() if isinstance(value, bool) else str(value)
            for key, value in query.items()
            if value is not None
        }
        target = f"{path}?{urlencode(values)}" if values else path
        data: bytes | None
        if isinstance(body, Form):
            data, headers = body.content, {**self._headers, "Content-Type": body.kind}
        else:
            data = None if body is None else json.dumps(body).encode()
            headers = self._headers if data is None else {**self._headers, **_JSON}
        connection: HTTPConnection | None = None
        try:
            connection = self._connections.take()
            connection.sock.settimeout(answer_s + float(values.get("wait_s", 0.0)))
            signed = None
            if not self._unix:
                signed = http_connections.sign(self._token, method, target, data or b"")
                headers = {**headers, "Authorization": signed.header}
            connection.request(method, target, data, headers)
            # The `with` block closes the response, because Python would drop an interrupt in the response's finalizer.
            with connection.getresponse() as response:
                answer = _Answer(self._token, signed, response)
                if response.status >= MIN_ERROR_STATUS:
                    raise error_of(f"{self.url}{target}", response.status, answer.read())
                yield answer
                is_read = response.isclosed()
            if is_read and not response.will_close:
                self._connections.give_back(connection)
                connection = None
        except (OSError, HTTPException) as error:
            raise Unreachable(
                f"The manager at {self.url} does not answer: {str(error).rstrip('.') or type(error).__name__}.",
                remedy="`batchlab grid up` on the machine of the grid starts a manager.",
            ) from error
        except Unproven as error:
            raise Unreachable(
                f"The program at {self.url} does not prove that it is this grid's manager.",
                remedy="Another program may listen there, the manager may have another token, or its release may be "
                "0.1.0. The answer was not used, and the token was not sent.",
            ) from error
        finally:
            if connection:
                connection.close()


class _Answer:
    """Body of an HTTP answer of the manager.

    If the answer to a signed request is not signed correctly, `read` raises Unproven.
    """

    def __init__(self, token: str, signed: Signed | None, response: HTTPResponse) -> None:
        self._response = response
        self._line = b""
        self._expected = Expected(token, signed, response.status, response.headers.get(PROOF)) if signed else None

    def line(self) -> bytes:
        """Return the first line of the body as soon as the line arrives.

        The signature of the line is checked by a later call of `read`.
        """
        self._line = self._response.readline()
        return self._line

    def read(self) -> bytes:
        """Return the body of the answer after the lines that `line` has returned."""
        rest = self._response.read()
        if self._expected is None:
            return rest
        return self._expected.check_answer(self._line + rest)[len(self._line) :]


def _trace(context: str) -> str:
    """Return `context` if `context` is a valid W3C trace context, and otherwise ""."""
    if not context:
        return ""
    from batchlab.core.tracing import is_context

    return context if is_context(context) else ""


def error_of(url: str, status: int, content: bytes) -> BatchlabError:
    """Return the error that an answer with an error status describes."""
    kind = _ERRORS.get(status, BackendError)
    try:
        problem = json.loads(content)
        return kind(problem["error"], remedy=problem["remedy"])
    except (ValueError, KeyError, TypeError):
        return _no_manager(url, status)


def _no_manager(url: str, status: int) -> BackendError:
    return BackendError(
        f"The answer of {url} (HTTP {status}) does not come from a manager.",
        remedy="Check whether another program listens there.",
    )
