"""The part of CloudWatch that target tracking needs: clients put custom metrics, and scaling policies read the metrics.

Metrics stay in memory for MAX_POINT_AGE_S. Clients put new values regularly, so a restart of the server loses only a
few data points. The module also contains the server side of AWS's JSON protocol, which boto3 uses for CloudWatch.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from botocore.model import ListShape, MapShape, OperationModel, ServiceModel, Shape, StructureShape

from batchlab.core.ports import Clock
from batchlab.fleet.api_types import ScalingPolicy
from batchlab.server.autoscaling_api.app import Fault, Faults, Request, Response, invalid
from batchlab.server.autoscaling_api.parameters import Parameters, check
from batchlab.server.autoscaling_api.query_protocol import Act, QueryService, model

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
    """AWS service with the JSON protocol: the service parses and checks a request, and calls `act`."""

    def __init__(self, service: ServiceModel, act: Act) -> None:
        self._service = service
        self._faults = Faults(service)
        self._act = act

    async def answer(self, request: Request, request_id: str) -> Response:  # noqa: ARG002
        operation, parameters = parse(self._service, request.header(TARGET) or "", request.body)
        check(operation, parameters)
        return Response(200, result(operation, await self._act(operation, parameters)), _TYPE)

    def refuse(self, _request: Request, fault: Fault, _request_id: str) -> Response:
        status = self._faults.status(fault)
        body = json.dumps({"__type": fault.code, "message": fault.message}).encode()
        cause = "Sender" if status.is_senders else "Receiver"
        return Response(status.status, body, _TYPE, (("x-amzn-query-error", f"{fault.code};{cause}"),))


def parse(service: ServiceModel, target: str, body: bytes) -> tuple[OperationModel, dict[str, Any]]:
    """Return the requested operation and its parameters.

    Raise Fault for an unknown operation or a malformed body. The function ignores parameters that are not in botocore's
    model.
    """
    prefix, _, action = target.partition(".")
    if prefix != service.metadata.get("targetPrefix") or action not in service.operation_names:
        raise Fault("InvalidAction", f"Could not find operation {target or 'without a name'}")
    operation = service.operation_model(action)
    try:
        # NaN and Infinity are not valid JSON, but Python's parser accepts NaN and Infinity without `parse_constant`.
        sent = json.loads(body or b"{}", parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise Fault("SerializationException", "The request is not JSON.") from error
    shape = operation.input_shape
    if not isinstance(shape, StructureShape):
        return operation, {}
    found: dict[str, Any] = _read(shape, sent, "")
    return operation, found


def _refuse_constant(text: str) -> None:
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
        return [_read(shape.member, item, path) for item in value]
    if isinstance(shape, MapShape):
        _expect(value, (dict,), path)
        return {key: _read(shape.value, item, path) for key, item in value.items()}
    return _scalar(shape, value, path)


def _expect(value: Any, kinds: tuple[type, ...], path: str) -> None:
    # A bool in Python is also an int. A boolean is not a number in the JSON protocol.
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
    """Return the body of the answer to a successful request.

    Raise ValueError if the answer does not match the operation's output shape.
    """
    shape = operation.output_shape
    if shape is None:
        if answer:
            raise ValueError(f"{operation.name} has an empty answer in the model, but got {sorted(answer)}")
        return b"{}"
    return json.dumps(_write(shape, answer)).encode()


def _write(shape: Shape, value: Any) -> Any:
    if isinstance(shape, StructureShape):
        if unknown := value.keys() - shape.members.keys():
            raise ValueError(f"{shape.name}: unknown {sorted(unknown)}")
        return {
            shape.members[name].serialization.get("name", name): _write(shape.members[name], item)
            for name, item in value.items()
            if item is not None
        }
    if isinstance(shape, ListShape):
        return [_write(shape.member, item) for item in value]
    if isinstance(shape, MapShape):
        return {key: _write(shape.value, item) for key, item in value.items()}
    if shape.type_name == "timestamp":
        return value.timestamp()
    return base64.b64encode(value).decode() if shape.type_name == "blob" else value


PERIOD_S = 60.0
"""Length in seconds of the period of a statistic. The period of a statistic ends with the newest data point."""
MAX_POINT_AGE_S = 300.0
"""Maximum age in seconds of a data point. Older data points are ignored."""
MAX_VALUE = 2.0**360
"""Largest absolute value that CloudWatch accepts."""
MAX_METRICS = 1_000
MAX_POINTS = 1_000

_Name = tuple[str, str, tuple[tuple[str, str], ...]]


@dataclass(frozen=True, slots=True)
class Point:
    """Summary of `count` measured values at `at_s`, in epoch seconds."""

    at_s: float
    count: float
    total: float
    least: float
    most: float


_STATISTICS: Mapping[str, Callable[[Sequence[Point]], float]] = {
    "Average": lambda points: sum(p.total for p in points) / sum(p.count for p in points),
    "Maximum": lambda points: max(p.most for p in points),
    "Minimum": lambda points: min(p.least for p in points),
    "SampleCount": lambda points: sum(p.count for p in points),
    "Sum": lambda points: sum(p.total for p in points),
}


class MetricStore:
    """Implementation of the Metrics port on the metrics that clients put. Predefined metrics and metric math do not
    return data.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._points: dict[_Name, list[Point]] = {}

    def put(self, namespace: str, data: Sequence[Parameters]) -> None:
        """Store the data of a PutMetricData request.

        Raise Fault and store nothing if a part of the request is invalid.
        """
        now_s = self._clock.now_s()
        fresh = [(_name(namespace, datum), point) for datum in data for point in _points(datum, now_s)]
        for name, point in fresh:
            points = self._points.setdefault(name, [])
            points.append(point)
            points[:] = [p for p in points if now_s - p.at_s <= MAX_POINT_AGE_S][-MAX_POINTS:]
        for name in [name for name, points in self._points.items() if not points]:
            del self._points[name]
        while len(self._points) > MAX_METRICS:
            del self._points[next(iter(self._points))]

    def value(self, policy: ScalingPolicy) -> float | None:
        tracking = policy.target_tracking_configuration
        if tracking is None or not tracking.customized_metric_specification:
            return None
        metric = json.loads(tracking.customized_metric_specification)
        if "MetricName" not in metric:
            return None
        now_s = self._clock.now_s()
        points = self._points.get(_name(metric.get("Namespace", ""), metric), [])
        fresh = [point for point in points if -PERIOD_S <= now_s - point.at_s <= MAX_POINT_AGE_S]
        if not fresh:
            return None
        newest_s = max(point.at_s for point in fresh)
        statistic = _STATISTICS[metric.get("Statistic", "Average")]
        return statistic([point for point in fresh if newest_s - point.at_s < PERIOD_S])


def _name(namespace: str, metric: Parameters) -> _Name:
    dimensions = tuple(sorted((item["Name"], item["Value"]) for item in metric.get("Dimensions", ())))
    return namespace, metric["MetricName"], dimensions


def _points(datum: Parameters, now_s: float) -> Sequence[Point]:
    at_s = datum["Timestamp"].timestamp() if "Timestamp" in datum else now_s
    if "StatisticValues" in datum:
        statistics = datum["StatisticValues"]
        points = [Point(at_s, *(statistics[name] for name in ("SampleCount", "Sum", "Minimum", "Maximum")))]
    else:
        values = datum.get("Values") or [datum[name] for name in ("Value",) if name in datum]
        counts = datum.get("Counts") or [1.0] * len(values)
        if len(counts) != len(values):
            raise Fault("InvalidParameterValue", "Values and Counts must have the same length.")
        points = [Point(at_s, n, v * n, v, v) for v, n in zip(values, counts, strict=True)]
    if not points or any(point.count <= 0 for point in points):
        raise Fault("InvalidParameterValue", f"{datum['MetricName']!r} has no value.")
    numbers = [n for p in points for n in (p.count, p.total / p.count, p.least, p.most)]
    if not all(abs(number) <= MAX_VALUE for number in numbers):
        raise Fault("InvalidParameterValue", f"{datum['MetricName']!r} is out of range.")
    return points


class CloudWatch:
    """Service for CloudWatch's operation PutMetricData, in the two protocols that clients use: JSON and query."""

    def __init__(self, store: MetricStore) -> None:
        async def act(operation: OperationModel, parameters: Parameters) -> Mapping[str, Any]:
            if operation.name != "PutMetricData":
                raise Fault("NotImplemented", f"This endpoint does not support {operation.name}.")
            if "MetricData" not in parameters:
                raise invalid("The parameter MetricData is required.")
            store.put(parameters["Namespace"], parameters["MetricData"])
            return {}

        service = model("cloudwatch")
        self._json, self._query = JsonService(service, act), QueryService(service, act)

    async def answer(self, request: Request, request_id: str) -> Response:
        return await self._protocol(request).answer(request, request_id)

    def refuse(self, request: Request, fault: Fault, request_id: str) -> Response:
        return self._protocol(request).refuse(request, fault, request_id)

    def _protocol(self, request: Request) -> JsonService | QueryService:
        return self._query if request.header(TARGET) is None else self._json
