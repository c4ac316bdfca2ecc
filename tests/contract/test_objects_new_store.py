"""A new object store sets class attributes of `ObstoreObjects`, here with the rules of Azure Blob Storage."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from obstore.store import AzureStore

from batchlab.adapters.obstore_objects import ObstoreObjects, client_options
from batchlab.core.errors import AlreadyExists, BackendError, NotFound, Throttled

ERRORS = {
    "exists": (409, "BlobAlreadyExists"),
    "busy": (429, "TooManyRequests"),
    "missing": (404, "BlobNotFound"),
    "no-container": (404, "ContainerNotFound"),
}


class AzureObjects(ObstoreObjects):
    """The rules of Azure: a conditional create that loses gets 409, and a missing bucket has its own code."""

    missing_bucket = "ContainerNotFound"
    busy_statuses = frozenset({"429", "503"})


class Handler(BaseHTTPRequestHandler):
    """A blob's name selects the error of each request."""

    def refuse(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, code = ERRORS[self.path.partition("?")[0].rpartition("/")[2]]
        body = f"<Error><Code>{code}</Code></Error>".encode()
        self.send_response(status)
        self.send_header("x-ms-error-code", code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = refuse  # noqa: N815 - names of http.server

    def log_message(self, *args: object) -> None:
        """Log nothing."""


@pytest.fixture
def objects() -> Iterator[ObstoreObjects]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        yield AzureObjects(
            AzureStore(
                "grid",
                config={"account_name": "a", "endpoint": url, "skip_signature": True},
                client_options=client_options(url),
                retry_config={"max_retries": 0, "backoff": {}},
            )
        )
        server.shutdown()
        thread.join()


def test_a_409_of_azure_means_that_the_object_exists(objects: ObstoreObjects) -> None:
    with pytest.raises(AlreadyExists):
        asyncio.run(objects.put("exists", b"", if_absent=True))
    with pytest.raises(Throttled):
        asyncio.run(objects.put("busy", b"", if_absent=True))


def test_a_missing_container_is_not_a_missing_object(objects: ObstoreObjects) -> None:
    """NotFound would mean that nothing was committed."""
    with pytest.raises(NotFound):
        asyncio.run(objects.get("missing"))
    with pytest.raises(BackendError, match="bucket does not exist") as caught:
        asyncio.run(objects.get("no-container"))
    assert not isinstance(caught.value, NotFound)
