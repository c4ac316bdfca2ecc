"""Delivery of a notification by a signed HTTP POST, only to allowed addresses.

Invariant: the connection goes to the address that was checked, so a name cannot change its address
in between. Redirects are not followed, and proxies are not used. Only the status of an answer is
kept. Logs never contain the address of a webhook, because its path may be a secret.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import os
import socket
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, urlsplit

from batchlab import __version__
from batchlab.core.notification_targets import PORTS
from batchlab.core.notifications import (
    NotDelivered,
    Notification,
    Target,
    address_problem,
    address_refusal,
    is_loopback,
)
from batchlab.core.ports import Clock

if TYPE_CHECKING:
    import httpx

WHOLE_S = 15.0
"""Maximum time in seconds from the name lookup to the answer's status."""
GONE = 410


def signature(secret: bytes, at_s: int, body: bytes) -> str:
    """Return the value of the header `Batchlab-Signature`."""
    code = hmac.new(secret, f"{at_s}.".encode() + body, hashlib.sha256).hexdigest()
    return f"t={at_s},v1={code}"


def secret_of(target: Target, environ: Mapping[str, str]) -> bytes:
    """Return the key that a target names. Raise NotDelivered if it cannot be read."""
    kind, _, where = target.secret.partition(":")
    if kind == "env":
        found = environ.get(where, "")
        if not found:
            raise NotDelivered(f"The manager's environment has no variable {where}, its secret.")
        return found.encode()
    try:
        read = Path(where).read_bytes().strip()
    except OSError as error:
        raise NotDelivered(f"The file of its secret cannot be read: {error.strerror}.") from error
    if not read:
        raise NotDelivered("The file of its secret is empty.")
    return read


class Webhooks:
    """Sender of notifications to webhooks."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._tls: ssl.SSLContext | None = None
        # These libraries log the address of every request.
        for name in ("httpx", "httpcore"):
            logging.getLogger(name).setLevel(logging.WARNING)

    async def post(self, target: Target, one: Notification) -> None:
        """Deliver a notification, or raise NotDelivered."""
        if wrong := address_problem("webhook", target.to):
            raise NotDelivered(wrong, final=True)
        parts = urlsplit(target.to)
        try:
            async with asyncio.timeout(WHOLE_S):
                address = await resolved(parts, stays_out=target.stays_out)
                status = await self._posted(parts, address, self._headers(target, one), one.body)
        except TimeoutError:
            raise NotDelivered(f"It did not answer within {WHOLE_S:.0f} s.") from None
        if 200 <= status < 300:
            return
        if 300 <= status < 400:
            raise NotDelivered(
                f"It answered with a redirect (HTTP {status}), and none is followed.", final=True
            )
        raise NotDelivered(f"It answered with HTTP {status}.", final=status == GONE)

    def _headers(self, target: Target, one: Notification) -> dict[str, str]:
        headers = {
            "Content-Type": "application/json",
            "User-Agent": f"batchlab/{__version__}",
            "Batchlab-Notification": one.id,
            "Batchlab-Moment": one.moment,
            "Batchlab-Attempt": str(one.attempts + 1),
        }
        if target.secret:
            # The time is that of this try, because receivers refuse old times and a retry may be
            # hours later.
            at_s = int(self._clock.now_s())
            key = secret_of(target, os.environ)
            headers["Batchlab-Signature"] = signature(key, at_s, one.body.encode())
        return headers

    async def _posted(
        self, parts: SplitResult, address: str, headers: Mapping[str, str], body: str
    ) -> int:
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
                # The connection uses the address, but the certificate must match the name.
                extensions={"sni_hostname": host},
            )
            try:
                response = await client.send(request, stream=True)
                await response.aclose()
            except httpx.TransportError as error:
                raise NotDelivered(f"It cannot be reached: {_told(error)}.") from error
        return response.status_code

    async def _client(self) -> httpx.AsyncClient:
        import httpx

        if self._tls is None:
            # This call reads all of the system's certificates.
            self._tls = await asyncio.to_thread(ssl.create_default_context)
        return httpx.AsyncClient(
            verify=self._tls, trust_env=False, follow_redirects=False, timeout=WHOLE_S
        )


async def resolved(parts: SplitResult, *, stays_out: bool) -> str:
    """Return an allowed address of the URL's host. With `stays_out`, this machine is not allowed.

    Raise NotDelivered if any of its addresses is refused, because a name with allowed and refused
    addresses may be an attack.
    """
    host, port = parts.hostname or "", parts.port or PORTS[parts.scheme]
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise NotDelivered(f"The name {host} cannot be looked up: {_told(error)}.") from error
    addresses = list(dict.fromkeys(str(one[4][0]) for one in found))
    for address in addresses:
        if wrong := address_refusal(address):
            raise NotDelivered(f"The name {host} leads astray: {wrong}", final=True)
        if stays_out and is_own(address):
            raise NotDelivered(
                f"The name {host} leads astray: {address} is the manager's own machine, where no "
                "job has anything sent to.",
                final=True,
            )
        if parts.scheme == "http" and not is_loopback(address):
            raise NotDelivered(
                f"{host} is not this machine, so only https may be used.", final=True
            )
    return addresses[0]


def is_own(address: str) -> bool:
    """Return whether an IP address belongs to this machine."""
    if is_loopback(address):
        return True
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as asked:
        try:
            asked.connect((address, 9))  # sends nothing, but selects the source address
        except OSError:
            return False  # the address is unreachable
        return str(asked.getsockname()[0]) == address


def _told(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).rstrip(".")
