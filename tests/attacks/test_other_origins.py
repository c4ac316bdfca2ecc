"""Pages of other origins cannot call the API or read its answers."""

from __future__ import annotations

import re
from collections.abc import Iterator

import httpx
import pytest

from tests.support.grid.local_grid import LocalGrid

pytestmark = pytest.mark.slow

FOREIGN = (
    {"Origin": "http://evil.example"},
    {"Origin": "http://127.0.0.1:1"},
    {"Origin": "null"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},  # a page of another port on the same host
    {"Sec-Fetch-Site": "cross-site", "Origin": "http://evil.example"},
)


@pytest.fixture(scope="module")
def http(grid: LocalGrid) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=grid.client.url, trust_env=False) as made:
        yield made


@pytest.fixture(scope="module")
def asked(grid: LocalGrid, http: httpx.Client) -> list[tuple[str, str]]:
    """Return every route of the API with its method."""
    described = http.get("/openapi.json").json()["paths"]
    found = [
        (method.upper(), re.sub(r"\{task\}", "0", path).replace("{", "").replace("}", ""))
        for path, methods in described.items()
        for method in methods
    ]
    assert len(found) >= 30
    return [*found, ("GET", "/metrics"), ("GET", "/openapi.json"), ("GET", "/v1/nothing")]


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_page_of_another_origin_gets_no_data(
    grid: LocalGrid, http: httpx.Client, asked: list[tuple[str, str]], headers: dict[str, str]
) -> None:
    """The test sends requests with and without the token, and also to public routes."""
    token = {"Authorization": f"Bearer {grid.home.token()}"}
    for method, path in asked:
        for more in ({}, token):
            answer = http.request(method, path, headers={**headers, **more})
            assert answer.status_code == 403, (method, path)
            assert answer.text == "A page of another origin sent the request.\n"
    assert grid.client.health()["leader"]


def test_no_answer_permits_another_origin(grid: LocalGrid, http: httpx.Client, asked: list[tuple[str, str]]) -> None:
    """A browser sends an OPTIONS request before it sends a request with a custom header."""
    preflight = {
        "Origin": "http://evil.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    for path in {path for _, path in asked} | {"/", "/ui/", "/ui/login", "/ui/static/page.css"}:
        for method, headers in (("OPTIONS", preflight), ("GET", {"Host": "localhost"})):
            answer = http.request(method, path, headers=headers)
            assert not [header for header in answer.headers if header.startswith("access-control-")], path
            assert method == "GET" or answer.status_code >= 400


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil", ""])
def test_a_name_that_leads_here_gets_nothing_without_the_token(
    grid: LocalGrid, http: httpx.Client, asked: list[tuple[str, str]], host: str
) -> None:
    """A browser treats such a name as the same origin (DNS rebinding)."""
    for method, path in asked:
        for headers in ({}, {"Authorization": "Bearer guess"}):
            answer = http.request(method, path, headers={"Host": host, **headers})
            assert answer.status_code == 421, (method, path)
    # A proxy or Prometheus may use any host name, because a web page does not have the token.
    token = {"Authorization": f"Bearer {grid.home.token()}", "Host": "manager.internal"}
    assert http.get("/v1/jobs", headers=token).status_code == 200


def test_a_page_of_the_same_origin_may_use_the_api(grid: LocalGrid, http: httpx.Client) -> None:
    """The checks refuse other pages, but not a page of the manager's own origin."""
    ours = {"Sec-Fetch-Site": "same-origin", "Origin": grid.client.url}
    assert http.get("/v1/health", headers=ours).status_code == 200
    assert http.get("/v1/health", headers={"Sec-Fetch-Site": "none"}).status_code == 200
