"""Quick API, which answers the most frequent requests about jobs without the web framework.

A new grid answers the requests of its first job before the API is loaded, because the import of the web framework takes
nearly as long as the other imports of the manager together. Invariants: the quick API answers only requests with the
bearer token that it understands completely. The API answers all other requests, including each request whose answer is
an error. A request may reach the manager twice, because the API repeats a failed request, so each route of the quick
API is idempotent.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import replace
from functools import partial
from hmac import compare_digest
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from batchlab.core.model import JobId
from batchlab.core.port_retries import set_within
from batchlab.core.protocol import json_format
from batchlab.core.users import GRID_OWNER
from batchlab.server.answers import (
    LEADER_WAIT_S,
    MAX_LISTED,
    MAX_WAIT_S,
    accept,
    changed_view,
    current_view,
    grid_view,
    jobs_page,
    outcomes_page,
)

if TYPE_CHECKING:
    from batchlab.manager.manager import Manager

log = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
Answer = tuple[int, Any]
"""HTTP status, and a document for the body."""

MAX_BODY_BYTES = 1024 * 1024
"""Maximum size of a request that the quick API answers. The jobs of larger requests take longer than the import."""
_HEADERS = frozenset(
    {b"accept", b"accept-encoding", b"authorization", b"connection", b"content-length", b"content-type", b"host"}
)
"""Names of the headers of a usual request. The API checks requests with other headers, such as those of browsers."""
_JSON = b"application/json"
_PREFIX = "/v1/jobs/"


class _NotQuick(Exception):
    """The quick API does not understand a request."""


class QuickApi:
    """ASGI application that answers some requests itself, and passes all other requests to the API.

    `manager` returns the current manager object. The quick API calls `load` once, at the first request that it cannot
    answer or when `start_loading` is called.
    """

    def __init__(
        self, token: str, backend_name: str, manager: Callable[[], Manager], load: Callable[[], Awaitable[App]]
    ) -> None:
        self._expected = f"Bearer {token}".encode()
        self._backend_name = backend_name
        self._manager = manager
        self._load = load
        self._loading: asyncio.Task[App] | None = None

    @property
    def has_begun_loading(self) -> bool:
        return self._loading is not None

    def start_loading(self) -> asyncio.Task[App]:
        """Return the task that loads the API, which is started by the first call."""
        if self._loading is None:
            self._loading = asyncio.ensure_future(self._load())
        return self._loading

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        received: list[Message] = []
        try:
            status, document = await self._answer(scope, receive, received)
            body = json_format.dumps(document).encode()
        except Exception as error:  # noqa: BLE001 - the API also answers and logs unexpected errors
            log.debug("the API answers %s %s: %r", scope.get("method"), scope.get("path"), error)
            app = await asyncio.shield(self.start_loading())
            await app(scope, partial(_replay, received, receive), send)
            return
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _answer(self, scope: Message, receive: Receive, received: list[Message]) -> Answer:
        """Return the answer to a request. The messages that the function receives are added to `received`."""
        headers = dict(scope.get("headers", ()))
        is_authorized = compare_digest(headers.get(b"authorization", b""), self._expected)
        if scope["type"] != "http" or not is_authorized or not headers.keys() <= _HEADERS:
            raise _NotQuick
        if len(headers) < len(scope["headers"]):
            raise _NotQuick  # The API reads the first of several equal headers.
        method, path, query = scope["method"], scope["path"], _query(scope["query_string"])
        if method == "POST" and path == "/v1/jobs" and not query and headers.get(b"content-type") == _JSON:
            return await self._submit(await _body(headers, receive, received))
        if method != "GET":
            raise _NotQuick
        if path == "/v1/grid" and not query:
            return 200, await grid_view(await self._leader(), self._backend_name)
        if path == "/v1/jobs" and query.keys() == {"limit", "active"} and query["active"] in ("true", "false"):
            active, limit = query["active"] == "true", _limit(query["limit"])
            return 200, await jobs_page(await self._leader(), limit, None, active=active)
        job, slash, kind = path.removeprefix(_PREFIX).partition("/")
        if not path.startswith(_PREFIX) or not job or bool(slash) != bool(kind) or b"%" in scope["raw_path"]:
            raise _NotQuick
        wait_s = float(query.pop("wait_s", 0.0))
        if not 0.0 <= wait_s <= MAX_WAIT_S:
            raise _NotQuick
        if kind == "" and query.keys() <= {"version"}:
            version = int(query["version"]) if "version" in query else None
            return 200, await changed_view(await self._leader(), JobId(job), version, wait_s)
        if kind == "outcomes" and query.keys() <= {"after", "limit"}:
            after = int(query["after"]) if "after" in query else None
            limit = _limit(query.get("limit", str(MAX_LISTED)))
            return 200, await outcomes_page(await self._leader(), JobId(job), None, after, limit, wait_s)
        raise _NotQuick

    async def _submit(self, body: bytes) -> Answer:
        request = json.loads(body)
        if not isinstance(request, dict) or not {"job"} <= request.keys() <= {"job", "items"}:
            raise _NotQuick
        job = json_format.job_from_json(json_format.loads(json_format.dumps(request["job"])))
        items = request.get("items")
        if not (items is None or isinstance(items, list)):
            raise _NotQuick
        manager = await self._leader()
        # Only the header `traceparent` sets the trace of a job, and the API answers requests with this header.
        written = await accept(manager, replace(job, trace=""), items, GRID_OWNER)
        return (201 if written.is_new else 200), await current_view(manager, written.rows.id)

    async def _leader(self) -> Manager:
        manager = self._manager()
        if not await set_within(manager.is_leader, LEADER_WAIT_S):
            raise _NotQuick
        return manager


def _query(text: bytes) -> dict[str, str]:
    query = dict(parse_qsl(text.decode(), keep_blank_values=True))
    if not all(map(str.isascii, query.values())):
        raise _NotQuick  # Python reads numbers in the digits of every language, but the API does not.
    return query


def _limit(text: str) -> int:
    limit = int(text)
    if not 1 <= limit <= MAX_LISTED:
        raise _NotQuick
    return limit


async def _body(headers: MutableMapping[bytes, bytes], receive: Receive, received: list[Message]) -> bytes:
    if int(headers.get(b"content-length", MAX_BODY_BYTES + 1)) > MAX_BODY_BYTES:
        raise _NotQuick
    while not received or received[-1].get("more_body", False):
        message = await receive()
        received.append(message)
        if message["type"] != "http.request":
            raise _NotQuick
    return b"".join(message.get("body", b"") for message in received)


async def _replay(received: list[Message], receive: Receive) -> Message:
    """Return the messages of a request again that the quick API has received before, and then further messages."""
    return received.pop(0) if received else await receive()
