"""The permissions of the stack's roles. MiniStack enforces the policies over TLS, for calls as an instance with the
role's profile makes them.

MiniStack does not enforce the trust policy of AssumeRole (only EC2 may assume the roles, see the unit tests), and does
not have SimpleDB. MiniStack checks an SQS batch call as a separate action, so `cfn.for_ministack` adds these actions.
The condition keys of conditional writes come from `ministack_conditions`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from botocore.exceptions import ClientError

from tests.support import ROOT
from tests.support.aws import cfn
from tests.support.aws.ministack import ACCOUNT, REGION, Plane, Stack, served
from tests.support.aws.stack_calls import (
    MANAGER_MAY,
    MANAGER_MUST_NOT,
    OTHER_POOLS,
    OTHER_TOPIC,
    TOPIC,
    USER_MAY,
    USER_MUST_NOT,
    WORKER_MAY,
    WORKER_MUST_NOT,
    Call,
    Site,
)
from tests.support.aws.stack_shapes import RELEASE

SHAPE: dict[str, Any] = {"Release": RELEASE, "NotifyTopics": TOPIC}
PAGE = ROOT / "docs" / "aws-security.md"
DENIED = {"AccessDenied", "AccessDeniedException", "AuthorizationError", "UnauthorizedOperation"}


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Site]]:
    with served(tmp_path_factory.mktemp("enforced"), enforces=True, tls=True) as root:
        stack = Stack(root)
        status = stack.create(cfn.for_ministack(cfn.load(), **SHAPE), **SHAPE)
        assert status == "CREATE_COMPLETE", stack.failures()
        ids = stack.ids()
        for key in ("boot/a.tar.gz", "code/a.zip", "raw/j/0", "files/j/s/0", "logs/j/s/0", "grid/leader.json"):
            root.client("s3").put_object(Bucket=ids["Bucket"], Key=key, Body=b"1")
        root.client("s3").create_bucket(Bucket="somebody-elses")
        root.client("s3").put_object(Bucket="somebody-elses", Key="a", Body=b"1")
        for name in ("somebody-elses", OTHER_POOLS):
            root.client("sqs").create_queue(QueueName=name)
        for topic in (TOPIC, OTHER_TOPIC):
            root.client("sns").create_topic(Name=topic.rpartition(":")[2])
        root.client("secretsmanager").create_secret(Name="somebody-elses", SecretString="x")
        root.client("ssm").put_parameter(Name="/somebody/elses", Value="x", Type="String")
        roles = {"Worker": "PoolRole", "Manager": "ManagerRole"}
        made = {who: Site(root, ids, root.role(ids[role])) for who, role in roles.items()}
        yield {**made, "User": Site(root, ids, user_of(root, stack))}


def user_of(root: Plane, stack: Stack) -> Plane:
    """Return a user with only the policy that the docs give to users of the grid."""
    (policy,) = re.findall(r"```json\n(.*?)```", PAGE.read_text(), re.DOTALL)
    outputs = stack.outputs()
    facts = {"ACCOUNT": ACCOUNT, "REGION": REGION, "BUCKET": outputs["Bucket"]}
    for name, value in {**facts, "TOKENSECRET": outputs["TokenSecret"]}.items():
        policy = policy.replace(name, value)
    iam = root.client("iam")
    iam.create_user(UserName="ada")
    iam.put_user_policy(UserName="ada", PolicyName="grid", PolicyDocument=policy)
    key = iam.create_access_key(UserName="ada")["AccessKey"]
    keys = {"aws_access_key_id": key["AccessKeyId"], "aws_secret_access_key": key["SecretAccessKey"]}
    return Plane(root.url, root.ca, keys)


@pytest.fixture
def worker(sites: dict[str, Site]) -> Site:
    return sites["Worker"]


@pytest.fixture
def manager(sites: dict[str, Site]) -> Site:
    return sites["Manager"]


@pytest.fixture
def user(sites: dict[str, Site]) -> Site:
    return sites["User"]


def _named(calls: dict[str, Call]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("call", calls.values(), ids=calls.keys())


def denied(call: Call, site: Site) -> None:
    with pytest.raises(ClientError) as refused:
        call(site)
    assert refused.value.response["Error"]["Code"] in DENIED
    assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] in (400, 403)


@_named(WORKER_MAY)
def test_a_worker_may(worker: Site, call: Call) -> None:
    call(worker)


@_named(WORKER_MUST_NOT)
def test_a_worker_must_not(worker: Site, call: Call) -> None:
    denied(call, worker)


@_named(MANAGER_MAY)
def test_the_manager_may(manager: Site, call: Call) -> None:
    call(manager)


@_named(MANAGER_MUST_NOT)
def test_the_manager_must_not(manager: Site, call: Call) -> None:
    denied(call, manager)


@_named(USER_MAY)
def test_a_user_with_the_documented_policy_may(user: Site, call: Call) -> None:
    call(user)


@_named(USER_MUST_NOT)
def test_a_user_with_the_documented_policy_must_not(user: Site, call: Call) -> None:
    denied(call, user)


def test_missing_key_is_not_found_instead_of_forbidden(worker: Site, manager: Site) -> None:
    """A worker reads this answer as "the bundle does not have an outcome yet"."""
    for site in (worker, manager):
        with pytest.raises(ClientError) as missing:
            site.get("jobs/j/s/outcomes/ab/nothing.json")
        assert missing.value.response["Error"]["Code"] == "NoSuchKey"


def test_a_commit_is_made_once(worker: Site) -> None:
    worker.put("jobs/j/s/outcomes/ab/once.json", IfNoneMatch="*")
    with pytest.raises(ClientError) as taken:
        worker.put("jobs/j/s/outcomes/ab/once.json", IfNoneMatch="*")
    assert taken.value.response["Error"]["Code"] == "PreconditionFailed"


def test_only_the_manager_replaces_a_definition_and_only_by_a_condition(manager: Site, user: Site) -> None:
    key = "jobs/deleted/spec.json"
    manager.put(key, IfNoneMatch="*")
    etag = manager.s3.head_object(Bucket=manager.bucket, Key=key)["ETag"]
    denied(lambda site: site.put(key), manager)
    denied(lambda site: site.put(key, IfMatch=etag), user)
    manager.put(key, IfMatch=etag)


def test_a_stolen_session_without_its_secret_is_refused(worker: Site) -> None:
    keys = {**worker.plane.keys, "aws_secret_access_key": "guessed"}
    s3 = Plane(worker.plane.url, worker.plane.ca, keys).client("s3")
    with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
        s3.list_objects_v2(Bucket=worker.bucket)


def test_everything_is_refused_without_tls(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The calls are those of the tests above, on the same stack without TLS."""
    with served(tmp_path_factory.mktemp("plain"), enforces=True) as root:
        stack = Stack(root)
        assert stack.create(cfn.for_ministack(cfn.load(), **SHAPE), **SHAPE) == "CREATE_COMPLETE"
        ids = stack.ids()
        worker = Site(root, ids, root.role(ids["PoolRole"]))
        calls: list[Call] = [
            lambda it: it.put("files/j/s/ab/b/w/0/a.csv", IfNoneMatch="*"),
            lambda it: it.s3.list_objects_v2(Bucket=it.bucket),
            lambda it: it.sqs.get_queue_url(QueueName="batchlab-tasks-default"),
            lambda it: it.sqs.get_queue_url(QueueName="batchlab-events"),
        ]
        for call in calls:
            with pytest.raises(ClientError, match="explicit deny in a resource-based policy"):
                call(worker)
