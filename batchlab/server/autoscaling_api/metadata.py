"""Metadata of instances from the engine, and a service that sends notices to instances.

AWS sends Spot interruptions and rebalance recommendations for its own reasons. Here a user requests
them. The notice service is not a part of AWS. It takes and returns JSON, and its requests have the
same signatures.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from batchlab.adapters.aws.metadata_server import Interruption, Metadata, MetadataSource, Signals, iso
from batchlab.core.errors import BackendError, Unreachable, UsageError
from batchlab.core.ports import Clock
from batchlab.fleet import api_types
from batchlab.fleet.api_types import ValidationError
from batchlab.fleet.autoscaling import AutoScaling
from batchlab.server.autoscaling_api.app import Fault, Request, Response, invalid
from batchlab.server.autoscaling_api.launch_templates import Role, TemplateFile

if TYPE_CHECKING:
    from batchlab.adapters.aws.endpoint import Endpoint
    from batchlab.fleet.autoscaling import AutoScaling

CREDENTIALS_S = 6 * 3600.0
"""Lifetime of a role's credentials in seconds, as on EC2."""


class InstanceFacts:
    """InstanceFacts of the engine about an instance. `engine` is set after the launcher is created."""

    engine: AutoScaling

    def signals(self, instance: str) -> Signals:
        """Return the signals of an instance. An instance that belongs to no group gets the signal
        that it will end."""
        try:
            metadata = self.engine.metadata(instance)
        except ValidationError:
            return Signals("Terminated")
        interruption = None
        if metadata.spot_action and metadata.spot_time is not None:
            interruption = Interruption(metadata.spot_time, metadata.spot_action)
        return Signals(metadata.target_lifecycle_state, interruption, metadata.rebalance_time)

    def of(self, launcher: object, templates: TemplateFile, clock: Clock) -> MetadataSource:
        """Return a source of the launcher's metadata with the group's tags, and with the user data
        and the credentials of the launch template."""
        return _Told(self, launcher, templates, clock)


class _Told:
    def __init__(self, facts: InstanceFacts, launcher: object, templates: TemplateFile, clock: Clock) -> None:
        self._facts = facts
        self._launcher = launcher
        self._templates = templates
        self._clock = clock

    async def metadata(self, address: str) -> Metadata | None:
        ask = getattr(self._launcher, "metadata", None)
        metadata: Metadata | None = await ask(address) if ask else None
        if metadata is None:
            return None
        try:
            known = self._facts.engine.metadata(metadata.instance)
            (row,) = self._facts.engine.describe_auto_scaling_instances([metadata.instance])
            metadata = replace(metadata, tags={**metadata.tags, **dict(known.tags)})
            if row.launch_template is None:
                return metadata
            version = self._templates.referred(row.launch_template)
        except (ValidationError, ValueError):
            return metadata  # the instance or its template no longer exists
        credentials = {}
        if role := version.role:
            credentials[role.name] = _document(role, self._clock.now_s())
        return replace(metadata, user_data=version.user_data, credentials=credentials)


def _document(role: Role, now_s: float) -> Mapping[str, str]:
    """Return credentials in the format of the metadata service."""
    return {
        "Code": "Success",
        "LastUpdated": iso(now_s),
        "Type": "AWS-HMAC",
        "AccessKeyId": role.access_key,
        "SecretAccessKey": role.secret_key,
        "Token": role.token,
        "Expiration": iso(now_s + CREDENTIALS_S),
    }


NAME = "batchlab"
"""Service name in the signatures of its requests."""
_MAX_S = 3600.0
_ANSWER_S = 10.0


class NoticeService:
    """Service that sends notices to instances through the engine. It calls `changed` after each
    success."""

    def __init__(self, engine: AutoScaling, changed: Callable[[], None]) -> None:
        self._engine = engine
        self._changed = changed

    async def answer(self, request: Request, _: str) -> Response:
        instance, kind, notice_s = _asked(request.body)
        try:
            if kind == "interruption":
                self._engine.interrupt(instance, notice_s=notice_s)
            else:
                self._engine.rebalance(instance)
        except api_types.Fault as fault:
            raise Fault(fault.code, fault.message) from fault
        self._changed()
        return Response(200, b"{}", "application/json")

    def refuse(self, _: Request, fault: Fault, __: str) -> Response:
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
    if not 0 <= notice_s <= _MAX_S:
        raise invalid(f"notice_s is from 0 to {_MAX_S:g}.")
    return instance, kind, float(notice_s)


def send_notice(at: Endpoint, instance: str, notice: str, notice_s: float) -> None:
    """Request a notice ("interruption" or "rebalance") to an instance from the endpoint.

    Raise UsageError if the endpoint refuses, and Unreachable if it does not answer.
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
        answer = httpx.post(url + "/", content=body, headers=dict(asked.headers.items()), timeout=_ANSWER_S)
        told: Any = answer.json()
    except httpx.HTTPError as error:
        raise Unreachable(
            f"No Auto Scaling endpoint answers at {url}: {error}.",
            remedy="A grid of `--backend localstack` has one, and so has `batchlab asg serve`.",
        ) from error
    except ValueError as error:
        raise BackendError(
            f"What answers at {url} is no `batchlab asg serve`.", remedy="Name its address with --endpoint."
        ) from error
    if answer.status_code != 200:
        raise UsageError(f"{told.get('message', 'It is refused')}".rstrip(".") + ".")
