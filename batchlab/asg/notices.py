"""Spot interruptions on demand: what AWS decides for its own reasons, somebody here decides.

A service of our own beside Auto Scaling, under the same signatures: JSON in, JSON out.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from batchlab.asg.app import Request, Response
from batchlab.asg.fault import Fault, invalid
from batchlab.errors import BackendError, Unreachable, UsageError
from batchlab.fleet import faults

if TYPE_CHECKING:
    from batchlab.adapters.aws import Endpoint
    from batchlab.fleet.autoscaling import AutoScaling

NAME = "batchlab"
"""What its requests are signed for."""
_MOST_S = 3600.0
_ANSWER_S = 10.0


class NoticeService:
    """Gives an instance a notice, by the engine; `changed` is called where that went well."""

    def __init__(self, engine: AutoScaling, changed: Callable[[], None]) -> None:
        self._engine = engine
        self._changed = changed

    async def answer(self, request: Request, _: str) -> Response:
        """As `app.Service` says."""
        instance, kind, notice_s = _asked(request.body)
        try:
            if kind == "interruption":
                self._engine.interrupt(instance, notice_s=notice_s)
            else:
                self._engine.rebalance(instance)
        except faults.Fault as fault:
            raise Fault(fault.code, fault.message) from fault
        self._changed()
        return Response(200, b"{}", "application/json")

    def refuse(self, _: Request, fault: Fault, __: str) -> Response:
        """As `app.Service` says."""
        body = json.dumps({"code": fault.code, "message": fault.message}).encode()
        status = 500 if fault.code == "InternalFailure" else 400
        return Response(status, body, "application/json")


def _asked(body: bytes) -> tuple[str, str, float]:
    try:
        asked = json.loads(body)
        instance, kind, notice_s = asked["instance"], asked["notice"], asked["notice_s"]
    except (ValueError, KeyError, TypeError) as error:
        raise invalid("It takes an object with instance, notice and notice_s.") from error
    if not isinstance(instance, str) or kind not in ("interruption", "rebalance"):
        raise invalid("notice is interruption or rebalance, instance the id of one.")
    if isinstance(notice_s, bool) or not isinstance(notice_s, (int, float)):
        raise invalid("notice_s is a number of seconds.")
    if not 0 <= notice_s <= _MOST_S:
        raise invalid(f"notice_s is from 0 to {_MOST_S:g}.")
    return instance, kind, float(notice_s)


def give(at: Endpoint, instance: str, notice: str, notice_s: float) -> None:
    """Ask the endpoint for a notice ("interruption" or "rebalance") to an instance.

    UsageError where it refuses, Unreachable where nothing answers.
    """
    import httpx
    from botocore.auth import SigV4Auth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials

    url = at.url or ""
    body = json.dumps({"instance": instance, "notice": notice, "notice_s": notice_s})
    asked = AWSRequest("POST", url + "/", data=body, headers={"Content-Type": "application/json"})
    SigV4Auth(Credentials(at.access_key, at.secret_key), NAME, "us-east-1").add_auth(asked)
    try:
        answer = httpx.post(
            url + "/", content=body, headers=dict(asked.headers.items()), timeout=_ANSWER_S
        )
        told: Any = answer.json()
    except httpx.HTTPError as error:
        raise Unreachable(
            f"No Auto Scaling endpoint answers at {url}: {error}.",
            remedy="A grid of `--backend localstack` has one, and so has `batchlab asg serve`.",
        ) from error
    except ValueError as error:
        raise BackendError(
            f"What answers at {url} is no `batchlab asg serve`.",
            remedy="Name its address with --endpoint.",
        ) from error
    if answer.status_code != 200:
        raise UsageError(f"{told.get('message', 'It is refused')}".rstrip(".") + ".")
