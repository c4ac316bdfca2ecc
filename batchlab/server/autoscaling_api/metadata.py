"""Metadata of instances from the engine, and a service that sends notices to instances.

On AWS, only AWS decides when to send a Spot interruption or a rebalance recommendation. With the notice service, a user
requests a Spot interruption or a rebalance recommendation. The notice service is not a part of AWS. Requests and
answers of the notice service are JSON, and the requests are signed like requests to AWS's services.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from batchlab.adapters.aws.metadata_server import Interruption, Metadata, MetadataSource, Signals, iso
from batchlab.core.errors import BackendError, Unreachable, UsageError
from batchlab.core.ports import Clock
from batchlab.fleet import api_types
from batchlab.fleet.api_types import ValidationError
from batchlab.fleet.autoscaling import AutoScaling
from batchlab.server.autoscaling_api.app import Fault, Request, Response, invalid
from batchlab.server.autoscaling_api.launch_templates import TemplateFile

if TYPE_CHECKING:
    from batchlab.adapters.aws.endpoint import Endpoint
    from batchlab.fleet.autoscaling import AutoScaling

CREDENTIALS_S = 6 * 3600.0
"""Lifetime of a role's credentials in seconds, as on EC2."""


class InstanceFacts:
    """Facts about an instance, which come from the engine.

    The attribute `engine` is set after the launcher is created.
    """

    engine: AutoScaling

    def signals(self, instance: str) -> Signals:
        """Return the signals of an instance. An instance that is not in a group gets the target state Terminated."""
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
        and the credentials of the launch template.
        """
        return _GroupMetadata(self, launcher, templates, clock)


@dataclass(slots=True)
class _GroupMetadata:
    _facts: InstanceFacts
    _launcher: object
    _templates: TemplateFile
    _clock: Clock

    async def metadata(self, address: str) -> Metadata | None:
        read = getattr(self._launcher, "metadata", None)
        metadata: Metadata | None = await read(address) if read else None
        if metadata is None:
            return None
        engine = self._facts.engine
        try:
            tags = engine.metadata(metadata.instance).tags
            (row,) = engine.describe_auto_scaling_instances([metadata.instance])
            metadata = replace(metadata, tags={**metadata.tags, **dict(tags)})
            if row.launch_template is None:
                return metadata
            version = self._templates.referred(row.launch_template)
        except (ValidationError, ValueError):
            return metadata  # the instance or its template no longer exists
        credentials = {}
        if role := version.role:
            now_s = self._clock.now_s()
            credentials[role.name] = {
                "Code": "Success",
                "LastUpdated": iso(now_s),
                "Type": "AWS-HMAC",
                "AccessKeyId": role.access_key,
                "SecretAccessKey": role.secret_key,
                "Token": role.token,
                "Expiration": iso(now_s + CREDENTIALS_S),
            }
        return replace(metadata, user_data=version.user_data, credentials=credentials)


NAME = "batchlab"
"""Service name in the signatures of requests to the notice service."""
_MAX_NOTICE_S = 3600.0
_TIMEOUT_S = 10.0


class NoticeService:
    """Service that sends notices to instances through the engine.

    The service calls `changed` after each successful request.
    """

    def __init__(self, engine: AutoScaling, changed: Callable[[], None]) -> None:
        self._engine = engine
        self._changed = changed

    async def answer(self, request: Request, _: str) -> Response:
        instance, kind, notice_s = _parse(request.body)
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


def _parse(body: bytes) -> tuple[str, str, float]:
    try:
        notice = json.loads(body)
        instance, kind, notice_s = notice["instance"], notice["notice"], notice["notice_s"]
    except (ValueError, KeyError, TypeError) as error:
        raise invalid("The request must be a JSON object with instance, notice, and notice_s.") from error
    if not isinstance(instance, str) or kind not in ("interruption", "rebalance"):
        raise invalid("notice must be interruption or rebalance, and instance must be an instance id.")
    if isinstance(notice_s, bool) or not isinstance(notice_s, (int, float)):
        raise invalid("notice_s must be a number of seconds.")
    if not 0 <= notice_s <= _MAX_NOTICE_S:
        raise invalid(f"notice_s must be between 0 and {_MAX_NOTICE_S:g}.")
    return instance, kind, float(notice_s)


def send_notice(at: Endpoint, instance: str, notice: str, notice_s: float) -> None:
    """Let the endpoint send a notice ("interruption" or "rebalance") to an instance.

    Raise UsageError if the endpoint refuses the request, and Unreachable if the endpoint does not answer.
    """
    import httpx
    from botocore.auth import SigV4Auth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials

    url = at.url or ""
    body = json.dumps({"instance": instance, "notice": notice, "notice_s": notice_s})
    request = AWSRequest("POST", url + "/", data=body, headers={"Content-Type": "application/json"})
    SigV4Auth(Credentials(at.access_key, at.secret_key), NAME, "us-east-1").add_auth(request)
    try:
        answer = httpx.post(url + "/", content=body, headers=dict(request.headers.items()), timeout=_TIMEOUT_S)
        document: Any = answer.json()
    except httpx.HTTPError as error:
        raise Unreachable(
            f"No Auto Scaling endpoint answers at {url}: {error}.",
            remedy="Start a grid with `--backend localstack`, or run `batchlab asg serve`.",
        ) from error
    except ValueError as error:
        raise BackendError(
            f"The server at {url} is not a `batchlab asg serve`.", remedy="Name the right address with --endpoint."
        ) from error
    if answer.status_code != 200:
        raise UsageError(f"{document.get('message', 'The endpoint refuses the notice')}".rstrip(".") + ".")
