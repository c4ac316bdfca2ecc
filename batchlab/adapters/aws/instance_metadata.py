"""What an instance asks about itself: EC2's metadata service, version 2, and its notices.

The same on EC2 and in a container of ours; AWS_EC2_METADATA_SERVICE_ENDPOINT, where AWS's own SDKs
look too, names a service that is elsewhere. Invariant: a service that says nothing for ANSWER_S is
given up.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import threading
import time
from collections.abc import Mapping
from contextlib import closing
from datetime import datetime
from urllib.parse import urlsplit

from batchlab.core.errors import BackendError, NotFound, Unreachable, UsageError
from batchlab.core.ports import Notice

ENDPOINT = "AWS_EC2_METADATA_SERVICE_ENDPOINT"
MODE = "AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE"
_IPV4, _IPV6 = "http://169.254.169.254", "http://[fd00:ec2::254]"

TTL_S = 21_600
"""What a token is asked for: the longest there is."""
_RENEW_S = TTL_S / 2
ANSWER_S = 2.0
_MOST_BYTES = 1024 * 1024

_LEAVING = ("Terminated", "Warmed:Terminated")


class Imds:
    """The metadata service of the instance this process runs on; safe to share among threads.

    `url` where it is; by default where AWS's SDKs would look for it.
    """

    def __init__(self, url: str = "", environ: Mapping[str, str] = os.environ) -> None:
        ipv6 = environ.get(MODE, "").lower() == "ipv6"
        self._url = url or environ.get(ENDPOINT) or (_IPV6 if ipv6 else _IPV4)
        parts = urlsplit(self._url)
        try:
            self._host, self._port = parts.hostname or "", parts.port or 80
        except ValueError:
            self._host, self._port = "", 0
        if parts.scheme != "http" or not self._host:
            raise UsageError(
                f"{self._url!r} is no address of a metadata service.",
                remedy=f"Let {ENDPOINT} be a URL such as {_IPV4}, or leave it unset.",
            )
        self._token = ""
        self._renew_s = 0.0
        self._renewing = threading.Lock()

    def get(self, path: str) -> str | None:
        """What is at `path` below `latest/`, None where there is nothing. Blocks. Unreachable
        where no metadata service answers, BackendError where it declines."""
        for _ in range(2):
            token = self._current_token()
            status, body = self._ask("GET", path, {"X-aws-ec2-metadata-token": token})
            if status != 401:
                break
            # The service has forgotten it, or we have another address by now.
            self._drop(token)
        if status == 404:
            return None
        if status != 200:
            raise self._declined(status)
        return body.decode(errors="replace")

    def instance_id(self) -> str:
        """The instance this process runs on; errors as `get`."""
        return self._needed("meta-data/instance-id")

    def image(self) -> str:
        """The machine image it was launched from, "" where it is none of EC2's; errors as `get`."""
        return (self.get("meta-data/ami-id") or "").strip()

    def is_spot(self) -> bool:
        """Whether it may be interrupted; errors as `get`."""
        return self._needed("meta-data/instance-life-cycle") == "spot"

    def is_leaving(self) -> bool:
        """Whether its Auto Scaling group takes it out of service; errors as `get`."""
        state = self.get("meta-data/autoscaling/target-lifecycle-state")
        return state is not None and state.strip() in _LEAVING

    def needed_tag(self, name: str) -> str:
        """The instance's tag of that name; NotFound where it has none, else as `get`."""
        return self._needed(f"meta-data/tags/instance/{name}")

    def _needed(self, path: str) -> str:
        found = self.get(path)
        if found is None:
            raise NotFound(f"The metadata service at {self._url} has no {path}.")
        return found.strip()

    def _current_token(self) -> str:
        with self._renewing:
            if not self._token or time.monotonic() >= self._renew_s:
                asked = {"X-aws-ec2-metadata-token-ttl-seconds": str(TTL_S)}
                status, body = self._ask("PUT", "api/token", asked)
                if status != 200:
                    raise self._declined(status)
                self._token = body.decode("ascii", errors="replace").strip()
                self._renew_s = time.monotonic() + _RENEW_S
            return self._token

    def _drop(self, token: str) -> None:
        with self._renewing:
            if self._token == token:
                self._token = ""

    def _ask(self, method: str, path: str, headers: Mapping[str, str]) -> tuple[int, bytes]:
        # Straight to it: a proxy of the environment could not reach it, and must not.
        with closing(
            http.client.HTTPConnection(self._host, self._port, timeout=ANSWER_S)
        ) as connection:
            try:
                connection.request(method, f"/latest/{path}", headers=dict(headers))
                response = connection.getresponse()
                return response.status, response.read(_MOST_BYTES)
            except (OSError, http.client.HTTPException) as error:
                why = str(error) or type(error).__name__
                raise Unreachable(
                    f"No metadata service answers at {self._url} ({why}).",
                    remedy="In a container on EC2, raise the instance's metadata hop limit to 2.",
                ) from error

    def _declined(self, status: int) -> BackendError:
        text = f"The metadata service at {self._url} answers with HTTP {status}."
        return Unreachable(text) if status >= 500 else BackendError(text)


class ImdsNotices:
    """The Notices port over the metadata service.

    A Spot interruption notice, or an Auto Scaling group that takes the instance out. A rebalance
    recommendation is none: it says that an interruption has become likelier, and a group that
    acts on it launches a replacement first, and then takes the instance out.
    """

    def __init__(self, imds: Imds) -> None:
        self._imds = imds

    async def notice(self) -> Notice | None:
        """As the port says."""
        return await asyncio.to_thread(self._notice)

    def _notice(self) -> Notice | None:
        action = self._imds.get("meta-data/spot/instance-action")
        if action is not None:
            return _interruption(action)
        if self._imds.is_leaving():
            return Notice("its Auto Scaling group takes the instance out of service")
        return None


def _interruption(content: str) -> Notice:
    """What an instance-action document says; one that cannot be read says at least that."""
    try:
        document = json.loads(content)
        why = f"a Spot interruption will {document['action']} the instance"
        by_s = datetime.fromisoformat(document["time"]).timestamp()
    except (ValueError, KeyError, TypeError):
        return Notice("a Spot interruption, in a form that cannot be read")
    return Notice(why, by_s)
