"""The part of CloudWatch that target tracking needs: its JSON protocol and its stored metrics."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from botocore.model import OperationModel
from botocore.parsers import create_parser
from botocore.serialize import create_serializer

from batchlab.fleet.api_types import ScalingPolicy, TargetTracking
from batchlab.server.autoscaling_api import cloudwatch
from batchlab.server.autoscaling_api.app import Fault, Request, Response
from batchlab.server.autoscaling_api.cloudwatch import CloudWatch, MetricStore
from batchlab.server.autoscaling_api.query_protocol import model
from tests.support.aws.botocore_shapes import Samples
from tests.support.fleet import ManualClock

CLOUDWATCH = model("cloudwatch")
PUT = CLOUDWATCH.operation_model("PutMetricData")
TARGET = "GraniteServiceVersion20100801.PutMetricData"
METRIC = {"Namespace": "batchlab", "MetricName": "Backlog"}
POOL = [{"Name": "pool", "Value": "default"}]


@pytest.mark.parametrize("name", CLOUDWATCH.operation_names)
def test_every_request_arrives_as_it_was_sent(name: str) -> None:
    operation = CLOUDWATCH.operation_model(name)
    shape = operation.input_shape
    for seed in range(5):
        # botocore's JSON does not contain fractions of a second.
        asked = (shape and Samples(seed, tick=timedelta(seconds=1)).of(shape)) or {}
        sent = create_serializer("json").serialize_to_request(asked, operation)
        target = sent["headers"]["X-Amz-Target"]
        found, understood = cloudwatch.parse(CLOUDWATCH, target, sent["body"])
        assert (found.name, understood) == (name, asked)


@pytest.mark.parametrize("name", CLOUDWATCH.operation_names)
def test_every_answer_is_read_as_it_was_meant(name: str) -> None:
    operation = CLOUDWATCH.operation_model(name)
    shape: Any = operation.output_shape
    for seed in range(5):
        answer = (shape and Samples(seed, tick=timedelta(milliseconds=1)).of(shape)) or {}
        assert _read(operation, cloudwatch.result(operation, answer)) == answer


def _read(operation: OperationModel, body: bytes) -> Any:
    response = {"headers": {}, "status_code": 200, "body": body}
    shape: Any = operation.output_shape
    parsed = create_parser("json").parse(response, shape)
    del parsed["ResponseMetadata"]
    return parsed


WRONG = {
    "no such operation": ("GraniteServiceVersion20100801.Put", b"{}", "InvalidAction"),
    "no such service": ("Other.PutMetricData", b"{}", "InvalidAction"),
    "no JSON": (TARGET, b"{", "SerializationException"),
    "no object": (TARGET, b"[]", "SerializationException"),
    "no text": (TARGET, b'{"Namespace": 3}', "SerializationException"),
    "no list": (TARGET, b'{"MetricData": {}}', "SerializationException"),
    "no number": (TARGET, b'{"MetricData": [{"Value": true}]}', "SerializationException"),
    "not a number": (TARGET, b'{"MetricData": [{"Value": NaN}]}', "SerializationException"),
    "no time": (TARGET, b'{"MetricData": [{"Timestamp": 1e99}]}', "SerializationException"),
    "a deep one": (TARGET, b"[" * 100_000, "SerializationException"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_malformed_request_is_refused(wrong: str) -> None:
    target, body, code = WRONG[wrong]
    with pytest.raises(Fault) as refused:
        cloudwatch.parse(CLOUDWATCH, target, body)
    assert refused.value.code == code


def ask(to: CloudWatch, body: bytes, target: str = TARGET) -> Response:
    request = Request("POST", "/", "", [("x-amz-target", target)], body)
    try:
        return asyncio.run(to.answer(request, "id"))
    except Fault as fault:
        return to.refuse(request, fault, "id")


def test_fault_code_is_readable_by_botocore() -> None:
    told = ask(CloudWatch(MetricStore(ManualClock())), b'{"Namespace": "a"}')
    response = {"headers": dict(told.headers), "status_code": told.status, "body": told.body}
    parsed = create_parser("json").parse(response, PUT.output_shape)  # type: ignore[arg-type]
    assert parsed["Error"]["Code"] == "ValidationError"
    assert parsed["Error"]["Message"] == "The parameter MetricData is required."
    told = ask(CloudWatch(MetricStore(ManualClock())), b"{}", "GraniteServiceVersion20100801.ListMetrics")
    assert (told.status, json.loads(told.body)["__type"]) == (501, "NotImplemented")


def policy(statistic: str = "Average", **metric: Any) -> ScalingPolicy:
    wanted = {**METRIC, "Dimensions": POOL, "Statistic": statistic, **metric}
    tracking = TargetTracking(5.0, customized_metric_specification=json.dumps(wanted))
    return ScalingPolicy("g", "p", target_tracking_configuration=tracking)


class Kept:
    """A store with one metric."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.store = MetricStore(self.clock)

    def put(self, value: float, **more: Any) -> None:
        one = {"MetricName": "Backlog", "Dimensions": POOL, "Value": value, **more}
        self.store.put("batchlab", [one])

    def value(self, statistic: str = "Average", **metric: Any) -> float | None:
        return self.store.value(policy(statistic, **metric))


def test_a_statistic_is_taken_over_the_newest_minute() -> None:
    kept = Kept()
    kept.put(100)
    kept.clock.time_s += 70
    for value in (1, 2, 6):
        kept.put(value)
    found = {name: kept.value(name) for name in ("Average", "Sum", "Minimum", "Maximum")}
    assert found == {"Average": 3, "Sum": 9, "Minimum": 1, "Maximum": 6}
    assert kept.value("SampleCount") == 3


def test_old_data_is_dropped() -> None:
    kept = Kept()
    kept.put(1)
    kept.clock.time_s += 299
    assert kept.value() == 1
    kept.clock.time_s += 2
    assert kept.value() is None


def test_metric_is_identified_by_name_and_dimensions() -> None:
    kept = Kept()
    kept.put(1)
    assert kept.value(MetricName="Other") is None
    assert kept.value(Namespace="other") is None
    assert kept.value(Dimensions=[]) is None
    assert kept.value() == 1


def test_values_may_be_lists_or_statistics() -> None:
    kept = Kept()
    kept.put(0, Values=[1.0, 4.0], Counts=[2.0, 1.0])
    assert kept.value("Average") == 2
    summed = {"SampleCount": 10.0, "Sum": 90.0, "Minimum": 0.0, "Maximum": 50.0}
    kept.put(0, StatisticValues=summed)
    found = [kept.value(name) for name in ("SampleCount", "Sum", "Minimum", "Maximum")]
    assert found == [13, 96, 0, 50]


def test_a_value_may_have_its_own_time() -> None:
    kept = Kept()
    at = datetime.fromtimestamp(kept.clock.now_s() - 200, UTC)
    kept.put(7, Timestamp=at)
    kept.put(1)
    assert kept.value("Sum") == 1
    kept.put(7, Timestamp=datetime.fromtimestamp(kept.clock.now_s() + 7200, UTC))
    assert kept.value("Sum") == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"Value": 2.0**361},
        {"Value": float("inf")},
        {"Values": [1.0], "Counts": [1.0, 2.0]},
        {"Values": [1.0], "Counts": [0.0]},
        {"Values": []},
        {"StatisticValues": {"SampleCount": 0.0, "Sum": 0.0, "Minimum": 0.0, "Maximum": 0.0}},
    ],
)
def test_invalid_value_refuses_the_whole_request(wrong: Any) -> None:
    store = MetricStore(ManualClock())
    good = {"MetricName": "Backlog", "Dimensions": POOL, "Value": 1.0}
    with pytest.raises(Fault, match="InvalidParameterValue"):
        store.put("batchlab", [good, {"MetricName": "Backlog", **wrong}])
    assert store.value(policy()) is None


def test_metric_without_data_is_empty() -> None:
    store = MetricStore(ManualClock())
    predefined = TargetTracking(5.0, predefined_metric_type="ASGAverageCPUUtilization")
    assert store.value(ScalingPolicy("g", "p", target_tracking_configuration=predefined)) is None
    math = TargetTracking(5.0, customized_metric_specification='{"Metrics": []}')
    assert store.value(ScalingPolicy("g", "p", target_tracking_configuration=math)) is None
    assert store.value(ScalingPolicy("g", "p")) is None
