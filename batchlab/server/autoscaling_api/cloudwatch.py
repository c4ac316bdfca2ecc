"""The part of CloudWatch that target tracking needs: clients put custom metrics, and scaling
policies read them.

Metrics stay in memory for FRESH_S. Their senders put new values regularly, so a restart loses
little.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from botocore.model import OperationModel

from batchlab.core.ports import Clock
from batchlab.fleet.api_types import ScalingPolicy
from batchlab.server.autoscaling_api.app import Request, Response
from batchlab.server.autoscaling_api.errors import Fault, invalid
from batchlab.server.autoscaling_api.json_protocol import TARGET, JsonService
from batchlab.server.autoscaling_api.parameters import Asked
from batchlab.server.autoscaling_api.query_protocol import QueryService, model

PERIOD_S = 60.0
"""Length in seconds of the period that a statistic covers. It ends with the newest data point."""
FRESH_S = 300.0
"""Maximum age in seconds of a data point. Older ones are ignored."""
LARGEST = 2.0**360
"""Largest absolute value that CloudWatch accepts."""
MOST_METRICS = 1_000
MOST_POINTS = 1_000

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
    """Implementation of the Metrics port on the metrics that clients put. Predefined metrics and
    metric math return no data."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._points: dict[_Name, list[Point]] = {}

    def put(self, namespace: str, data: Sequence[Asked]) -> None:
        """Store the data of a PutMetricData request. Raise Fault and store nothing if a part of it
        is invalid."""
        now_s = self._clock.now_s()
        fresh = [(_name(namespace, one), point) for one in data for point in _points(one, now_s)]
        for name, point in fresh:
            points = self._points.setdefault(name, [])
            points.append(point)
            points[:] = [p for p in points if now_s - p.at_s <= FRESH_S][-MOST_POINTS:]
        for name in [name for name, points in self._points.items() if not points]:
            del self._points[name]
        while len(self._points) > MOST_METRICS:
            del self._points[next(iter(self._points))]

    def value(self, policy: ScalingPolicy) -> float | None:
        tracking = policy.target_tracking_configuration
        if tracking is None or not tracking.customized_metric_specification:
            return None
        wanted = json.loads(tracking.customized_metric_specification)
        if "MetricName" not in wanted:
            return None
        now_s = self._clock.now_s()
        found = self._points.get(_name(wanted.get("Namespace", ""), wanted), [])
        fresh = [point for point in found if -PERIOD_S <= now_s - point.at_s <= FRESH_S]
        if not fresh:
            return None
        newest_s = max(point.at_s for point in fresh)
        statistic = _STATISTICS[wanted.get("Statistic", "Average")]
        return statistic([point for point in fresh if newest_s - point.at_s < PERIOD_S])


def _name(namespace: str, told: Asked) -> _Name:
    dimensions = tuple(sorted((one["Name"], one["Value"]) for one in told.get("Dimensions", ())))
    return namespace, told["MetricName"], dimensions


def _points(one: Asked, now_s: float) -> Sequence[Point]:
    at_s = one["Timestamp"].timestamp() if "Timestamp" in one else now_s
    if "StatisticValues" in one:
        told = one["StatisticValues"]
        found = [Point(at_s, told["SampleCount"], told["Sum"], told["Minimum"], told["Maximum"])]
    else:
        values = one.get("Values") or [one[name] for name in ("Value",) if name in one]
        counts = one.get("Counts") or [1.0] * len(values)
        if len(counts) != len(values):
            raise Fault("InvalidParameterValue", "Values and Counts must be equally many.")
        found = [Point(at_s, n, v * n, v, v) for v, n in zip(values, counts, strict=True)]
    if not found or any(point.count <= 0 for point in found):
        raise Fault("InvalidParameterValue", f"{one['MetricName']!r} comes without a value.")
    numbers = [n for p in found for n in (p.count, p.total / p.count, p.least, p.most)]
    if not all(abs(number) <= LARGEST for number in numbers):
        raise Fault("InvalidParameterValue", f"{one['MetricName']!r} is out of range.")
    return found


class CloudWatch:
    """PutMetricData in the two protocols that clients use here: JSON and query."""

    def __init__(self, store: MetricStore) -> None:
        async def act(operation: OperationModel, asked: Asked) -> Mapping[str, Any]:
            if operation.name != "PutMetricData":
                raise Fault("NotImplemented", f"{operation.name} is not served here.")
            if "MetricData" not in asked:
                raise invalid("The parameter MetricData is required.")
            store.put(asked["Namespace"], asked["MetricData"])
            return {}

        service = model("cloudwatch")
        self._json, self._query = JsonService(service, act), QueryService(service, act)

    async def answer(self, request: Request, request_id: str) -> Response:
        return await self._spoken(request).answer(request, request_id)

    def refuse(self, request: Request, fault: Fault, request_id: str) -> Response:
        return self._spoken(request).refuse(request, fault, request_id)

    def _spoken(self, request: Request) -> JsonService | QueryService:
        return self._query if request.header(TARGET) is None else self._json
