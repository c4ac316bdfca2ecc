"""A program that listens on the manager's port cannot learn the token or change an answer."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx
import pytest

from batchlab.cli import options
from batchlab.client.http import Client
from batchlab.core import http_connections
from batchlab.core.errors import BackendError, Refused, Unreachable
from batchlab.runtime.home import Home, ManagerRecord
from tests.support.grid.local_grid import LocalGrid
from tests.support.http_proxy import Answer, Request, forward, standing
from tests.support.server.api import TOKEN, Rig, job


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with Rig() as made:
        yield made


@dataclass
class FalseManager:
    """A false manager that answers as well as it can without the token."""

    seen: list[Request] = field(default_factory=list)

    def answer(self, request: Request) -> Answer:
        self.seen.append(request)
        health = {"status": "ok", "version": "0.1.0", "leader": True}
        return Answer(200, [("Content-Type", "application/json")], json.dumps(health).encode())


@dataclass
class Relay:
    """A relay that sends requests to the real manager, and applies `alter` to the traffic."""

    target: str
    alter: Callable[[Answer], Answer] = lambda answer: answer
    seen: list[Request] = field(default_factory=list)

    def answer(self, request: Request) -> Answer:
        self.seen.append(request)
        return self.alter(forward(self.target, request))


def sent(requests: list[Request]) -> str:
    return "\n".join(repr(request) for request in requests)


def test_a_false_manager_learns_no_token() -> None:
    """The client does not send the token before the manager has proven its identity, not even to `/v1/health`."""
    false = FalseManager()
    with standing(false) as url, Client(url, TOKEN) as client:
        for ask in (client.health, client.shutdown, client.open_session, client.jobs):
            with pytest.raises(Unreachable, match="does not prove"):
                ask()
        asyncio.run(_polled(client))
    assert len(false.seen) == 5
    assert TOKEN not in sent(false.seen)


async def _polled(client: Client) -> None:
    async with client.for_loop(1) as http:
        with pytest.raises(httpx.TransportError, match="does not prove"):
            await http.get("/v1/jobs", params={"limit": 1})


def test_no_command_sends_the_token_to_a_false_manager(tmp_path: Path) -> None:
    """The shell completion also sends requests to the manager."""
    home, false = Home(tmp_path), FalseManager()
    with standing(false) as url, home.lock():
        home.write_record(ManagerRecord(url, os.getpid(), "manager-1", "aws"))
        assert options._request_list(home, "/v1/jobs?limit=5", "jobs") == []
    assert false.seen
    assert home.token() not in sent(false.seen)


def test_a_relay_learns_no_token_and_changes_no_answer(rig: Rig) -> None:
    """The attacker may forward requests to the real manager at another port."""
    rig.submit(job(token="relayed"))

    def forged(answer: Answer) -> Answer:
        return replace(answer, body=answer.body.replace(b"sums", b"evil"))

    def denied(answer: Answer) -> Answer:
        return replace(answer, status=404)

    relay = Relay(rig.url)
    with standing(relay) as url, Client(url, TOKEN) as client:
        assert client.jobs()[0]["name"] == "sums"
        for alter in (forged, denied):
            relay.alter = alter
            with pytest.raises(Unreachable, match="does not prove"):
                client.jobs()
    assert TOKEN not in sent(relay.seen)


def test_first_outcomes_are_not_changed_on_their_way(rig: Rig) -> None:
    """The Python API unpickles results, which arrive in an answer of several parts."""

    def forged(answer: Answer) -> Answer:
        first, _, rest = answer.body.partition(b"\n")
        return replace(answer, body=first + b"\n" + rest.replace(b"false", b"true "))

    relay = Relay(rig.url)
    with standing(relay) as url, Client(url, TOKEN) as client:
        page = client.submit_and_hear(job(token="heard-1"), None, lambda: None, wait_s=0.01)
        assert not page["ended"]
        relay.alter = forged
        with pytest.raises(Unreachable, match="does not prove"):
            client.submit_and_hear(job(token="heard-2"), None, lambda: None, wait_s=0.01)


def test_a_request_that_was_seen_cannot_be_sent_again_or_changed(rig: Rig) -> None:
    """A relay cannot send a request of its own."""
    name = rig.submit(job(token="again"))
    relay = Relay(rig.url)
    with standing(relay) as url, Client(url, TOKEN) as client:
        client.pause(name)
        client.resume(name)
        client.jobs()
    pause, resume, listing = relay.seen
    for seen in relay.seen:
        again = forward(rig.url, seen)
        assert again.status == 401
        assert "was received before" in again.body.decode()
    broken = resume.header("Authorization")[:-1] + "g"
    for changed in (
        replace(pause, path=pause.path.replace("pause", "cancel")),
        replace(listing, method="POST", path="/v1/shutdown"),
        replace(listing, path="/v1/jobs/x/failures"),
        replace(resume, headers={**resume.headers, "Authorization": broken}),
    ):
        assert forward(rig.url, changed).status == 401
    body = replace(resume, path="/v1/jobs", body=b'{"job": {}}')
    assert forward(rig.url, body).status == 401
    assert rig.client.job(name)["state"] != "PAUSED"
    assert rig.shutdowns == 0


def test_a_signed_request_has_the_body_that_was_signed(rig: Rig) -> None:
    """A relay may change the body of a signed request."""
    before = len(rig.client.jobs())
    signed = http_connections.sign(TOKEN, "POST", "/v1/jobs", b'{"job": 1}')
    headers = {"Authorization": signed.header, "Content-Type": "application/json"}
    answer = forward(rig.url, Request("POST", "/v1/jobs", headers, b'{"job": {}}'))
    assert answer.status == 400
    assert "the signature belongs to another body" in answer.body.decode()
    assert len(rig.client.jobs()) == before


def test_an_old_signature_is_refused_in_words(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signature is valid for some minutes, so the clocks must agree roughly."""
    sign = http_connections.sign

    def earlier(token: str, method: str, target: str, body: bytes) -> http_connections.Signed:
        return sign(token, method, target, body, time.time() - http_connections.WINDOW_S - 60)

    monkeypatch.setattr(http_connections, "sign", earlier)
    with Client(rig.url, TOKEN) as client, pytest.raises(Refused, match="clocks of the client and"):
        client.jobs()


def test_an_error_of_the_manager_is_signed(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a signature, a manager's error would look like the answer of another program."""
    rig.submit(job(token="failing"))
    monkeypatch.setattr("batchlab.server.job_views.job_view", None)
    with pytest.raises(BackendError, match="The manager failed"):
        rig.client.jobs()


@pytest.mark.slow
def test_commands_on_this_machine_use_a_socket_of_their_user(tmp_path: Path) -> None:
    """On `local`, the client sends the token to a Unix socket that only its user can open. A program that takes the
    port of an ended manager does not learn the token."""
    grid = LocalGrid(tmp_path / "home")
    try:
        record = grid.home.record()
        assert record
        path = grid.home.socket(record)
        assert path
        assert path.stat().st_mode & 0o777 == 0o600
        with Client("http://127.0.0.1:1", grid.home.token(), path) as client:
            assert client.health()["status"] == "ok"
        # Old clients and curl still use the port.
        bearer = {"Authorization": f"Bearer {grid.home.token()}"}
        assert httpx.get(f"{record.url}/v1/jobs", headers=bearer, trust_env=False).is_success
        with Client(record.url, grid.home.token()) as client:
            assert client.jobs() == []
    finally:
        grid.stop()
    assert not path.exists()
    assert grid.home.socket(record) is None


@pytest.mark.slow
def test_a_socket_has_a_private_folder_where_the_grids_path_is_too_long(tmp_path: Path) -> None:
    """The path of a Unix socket is limited to about 100 bytes."""
    grid = LocalGrid(tmp_path / ("long-" * 30) / "home")
    try:
        record = grid.home.record()
        assert record
        path = grid.home.socket(record)
        assert path
        assert not path.is_relative_to(grid.home.path)
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.parent.stat().st_mode & 0o777 == 0o700
        assert grid.client.health()["status"] == "ok"
        grid.kill_manager()
        record = grid.home.record()
        assert record
        assert grid.home.socket(record) == path, "clients that wait for a manager find the next one"
    finally:
        grid.stop()
    assert not path.parent.exists()
