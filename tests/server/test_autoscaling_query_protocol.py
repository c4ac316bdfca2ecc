"""The query protocol, compared with botocore's serializer and parser for every operation."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlencode

import pytest
from botocore.model import OperationModel, ServiceModel, StructureShape
from botocore.parsers import create_parser
from botocore.serialize import create_serializer
from hypothesis import given, settings
from hypothesis import strategies as st

from batchlab.server.autoscaling_api import parameters, query_protocol
from batchlab.server.autoscaling_api.app import Fault, Faults
from tests.support.aws.botocore_shapes import Samples, query_services, service

AUTOSCALING = service("autoscaling")
MICROSECOND, MILLISECOND = timedelta(microseconds=1), timedelta(milliseconds=1)
SEEDS = range(12)


def form(operation: OperationModel, asked: dict[str, Any]) -> str:
    """Return the form that botocore sends."""
    return urlencode(create_serializer("query").serialize_to_request(asked, operation)["body"])


def answered(operation: OperationModel, body: bytes, status: int = 200) -> dict[str, Any]:
    """Return an answer as botocore parses it."""
    response = {"headers": {}, "status_code": status, "body": body}
    shape: Any = operation.output_shape
    parsed: dict[str, Any] = create_parser("query").parse(response, shape)
    return parsed


def asked_for(operation: OperationModel, seed: int) -> dict[str, Any]:
    shape = operation.input_shape
    return (shape and Samples(seed, tick=MICROSECOND).of(shape)) or {}


def requests_survive(model: ServiceModel, name: str, seed: int) -> dict[str, Any]:
    operation = model.operation_model(name)
    asked = asked_for(operation, seed)
    found, understood = query_protocol.parse(model, form(operation, asked))
    assert (found.name, understood) == (name, asked)
    return asked


def answers_survive(model: ServiceModel, name: str, seed: int) -> None:
    operation = model.operation_model(name)
    shape = operation.output_shape
    answer = (shape and Samples(seed, tick=MILLISECOND, is_answer=True).of(shape)) or {}
    parsed = answered(operation, query_protocol.result(operation, answer, "id-1"))
    assert parsed.pop("ResponseMetadata")["RequestId"] == "id-1"
    assert parsed == answer


@pytest.mark.parametrize("name", AUTOSCALING.operation_names)
def test_every_request_of_auto_scaling_arrives_as_it_was_sent(name: str) -> None:
    for seed in SEEDS:
        asked = requests_survive(AUTOSCALING, name, seed)
        parameters.check(AUTOSCALING.operation_model(name), asked)


@pytest.mark.parametrize("name", AUTOSCALING.operation_names)
def test_every_answer_of_auto_scaling_is_read_as_it_was_meant(name: str) -> None:
    for seed in SEEDS:
        answers_survive(AUTOSCALING, name, seed)


@pytest.mark.parametrize("other", query_services())
def test_codec_is_independent_of_auto_scaling(other: str) -> None:
    """The test includes flattened lists, maps, and blobs. Auto Scaling does not use these types, but other
    services do."""
    model = service(other)
    for name in model.operation_names:
        requests_survive(model, name, 1)
        answers_survive(model, name, 1)


WRONG_FORMS = {
    "no action": ("Version=2011-01-01", "MissingAction", "The request has no action."),
    "no such action": (
        "Action=Describe&Version=2011-01-01",
        "InvalidAction",
        "Could not find operation Describe for version 2011-01-01",
    ),
    "another version": (
        "Action=DescribeTags&Version=2010-08-01",
        "InvalidAction",
        "Could not find operation DescribeTags for version 2010-08-01",
    ),
    "no version": (
        "Action=DescribeTags",
        "InvalidAction",
        "Could not find operation DescribeTags for version NO_VERSION",
    ),
    "no number": (
        "Action=DescribeTags&Version=2011-01-01&MaxRecords=1_0",
        "MalformedInput",
        "The value at 'MaxRecords' cannot be read.",
    ),
    "no truth": (
        "Action=DescribeAutoScalingGroups&Version=2011-01-01&IncludeInstances=perhaps",
        "MalformedInput",
        "The value at 'IncludeInstances' cannot be read.",
    ),
    "no list": (
        "Action=DescribeTags&Version=2011-01-01&Filters.member.x.Name=key",
        "MalformedInput",
        "The value at 'Filters' cannot be read.",
    ),
    "no text": (
        "Action=DescribeTags&Version=2011-01-01&NextToken=%ff",
        "MalformedQueryString",
        "The query string cannot be read.",
    ),
    "too deep": (
        "Action=DescribeTags&Version=2011-01-01&" + "A." * 99 + "=",
        "MalformedInput",
        f"The field {('A.' * 99)[:100]!r} is nested too deeply.",
    ),
}


@pytest.mark.parametrize("wrong", WRONG_FORMS)
def test_malformed_form_is_refused(wrong: str) -> None:
    sent, code, message = WRONG_FORMS[wrong]
    with pytest.raises(Fault) as refused:
        query_protocol.parse(AUTOSCALING, sent)
    assert (refused.value.code, refused.value.message) == (code, message)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_any_request_is_parsed_or_refused(data: st.DataObject) -> None:
    """The test combines parts of the names and values of a real request in wrong ways."""
    name = data.draw(st.sampled_from(AUTOSCALING.operation_names))
    operation = AUTOSCALING.operation_model(name)
    sent = form(operation, asked_for(operation, data.draw(st.integers(0, 9))))
    steps = st.sampled_from(["member", "entry", "key", "1", "-1", "", "x", ".", "Filters", "Tags"])
    value = st.sampled_from(["", "true", "1e999", "-", "\x00", "9" * 40, "2026-13-01T00:00:00Z"])
    for _ in range(data.draw(st.integers(1, 4))):
        fields = sent.split("&")
        at = data.draw(st.integers(0, len(fields) - 1))
        key, _, old = fields[at].partition("=")
        key = data.draw(st.sampled_from([key, f"{key}.{data.draw(steps)}", key.rpartition(".")[0]]))
        fields[at] = f"{key}={data.draw(st.sampled_from([old, data.draw(value)]))}"
        sent = "&".join(fields)
    assert refusal(sent) in {"", *REFUSALS}


REFUSALS = ("InvalidAction", "MalformedInput", "MalformedQueryString", "MissingAction", "ValidationError")


def refusal(sent: str) -> str:
    """Return the error code for the form, or "" if the form is a valid request."""
    try:
        parameters.check(*query_protocol.parse(AUTOSCALING, sent))
    except Fault as fault:
        return fault.code
    return ""


def test_list_entries_are_ordered_by_number() -> None:
    names = "&".join(f"AutoScalingGroupNames.member.{n}=g{n}" for n in (10, 2, 1))
    sent = f"Action=DescribeAutoScalingGroups&Version=2011-01-01&{names}"
    assert query_protocol.parse(AUTOSCALING, sent)[1] == {"AutoScalingGroupNames": ["g1", "g2", "g10"]}


def test_a_parameter_that_the_model_lacks_is_left_out() -> None:
    assert query_protocol.parse(AUTOSCALING, "Action=DescribeTags&Version=2011-01-01&Colour=red")[1] == {}


def test_times_accept_any_zone_and_default_to_utc() -> None:
    for text in ("2026-01-02T03:04:05Z", "2026-01-02T04:04:05%2B01:00", "2026-01-02T03:04:05"):
        sent = f"Action=DescribeScheduledActions&Version=2011-01-01&StartTime={text}"
        asked = query_protocol.parse(AUTOSCALING, sent)[1]
        assert asked["StartTime"] == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.mark.parametrize("shape", AUTOSCALING.error_shapes, ids=lambda shape: shape.name)
def test_every_fault_of_the_model_is_rendered(shape: StructureShape) -> None:
    error = shape.metadata["error"]
    blame = Faults(AUTOSCALING).status(Fault(shape.error_code, "<no> & why"))
    assert blame.status == error["httpStatusCode"]
    body = query_protocol.refusal(AUTOSCALING, Fault(shape.error_code, "<no> & why"), blame, "id-2")
    parsed = answered(AUTOSCALING.operation_model("DescribeTags"), body, blame.status)
    told = {"Type": "Sender", "Code": error["code"], "Message": "<no> & why"}
    assert parsed["Error"] == told
    assert parsed["ResponseMetadata"]["RequestId"] == "id-2"


def test_an_answer_that_is_not_of_its_shape_is_a_defect() -> None:
    tags = AUTOSCALING.operation_model("DescribeTags")
    wrong: tuple[dict[str, Any], ...] = ({"Tag": []}, {"Tags": [{"Colour": "red"}]}, {"Tags": [{"Key": 3}]})
    for answer in wrong:
        with pytest.raises(ValueError, match=r"unknown|must be a string"):
            query_protocol.result(tags, answer, "id")
    groups = AUTOSCALING.operation_model("DescribeAutoScalingGroups")
    with pytest.raises(ValueError, match="missing"):
        query_protocol.result(groups, {"AutoScalingGroups": [{}]}, "id")
    with pytest.raises(ValueError, match="has an empty answer"):
        query_protocol.result(AUTOSCALING.operation_model("SetDesiredCapacity"), {"Tags": []}, "id")


def test_characters_invalid_in_xml_are_replaced() -> None:
    tags = AUTOSCALING.operation_model("DescribeTags")
    body = query_protocol.result(tags, {"Tags": [{"Key": "a\x00b\ud800c\r\n"}]}, "id")
    assert answered(tags, body)["Tags"] == [{"Key": "a\ufffdb\ufffdc\r\n"}]


CREATE = {"AutoScalingGroupName": "g", "MinSize": 0, "MaxSize": 1}
VIOLATIONS: dict[str, tuple[str, dict[str, Any], str]] = {
    "required": (
        "CreateAutoScalingGroup",
        {"AutoScalingGroupName": "g", "MinSize": 0},
        "Value null at 'maxSize' failed to satisfy constraint: Member must not be null",
    ),
    "too short": (
        "CreateAutoScalingGroup",
        CREATE | {"AutoScalingGroupName": ""},
        "Value '' at 'autoScalingGroupName' failed to satisfy constraint: "
        "Member must have length greater than or equal to 1",
    ),
    "pattern": (
        "CreateAutoScalingGroup",
        CREATE | {"AutoScalingGroupName": "a\x00"},
        "Value 'a\x00' at 'autoScalingGroupName' failed to satisfy constraint: Member must satisfy "
        "regular expression pattern: "
        r"[\u0020-\uD7FF\uE000-\uFFFD\uD800\uDC00-\uDBFF\uDFFF\r\n\t]*",
    ),
    "enum": (
        "PutWarmPool",
        {"AutoScalingGroupName": "g", "PoolState": "Asleep"},
        "Value 'Asleep' at 'poolState' failed to satisfy constraint: "
        "Member must satisfy enum value set: [Stopped, Running, Hibernated]",
    ),
    "too great, in a list": (
        "StartInstanceRefresh",
        {"AutoScalingGroupName": "g", "Preferences": {"CheckpointPercentages": [50, 101]}},
        "Value '101' at 'preferences.checkpointPercentages.2.member' failed to satisfy "
        "constraint: Member must have value less than or equal to 100",
    ),
    "in a structure in a list": (
        "CreateOrUpdateTags",
        {"Tags": [{"Key": ""}]},
        "Value '' at 'tags.1.member.key' failed to satisfy constraint: "
        "Member must have length greater than or equal to 1",
    ),
}


@pytest.mark.parametrize("violation", VIOLATIONS)
def test_model_violations_are_refused_with_aws_texts(violation: str) -> None:
    action, asked, told = VIOLATIONS[violation]
    with pytest.raises(Fault) as refused:
        parameters.check(AUTOSCALING.operation_model(action), asked)
    assert refused.value.code == "ValidationError"
    assert refused.value.message == f"1 validation error detected: {told}"


def test_all_violations_are_reported_together() -> None:
    with pytest.raises(Fault, match=r"2 validation errors detected: .*; Value null at 'maxSize'"):
        parameters.check(
            AUTOSCALING.operation_model("CreateAutoScalingGroup"), {"MinSize": 0, "AutoScalingGroupName": ""}
        )


def test_names_beyond_the_basic_plane_are_allowed() -> None:
    asked = CREATE | {"AutoScalingGroupName": "\U0001f600\U0010ffff"}
    parameters.check(AUTOSCALING.operation_model("CreateAutoScalingGroup"), asked)
