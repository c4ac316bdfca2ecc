"""A service over the query protocol: its model, and a table of what its actions do."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from functools import cache
from typing import Any

from botocore.loaders import Loader
from botocore.model import OperationModel, ServiceModel

from batchlab.asg import constraints, query
from batchlab.asg.app import Request, Response
from batchlab.asg.fault import Fault, Faults

Act = Callable[[OperationModel, Mapping[str, Any]], Awaitable[Mapping[str, Any]]]
"""Does what an operation asks, with parameters that satisfy the model; Fault where it cannot."""


@cache
def model(name: str) -> ServiceModel:
    """The newest model that botocore has of the service."""
    return ServiceModel(Loader().load_service_model(name, "service-2"), name)


class QueryService:
    """Parses, checks, has `act` do it, and writes what came of it."""

    def __init__(self, service: ServiceModel, act: Act) -> None:
        self._service = service
        self._faults = Faults(service)
        self._act = act

    async def answer(self, request: Request, request_id: str) -> Response:
        """As `app.Service` says."""
        operation, asked = query.parse(self._service, _form(request))
        constraints.check(operation, asked)
        answer = await self._act(operation, asked)
        return Response(200, query.result(operation, answer, request_id))

    def refuse(self, _: Request, fault: Fault, request_id: str) -> Response:
        """As `app.Service` says."""
        blame = self._faults.blame(fault)
        return Response(blame.status, query.refusal(self._service, fault, blame, request_id))


def _form(request: Request) -> str:
    try:
        return request.body.decode("ascii")
    except UnicodeDecodeError as error:
        raise Fault("MalformedQueryString", "The request is not a form.") from error
