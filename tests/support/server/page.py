"""The web page over HTTP, for visitors with and without a session. Jobs fail with hostile messages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from starlette.routing import Mount, Route

from batchlab.core.model import Failure, FailureKind
from batchlab.server import web
from batchlab.server.http.authentication import PAGE
from tests.support.server.api import TOKEN, Rig

OURS = {"Sec-Fetch-Site": "same-origin"}
NASTY = "<script>alert(1)</script>'\"><img src=x onerror=alert(2)>`{{7919*6841}}"


def nasty(task: int) -> Failure:
    return Failure(task, FailureKind.EXCEPTION, NASTY, NASTY, f'File "{NASTY}", line 1, in x')


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with Rig(failure=nasty) as made:
        yield made


class Visitor:
    """A simulated browser that keeps its cookies and sends the origin of each request."""

    def __init__(self, rig: Rig) -> None:
        self.http = httpx.Client(base_url=rig.url, trust_env=False, verify=False)
        self.rig = rig
        self.root = PAGE
        """The path prefix of the page, which includes the session id after a login."""

    def log_in(self, word: str = TOKEN) -> httpx.Response:
        answer = self.http.post("/ui/login", data={"word": word}, headers=OURS)
        self.root = answer.headers.get("location", f"{PAGE}/").removesuffix("/")
        return answer

    def get(self, path: str, **headers: str) -> httpx.Response:
        return self.http.get(f"{self.root}{path}", headers=headers)

    def token(self) -> str:
        found = re.search(r'name="form_token" value="([^"]+)"', self.get("/").text)
        assert found
        return found[1]

    def post(self, path: str, **data: Any) -> httpx.Response:
        return self.http.post(f"{self.root}{path}", data={"form_token": self.token(), **data}, headers=OURS)


@pytest.fixture
def stranger(rig: Rig) -> Iterator[Visitor]:
    made = Visitor(rig)
    with made.http:
        yield made


@pytest.fixture
def other(rig: Rig) -> Iterator[Visitor]:
    made = Visitor(rig)
    with made.http:
        yield made


@pytest.fixture
def visitor(rig: Rig) -> Iterator[Visitor]:
    made = Visitor(rig)
    with made.http:
        assert made.log_in().status_code == 303
        yield made


def route_templates(app: Any, mount: str) -> list[tuple[str, str]]:
    """Return the method and the path template of each route. The path of the only mounted application is `mount`."""
    found: list[tuple[str, str]] = []

    def walk(some: Any) -> None:
        for route in some:
            if router := getattr(route, "original_router", None):
                walk(router.routes)
            elif isinstance(route, Route):
                found.extend((method, route.path) for method in route.methods or ())
            else:
                assert isinstance(route, Mount)
                assert route.path == mount, "a part of the manager that this function does not know"

    walk(app.routes)
    return found


def page_templates(rig: Rig) -> list[tuple[str, str]]:
    return route_templates(web.page_of(rig.served), "/static")


def with_values(path: str) -> str:
    """Return the path of a route with values for its parameters."""
    return re.sub(r"\{(\w+)\}", lambda m: "0" if m[1] == "task" else "x", path)


def routes(rig: Rig) -> list[tuple[str, str]]:
    """Return every route of the page with its method, and with values for the names in the path."""
    return [(method, with_values(path)) for method, path in page_templates(rig)]
