"""Problems of a grid on `ministack`, each of which is reported with a remedy."""

from __future__ import annotations

import asyncio
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from batchlab.adapters.aws.endpoint import Endpoint, check
from batchlab.adapters.aws.objects import open_s3
from batchlab.adapters.local.ministack import Emulator
from batchlab.core.errors import Unreachable
from tests.support.aws.emulators import free_port, ministack_python, named_emulator
from tests.system.test_command_line import Cli, cli, numbers

__all__ = ["cli"]

MINISTACK = ("--backend", "ministack")
NO_BUCKETS = b"<ListAllMyBucketsResult><Buckets></Buckets></ListAllMyBucketsResult>"


@contextmanager
def serving(answer: bytes) -> Iterator[str]:
    """Start a server that answers every GET with this content, and yield its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


# --- The named endpoint --------------------------------------------------------------------------


def refused(cli: Cli, endpoint: str, sentence: str) -> None:
    code, _, err = cli("run", "job.yaml", *MINISTACK, "--endpoint", endpoint)
    assert code == 3
    assert f"Error: {sentence}\n" in err
    assert "Traceback" not in err
    assert cli.home.place("ministack") is None, "it must not be remembered"
    code, out, _ = cli("doctor", *MINISTACK, "--endpoint", endpoint)
    assert code == 1
    assert f"fail  endpoint     {sentence}\n" in out
    cli.none_left()


def test_an_endpoint_at_which_nothing_listens(cli: Cli) -> None:
    cli.inputs(1)
    endpoint = f"http://127.0.0.1:{free_port()}"
    refused(cli, endpoint, f"No service answers at {endpoint}.")


def test_an_endpoint_that_is_not_s3(cli: Cli) -> None:
    cli.inputs(1)
    with serving(b"<html>It works!</html>") as endpoint:
        refused(cli, endpoint, f"{endpoint} does not answer like S3.")


def test_an_endpoint_of_s3_alone() -> None:
    with serving(NO_BUCKETS) as endpoint, pytest.raises(Unreachable, match="does not answer like SQS"):
        check(Endpoint(endpoint))


def test_an_endpoint_that_ended_since_it_was_first_used(cli: Cli) -> None:
    """The home stores the endpoint, so the job continues once the endpoint works again."""
    cli.inputs(2)
    port = free_port()
    server = named_emulator(cli.folder / "theirs", port=port)
    with server:
        code, _, err = cli("run", "job.yaml", *MINISTACK, "--endpoint", server.url)
        assert code == 0, err
    code, _, err = cli("run", "job.yaml", *MINISTACK, "--cache")
    assert code == 3
    assert f"No service answers at http://127.0.0.1:{port}." in err
    with server:
        code, _, err = cli("run", "job.yaml", *MINISTACK, "--cache", "--out", "out")
        assert code == 0, err
    assert numbers(cli.folder / "out") == [0, 1]


# --- The grid's own emulator ---------------------------------------------------------------------


def test_a_port_that_is_taken_meanwhile_costs_nothing(tmp_path: Path) -> None:
    """Another program took the port while the grid was down, and the grid's data is available at another port."""

    async def put(emulator: Emulator) -> None:
        await open_s3(emulator.endpoint, "kept").put("a", b"content")

    async def get(emulator: Emulator) -> bytes:
        return await open_s3(emulator.endpoint, "kept").get("a")

    python = ministack_python()
    with Emulator(python, tmp_path) as emulator:
        before = emulator.url
        asyncio.run(put(emulator))
    with socket.create_server(("127.0.0.1", int(before.rpartition(":")[2]))), Emulator(python, tmp_path) as emulator:
        assert emulator.url != before
        assert asyncio.run(get(emulator)) == b"content"


def test_no_port_that_is_free(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        emulator = Emulator(ministack_python(), tmp_path, port=port)
        with pytest.raises(Unreachable, match="All ports that the emulator may use on") as caught, emulator:
            pass
    assert caught.value.remedy


# --- Its installation ----------------------------------------------------------------------------


def test_no_network_to_install_it(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    cli.inputs(1)
    for name in ("BATCHLAB_MINISTACK", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cli.folder / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{free_port()}/simple")
    code, _, err = cli("run", "job.yaml", *MINISTACK)
    assert code == 3
    assert "cannot be installed: the package index cannot be reached.\n" in err
    assert "BATCHLAB_MINISTACK" in err
    assert "Traceback" not in err
    code, out, _ = cli("doctor", *MINISTACK)
    assert code == 0, "what is half made does not count as there"
    assert "is not here yet" in out
    cli.none_left()


def test_broken_installation_is_reported(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    cli.inputs(1)
    for named, sentence in (
        (str(cli.folder / "ministack"), f"is {cli.folder}/ministack, but MiniStack is not"),
        (sys.executable, f"environment of {sys.executable} does not contain MiniStack"),
    ):
        monkeypatch.setenv("BATCHLAB_MINISTACK", named)
        code, _, err = cli("run", "job.yaml", *MINISTACK)
        assert code == 2
        assert sentence in err
        code, out, _ = cli("doctor", *MINISTACK)
        assert code == 1
        assert sentence in out
    cli.none_left()
