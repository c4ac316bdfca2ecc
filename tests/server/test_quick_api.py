"""The quick API, which answers without the web framework, compared with the API itself."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest

from batchlab.core.protocol import json_format
from batchlab.runtime import factory
from batchlab.runtime.home import Home
from batchlab.server import manager_service, quick_api
from batchlab.server.http import common
from batchlab.server.quick_api import App, QuickApi
from tests.support.server.api import TOKEN, Rig, job

BEARER = {"Authorization": f"Bearer {TOKEN}"}
Request = tuple[str, str, Any]


class Loader:
    """Loader of a rig's API that counts its calls and waits until the test allows the API to load."""

    def __init__(self, rig: Rig, *, allowed: bool = True) -> None:
        self.calls = 0
        self.allowed = asyncio.Event()
        self._rig = rig
        if allowed:
            self.allowed.set()

    async def __call__(self) -> App:
        self.calls += 1
        await self.allowed.wait()
        return cast(App, self._rig.app)

    def quick(self) -> QuickApi:
        return QuickApi(TOKEN, "memory", lambda: self._rig.manager, self)


def run(rig: Rig, work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run_coroutine_threadsafe(work, rig._loop).result(10)


async def ask(app: Any, requests: Sequence[Request], headers: Any = BEARER, **more: Any) -> list[httpx.Response]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
        client.headers.clear()
        return [
            await client.request(method, path, json=body, headers=headers, **more) for method, path, body in requests
        ]


def submission(token: str, **changes: Any) -> Request:
    return "POST", "/v1/jobs", {"job": {**json_format.job_to_json(job(token=token)), **changes}, "items": None}


def test_answers_equal_the_answers_of_the_api(rig: Rig) -> None:
    loader = Loader(rig, allowed=False)
    made = job(token="q").id
    reads: list[Request] = [
        ("GET", f"/v1/jobs/{made}/outcomes", None),
        ("GET", f"/v1/jobs/{made}/outcomes?after=0&limit=5&wait_s=0.0", None),
        ("GET", "/v1/grid", None),
    ]

    async def both() -> None:
        first, again = await ask(loader.quick(), [submission("q"), submission("q")])
        assert (first.status_code, again.status_code) == (201, 200)
        assert first.json()["id"] == again.json()["id"] == made
        quick, own = await ask(loader.quick(), reads), await ask(rig.app, reads)
        assert [answer.status_code for answer in quick] == [200] * len(reads)
        for ours, expected in zip(quick, own, strict=True):
            assert ours.json().keys() == expected.json().keys()
        (view,) = await ask(loader.quick(), [("GET", f"/v1/jobs/{made}", None)])
        (changed,) = await ask(loader.quick(), [("GET", f"/v1/jobs/{made}?version=-1&wait_s=5", None)])
        (page,) = await ask(loader.quick(), [("GET", "/v1/jobs?limit=100&active=true", None)])
        (own_view,) = await ask(rig.app, [("GET", f"/v1/jobs/{made}", None)])
        views = view.json(), changed.json(), page.json()["jobs"][0]
        assert all(one.keys() == own_view.json().keys() and one["id"] == made for one in views)

    run(rig, both())
    assert loader.calls == 0


NOT_QUICK: list[tuple[Request, dict[str, str], int]] = [
    (("GET", "/v1/grid", None), {}, 401),
    (("GET", "/v1/grid", None), {"Authorization": "Bearer guess"}, 401),
    (("GET", "/v1/grid", None), {**BEARER, "Origin": "http://evil.example"}, 403),
    (("GET", "/v1/health", None), {}, 200),
    (("GET", "/v1/jobs/unknown", None), BEARER, 404),
    (("GET", "/v1/jobs/unknown/outcomes?after=x", None), BEARER, 422),
    (("GET", "/v1/jobs/unknown?wait_s=1e9", None), BEARER, 422),
    (("GET", "/v1/jobs/unknown?wait_s=nan", None), BEARER, 422),
    (("GET", "/v1/jobs?limit=0&active=true", None), BEARER, 422),
    (("GET", "/v1/jobs?limit=5&active=true&before=", None), BEARER, 404),
    (("GET", "/v1/jobs?limit=5&limit=&active=true", None), BEARER, 422),
    (("POST", "/v1/jobs", None), BEARER, 422),
    (submission("plain"), {**BEARER, "Content-Type": "text/plain"}, 422),
    (("POST", "/v1/jobs", [1]), BEARER, 422),
    (submission("bad", stages=[]), BEARER, 422),
    (submission("bad", v=99), BEARER, 422),
    (submission("bad", id="../x"), BEARER, 422),
    (submission("bad", id="Capital"), BEARER, 422),
    (submission("bad", priority="high"), BEARER, 422),
    (submission("traced"), {**BEARER, "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}, 201),
]


@pytest.mark.parametrize(("request_", "headers", "status"), NOT_QUICK)
def test_api_answers_all_other_requests(rig: Rig, request_: Request, headers: dict[str, str], status: int) -> None:
    loader = Loader(rig)

    async def both() -> None:
        (quick,) = await ask(loader.quick(), [request_], headers)
        assert quick.status_code == status, quick.text
        assert loader.calls == 1
        (own,) = await ask(rig.app, [request_], headers)
        assert own.status_code == status or (own.status_code, status) == (200, 201)
        if status >= 400:
            assert quick.content == own.content

    run(rig, both())


@pytest.mark.parametrize(
    ("rest", "status"),
    [
        ("?version=", 422),
        ("?wait_s=", 422),
        ("?version=１", 422),
        ("/", 307),
        ("/outcomes?after=", 422),
        ("/outcomes?limit=１", 422),
        ("/outcomes?stage=", 200),
    ],
)
def test_api_answers_requests_about_a_job_that_the_quick_api_would_read_differently(
    rig: Rig, rest: str, status: int
) -> None:
    loader, path = Loader(rig), f"/v1/jobs/{rig.submit(job())}{rest}"
    (answer,) = run(rig, ask(loader.quick(), [("GET", path, None)]))
    assert answer.status_code == status
    assert loader.calls == 1


def test_api_answers_requests_with_two_tokens(rig: Rig) -> None:
    loader, headers = Loader(rig), [("Authorization", "Bearer guess"), *BEARER.items()]
    for app in (loader.quick(), rig.app):
        (answer,) = run(rig, ask(app, [("GET", "/v1/grid", None)], headers))
        assert answer.status_code == 401
    assert loader.calls == 1


@pytest.mark.parametrize("answer", [OSError("disk full"), RuntimeError("a bug"), {"a": float("nan")}, {"a": "\ud800"}])
def test_api_answers_after_an_unexpected_error(rig: Rig, monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    async def grid_view(*_: object) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(quick_api, "grid_view", grid_view)
    (response,) = run(rig, ask(Loader(rig).quick(), [("GET", "/v1/grid", None)]))
    assert (response.status_code, response.json()["leader"]) == (200, True)


def test_manager_notices_at_once_that_a_request_cannot_load_the_api(rig: Rig) -> None:
    rig.submit(job())  # The grid is not idle, so only the request loads the API.

    async def load() -> App:
        raise ImportError("an undefined symbol")

    async def both() -> None:
        quick = QuickApi(TOKEN, "memory", lambda: rig.manager, load)
        loading = asyncio.create_task(manager_service._load_later(quick, manager_service._Lead(rig.manager)))
        with pytest.raises(ImportError):
            await ask(quick, [("GET", "/v1/health", None)])
        with pytest.raises(ImportError):
            await asyncio.wait_for(loading, 5)

    run(rig, both())


def test_api_is_loaded_only_after_a_time_without_new_jobs(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, loader = 0, Loader(rig)

    async def sleep(_: float) -> None:
        nonlocal steps
        steps += 1
        if steps <= 20:
            rig.manager.lives.adopted += 1  # A job that ends before the next step.

    monkeypatch.setattr(manager_service, "asyncio", SimpleNamespace(sleep=sleep, shield=asyncio.shield))
    run(rig, manager_service._load_later(loader.quick(), manager_service._Lead(rig.manager)))
    assert (steps, loader.calls) == (28, 1)


def test_request_is_answered_although_the_manager_ends_while_the_api_is_loaded(rig: Rig) -> None:
    loader = Loader(rig, allowed=False)

    async def both() -> None:
        quick = loader.quick()
        asked = asyncio.create_task(ask(quick, [("GET", "/v1/health", None)]))
        loading = asyncio.create_task(manager_service._load_later(quick, manager_service._Lead(rig.manager)))
        while not loader.calls:
            await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)
        loader.allowed.set()
        (answer,) = await asked
        assert answer.status_code == 200

    run(rig, both())


@pytest.mark.parametrize(
    ("missing", "problem"), [("multipart", None), ("python_multipart", "python_multipart"), ("uvicorn", "uvicorn")]
)
def test_manager_needs_every_package_of_the_api_at_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str, problem: str | None
) -> None:
    """The package python-multipart has the module `multipart` only for old programs."""
    monkeypatch.setattr(manager_service, "find_spec", lambda name: None if name == missing else object())
    monkeypatch.setattr("batchlab.core.logs.set_up", lambda service: None)
    monkeypatch.setattr("asyncio.run", lambda work: work.close())
    options = manager_service.ManagerOptions(Home(tmp_path), factory.load("local"))
    if problem is None:
        manager_service.manager_main(options)
        return
    with pytest.raises(ModuleNotFoundError) as raised:
        manager_service.manager_main(options)
    assert raised.value.name == problem


def test_api_gets_the_whole_body_of_a_large_request(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quick_api, "MAX_BODY_BYTES", 100)
    loader = Loader(rig)
    (answer,) = run(rig, ask(loader.quick(), [submission("large")]))
    assert answer.status_code == 201
    assert loader.calls == 1


def test_api_is_loaded_once(rig: Rig) -> None:
    loader = Loader(rig)
    health: Request = ("GET", "/v1/health", None)
    answers = run(rig, ask(loader.quick(), [health, ("GET", "/v1/grid", None), health]))
    assert [answer.status_code for answer in answers] == [200, 200, 200]
    assert loader.calls == 1


def test_manager_without_the_lead_leaves_the_answer_to_the_api(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quick_api, "LEADER_WAIT_S", 0.02)
    monkeypatch.setattr(common, "LEADER_WAIT_S", 0.02)
    with Rig(lead=False) as rig:
        loader = Loader(rig)
        (answer,) = run(rig, ask(loader.quick(), [("GET", "/v1/grid", None)]))
        assert answer.status_code == 503
        assert loader.calls == 1
