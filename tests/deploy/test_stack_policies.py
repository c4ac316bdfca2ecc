"""The permissions of the stack's roles in the template. No role has a wildcard action or an unknown action, and each
role may write only its own keys."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.model import StageName
from batchlab.core.protocol import object_keys
from tests.core.test_properties_of_names import COUNT, NAME, bundles, keys_of
from tests.support import ROOT
from tests.support.aws import cfn
from tests.support.aws.stack_shapes import SHAPES, TOPICS
from tests.support.properties import PROPERTY

TEMPLATE = cfn.load()
SHOWN = {name: cfn.Rendered(TEMPLATE, **shape) for name, shape in SHAPES.items()}
BUCKET = "<Bucket.Arn>/"

WITHOUT_RESOURCE = {
    "autoscaling:DescribeAutoScalingGroups",
    "autoscaling:DescribeScalingActivities",
    "autoscaling:DescribeScheduledActions",
    "ecr:GetAuthorizationToken",
    "ssmmessages:CreateControlChannel",
    "ssmmessages:CreateDataChannel",
    "ssmmessages:OpenControlChannel",
    "ssmmessages:OpenDataChannel",
}
"""Actions without a resource type in AWS, which can be allowed only for "*"."""


@cache
def known() -> dict[str, dict[str, dict[str, Any]]]:
    """Return AWS's service authorization reference from cfn-lint, as {service: {action: facts}}."""
    text = files("cfnlint.data.AdditionalSpecs").joinpath("Policies.json").read_text()
    return {service: facts["Actions"] for service, facts in json.loads(text).items()}


def allowed() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield (role, action, statement) of every allowed action in any shape."""
    for shape in SHOWN.values():
        for role, properties in shape.of_type("AWS::IAM::Role").items():
            for statement in cfn.statements(properties):
                if statement["Effect"] == "Allow":
                    for action in cfn.as_list(statement["Action"]):
                        yield role, action, statement


def test_every_action_is_spelled_out_and_exists_in_aws() -> None:
    for role, action, _ in allowed():
        assert "*" not in action, (role, action)
        service, name = action.split(":")
        assert name.lower() in known()[service], action


def test_wildcard_resources_only_where_aws_requires_them() -> None:
    whole = {a for _, a, one in allowed() if "*" in cfn.as_list(one["Resource"])}
    assert whole == WITHOUT_RESOURCE
    for action in WITHOUT_RESOURCE:
        service, name = action.split(":")
        assert "Resources" not in known()[service][name.lower()], f"{action} has resources"


def test_each_resource_is_of_this_stack_and_this_account() -> None:
    """A resource may also be an instance with an unknown id, or an image of this account."""
    for role, action, statement in allowed():
        for resource in cfn.as_list(statement["Resource"]):
            if resource == "*" or resource.startswith("<"):
                continue
            assert ":us-east-1:123456789012:" in resource, (role, resource)
            if action.split(":")[0] not in ("ssm", "ecr", "sdb", "rds-db"):
                assert "batchlab-" in resource or "<LogGroup>" in resource, (role, resource)


def test_only_ec2_may_take_the_roles() -> None:
    for shape in SHOWN.values():
        for role in shape.of_type("AWS::IAM::Role").values():
            (statement,) = role["AssumeRolePolicyDocument"]["Statement"]
            assert statement["Principal"] == {"Service": "ec2.amazonaws.com"}


def actions(role: str) -> set[str]:
    return {action for name, action, _ in allowed() if name == role}


def test_a_worker_may_do_nothing_to_the_fleet_the_stack_or_secrets() -> None:
    services = {action.split(":")[0] for action in actions("PoolRole")}
    assert services == {"s3", "sqs", "autoscaling", "logs", "ecr"}
    assert not {a for a in actions("PoolRole") if a.startswith("s3:Delete")}
    scaling = {a for a in actions("PoolRole") if a.startswith("autoscaling")}
    assert scaling == {"autoscaling:CompleteLifecycleAction"}


def test_no_role_may_create_or_delete_queues_groups_or_buckets() -> None:
    for role in ("PoolRole", "ManagerRole"):
        for action in actions(role):
            name = action.split(":")[1]
            assert not name.startswith(("CreateQueue", "DeleteQueue", "Purge", "CreateAuto"))
            assert not name.startswith(("DeleteAuto", "PutBucket", "DeleteBucket"))


def test_only_the_limits_of_pools_may_be_changed() -> None:
    changes = {a for role in ("PoolRole", "ManagerRole") for a in actions(role) if ":Update" in a}
    assert changes == {"ssm:UpdateInstanceInformation", "autoscaling:UpdateAutoScalingGroup"}


def test_the_store_is_reached_in_the_one_way_that_was_chosen() -> None:
    secret, token = "secretsmanager:GetSecretValue", "rds-db:connect"

    def of(shape: str, action: str) -> list[str]:
        role = SHOWN[shape].properties("ManagerRole")
        found = [statement for statement in cfn.statements(role) if action in cfn.as_list(statement["Action"])]
        return [resource for one in found for resource in cfn.as_list(one["Resource"])]

    assert of("postgres", secret) == ["<TokenSecret.Id>", "<Database.MasterUserSecret.SecretArn>"]
    assert of("postgres", token) == []
    assert of("own-network", secret) == ["<TokenSecret.Id>"]
    (dbuser,) = of("own-network", token)
    assert dbuser.endswith(":dbuser:<Database.DbiResourceId>/batchlab_iam")
    assert of("endpoints", "sdb:Select") == []
    (domain,) = of("simpledb", "sdb:Select")
    assert domain.endswith(":domain/<LedgerDomain>")


def test_only_the_topics_that_are_named_may_be_published_to() -> None:
    found = [(role, one["Resource"]) for role, action, one in allowed() if action == "sns:Publish"]
    assert found == [("ManagerRole", list(TOPICS))]


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("", True),
        (TOPICS[0], True),
        (",".join(TOPICS), True),
        ("*", False),
        (TOPICS[0].replace("batchlab-ends", "*"), False),
        (TOPICS[0] + ",", False),
        ("arn:aws:sqs:us-east-1:123456789012:queue", False),
    ],
)
def test_no_other_text_names_topics(text: str, fits: bool) -> None:
    pattern = TEMPLATE["Parameters"]["NotifyTopics"]["AllowedPattern"]
    assert bool(re.fullmatch(pattern, text)) == fits


def test_permissions_boundary_and_extra_policies_are_attached_on_request() -> None:
    own, plain = SHOWN["own-network"], SHOWN["empty"]
    for role in ("PoolRole", "ManagerRole"):
        assert own.properties(role)["PermissionsBoundary"].endswith(":policy/boundary")
        assert "PermissionsBoundary" not in plain.properties(role)
    assert own.properties("PoolRole")["ManagedPolicyArns"] == ["arn:aws:iam::aws:policy/AmazonS3ReadOnlyAccess"]
    assert "ManagedPolicyArns" not in own.properties("ManagerRole"), "tasks do not run there"


# --- Keys ----------------------------------------------------------------------------------------


def matches(pattern: str, name: str) -> bool:
    """Return whether a name matches a pattern of IAM. The character "*" matches any text with slashes, and "?" matches
    one character."""
    text = re.escape(pattern).replace(r"\*", ".*").replace(r"\?", ".")
    return re.fullmatch(text, name, re.DOTALL) is not None


def resources(role: str, action: str) -> list[str]:
    found = [
        resource
        for statement in cfn.statements(SHOWN["empty"].properties(role))
        if statement["Effect"] == "Allow" and action in cfn.as_list(statement["Action"])
        for resource in cfn.as_list(statement["Resource"])
    ]
    assert found, (role, action)
    return found


def may(role: str, action: str, key: str) -> bool:
    return any(matches(pattern, BUCKET + key) for pattern in resources(role, action))


def must_be_conditional(key: str) -> bool:
    statements = SHOWN["empty"].properties("BucketPolicy")["PolicyDocument"]["Statement"]
    patterns = [
        pattern
        for one in statements
        if one["Sid"] in ("CommitsAreConditional", "DefinitionsAreConditional")
        for pattern in cfn.as_list(one["Resource"])
    ]
    return any(matches(pattern, BUCKET + key) for pattern in patterns)


KINDS = {
    "spec": (True, False),
    "control": (False, False),
    "retry": (True, False),
    "final": (True, False),
    "manifest": (True, False),
    "part": (False, False),
    "item": (False, False),
    "cut": (True, False),
    "outcome": (True, True),
    "files": (True, True),
    "log": (True, True),
    "starts": (True, True),
    "running": (False, True),
}
"""The kinds of keys in the bucket. Each kind has two flags: whether the key is a commit, and whether workers write the
key."""

ODD_FILES = st.sampled_from(
    ["a.csv", "outcomes/ab/x.json", "spec.json", "plan/0000/cuts/1", "final/0000.json", "starts/x"]
)


@PROPERTY
@given(NAME, NAME, COUNT.map(lambda n: n % 10_000), ODD_FILES, st.data())
def test_commits_are_protected_and_nothing_else_is(
    name: str, stage: str, number: int, file: str, data: st.DataObject
) -> None:
    """Jobs, stages, and files may have any name. The names "outcomes" and "final" are allowed too."""
    job = object_keys.job_id(name, "token")
    bundle = data.draw(bundles(job, StageName(stage)))
    keys = keys_of(job, StageName(stage), number, bundle)
    for (kind, (is_commit, is_workers)), key in zip(KINDS.items(), keys, strict=True):
        if key.endswith("/"):
            key += "w-1" if kind == "starts" else f"0/{file}"
        assert must_be_conditional(key) == is_commit, (kind, key)
        assert may("PoolRole", "s3:PutObject", key) == is_workers, (kind, key)
        assert may("ManagerRole", "s3:PutObject", key) == key.startswith("jobs/"), (kind, key)
    for key in (f"{object_keys.raw(job)}{file}", "code/0123.zip", "boot/0123.tar.gz"):
        assert not must_be_conditional(key)
        assert may("PoolRole", "s3:GetObject", key)
        assert not may("PoolRole", "s3:PutObject", key)
        # The manager stores the files of a job that a user submits on the page.
        assert may("ManagerRole", "s3:PutObject", key) != key.startswith("boot/")
    of_the_grid = (object_keys.USE, object_keys.reference_key(job), object_keys.NOTIFICATIONS, object_keys.RECORD)
    of_schedules = (object_keys.schedule(name), object_keys.template("0123"))
    for key in (*of_the_grid, *of_schedules, object_keys.reports(job) + "report.json"):
        assert may("ManagerRole", "s3:PutObject", key)
        assert may("ManagerRole", "s3:GetObject", key)
        assert not may("PoolRole", "s3:PutObject", key)
        assert not must_be_conditional(key)


def test_a_multipart_upload_is_held_to_the_condition_at_its_end_only() -> None:
    """The parts of an upload cannot carry the condition. AWS documents that the parts do not need it."""
    statements = SHOWN["empty"].properties("BucketPolicy")["PolicyDocument"]["Statement"]
    (statement,) = (one for one in statements if one["Sid"] == "CommitsAreConditional")
    assert (statement["Effect"], statement["Principal"]) == ("Deny", "*")
    assert statement["Action"] == "s3:PutObject"
    assert statement["Condition"] == {
        "Null": {"s3:if-none-match": "true"},
        "Bool": {"s3:ObjectCreationOperation": "true"},
    }


def test_only_the_manager_deletes_objects_and_only_those_of_jobs() -> None:
    job = object_keys.job_id("sums", "token")
    deleted = (
        *object_keys.everything_of(job),
        object_keys.addresses_of(job),
        object_keys.deletion(job),
        object_keys.reference_key(job),
    )
    for key in deleted:
        assert may("ManagerRole", "s3:DeleteObject", key + "x"), key
    kept = ("code/0123.zip", "boot/0123.tar.gz", object_keys.USE, object_keys.COMMIT_SECRET, object_keys.schedule("a"))
    for key in kept:
        assert not may("ManagerRole", "s3:DeleteObject", key), key
    assert "s3:DeleteObject" not in actions("PoolRole")


def test_only_the_manager_replaces_a_definition_and_only_by_a_condition() -> None:
    statements = SHOWN["empty"].properties("BucketPolicy")["PolicyDocument"]["Statement"]
    by_sid = {one["Sid"]: one for one in statements}
    at_the_end = {"Bool": {"s3:ObjectCreationOperation": "true"}}
    conditions = {
        "DefinitionsAreConditional": {"Null": {"s3:if-none-match": "true", "s3:if-match": "true"}},
        "OnlyTheManagerReplacesDefinitions": {
            "Null": {"s3:if-none-match": "true"},
            "ArnNotEquals": {"aws:PrincipalArn": "<ManagerRole.Arn>"},
        },
    }
    for sid, condition in conditions.items():
        statement = by_sid[sid]
        assert (statement["Effect"], statement["Principal"]) == ("Deny", "*")
        assert statement["Action"] == "s3:PutObject"
        assert statement["Resource"].endswith("/jobs/*/spec.json")
        assert statement["Condition"] == condition | at_the_end


@pytest.mark.parametrize("pool", ["default", "gpu", "dead", "my-dead"])
def test_workers_send_to_queues_of_pools_and_never_to_dead_letters(pool: str) -> None:
    arn = "arn:aws:sqs:us-east-1:123456789012:batchlab-"
    denied = [
        statement["Resource"]
        for statement in cfn.statements(SHOWN["empty"].properties("PoolRole"))
        if statement["Effect"] == "Deny"
    ]

    allowed_to = resources("PoolRole", "sqs:SendMessage")

    def sends(queue: str) -> bool:
        found = any(matches(one, arn + queue) for one in allowed_to)
        return found and not any(matches(one, arn + queue) for one in denied)

    assert sends(object_keys.tasks_queue(pool)) != pool.endswith("-dead")
    assert not sends(object_keys.dead_letters(pool))


def test_workers_take_from_the_queue_of_their_pool_only() -> None:
    for action in ("ReceiveMessage", "DeleteMessage", "ChangeMessageVisibility"):
        assert resources("PoolRole", f"sqs:{action}") == ["<PoolTasks.Arn>"]
    (group,) = resources("PoolRole", "autoscaling:CompleteLifecycleAction")
    assert group.endswith(":autoScalingGroupName/batchlab-pool-default")


def test_users_may_open_a_way_to_the_manager_and_no_shell_on_it() -> None:
    """Without a named document, AWS starts a shell, unless each statement has this condition."""
    page = ROOT / "docs" / "aws-security.md"
    (policy,) = re.findall(r"```json\n(.*?)```", page.read_text(), re.DOTALL)
    sessions = [load for load in json.loads(policy)["Statement"] if "ssm:StartSession" in load["Action"]]
    assert [session["Resource"].rpartition(":")[2] for session in sessions] == [
        "instance/*",
        "document/AWS-StartPortForwardingSession",
    ]
    for session in sessions:
        checked = {"ssm:SessionDocumentAccessCheck": "true"}
        assert session["Condition"]["BoolIfExists"] == checked, session["Sid"]
    assert sessions[0]["Condition"]["StringEquals"] == {
        "ssm:resourceTag/batchlab.stack": "batchlab",
        "ssm:resourceTag/batchlab.role": "manager",
    }
