"""Server of EC2's instance metadata service, version 2, for containers that act as instances.

Invariant: every answer requires a session token. A session token is valid only for the instance that requested the
token. A request through a proxy (with X-Forwarded-For) does not get a token.

The server identifies an instance by the address of its connection, as EC2 does. No address translation may take place
between an instance and the server, because the address identifies the instance.

`metadata_tree` returns the metadata of one instance as a tree of paths. The paths, values, and formats of the metadata
follow AWS's documentation page "Instance metadata categories". The server answers 404 for a path that the tree does not
contain. The tree lacks data that batchlab does not use.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Protocol
from urllib.parse import unquote, urlsplit

from batchlab.core.errors import BackendError, UsageError
from batchlab.core.model import Machine, Market
from batchlab.core.ports import ANY_MACHINE, Clock

ROOT = "latest/"

_REGION = re.compile(r"[a-z]+(?:-[a-z]+)+?-\d+")
_TAG = re.compile(r"[A-Za-z0-9+\-=.,_:@]+")


@dataclass(frozen=True, slots=True)
class Interruption:
    """Spot interruption notice. `action` is terminate, stop, or hibernate, and happens at `at_s`, in epoch seconds."""

    at_s: float
    action: str = "terminate"


@dataclass(frozen=True, slots=True)
class Signals:
    """Announcements of the platform about the future of an instance."""

    lifecycle: str = "InService"
    """Lifecycle state to which an Auto Scaling group moves the instance, or "" for an instance without a group."""
    interruption: Interruption | None = None
    rebalance_s: float | None = None
    """Epoch seconds of a rebalance recommendation: a Spot interruption has become more likely."""


@dataclass(frozen=True, slots=True)
class Metadata:
    """Facts about one instance, from which its metadata tree is made.

    `credentials` maps the name of an IAM role to its credentials document. The times in the metadata are epoch seconds.
    """

    instance: str
    address: str
    machine: Machine = ANY_MACHINE
    launched_s: float = 0.0
    image: str = ""
    architecture: str = "x86_64"
    account: str = "000000000000"
    tags: Mapping[str, str] = field(default_factory=dict)
    credentials: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    signals: Signals = Signals()
    user_data: str = ""

    @property
    def region(self) -> str:
        """Return the region of the availability zone: us-west-2 for us-west-2b and for us-west-2-lax-1a."""
        match = _REGION.match(self.machine.zone)
        return match[0] if match else ""


def metadata_tree(of: Metadata) -> dict[str, str]:
    """Return the metadata content by path below `latest/`.

    The tree does not contain paths with empty values, so the server answers 404 for a path with an empty value.
    """
    machine, signals = of.machine, of.signals
    spot = machine.market is Market.SPOT
    meta = {
        "ami-id": of.image,
        "autoscaling/target-lifecycle-state": signals.lifecycle,
        "hostname": of.instance,
        "instance-id": of.instance,
        "instance-life-cycle": "spot" if spot else "on-demand",
        "instance-type": machine.type,
        "local-hostname": of.instance,
        "local-ipv4": of.address,
        "placement/availability-zone": machine.zone,
        "placement/region": of.region,
    }
    if signals.rebalance_s is not None:
        meta["events/recommendations/rebalance"] = json.dumps({"noticeTime": iso(signals.rebalance_s)})
    if signals.interruption is not None:
        action, at = signals.interruption.action, iso(signals.interruption.at_s)
        meta["spot/instance-action"] = json.dumps({"action": action, "time": at})
        if action == "terminate":
            meta["spot/termination-time"] = at
    for role, document in of.credentials.items():
        meta[f"iam/security-credentials/{role}"] = json.dumps(document, indent=2)
    for name, value in of.tags.items():
        # EC2 shows only tags whose names match `_TAG` in the instance metadata.
        if _TAG.fullmatch(name):
            meta[f"tags/instance/{name}"] = value
    paths = {f"meta-data/{path}": content for path, content in meta.items() if content}
    paths["dynamic/instance-identity/document"] = _document(of)
    if of.user_data:
        paths["user-data"] = of.user_data
    return paths


def content_at(paths: Mapping[str, str], path: str) -> str | None:
    """Return the content of `path` below `latest/`, or the list of the names below `path`.

    Return None if `path` does not exist.
    """
    path = path.rstrip("/")  # boto3 requests the availability zone with a slash at the end.
    if path in paths:
        return paths[path]
    folder = f"{path}/" if path else ""
    below = (p.removeprefix(folder).partition("/") for p in paths if p.startswith(folder))
    names = {name + slash for name, slash, _ in below}
    return "\n".join(sorted(names)) or None


def iso(epoch_s: float) -> str:
    """Return a time as ISO 8601 text in whole seconds, in the format of EC2's metadata service."""
    return datetime.fromtimestamp(epoch_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _document(of: Metadata) -> str:
    return json.dumps(
        {
            "accountId": of.account,
            "architecture": of.architecture,
            "availabilityZone": of.machine.zone,
            "billingProducts": None,
            "devpayProductCodes": None,
            "imageId": of.image,
            "instanceId": of.instance,
            "instanceType": of.machine.type,
            "kernelId": None,
            "marketplaceProductCodes": None,
            "pendingTime": iso(of.launched_s),
            "privateIp": of.address,
            "ramdiskId": None,
            "region": of.region,
            "version": "2017-09-30",
        },
        indent=2,
    )


log = logging.getLogger(__name__)

TOKEN_PATH = f"{ROOT}api/token"
TTL_HEADER = "x-aws-ec2-metadata-token-ttl-seconds"
TOKEN_HEADER = "x-aws-ec2-metadata-token"  # noqa: S105 - a header's name
MAX_TTL_S = 21_600

IDLE_S = 60.0
"""Time in seconds after which the server closes a silent connection."""
_TTL = re.compile("[0-9]{1,5}")
_LENGTH = re.compile("[0-9]{1,5}")
_HEAD_BYTES = 16 * 1024


class MetadataSource(Protocol):
    """Source of instance metadata for the metadata server."""

    async def metadata(self, address: str) -> Metadata | None:
        """Return the metadata of the instance that now has `address`, or None if no instance has `address`.

        Raise BackendError if the instance of the address cannot be determined.
        """


@dataclass(frozen=True, slots=True)
class _Request:
    method: str
    path: str
    """Path of the request without its leading slash."""
    headers: Mapping[str, str]
    """Headers of the request with lowercase names."""
    keeps_open: bool
    """Whether the connection stays open after the answer."""


@dataclass(frozen=True, slots=True)
class _Answer:
    status: HTTPStatus
    content: str = ""
    ttl_s: int | None = None


class _MalformedError(Exception):
    """Error for bytes that are not a supported HTTP request."""


class MetadataServer:
    """HTTP server that returns the metadata of the instances of `source`. The server runs from `start` to `close`."""

    def __init__(self, source: MetadataSource, clock: Clock) -> None:
        self._source = source
        self._clock = clock
        # The server signs session tokens instead of storing the tokens, so many token requests cannot fill the memory.
        self._key = secrets.token_bytes(32)
        self._server: asyncio.Server | None = None
        self._is_closing = False
        self._connections: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    async def start(self, host: str, port: int = 0) -> str:
        """Listen on the address. Port 0 selects any free port.

        Return the URL for AWS_EC2_METADATA_SERVICE_ENDPOINT. Raise UsageError if the address is not available.
        """
        try:
            self._server = await asyncio.start_server(self._serve, host, port, limit=_HEAD_BYTES)
        except OSError as error:
            raise UsageError(
                f"The metadata service cannot listen on {host}:{port}: {error.strerror}.",
                remedy="Name an address of this machine and a free port.",
            ) from error
        bound = self._server.sockets[0].getsockname()
        shown = f"[{bound[0]}]" if ":" in bound[0] else bound[0]
        return f"http://{shown}:{bound[1]}"

    async def close(self) -> None:
        """Stop listening and close every connection."""
        if self._server is None:
            return
        self._is_closing = True
        # A server that is closed while asyncio accepts a connection leaves the connection's socket open, so the server
        # first stops accepting, and the accepted connection gets its transport in the next iteration of the loop.
        for listener in self._server.sockets:
            asyncio.get_running_loop().remove_reader(listener.fileno())
        await asyncio.sleep(0)
        self._server.close()
        # asyncio's streams report a canceled task as an error, so the connections are aborted instead.
        for writer in self._connections.values():
            writer.transport.abort()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await self._server.wait_closed()

    # --- Answers ---------------------------------------------------------------------------------

    async def _respond(self, request: _Request, address: str) -> _Answer:
        try:
            metadata = await self._source.metadata(address)
        except BackendError as error:
            log.warning("the instance at the address %s cannot be identified: %s", address, error)
            return _Answer(HTTPStatus.SERVICE_UNAVAILABLE)
        if metadata is None:
            return _Answer(HTTPStatus.FORBIDDEN)
        if request.method == "PUT":
            return self._token(request, metadata.instance)
        if request.method != "GET":
            return _Answer(HTTPStatus.METHOD_NOT_ALLOWED)
        if not self._is_valid(request.headers.get(TOKEN_HEADER, ""), metadata.instance):
            return _Answer(HTTPStatus.UNAUTHORIZED)
        return _find(request.path, metadata)

    def _token(self, request: _Request, instance: str) -> _Answer:
        if request.path != TOKEN_PATH:
            return _Answer(HTTPStatus.METHOD_NOT_ALLOWED)
        if "x-forwarded-for" in request.headers:
            return _Answer(HTTPStatus.FORBIDDEN)
        ttl_s = request.headers.get(TTL_HEADER, "")
        if not _TTL.fullmatch(ttl_s) or not 1 <= int(ttl_s) <= MAX_TTL_S:
            return _Answer(HTTPStatus.BAD_REQUEST)
        until = f"{self._clock.monotonic_s() + int(ttl_s):.3f}"
        return _Answer(HTTPStatus.OK, f"{until}-{self._sign(until, instance)}", int(ttl_s))

    def _is_valid(self, token: str, instance: str) -> bool:
        until, _, signature = token.partition("-")
        if not hmac.compare_digest(signature.encode(), self._sign(until, instance).encode()):
            return False
        return self._clock.monotonic_s() < float(until)

    def _sign(self, until: str, instance: str) -> str:
        return hmac.new(self._key, f"{until} {instance}".encode(), hashlib.sha256).hexdigest()

    # --- HTTP ------------------------------------------------------------------------------------

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections[task] = writer
        if self._is_closing:  # `close` has aborted the earlier connections.
            writer.transport.abort()
        try:
            # The peer name is None if the client disconnected before `peername` was read.
            address = str((writer.get_extra_info("peername") or ("",))[0])
            keeps_open = True
            while keeps_open:
                async with asyncio.timeout(IDLE_S):
                    request = await _read(reader)
                if request is None:
                    return
                keeps_open = request.keeps_open
                _write(writer, await self._respond(request, address), keeps_open=keeps_open)
                await writer.drain()
        except _MalformedError:
            _write(writer, _Answer(HTTPStatus.BAD_REQUEST), keeps_open=False)
        except (TimeoutError, OSError):
            pass  # The client disconnected or sent nothing for `IDLE_S` seconds.
        finally:
            del self._connections[task]
            writer.close()


def _find(path: str, metadata: Metadata) -> _Answer:
    if not path:
        return _Answer(HTTPStatus.OK, ROOT.rstrip("/"))
    if f"{path}/".startswith(ROOT):
        content = content_at(metadata_tree(metadata), path[len(ROOT) :])
        if content is not None:
            return _Answer(HTTPStatus.OK, content)
    return _Answer(HTTPStatus.NOT_FOUND)


async def _read(reader: asyncio.StreamReader) -> _Request | None:
    """Return the next request, or None if the client has closed the connection."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    except asyncio.LimitOverrunError as error:
        raise _MalformedError from error
    first, *lines = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
    words = first.split(" ")
    if len(words) != 3 or words[2] not in ("HTTP/1.0", "HTTP/1.1"):
        raise _MalformedError
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or name != name.strip():
            raise _MalformedError
        headers[name.lower()] = value.strip()
    await _skip_body(reader, headers)
    keeps_alive = "close" not in headers.get("connection", "").lower()
    return _Request(words[0], _path(words[1]), headers, keeps_open=keeps_alive and words[2] == "HTTP/1.1")


async def _skip_body(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> None:
    """Skip the body of a request.

    The server does not need the body of a request, but must not read the body as the next request.
    """
    length = headers.get("content-length", "0")
    if "transfer-encoding" in headers or not _LENGTH.fullmatch(length):
        raise _MalformedError
    try:
        await reader.readexactly(int(length))
    except asyncio.IncompleteReadError as error:
        raise _MalformedError from error


def _path(target: str) -> str:
    try:
        return unquote(urlsplit(target).path).lstrip("/")
    except ValueError as error:
        raise _MalformedError from error


def _write(writer: asyncio.StreamWriter, answer: _Answer, *, keeps_open: bool) -> None:
    content = answer.content.encode()
    lines = [
        f"HTTP/1.1 {answer.status.value} {answer.status.phrase}",
        "Server: EC2ws",
        "Content-Type: text/plain",
        f"Content-Length: {len(content)}",
        f"Connection: {'keep-alive' if keeps_open else 'close'}",
    ]
    if answer.ttl_s is not None:
        lines.append(f"X-Aws-Ec2-Metadata-Token-Ttl-Seconds: {answer.ttl_s}")
    writer.write("\r\n".join([*lines, "", ""]).encode() + content)
