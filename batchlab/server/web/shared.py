"""Shared parts of the page's routes: its state, its forms, and the cached view of the grid.

Invariant: a form is used only after its token was checked. The fleet and the queues are queried at
most once in FRESH_S, regardless of the number of browsers.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Annotated, cast

from fastapi import APIRouter, Depends, Request
from fastapi.responses import RedirectResponse, Response
from starlette.datastructures import FormData, UploadFile

from batchlab.core import api_types
from batchlab.core.errors import Refused
from batchlab.core.pricing.price_book import PriceBook
from batchlab.manager.manager import Manager
from batchlab.server.http import grid as api
from batchlab.server.http.authentication import SAFE
from batchlab.server.http.common import Given, Served
from batchlab.server.http.job_files import MOST_BYTES, check_length, read
from batchlab.server.web.security import SESSION

FRESH_S = 1.0
MOST_FORM_BYTES = 1024 * 1024
TOKEN = "form_token"  # noqa: S105 - a field's name


@dataclass(slots=True)
class State:
    """State that the page keeps between requests."""

    prices: PriceBook | None
    _grid: tuple[float, api_types.GridView] | None = None
    _asking: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def grid(self, manager: Manager, served: Served) -> api_types.GridView:
        """Return the pools, instances, and queues. The view is at most FRESH_S old."""
        async with self._asking:
            now_s = manager.ports.clock.monotonic_s()
            if self._grid is None or now_s - self._grid[0] > FRESH_S:
                self._grid = (now_s, await api.grid(manager, served))
            return self._grid[1]


async def _state(request: Request) -> State:
    return cast(State, request.app.state.page)


Page = Annotated[State, Depends(_state)]


async def form_of(request: Request) -> FormData:
    """Return the request's form. It is read only once."""
    kind = request.headers.get("content-type", "")
    is_upload = request.url.path.endswith("/submit") and kind.startswith("multipart/")
    size_bytes = check_length(
        request.headers.get("content-length"), MOST_BYTES if is_upload else MOST_FORM_BYTES
    )
    if not is_upload:
        return await request.form(max_files=0, max_fields=10_000)
    if not hasattr(request.state, "form"):
        request.state.form = await read(request, size_bytes)
    return cast(FormData, request.state.form)


async def _comes_from_a_form(request: Request, served: Given) -> None:
    if request.method in SAFE:
        return
    session = request.scope[SESSION]
    given = (await form_of(request)).get(TOKEN)
    if session is None or not isinstance(given, str):
        raise Refused("The form has no token.", remedy="Open the page again.")
    if not served.sessions.has_sent(session, given):
        raise Refused("The form is of another login.", remedy="Open the page again.")


def guarded() -> APIRouter:
    """Return a router whose forms must contain the token of their session."""
    return APIRouter(dependencies=[Depends(_comes_from_a_form)])


def to(request: Request, path: str) -> Response:
    """Redirect to a path of the page in the same session."""
    return RedirectResponse(f"{request.scope['root_path']}{path}", 303)


def field_of(form: FormData, name: str) -> str:
    """Return the value of a text field, or "" if it is missing."""
    value = form.get(name)
    return "" if value is None or isinstance(value, UploadFile) else value.strip()


def is_sure(form: FormData) -> bool:
    """Return whether the form contains the user's confirmation."""
    return field_of(form, "sure") == "yes"
