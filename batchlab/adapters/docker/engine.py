"""Client of a Docker Engine: calls in threads, events, and the removal of resources by label.

Invariant: this module removes only resources with the given labels. A request to Docker fails after `ANSWER_S` seconds
without an answer.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Self, TypeVar

from batchlab.core.errors import BackendError, NotFound, Unreachable, UsageError

if TYPE_CHECKING:
    from docker import APIClient
    from docker.types.daemon import CancellableStream

T = TypeVar("T")

ANSWER_S = 60.0
"""Timeout of a request to Docker in seconds. Even a busy machine starts a container within `ANSWER_S` seconds."""
RECONNECT_S = 1.0
_CALLS = 8

START_REMEDY = "Start Docker, or set DOCKER_HOST to its address."


class Engine:
    """Client of the Docker Engine at `url`, at DOCKER_HOST, or of the current `docker context`.

    The client connects at the first call, so creating this object is cheap and does not need Docker.
    """

    def __init__(self, url: str = "") -> None:
        self._url = url
        self._client: APIClient | None = None
        self._connecting = threading.Lock()
        self._calling = ThreadPoolExecutor(_CALLS, thread_name_prefix="docker")

    async def run(self, what: str, call: Callable[[APIClient], T]) -> T:
        """Return the result of `call`, which runs in a thread. Raise the same errors as `do`."""
        return await asyncio.wrap_future(self._calling.submit(self.do, what, call))

    def do(self, what: str, call: Callable[[APIClient], T]) -> T:
        """Return the result of `call`.

        Raise Unreachable if no Engine answers, NotFound for a missing resource, and BackendError for any other error.
        The messages of the errors begin with `what`.
        """
        with translate_errors(what):
            return call(self._open_client())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for the submitted calls, then end the threads and close the connections."""
        self._calling.shutdown()
        if self._client is not None:
            self._client.close()

    async def close(self) -> None:
        """Close the Engine without blocking the event loop."""
        await asyncio.to_thread(self.__exit__)

    def _open_client(self) -> APIClient:
        with self._connecting:
            if self._client is None:
                self._client = _connect(self._url)
            return self._client


def _connect(url: str) -> APIClient:
    from docker import APIClient, ContextAPI
    from docker.utils import kwargs_from_env

    options: dict[str, Any] = {**kwargs_from_env()}
    if url:
        options["base_url"] = url
    elif "base_url" not in options:
        context = ContextAPI.get_current_context()
        options["base_url"] = context.Host if context else None
    return APIClient(**options, version="auto", timeout=int(ANSWER_S))


@contextmanager
def translate_errors(what: str) -> Iterator[None]:
    """Raise batchlab's errors instead of the Docker SDK's errors.

    The messages of batchlab's errors begin with `what`.
    """
    from docker.errors import APIError, DockerException
    from docker.errors import NotFound as Missing
    from requests.exceptions import RequestException
    from urllib3.exceptions import HTTPError

    try:
        yield
    except Missing as error:
        raise NotFound(f"{what}: {error_text(error)}.") from error
    except APIError as error:
        # A Docker Engine that shuts down answers 503. Docker answers 500 for many kinds of failures.
        kind = Unreachable if error.status_code == 503 else BackendError
        raise kind(f"{what}: {error_text(error)}.") from error
    except (DockerException, RequestException, HTTPError, OSError) as error:
        # The innermost exception in a chain of wrappers has the reason, such as "[Errno 2] No such file or directory".
        root: BaseException = error
        while root.__cause__ or root.__context__:
            root = root.__cause__ or root.__context__ or root
        why = getattr(root, "strerror", None) or str(root)
        raise Unreachable(f"{what}: Docker does not answer ({why}).", remedy=START_REMEDY) from error


def error_text(error: Any) -> str:
    """Return Docker's own message without the wrapping of its SDK."""
    text = error.explanation
    if isinstance(text, bytes):
        text = text.decode(errors="replace")
    return " ".join(str(text or error).split()).rstrip(".")


class EventStream:
    """Stream of the events of containers and networks, read by its own thread until `close`.

    `seen` is called with each event, in the stream's thread. `seen` is called with None when events may have been
    missed: after the stream was opened, and when the stream breaks. A broken event stream is opened again.
    """

    def __init__(self, engine: Engine, on_event: Callable[[Mapping[str, Any] | None], None]) -> None:
        self._engine = engine
        self._on_event = on_event
        self._closing = threading.Event()
        self._stream: CancellableStream[dict[str, Any]] | None = None
        self.is_open = False
        """Whether the event stream is open, so no event is missed."""
        # The reader is a daemon thread, because the process must be able to exit while the thread waits on a socket.
        self._thread = threading.Thread(target=self._follow, name="docker-events", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Close the stream and wait until its thread has ended."""
        self._closing.set()
        while self._thread.is_alive():
            if self._stream is not None:
                # The Engine has closed the connection, or an earlier iteration of this loop has partly closed the
                # connection.
                with suppress(OSError, AttributeError):
                    self._stream.close()
            self._thread.join(0.05)

    def _follow(self) -> None:
        filters = {"type": ["container", "network"], "event": ["start", "die", "destroy", "connect", "disconnect"]}

        while not self._closing.is_set():
            with suppress(BackendError), translate_errors("Docker's events"):
                self._read(self._engine.do("Docker's events", lambda api: api.events(decode=True, filters=filters)))
            self._closing.wait(RECONNECT_S)

    def _read(self, stream: CancellableStream[dict[str, Any]]) -> None:
        self._stream, self.is_open = stream, True
        try:
            self._on_event(None)
            for event in stream:
                self._on_event(event)
        finally:
            self._stream, self.is_open = None, False
            self._on_event(None)


# --- Resources by label ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LabeledResource:
    """A Docker resource with batchlab's labels. `kind` is container, network, or volume."""

    kind: str
    id: str
    name: str
    labels: Mapping[str, str]


def find_resources(engine: Engine, labels: Mapping[str, str | None]) -> Sequence[LabeledResource]:
    """Return the resources with all of these labels, containers first. The label value None matches any value.

    Raise UsageError without a label, because an empty filter matches every resource on the machine.
    """
    if not labels:
        raise UsageError("At least one label is required to select resources.")
    filters = {"label": [name if value is None else f"{name}={value}" for name, value in labels.items()]}

    def search(api: APIClient) -> list[LabeledResource]:
        resources = [
            LabeledResource("container", c["Id"], c["Names"][0].lstrip("/") if c["Names"] else "", c["Labels"])
            for c in api.containers(all=True, filters=filters)
        ]
        networks, volumes = api.networks(filters=filters), api.volumes(filters=filters)["Volumes"] or []
        resources += [LabeledResource("network", n["Id"], n["Name"], n["Labels"]) for n in networks]
        return resources + [LabeledResource("volume", v["Name"], v["Name"], v["Labels"] or {}) for v in volumes]

    return engine.do("Search for resources with batchlab's labels", search)


def remove_resources(engine: Engine, labels: Mapping[str, str | None]) -> Sequence[LabeledResource]:
    """Remove the resources with all of these labels, even running containers. Return the removed resources.

    Ignore resources that no longer exist. If some resources cannot be removed, remove the others and then raise
    BackendError.
    """
    resources = find_resources(engine, labels)
    failed: BackendError | None = None
    for resource in resources:
        try:
            engine.do(f"The {resource.kind} {resource.name}", partial(_remove, resource))
        except NotFound:
            continue
        except BackendError as error:
            failed = error
    if failed is not None:
        raise failed
    return resources


def _remove(resource: LabeledResource, api: APIClient) -> None:
    if resource.kind == "container":
        remove_container(api, resource.id)
    elif resource.kind == "network":
        # Docker does not remove a network while a container is connected to the network.
        for container in api.inspect_network(resource.id)["Containers"] or {}:
            api.disconnect_container_from_network(container, resource.id, force=True)
        api.remove_network(resource.id)
    else:
        api.remove_volume(resource.id, force=True)


def remove_container(api: APIClient, container: str) -> None:
    """Kill and remove a container with its anonymous volumes. Ignore a container that is already removed."""
    from docker.errors import APIError

    try:
        api.remove_container(container, v=True, force=True)
    except APIError as error:
        # Status 409 means that the removal of the container is in progress.
        if error.status_code not in (404, 409):
            raise
