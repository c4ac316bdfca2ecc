"""The Spot notice through AWS Fault Injection Service. botocore checks the requests and parses the scripted answers,
because no emulator has this service."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import boto3
import pytest
from botocore.stub import ANY, Stubber

from batchlab.core.errors import BackendError
from batchlab.deploy import spot_notice
from batchlab.deploy.account import Account

STACK, INSTANCE = "batchlab-rehearsal", "i-0123456789abcdef0"
ARN = f"arn:aws:ec2:us-east-1:123456789012:instance/{INSTANCE}"
NAME = f"{STACK}-fis-us-east-1"
ROLE = {
    "Path": "/",
    "RoleName": NAME,
    "RoleId": "AROA0123456789ABCDEF",
    "Arn": "arn:aws:iam::123456789012:role/x",
    "CreateDate": datetime(2026, 1, 1, tzinfo=UTC),
}


class Cloud:
    """An account whose IAM and FIS return scripted answers in order."""

    def __init__(self) -> None:
        self.account = Account("us-east-1", "123456789012", "arn:aws:iam::123456789012:user/me")
        self.stubs: dict[str, Stubber] = {}
        for service in ("fis", "iam"):
            make: Any = boto3.client
            client = make(service, region_name="us-east-1", aws_access_key_id="a", aws_secret_access_key="b")
            self.account._clients[service] = client
            self.stubs[service] = Stubber(client)
            self.stubs[service].activate()

    def tells(self, service: str, method: str, answer: dict[str, Any], **request: Any) -> None:
        self.stubs[service].add_response(method, answer, request or None)

    def refuses(self, service: str, method: str, code: str, message: str = "No.") -> None:
        self.stubs[service].add_client_error(method, code, message, http_status_code=400)

    def experiment(self, method: str, status: str, reason: str = "") -> None:
        state = {"status": status, **({"reason": reason} if reason else {})}
        self.tells("fis", method, {"experiment": {"id": "EXP1", "state": state}})


@pytest.fixture
def cloud() -> Iterator[Cloud]:
    found = Cloud()
    yield found
    for stub in found.stubs.values():
        stub.assert_no_pending_responses()


def test_the_experiment_is_for_one_instance_with_a_role_of_its_own(cloud: Cloud) -> None:
    seen: list[dict[str, Any]] = []
    fis, iam = cloud.account.client("fis"), cloud.account.client("iam")
    for client in (fis, iam):
        client.meta.events.register("provide-client-params.*.*", lambda params, **_: seen.append(dict(params)))
    cloud.tells("iam", "create_role", {"Role": {**ROLE, "AssumeRolePolicyDocument": "{}"}})
    cloud.tells("iam", "put_role_policy", {})
    cloud.tells("fis", "create_experiment_template", {"experimentTemplate": {"id": "EXT1"}})
    assert spot_notice.prepare(cloud.account, STACK, INSTANCE) == "EXT1"
    role, policy, template = seen
    (trust,) = json.loads(role["AssumeRolePolicyDocument"])["Statement"]
    assert trust["Principal"] == {"Service": "fis.amazonaws.com"}
    allowed, _ = json.loads(policy["PolicyDocument"])["Statement"]
    assert allowed["Action"] == "ec2:SendSpotInstanceInterruptions"
    assert allowed["Condition"] == {"StringEquals": {"aws:ResourceTag/batchlab.stack": STACK}}
    assert template["targets"]["instance"]["resourceArns"] == [ARN]
    assert template["actions"]["notice"]["parameters"] == {"durationBeforeInterruption": "PT2M"}
    assert template["tags"] == {"batchlab.stack": STACK}


def test_a_refused_role_is_an_error_that_names_the_action(cloud: Cloud) -> None:
    cloud.refuses("iam", "create_role", "AccessDenied", "User: me is not authorized to perform: iam:CreateRole on x")
    with pytest.raises(BackendError, match="may not do iam:CreateRole"):
        spot_notice.prepare(cloud.account, STACK, INSTANCE)


def test_the_state_of_the_experiment_is_read_until_its_end(cloud: Cloud) -> None:
    cloud.experiment("start_experiment", "initiating")
    cloud.experiment("get_experiment", "running")
    cloud.experiment("get_experiment", "completed", "Experiment completed.")
    waits: list[float] = []
    text = spot_notice.send(cloud.account, "EXT1", sleep=waits.append)
    assert text == "FIS reports completed: Experiment completed."
    assert len(waits) == 2


def test_a_role_that_is_too_new_is_tried_again(cloud: Cloud) -> None:
    cloud.experiment("start_experiment", "failed", "Unable to assume role.")
    cloud.experiment("start_experiment", "completed")
    assert "completed" in spot_notice.send(cloud.account, "EXT1", sleep=lambda _: None)


def test_a_failed_experiment_is_an_error(cloud: Cloud) -> None:
    cloud.experiment("start_experiment", "failed", "Target resolution returned empty set.")
    with pytest.raises(BackendError, match=r"did not send the notice\. FIS reports failed: Target resolution"):
        spot_notice.send(cloud.account, "EXT1", sleep=lambda _: None)


def test_only_templates_of_the_stack_are_removed(cloud: Cloud) -> None:
    templates = [{"id": "EXT1", "tags": {"batchlab.stack": STACK}}, {"id": "EXT2", "tags": {"batchlab.stack": "other"}}]
    cloud.tells("fis", "list_experiment_templates", {"experimentTemplates": templates})
    cloud.tells("fis", "delete_experiment_template", {"experimentTemplate": {"id": "EXT1"}}, id="EXT1")
    cloud.tells("iam", "delete_role_policy", {}, RoleName=NAME, PolicyName=ANY)
    cloud.tells("iam", "delete_role", {}, RoleName=NAME)
    assert spot_notice.remove(cloud.account, STACK) == 1


def test_a_second_removal_has_no_effect(cloud: Cloud) -> None:
    cloud.tells("fis", "list_experiment_templates", {"experimentTemplates": []})
    cloud.refuses("iam", "delete_role_policy", "NoSuchEntity")
    cloud.refuses("iam", "delete_role", "NoSuchEntity")
    assert spot_notice.remove(cloud.account, STACK) == 0


def test_role_is_removed_even_if_fis_is_not_allowed(cloud: Cloud) -> None:
    cloud.refuses("fis", "list_experiment_templates", "AccessDeniedException")
    cloud.tells("iam", "delete_role_policy", {}, RoleName=NAME, PolicyName=ANY)
    cloud.tells("iam", "delete_role", {}, RoleName=NAME)
    with pytest.raises(BackendError, match="may not do ListExperimentTemplates"):
        spot_notice.remove(cloud.account, STACK)


def test_rehearsals_in_two_regions_have_two_roles(cloud: Cloud) -> None:
    other = Account("eu-west-1", cloud.account.id, cloud.account.who)
    assert spot_notice.role_name(other, STACK) != spot_notice.role_name(cloud.account, STACK) == NAME
