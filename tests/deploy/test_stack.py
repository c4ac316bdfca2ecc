"""Difficult behavior of CloudFormation, scripted: unknown stacks, long lists, failures, and refusals. botocore parses
the answers (Stubber)."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import boto3
import pytest
from botocore.stub import ANY, Stubber

from batchlab.core.errors import BackendError, Refused, Unreachable, UsageError
from batchlab.deploy.account import Account, aws_errors
from batchlab.deploy.stack import Stack
from batchlab.deploy.stack_records import Event, must_be_deleted, root_cause

ID = "arn:aws:cloudformation:us-east-1:1:stack/grid/1"
SET = "arn:aws:cloudformation:us-east-1:1:changeSet/c/1"
BEGAN = datetime(2026, 1, 1, tzinfo=UTC)


class Clock:
    """A clock that only sleeping advances."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def sleep(self, seconds: float) -> None:
        self.now_s += max(seconds, 0.5)

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def stub() -> Iterator[Stubber]:
    client: Any = boto3.client(
        "cloudformation", region_name="us-east-1", aws_access_key_id="a", aws_secret_access_key="b"
    )
    with Stubber(client) as stubber:
        yield stubber
        stubber.assert_no_pending_responses()


@pytest.fixture
def stack(stub: Stubber) -> Stack:
    account = Account("us-east-1", "1", "arn:aws:iam::1:user/me")
    account._clients["cloudformation"] = stub.client
    clock = Clock()
    return Stack(account, "grid", sleep=clock.sleep, clock=clock)


def told(status: str) -> dict[str, Any]:
    one = {"StackId": ID, "StackName": "grid", "StackStatus": status, "CreationTime": BEGAN}
    return {"Stacks": [one]}


def event(number: int, resource: str, status: str, reason: str = "") -> dict[str, Any]:
    is_stack = resource == "grid"
    return {
        "StackId": ID,
        "EventId": f"e{number}",
        "StackName": "grid",
        "LogicalResourceId": resource,
        "PhysicalResourceId": ID if is_stack else resource.lower(),
        "ResourceType": "AWS::CloudFormation::Stack" if is_stack else "AWS::SQS::Queue",
        "Timestamp": BEGAN + timedelta(seconds=number),
        "ResourceStatus": status,
        "ResourceStatusReason": reason,
    }


def missing(stub: Stubber, method: str, code: str = "ValidationError") -> None:
    stub.add_client_error(method, code, "Stack [grid] does not exist", http_status_code=400)


# --- Unknown stacks and events -------------------------------------------------------------------


def test_new_change_set_that_is_not_found_is_requested_again(stack: Stack, stub: Stubber) -> None:
    stub.add_response("create_change_set", {"Id": SET, "StackId": ID})
    missing(stub, "describe_change_set", "ChangeSetNotFound")
    missing(stub, "describe_change_set")
    stub.add_response("describe_change_set", {"Status": "CREATE_IN_PROGRESS"})
    stub.add_response("describe_change_set", {"Status": "CREATE_COMPLETE"})
    stub.add_response("describe_change_set", {"Changes": []})
    assert stack.propose({"TemplateBody": "{}"}, [], is_new=True).id == SET


def test_change_set_that_is_never_found_is_reported_and_removed(stack: Stack, stub: Stubber) -> None:
    stub.add_response("create_change_set", {"Id": SET, "StackId": ID})
    for _ in range(22):  # 60 s with a look every 3 s
        missing(stub, "describe_change_set", "ChangeSetNotFound")
    missing(stub, "delete_change_set", "ChangeSetNotFound")
    with pytest.raises(Unreachable, match="does not find the change set that it has created"):
        stack.propose({"TemplateBody": "{}"}, [], is_new=True)


def test_a_stack_that_describe_does_not_know_yet_is_followed_all_the_same(stack: Stack, stub: Stubber) -> None:
    """Directly after ExecuteChangeSet, CloudFormation may not know the events or the stack, and then returns the old
    state for a while."""
    missing(stub, "describe_stack_events")
    stub.add_response("describe_stack_events", {"StackEvents": []})
    rows = [event(2, "grid", "CREATE_COMPLETE"), event(1, "grid", "CREATE_IN_PROGRESS")]
    stub.add_response("describe_stack_events", {"StackEvents": rows})
    missing(stub, "describe_stacks")
    stub.add_response("describe_stack_events", {"StackEvents": rows})
    stub.add_response("describe_stacks", told("CREATE_IN_PROGRESS"))
    stub.add_response("describe_stack_events", {"StackEvents": rows})
    stub.add_response("describe_stacks", told("CREATE_COMPLETE"))
    seen: list[Event] = []
    assert stack.follow(ID, "", seen.append).status == "CREATE_COMPLETE"
    assert [one.id for one in seen] == ["e1", "e2"]


def test_deleted_stack_is_found_only_by_its_id(stack: Stack, stub: Stubber) -> None:
    stub.add_response("describe_stacks", told("DELETE_COMPLETE"), {"StackName": "grid"})
    stub.add_response("describe_stacks", told("DELETE_COMPLETE"), {"StackName": ID})
    missing(stub, "describe_stacks")
    assert stack.state() is None
    found = stack.state(ID)
    assert found is not None
    assert found.status == "DELETE_COMPLETE"
    assert stack.state() is None


# --- Change sets ---------------------------------------------------------------------------------


def test_changes_of_all_pages_have_their_causes(stack: Stack, stub: Stubber) -> None:
    def change(name: str, *details: tuple[str, str]) -> dict[str, Any]:
        return {
            "Type": "Resource",
            "ResourceChange": {
                "Action": "Modify",
                "LogicalResourceId": name,
                "ResourceType": "AWS::SQS::Queue",
                "Replacement": "Conditional",
                "Details": [
                    {"Target": {"Attribute": "Properties", "Name": what}, **({"CausingEntity": cause} if cause else {})}
                    for what, cause in details
                ],
            },
        }

    stub.add_response("create_change_set", {"Id": SET, "StackId": ID})
    stub.add_response("describe_change_set", {"Status": "CREATE_COMPLETE"})
    first = {"Changes": [change("A", ("MaxSize", ""), ("MaxSize", "PoolMax"))], "NextToken": "n"}
    stub.add_response("describe_change_set", first)
    stub.add_response(
        "describe_change_set",
        {"Changes": [change("B", ("Tags", ""))]},
        {"StackName": "grid", "ChangeSetName": SET, "NextToken": "n"},
    )
    found = stack.propose({"TemplateBody": "{}"}, [], is_new=False).changes
    assert [(one.id, one.why, one.replacement) for one in found] == [
        ("A", ("MaxSize (PoolMax)",), "Conditional"),
        ("B", ("Tags",), "Conditional"),
    ]


@pytest.mark.parametrize(
    "reason",
    [
        "The submitted information didn't contain changes. Submit different information to create a change set.",
        "No updates are to be performed.",
    ],
)
def test_one_without_changes_is_empty(stack: Stack, stub: Stubber, reason: str) -> None:
    stub.add_response("create_change_set", {"Id": SET, "StackId": ID})
    stub.add_response("describe_change_set", {"Status": "FAILED", "StatusReason": reason})
    assert stack.propose({"TemplateBody": "{}"}, [], is_new=False).changes == ()


def test_impossible_change_set_is_reported_and_deleted(stack: Stack, stub: Stubber) -> None:
    stub.add_response("create_change_set", {"Id": SET, "StackId": ID})
    reason = "Parameters: [ssm:/x] cannot be found."
    stub.add_response("describe_change_set", {"Status": "FAILED", "StatusReason": reason})
    stub.add_response("delete_change_set", {}, {"StackName": "grid", "ChangeSetName": SET})
    stub.add_response("describe_stacks", told("REVIEW_IN_PROGRESS"))
    stub.add_response("delete_stack", {}, {"StackName": ID, "ClientRequestToken": ANY})
    stub.add_response("describe_stacks", told("DELETE_IN_PROGRESS"))
    stub.add_response("describe_stacks", told("DELETE_COMPLETE"))
    with pytest.raises(BackendError, match=r"cannot be found\. Nothing was changed"):
        stack.propose({"TemplateBody": "{}"}, [], is_new=True)


def test_early_refusal_of_aws_is_reported_with_its_reason(stack: Stack, stub: Stubber) -> None:
    """The change set's reason only refers to another call (early validation)."""
    stub.add_response("create_change_set", {"Id": SET, "StackId": ID})
    points_on = (
        "The following hook(s)/validation failed: [AWS::EarlyValidation::ResourceExistenceCheck]. "
        "To troubleshoot Early Validation errors, use the DescribeEvents API."
    )
    stub.add_response("describe_change_set", {"Status": "FAILED", "StatusReason": points_on})
    refused_ = {
        "EventId": "e",
        "LogicalResourceId": "LogGroup",
        "ResourceType": "AWS::Logs::LogGroup",
        "ValidationStatusReason": "Resource … with identifier '/batchlab/grid' already exists.",
    }
    stub.add_response(
        "describe_events",
        {"OperationEvents": [{"EventId": "d"}, refused_]},
        {"ChangeSetName": SET, "Filters": {"FailedEvents": True}},
    )
    stub.add_response("delete_change_set", {}, {"StackName": "grid", "ChangeSetName": SET})
    with pytest.raises(BackendError) as refused:
        stack.propose({"TemplateBody": "{}"}, [], is_new=False)
    assert "LogGroup (AWS::Logs::LogGroup): Resource …" in refused.value.message
    assert "gc --aws" in refused.value.remedy


def test_a_stack_that_was_executed_meanwhile_is_not_deleted_as_an_empty_one(stack: Stack, stub: Stubber) -> None:
    stub.add_response("create_change_set", {"Id": SET, "StackId": ID})
    stub.add_response("describe_change_set", {"Status": "CREATE_COMPLETE"})
    stub.add_response("describe_change_set", {"Changes": []})
    found = stack.propose({"TemplateBody": "{}"}, [], is_new=True)
    stub.add_client_error("execute_change_set", "InternalFailure", "?", http_status_code=500)
    with pytest.raises(Unreachable):
        stack.execute(found)
    # The state of the operation is unknown, so no call is made.
    stack.withdraw(found, is_new=True)


# --- Events --------------------------------------------------------------------------------------


def test_events_are_read_until_a_known_one(stack: Stack, stub: Stubber) -> None:
    rows = [event(n, "Q", "CREATE_IN_PROGRESS") for n in range(9, -1, -1)]
    for begin, token in ((0, "a"), (4, "b")):
        page: dict[str, Any] = {"StackEvents": rows[begin : begin + 4], "NextToken": token}
        stub.add_response("describe_stack_events", page)
    found = stack.events(ID, since="e3")
    assert [one.id for one in found] == ["e4", "e5", "e6", "e7", "e8", "e9"]


def test_a_stack_that_fails_is_followed_through_its_rollback(stack: Stack, stub: Stubber) -> None:
    begun = [
        event(3, "B", "CREATE_FAILED", "B already exists"),
        event(2, "A", "CREATE_IN_PROGRESS"),
        event(1, "grid", "CREATE_IN_PROGRESS", "User Initiated"),
    ]
    rolled = [
        event(7, "grid", "ROLLBACK_COMPLETE"),
        event(6, "A", "DELETE_COMPLETE"),
        event(5, "grid", "ROLLBACK_IN_PROGRESS", "The following resource(s) failed: [A, B]"),
        event(4, "A", "CREATE_FAILED", "Resource creation cancelled"),
    ]
    stub.add_response("describe_stack_events", {"StackEvents": begun})
    stub.add_response("describe_stack_events", {"StackEvents": rolled + begun})
    stub.add_response("describe_stacks", told("ROLLBACK_COMPLETE"))
    seen: list[Event] = []
    state = stack.follow(ID, "", seen.append)
    assert must_be_deleted(state)
    assert not state.has_succeeded
    assert [one.id for one in seen] == [f"e{n}" for n in range(1, 8)]
    cause = root_cause(seen)
    assert cause is not None
    assert (cause.resource, cause.reason) == ("B", "B already exists")


def test_last_operation_is_separated_from_earlier_ones(stack: Stack, stub: Stubber) -> None:
    rows = [
        event(9, "grid", "UPDATE_ROLLBACK_FAILED"),
        event(8, "grid", "UPDATE_ROLLBACK_IN_PROGRESS"),
        event(7, "A", "UPDATE_FAILED", "no"),
        event(6, "grid", "UPDATE_IN_PROGRESS", "User Initiated"),
        event(5, "grid", "CREATE_COMPLETE"),
        event(4, "A", "CREATE_COMPLETE"),
        event(3, "grid", "CREATE_IN_PROGRESS"),
        event(2, "grid", "REVIEW_IN_PROGRESS"),
    ]
    stub.add_response("describe_stack_events", {"StackEvents": rows})
    before, found = stack.last_operation(ID)
    assert before == "e5"
    assert [one.id for one in found] == ["e6", "e7", "e8", "e9"]
    stub.add_response("describe_stack_events", {"StackEvents": rows[-1:]})
    assert stack.last_operation(ID) == ("", stack_event(rows[-1:]))


def stack_event(rows: list[dict[str, Any]]) -> list[Event]:
    return [
        Event(
            row["EventId"],
            row["Timestamp"].timestamp(),
            row["LogicalResourceId"],
            row["ResourceType"],
            row["ResourceStatus"],
            row["ResourceStatusReason"],
            is_of_stack=True,
        )
        for row in rows
    ]


# --- Refusals ------------------------------------------------------------------------------------


def test_missing_permission_names_the_action_and_the_page(stack: Stack, stub: Stubber) -> None:
    stub.add_client_error(
        "create_change_set",
        "AccessDenied",
        "User: arn:aws:iam::1:user/eve is not authorized to perform: "
        "cloudformation:CreateChangeSet on resource: arn:aws:… because no identity-based policy "
        "allows the cloudformation:CreateChangeSet action",
        http_status_code=403,
    )
    with pytest.raises(BackendError) as refused:
        stack.propose({"TemplateBody": "{}"}, [], is_new=True)
    assert refused.value.message == ("arn:aws:iam::1:user/eve may not do cloudformation:CreateChangeSet.")
    assert "docs/deploy.md" in refused.value.remedy


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("ExpiredToken", "have expired"),
        ("RequestExpired", "have expired"),
        ("InvalidClientTokenId", "rejects these credentials"),
        ("SignatureDoesNotMatch", "rejects these credentials"),
        ("UnrecognizedClientException", "rejects these credentials"),
    ],
)
def test_invalid_credentials_are_reported(stack: Stack, stub: Stubber, code: str, says: str) -> None:
    stub.add_client_error("describe_stacks", code, "no", http_status_code=403)
    with pytest.raises(UsageError, match=says) as refused:
        stack.state()
    assert refused.value.remedy


def test_only_requested_resources_can_be_missing(stub: Stubber) -> None:
    stub.add_client_error("describe_stacks", "ValidationError", "1 validation error detected")
    client: Any = stub.client
    with pytest.raises(Refused, match="1 validation error"), aws_errors("It", lambda code, _: not code):
        client.describe_stacks(StackName="x")


def test_types_that_an_emulator_lacks_are_named_with_the_option(stack: Stack, stub: Stubber) -> None:
    lacks = "Template format error: Unrecognized resource types: [AWS::Budgets::Budget]"
    stub.add_client_error("create_change_set", "ValidationError", lacks, http_status_code=400)
    with pytest.raises(Refused, match=r"AWS::Budgets::Budget") as refused:
        stack.propose({"TemplateBody": "{}"}, [], is_new=True)
    assert "--budget 0" in refused.value.remedy
