"""A notification by HTTP POST, signed, to nowhere but where it is meant to go.

Invariants: what is connected to is the address that was checked, so that a name cannot change its
meaning in between; no redirect is followed, no proxy asked, and nothing of an answer is kept but
its status. The address of a webhook is in no log, since its path may be a secret.
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
"""From the look-up of the name to the answer's status."""
GONE = 410


def signature(secret: bytes, at_s: int, body: bytes) -> str:
    """The value of the header `Batchlab-Signature`."""
    code = hmac.new(secret, f"{at_s}.".encode() + body, hashlib.sha256).hexdigest()
    return f"t={at_s},v1={code}"


def secret_of(target: Target, environ: Mapping[str, str]) -> bytes:
    """The key that a target names; NotDelivered where it cannot be had."""
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
    """Posts to any of them."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._tls: ssl.SSLContext | None = None
        # They log the addresses of all that they ask for.
        for name in ("httpx", "httpcore"):
            logging.getLogger(name).setLevel(logging.WARNING)

    async def post(self, target: Target, one: Notification) -> None:
        """Deliver; NotDelivered."""
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
            # The time of this try: a receiver refuses what is old, and a retry may be hours later.
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
                # The certificate must be that of the name, though the address is connected to.
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
            # It reads all of the system's certificates.
            self._tls = await asyncio.to_thread(ssl.create_default_context)
        return httpx.AsyncClient(
            verify=self._tls, trust_env=False, follow_redirects=False, timeout=WHOLE_S
        )


async def resolved(parts: SplitResult, *, stays_out: bool) -> str:
    """An address of the URL's host that something may be sent to, with `stays_out` none of this
    machine's. NotDelivered where one of its addresses is refused: a name that leads to both is
    nobody's friend."""
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
    """Whether an IP address is one of this machine's."""
    if is_loopback(address):
        return True
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as asked:
        try:
            asked.connect((address, 9))  # sends nothing, but chooses where from it would
        except OSError:
            return False  # nothing leads there
        return str(asked.getsockname()[0]) == address


def _told(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).rstrip(".")
