"""Kept connections, which are reused while they work, by one user at a time."""

from __future__ import annotations

import math
import socket
from collections.abc import Iterator
from contextlib import closing

import pytest

from batchlab.core.http_connections import Connections


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


def connections(server: socket.socket, *, idle_s: float = math.inf) -> Connections:
    host = f"127.0.0.1:{server.getsockname()[1]}"
    return Connections(host, None, connect_s=5.0, idle_s=idle_s)


def test_one_that_was_given_back_is_used_again(server: socket.socket) -> None:
    with closing(connections(server)) as some:
        one, other = some.take(), some.take()
        assert one is not other, "two users at a time have two"
        some.give_back(one)
        some.give_back(other)
        assert some.take() is other, "the last used is the freshest"
        assert some.take() is one
        one.close()
        other.close()


def test_one_that_the_server_has_closed_is_not(server: socket.socket) -> None:
    with closing(connections(server)) as some:
        one = some.take()
        some.give_back(one)
        server.accept()[0].close()
        with closing(some.take()) as other:
            assert other is not one
        assert one.sock is None, "it was closed here too"


def test_one_that_was_idle_for_too_long_is_not(server: socket.socket) -> None:
    with closing(connections(server, idle_s=0.0)) as some:
        one = some.take()
        some.give_back(one)
        with closing(some.take()) as other:
            assert other is not one
        assert one.sock is None


def test_idle_connection_is_closed(server: socket.socket) -> None:
    some = connections(server)
    one = some.take()
    some.give_back(one)
    some.close()
    assert one.sock is None


def test_connection_returned_after_close_is_closed(server: socket.socket) -> None:
    some = connections(server)
    one = some.take()
    some.close()
    assert one.sock is not None, "somebody uses it"
    some.give_back(one)
    assert one.sock is None


def test_refused_connection_is_an_os_error() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        with pytest.raises(OSError, match="refused"):
            connections(probe).take()
