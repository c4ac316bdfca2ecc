"""Delivery of notifications: webhooks, SNS topics, and commands of the grid.

Invariant: every failure of a delivery is a NotDelivered, and every wait has a limit.

- Topics: a message to a FIFO topic has the notification's id for deduplication, and the job as its group. Calls of
  boto3 block, so a delivery to SNS runs in a thread.
- Commands: only the grid's settings name commands. A command of the grid runs without a shell, and its arguments do not
  contain text of a job. The command of a grid reads the notification from its standard input. A command that reaches
  its timeout is killed with all processes that the command started.
- Webhooks: a notification is a signed HTTP POST to an allowed address. A webhook's connection goes to the address that
  was checked, so its name cannot change to another address in between. Webhook deliveries do not follow redirects and
  do not use proxies. Logs never contain the address of a webhook, because its path may be a secret.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import os
import socket
import ssl
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, urlsplit

from batchlab import __version__
from batchlab.core import installation
from batchlab.core.errors import BackendError
from batchlab.core.notifications import (
    PORTS,
    TOPIC,
    NotDelivered,
    Notification,
    Target,
    address_problem,
    address_refusal,
    is_loopback,
    problem,
)
from batchlab.core.operating_system.processes import kill_group
from batchlab.core.ports import Clock

if TYPE_CHECKING:
    import httpx

    from batchlab.adapters.aws.endpoint import Endpoint
    from batchlab.core.ports import Clock

log = logging.getLogger(__name__)


class Deliveries:
    """Delivery of notifications by the kind of the target. `endpoint_of` returns the endpoint of SNS in a region."""

    def __init__(self, clock: Clock, endpoint_of: Callable[[str], Endpoint]) -> None:
        self._deliveries = {"webhook": Webhooks(clock).post, "sns": Topics(endpoint_of).publish, "command": run_command}

    async def __call__(self, target: Target, notification: Notification) -> None:
        """Deliver a notification, or raise NotDelivered."""
        # A job's target comes from the bucket, so the manager checks the target again.
        if notification.own is not None and (reason := problem(notification.own)):
            raise NotDelivered(reason, final=True)
        try:
            await self._deliveries[target.kind](target, notification)
        except NotDelivered:
            raise
        except Exception as error:
            # A bug in the delivery to one target must not stop the manager.
            log.exception("a notification failed because of a bug", extra={"job": notification.job})
            raise NotDelivered(f"An error inside the manager: {type(error).__name__}.") from error


FIFO = ".fifo"


class Topics:
    """Publisher to SNS topics. `endpoint_of` returns the endpoint of SNS in a region."""

    def __init__(self, endpoint_of: Callable[[str], Endpoint]) -> None:
        self._endpoint_of = endpoint_of
        self._clients: dict[str, Any] = {}

    async def publish(self, target: Target, notification: Notification) -> None:
        """Deliver a notification, or raise NotDelivered."""
        try:
            await asyncio.to_thread(self._publish, target, notification)
        except BackendError as error:
            raise NotDelivered(error.message) from error

    def _publish(self, target: Target, notification: Notification) -> None:
        from batchlab.adapters.aws.endpoint import client, translate_errors

        if module := installation.missing("aws", "boto3"):
            text = installation.sentence("aws", "A topic of SNS", module)
            raise NotDelivered(f"{text} {installation.anywhere('aws')}", final=True)
        match = TOPIC.fullmatch(target.to)
        if match is None:
            raise NotDelivered("The target is not the ARN of a topic.", final=True)
        region = match[1]
        if region not in self._clients:
            self._clients[region] = client(self._endpoint_of(region), "sns", connections=1)
        fifo = {}
        if target.to.endswith(FIFO):
            fifo = {"MessageGroupId": notification.job or "test", "MessageDeduplicationId": notification.id}
        with translate_errors("SNS"):
            self._clients[region].publish(
                TopicArn=target.to,
                Message=notification.body,
                # Subscribers by mail see the subject.
                Subject=f"batchlab: {notification.job or 'test'} {notification.moment}"[:100],
                MessageAttributes={
                    name: {"DataType": "String", "StringValue": value}
                    for name, value in (
                        ("batchlab.id", notification.id),
                        ("batchlab.moment", notification.moment),
                        ("batchlab.job", notification.job or "test"),
                    )
                },
                **fifo,
            )


COMMAND_TIMEOUT_S = 30.0
MAX_ERROR_BYTES = 4096
"""Maximum number of bytes that are read from the end of a command's error output."""


async def run_command(target: Target, notification: Notification) -> None:
    """Deliver a notification by a command. Raise NotDelivered unless the command exits with status 0."""
    environment = {
        **os.environ,
        "BATCHLAB_NOTIFICATION": notification.id,
        "BATCHLAB_MOMENT": notification.moment,
        "BATCHLAB_JOB": notification.job,
        "BATCHLAB_ATTEMPT": str(notification.attempts + 1),
    }
    # The error output goes to a file, because a process that the command leaves running could keep a pipe open.
    with tempfile.TemporaryFile() as errors:
        try:
            process = await asyncio.create_subprocess_exec(
                *target.command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=errors,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            raise NotDelivered(f"The program {target.command[0]!r} cannot be run: {error.strerror}.") from error
        try:
            async with asyncio.timeout(COMMAND_TIMEOUT_S):
                await _write_input(process, notification.body.encode())
                status = await process.wait()
        except TimeoutError:
            raise NotDelivered(f"The command has not ended after {COMMAND_TIMEOUT_S:.0f} s.") from None
        finally:
            kill_group(process.pid)
            await process.wait()
        if status:
            last = _last_line(errors.fileno())
            raise NotDelivered(f"The command ended with status {status}{f': {last}' if last else ''}.")


async def _write_input(process: asyncio.subprocess.Process, body: bytes) -> None:
    assert process.stdin
    with suppress(BrokenPipeError, ConnectionResetError):  # The command may exit without reading its input.
        process.stdin.write(body)
        await process.stdin.drain()
    process.stdin.close()


def _last_line(file: int) -> str:
    size = os.fstat(file).st_size
    text = os.pread(file, MAX_ERROR_BYTES, max(0, size - MAX_ERROR_BYTES)).decode(errors="replace")
    lines = [line.strip() for line in text.splitlines()]
    return next((line for line in reversed(lines) if line), "")[:200].rstrip(".")


WEBHOOK_TIMEOUT_S = 15.0
"""Maximum time of a webhook delivery in seconds, from the name lookup to the answer's status."""
GONE = 410


def signature(secret: bytes, at_s: int, body: bytes) -> str:
    """Return the value of the header `Batchlab-Signature` for a body."""
    code = hmac.new(secret, f"{at_s}.".encode() + body, hashlib.sha256).hexdigest()
    return f"t={at_s},v1={code}"


def secret_of(target: Target, environ: Mapping[str, str]) -> bytes:
    """Return the secret that a target names. Raise NotDelivered if the secret cannot be read."""
    kind, _, where = target.secret.partition(":")
    if kind == "env":
        secret = environ.get(where, "").encode()
        if not secret:
            raise NotDelivered(f"The secret is in the variable {where}, which the manager's environment lacks.")
        return secret
    try:
        secret = Path(where).read_bytes().strip()
    except OSError as error:
        raise NotDelivered(f"The file of the secret cannot be read: {error.strerror}.") from error
    if not secret:
        raise NotDelivered("The file of the secret is empty.")
    return secret


class Webhooks:
    """Sender of notifications to webhooks."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._tls: ssl.SSLContext | None = None
        # httpx and httpcore log the address of every request, which may be a secret.
        for name in ("httpx", "httpcore"):
            logging.getLogger(name).setLevel(logging.WARNING)

    async def post(self, target: Target, notification: Notification) -> None:
        """Deliver a notification, or raise NotDelivered."""
        if reason := address_problem("webhook", target.to):
            raise NotDelivered(reason, final=True)
        parts = urlsplit(target.to)
        try:
            async with asyncio.timeout(WEBHOOK_TIMEOUT_S):
                address = await resolve(parts, stays_out=target.stays_out)
                status = await self._post(parts, address, self._headers(target, notification), notification.body)
        except TimeoutError:
            raise NotDelivered(f"The receiver did not answer within {WEBHOOK_TIMEOUT_S:.0f} s.") from None
        if 200 <= status < 300:
            return
        if 300 <= status < 400:
            raise NotDelivered(f"The receiver answered with HTTP {status}, and redirects are not followed.", final=True)
        raise NotDelivered(f"The receiver answered with HTTP {status}.", final=status == GONE)

    def _headers(self, target: Target, notification: Notification) -> dict[str, str]:
        headers = {
            "Content-Type": "application/json",
            "User-Agent": f"batchlab/{__version__}",
            "Batchlab-Notification": notification.id,
            "Batchlab-Moment": notification.moment,
            "Batchlab-Attempt": str(notification.attempts + 1),
        }
        if target.secret:
            # The signature contains the time of this attempt, because receivers refuse old times.
            at_s = int(self._clock.now_s())
            key = secret_of(target, os.environ)
            headers["Batchlab-Signature"] = signature(key, at_s, notification.body.encode())
        return headers

    async def _post(self, parts: SplitResult, address: str, headers: Mapping[str, str], body: str) -> int:
        import httpx

        host, port = parts.hostname or "", parts.port or PORTS[parts.scheme]
        own = "" if port == PORTS[parts.scheme] else f":{port}"
        query = f"?{parts.query}" if parts.query else ""
        shown = f"[{address}]" if ":" in address else address
        url = f"{parts.scheme}://{shown}:{port}{parts.path or '/'}{query}"
        name = f"[{host}]" if ":" in host else host
        async with await self._client() as client:
            request = client.build_request(
                "POST",
                url,
                content=body.encode(),
                headers={**headers, "Host": f"{name}{own}"},
                # The connection uses the checked address, but the certificate must match the host's name.
                extensions={"sni_hostname": host},
            )
            try:
                response = await client.send(request, stream=True)
                await response.aclose()
            except httpx.TransportError as error:
                raise NotDelivered(f"The receiver cannot be reached: {_reason(error)}.") from error
        return response.status_code

    async def _client(self) -> httpx.AsyncClient:
        import httpx

        if self._tls is None:
            # Creating the TLS context reads all of the system's certificates, so the TLS context is created in a
            # thread.
            self._tls = await asyncio.to_thread(ssl.create_default_context)
        return httpx.AsyncClient(verify=self._tls, trust_env=False, follow_redirects=False, timeout=WEBHOOK_TIMEOUT_S)


async def resolve(parts: SplitResult, *, stays_out: bool) -> str:
    """Return an allowed address of the URL's host. With `stays_out`, refuse addresses of this machine.

    Raise NotDelivered if any address of the host is refused, because a mix of allowed and refused addresses may be an
    attack.
    """
    host, port = parts.hostname or "", parts.port or PORTS[parts.scheme]
    loop = asyncio.get_running_loop()
    try:
        infos = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise NotDelivered(f"The name {host} cannot be looked up: {_reason(error)}.") from error
    addresses = list(dict.fromkeys(str(info[4][0]) for info in infos))
    for address in addresses:
        if reason := address_refusal(address):
            raise NotDelivered(f"The name {host} has a refused address: {reason}", final=True)
        if stays_out and is_own(address):
            raise NotDelivered(
                f"The name {host} has a refused address: {address} is the manager's own machine, and jobs must not "
                "send notifications to it.",
                final=True,
            )
        if parts.scheme == "http" and not is_loopback(address):
            raise NotDelivered(f"{host} is not this machine, so only https may be used.", final=True)
    return addresses[0]


def is_own(address: str) -> bool:
    """Return whether an IP address belongs to this machine."""
    if is_loopback(address):
        return True
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))  # Connecting a UDP socket sends nothing, but selects the source address.
        except OSError:
            return False  # The address is unreachable from this machine.
        return str(probe.getsockname()[0]) == address


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).rstrip(".")
