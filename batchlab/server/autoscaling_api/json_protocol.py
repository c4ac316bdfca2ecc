"""Server side of AWS's JSON protocol, driven by the service model.

boto3 uses this protocol for CloudWatch. `query_protocol` is the other protocol.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from botocore.model import (
    ListShape,
    MapShape,
    OperationModel,
    ServiceModel,
    Shape,
    StructureShape,
)

from batchlab.server.autoscaling_api import parameters
from batchlab.server.autoscaling_api.app import Request, Response
from batchlab.server.autoscaling_api.errors import Blame, Fault, Faults
from batchlab.server.autoscaling_api.query_protocol import Act

TARGET = "x-amz-target"
_TYPE = "application/x-amz-json-1.0"
_KINDS: Mapping[str, tuple[type, ...]] = {
    "boolean": (bool,),
    "double": (int, float),
    "float": (int, float),
    "integer": (int,),
    "long": (int,),
    "string": (str,),
    "timestamp": (int, float),
    "blob": (str,),
}


class JsonService:
    """Service over the JSON protocol: it parses and checks a request, calls `act`, and writes the
    result."""

    def __init__(self, service: ServiceModel, act: Act) -> None:
        self._service = service
        self._faults = Faults(service)
        self._act = act

    async def answer(self, request: Request, request_id: str) -> Response:  # noqa: ARG002
        operation, asked = parse(self._service, request.header(TARGET) or "", request.body)
        parameters.check(operation, asked)
        return Response(200, result(operation, await self._act(operation, asked)), _TYPE)

    def refuse(self, _request: Request, fault: Fault, _request_id: str) -> Response:
        blame: Blame = self._faults.blame(fault)
        body = json.dumps({"__type": fault.code, "message": fault.message}).encode()
        whose = "Sender" if blame.is_senders else "Receiver"
        headers = (("x-amzn-query-error", f"{fault.code};{whose}"),)
        return Response(blame.status, body, _TYPE, headers)


def parse(service: ServiceModel, target: str, body: bytes) -> tuple[OperationModel, dict[str, Any]]:
    """Return the requested operation and its parameters. Raise Fault for an unknown operation or a
    malformed body. Parameters that the model does not have are ignored."""
    prefix, _, action = target.partition(".")
    if prefix != service.metadata.get("targetPrefix") or action not in service.operation_names:
        raise Fault("InvalidAction", f"Could not find operation {target or 'without a name'}")
    operation = service.operation_model(action)
    try:
        sent = json.loads(body or b"{}", parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise Fault("SerializationException", "The request is not JSON.") from error
    shape = operation.input_shape
    if not isinstance(shape, StructureShape):
        return operation, {}
    found: dict[str, Any] = _read(shape, sent, "")
    return operation, found


def _no_number(text: str) -> None:
    raise ValueError(text)


def _read(shape: Shape, value: Any, path: str) -> Any:
    if isinstance(shape, StructureShape):
        _expect(value, (dict,), path)
        return {
            name: _read(member, value[wire], f"{path}.{name}")
            for name, member in shape.members.items()
            if value.get(wire := member.serialization.get("name", name)) is not None
        }
    if isinstance(shape, ListShape):
        _expect(value, (list,), path)
        return [_read(shape.member, one, path) for one in value]
    if isinstance(shape, MapShape):
        _expect(value, (dict,), path)
        return {key: _read(shape.value, one, path) for key, one in value.items()}
    return _scalar(shape, value, path)


def _expect(value: Any, kinds: tuple[type, ...], path: str) -> None:
    # In Python, a bool is also an int. In the protocol it is not.
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        place = path.lstrip(".") or "the top"
        raise Fault("SerializationException", f"The value at {place!r} cannot be read.")


def _scalar(shape: Shape, value: Any, path: str) -> Any:
    _expect(value, _KINDS[shape.type_name], path)
    try:
        if shape.type_name == "timestamp":
            return datetime.fromtimestamp(value, UTC)
        if shape.type_name == "blob":
            return base64.b64decode(value, validate=True)
    except (ValueError, OverflowError, OSError, binascii.Error) as error:
        raise Fault("SerializationException", f"{path.lstrip('.')!r} cannot be read.") from error
    return value


def result(operation: OperationModel, answer: Mapping[str, Any]) -> bytes:
    """Return the body of a successful answer. Raise ValueError if it does not match the operation's
    output shape."""
    shape = operation.output_shape
    if shape is None:
        if answer:
            raise ValueError(f"{operation.name} has no answer, and was given {sorted(answer)}")
        return b"{}"
    return json.dumps(_write(shape, answer)).encode()


def _write(shape: Shape, value: Any) -> Any:
    if isinstance(shape, StructureShape):
        given = {name: one for name, one in value.items() if one is not None}
        if unknown := given.keys() - shape.members.keys():
            raise ValueError(f"{shape.name}: unknown {sorted(unknown)}")
        return {
            shape.members[name].serialization.get("name", name): _write(shape.members[name], one)
            for name, one in given.items()
        }
    if isinstance(shape, ListShape):
        return [_write(shape.member, one) for one in value]
    if isinstance(shape, MapShape):
        return {key: _write(shape.value, one) for key, one in value.items()}
    if shape.type_name == "timestamp":
        return value.timestamp()
    return base64.b64encode(value).decode() if shape.type_name == "blob" else value
