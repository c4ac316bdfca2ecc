"""Web page of the manager: HTML for people, rendered from the same data as /v1.

Invariant: business rules are not a part of the page. A view shows the answers of endpoints of /v1,
and an action is one request of /v1. The page shows only data that the API also returns.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse, RedirectResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from batchlab.core import installation
from batchlab.core.errors import BatchlabError
from batchlab.core.pricing.price_book import PriceBook
from batchlab.server.http.authentication import PAGE
from batchlab.server.http.common import ServerState
from batchlab.server.web.security import Guard


def mount(app: FastAPI, served: ServerState, *, prices: PriceBook | None = None) -> None:
    """Serve the page below PAGE of `app`. Without `prices`, the page shows no costs. Without the
    extra `web`, it shows only that the extra is missing."""

    async def to_page() -> RedirectResponse:
        return RedirectResponse(f"{PAGE}/", 303)

    app.add_api_route("/", to_page, include_in_schema=False)
    page = _IfThere(_Later(partial(page_of, served, prices)))
    # The Guard is not a middleware, because the application answers an unhandled error outside of
    # its middlewares.
    app.mount(PAGE, Guard(page, served.sessions, served.hosts))


def page_of(served: ServerState, prices: PriceBook | None) -> FastAPI:
    """Return the application that the Guard protects."""
    from batchlab.server.web import actions, views
    from batchlab.server.web.rendering import Assets, PageState, problem_page

    page = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    page.state.served = served
    page.state.page = PageState(prices)
    for kind in (BatchlabError, RequestValidationError, HTTPException, Exception):
        page.add_exception_handler(kind, problem_page)
    for router in (views.login_router, views.router, actions.router):
        page.include_router(router)
    page.mount("/static", Assets())
    return page


class _IfThere:
    """Serves the page if the extra `web` is installed, even if it was installed after the grid's
    start."""

    def __init__(self, page: ASGIApp) -> None:
        self._page = page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        page = self._page
        if module := installation.missing("web"):
            said = installation.sentence("web", "The grid's page", module)
            page = PlainTextResponse(f"{said} {installation.for_a_manager('web')}\n", 501)
        await page(scope, receive, send)


class _Later:
    """Application that is created by its first request, so that a grid starts faster."""

    def __init__(self, make: Callable[[], ASGIApp]) -> None:
        self._make = make
        self._made: ASGIApp | None = None
        self._making = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._making:
            if self._made is None:
                self._made = await asyncio.to_thread(self._make)
            made = self._made
        await made(scope, receive, send)
