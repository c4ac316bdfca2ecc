"""Client of EC2's instance metadata service, version 2, and the Notices port over the metadata service.

The client works on EC2 and in batchlab's containers. AWS_EC2_METADATA_SERVICE_ENDPOINT, which AWS's SDKs also read,
sets another address of the metadata service. Invariant: a request fails after `ANSWER_S` seconds without an answer.
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
"""Requested lifetime of a token in seconds, which is the longest that the metadata service allows."""
_RENEW_S = TTL_S / 2
ANSWER_S = 2.0
_MAX_BYTES = 1024 * 1024

_LEAVING = ("Terminated", "Warmed:Terminated")


class Imds:
    """Metadata service of the instance that runs this process. Several threads may share one client.

    `url` is the address of the metadata service. The default address of the metadata service is the address that AWS's
    SDKs use. All methods of this class raise the same errors as `get`.
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
                f"{self._url!r} is not the address of a metadata service.",
                remedy=f"Set {ENDPOINT} to a URL such as {_IPV4}, or unset it.",
            )
        self._token = ""
        self._renew_s = 0.0
        self._renewing = threading.Lock()

    def get(self, path: str) -> str | None:
        """Return the content of `path` below `latest/`, or None if `path` does not exist. The call blocks its thread.

        Raise Unreachable if the metadata service does not answer. Raise BackendError if the service refuses the
        request.
        """
        for _ in range(2):
            token = self._current_token()
            status, body = self._ask("GET", path, {"X-aws-ec2-metadata-token": token})
            if status != 401:
                break
            # The metadata service does not know the session token, or the address of this instance has changed.
            with self._renewing:
                if self._token == token:
                    self._token = ""
        if status == 404:
            return None
        if status != 200:
            raise self._decline_error(status)
        return body.decode(errors="replace")

    def instance_id(self) -> str:
        """Return the id of the instance that runs this process."""
        return self._require("meta-data/instance-id")

    def image(self) -> str:
        """Return the id of the instance's Amazon Machine Image, or "" if the instance is not from EC2."""
        return (self.get("meta-data/ami-id") or "").strip()

    def is_spot(self) -> bool:
        """Return whether the instance is a Spot instance, which EC2 may interrupt."""
        return self._require("meta-data/instance-life-cycle") == "spot"

    def is_leaving(self) -> bool:
        """Return whether the instance's Auto Scaling group takes the instance out of service."""
        state = self.get("meta-data/autoscaling/target-lifecycle-state")
        return state is not None and state.strip() in _LEAVING

    def tag(self, name: str) -> str:
        """Return a tag of the instance, or "" if the tag does not exist."""
        return (self.get(f"meta-data/tags/instance/{name}") or "").strip()

    def require_tag(self, name: str) -> str:
        """Return a tag of the instance. Raise NotFound if the tag does not exist."""
        return self._require(f"meta-data/tags/instance/{name}")

    def _require(self, path: str) -> str:
        content = self.get(path)
        if content is None:
            raise NotFound(f"The metadata service at {self._url} does not know {path}.")
        return content.strip()

    def _current_token(self) -> str:
        with self._renewing:
            if not self._token or time.monotonic() >= self._renew_s:
                status, body = self._ask("PUT", "api/token", {"X-aws-ec2-metadata-token-ttl-seconds": str(TTL_S)})
                if status != 200:
                    raise self._decline_error(status)
                self._token = body.decode("ascii", errors="replace").strip()
                self._renew_s = time.monotonic() + _RENEW_S
            return self._token

    def _ask(self, method: str, path: str, headers: Mapping[str, str]) -> tuple[int, bytes]:
        # The metadata request bypasses proxies. A proxy on another machine would return the metadata of the proxy's
        # machine.
        with closing(http.client.HTTPConnection(self._host, self._port, timeout=ANSWER_S)) as connection:
            try:
                connection.request(method, f"/latest/{path}", headers=dict(headers))
                response = connection.getresponse()
                return response.status, response.read(_MAX_BYTES)
            except (OSError, http.client.HTTPException) as error:
                why = str(error) or type(error).__name__
                raise Unreachable(
                    f"No metadata service answers at {self._url} ({why}).",
                    remedy="In a container on EC2, raise the instance's metadata hop limit to 2.",
                ) from error

    def _decline_error(self, status: int) -> BackendError:
        text = f"The metadata service at {self._url} answers with HTTP {status}."
        return Unreachable(text) if status >= 500 else BackendError(text)


class ImdsNotices:
    """Notices port over the metadata service.

    The port reports a Spot interruption notice, and the termination of the instance by its Auto Scaling group. The port
    ignores rebalance recommendations, which say only that an interruption has become more likely. An Auto Scaling group
    that acts on a rebalance recommendation launches a replacement first and then terminates the instance.
    """

    def __init__(self, imds: Imds) -> None:
        self._imds = imds

    async def notice(self) -> Notice | None:
        return await asyncio.to_thread(self._notice)

    def _notice(self) -> Notice | None:
        action = self._imds.get("meta-data/spot/instance-action")
        if action is not None:
            return _interruption(action)
        if self._imds.is_leaving():
            return Notice("its Auto Scaling group takes the instance out of service")
        return None


def _interruption(content: str) -> Notice:
    """Return the Spot interruption notice of an `instance-action` document, even if the document cannot be parsed."""
    try:
        document = json.loads(content)
        why = f"a Spot interruption will {document['action']} the instance"
        by_s = datetime.fromisoformat(document["time"]).timestamp()
    except (ValueError, KeyError, TypeError):
        return Notice("a Spot interruption, whose details cannot be read")
    return Notice(why, by_s)
