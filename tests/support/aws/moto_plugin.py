"""Pytest plugin for moto's own tests of Auto Scaling. boto3's requests to Auto Scaling go to batchlab's endpoint.

moto's package of tests has the name `tests`, too, so a process of its own loads a copy of this file. Every test has an
endpoint with its own state in each region. moto still answers requests to EC2 (subnets and launch templates) and
requests for launch configurations, and the endpoint launches instances from these templates and launch configurations.
moto's tests expect that a change is complete when a request returns, so the engine ticks until nothing changes.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from botocore.awsrequest import AWSPreparedRequest, AWSResponse
from botocore.compat import HTTPHeaders
from botocore.handlers import BUILTIN_HANDLERS
from moto.autoscaling.models import autoscaling_backends
from moto.core.botocore_stubber import MockRawResponse
from moto.core.exceptions import ServiceException
from moto.core.models import botocore_stubber
from moto.ec2.models import ec2_backends

from batchlab.adapters.clock import RandomIds, WallClock
from batchlab.adapters.memory.launcher import MemoryState
from batchlab.core.model import Machine, Pool
from batchlab.core.ports import ANY_MACHINE
from batchlab.fleet.api_types import LaunchTemplate, Template, ValidationError
from batchlab.fleet.autoscaling import AutoScaling
from batchlab.server.autoscaling_api.cloudwatch import MetricStore
from batchlab.server.autoscaling_api.engine_loop import application

ACCOUNT = "123456789012"
"""The account of moto's tests."""
_HOST = re.compile(r"autoscaling\.([a-z0-9-]+)\.amazonaws\.com")


class MotoTemplates:
    """Implementation of the Templates port on the launch templates and launch configurations in moto."""

    def __init__(self, region: str) -> None:
        self._ec2 = ec2_backends[ACCOUNT][region]
        self._autoscaling = autoscaling_backends[ACCOUNT][region]

    def template(self, reference: LaunchTemplate) -> Template:
        try:
            if reference.launch_template_id:
                template = self._ec2.get_launch_template(reference.launch_template_id)
            else:
                template = self._ec2.get_launch_template_by_name(reference.launch_template_name)
            version = template.get_version(reference.version or "$Default")
        except ServiceException as error:
            raise ValidationError(str(error)) from error
        return Template(LaunchTemplate(template.id, template.name, str(version.number)), version.instance_type)

    def launch_configuration(self, name: str) -> Template:
        found = self._autoscaling.launch_configurations.get(name)
        if found is None:
            raise ValidationError(f"Launch configuration name not found - {name}")
        return Template(LaunchTemplate(), found.instance_type)


class Instances:
    """Implementation of the Launcher port, and of StoppableLauncher, on a table."""

    def __init__(self, changed: asyncio.Event) -> None:
        self._ends: dict[str, str | None] = {}
        self._changed = changed

    async def launch(self, pool: Pool, instance: str, machine: Machine = ANY_MACHINE) -> None:
        self._set(instance, None)

    async def terminate(self, instance: str, *, grace_s: float) -> None:
        self._set(instance, "exit 0")

    async def stop(self, instance: str, *, hibernate: bool) -> None:
        self._set(instance, None)

    async def start(self, instance: str) -> None:
        self._set(instance, None)

    async def running(self) -> Mapping[str, str | None]:
        return dict(self._ends)

    def _set(self, instance: str, end: str | None) -> None:
        self._ends[instance] = end
        self._changed.set()


class RegionEndpoint:
    """batchlab's Auto Scaling endpoint in one region of one test."""

    def __init__(self, region: str) -> None:
        clock, metrics = WallClock(), MetricStore(WallClock())
        self._changed = asyncio.Event()
        self._engine = AutoScaling(
            Instances(self._changed),
            clock,
            RandomIds(),
            MemoryState(),
            templates=MotoTemplates(region),
            metrics=metrics,
            region=region,
            account=ACCOUNT,
        )
        self._app = application(self._engine, clock, self._changed, metrics=metrics)

    async def answer(self, request: AWSPreparedRequest, body: bytes) -> AWSResponse:
        """Return the endpoint's answer after the change that the request started is complete."""
        scope: dict[str, Any] = {
            "type": "http",
            "method": request.method,
            "raw_path": b"/",
            "query_string": b"",
            "headers": [(name.lower().encode(), _bytes(value)) for name, value in request.headers.items()],
        }
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body}

        async def send(message: Any) -> None:
            sent.append(message)

        await self._app(scope, receive, send)
        while self._changed.is_set():
            self._changed.clear()
            await self._engine.tick()
        head, rest = sent
        headers = HTTPHeaders.from_pairs((name.decode(), value.decode()) for name, value in head["headers"])
        raw: Any = MockRawResponse(rest["body"])
        return AWSResponse(request.url, head["status"], headers, raw)


_loop = asyncio.new_event_loop()
_endpoints: dict[str, RegionEndpoint] = {}


def answer(event_name: str, request: AWSPreparedRequest, **more: Any) -> AWSResponse | None:
    """Return the endpoint's answer to a request to Auto Scaling, or moto's answer to another request."""
    host = _HOST.fullmatch(urlsplit(request.url).hostname or "")
    body = _bytes(request.body)
    (action,) = parse_qs(body.decode("latin-1")).get("Action", [""])
    if host is None or "LaunchConfiguration" in action:
        return botocore_stubber(event_name, request, **more)
    if host[1] not in _endpoints:
        _endpoints[host[1]] = RegionEndpoint(host[1])
    return _loop.run_until_complete(_endpoints[host[1]].answer(request, body))


def _bytes(text: Any) -> bytes:
    return text.encode() if isinstance(text, str) else bytes(text or b"")


# botocore calls every handler of a request, so moto's handler must not remain.
BUILTIN_HANDLERS[BUILTIN_HANDLERS.index(("before-send", botocore_stubber))] = ("before-send", answer)


@pytest.fixture(autouse=True)
def fresh_endpoints(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget all groups after a test, and let waiters of boto3 ask again at once."""
    monkeypatch.setattr(time, "sleep", lambda _: None)
    yield
    _endpoints.clear()
