"""A request to the manager with interruptions."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from http.client import HTTPResponse

import pytest

from batchlab.client.http import Client
from batchlab.core.errors import NotFound
from tests.support.http_proxy import Answer, Request, proven, standing


class Manager:
    def answer(self, request: Request) -> Answer:
        answer = Answer(404, [], b'{"error": "There is no such job.", "remedy": "Look again."}')
        if request.path == "/v1/health":
            answer = Answer(200, [], b'{"leader": true}')
        return proven("secret", request, answer)


@pytest.fixture
def client() -> Iterator[Client]:
    with standing(Manager()) as url, Client(url, "secret") as client:
        yield client


def test_interrupt_while_an_answer_is_stored_is_not_lost(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python drops an exception that is raised in a finalizer, such as one that closes an open answer."""
    close, left = HTTPResponse.close, [signal.SIGINT]

    def interrupted(response: HTTPResponse) -> None:
        if left:
            signal.raise_signal(left.pop())
        close(response)

    monkeypatch.setattr(HTTPResponse, "close", interrupted)
    with pytest.raises(KeyboardInterrupt):
        client.health()
    assert client.health()["leader"]
    assert len(client._connections._idle) == 1  # the connection will be used again
    left.append(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        client.job("nowhere")
    with pytest.raises(NotFound, match="no such job"):
        client.job("nowhere")


def test_closed_connection_is_not_reused(client: Client) -> None:
    """A manager that ends closes the connection, while its successor listens at the same address."""
    assert client.health()["leader"]
    kept = client._connections._idle[0][1]
    kept.sock.shutdown(socket.SHUT_RDWR)
    assert client.health()["leader"]
