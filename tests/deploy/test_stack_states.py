"""The actions of `deploy plan`, `apply`, and `destroy` for a stack in each of CloudFormation's states."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest

from batchlab.core.errors import Refused
from batchlab.deploy import apply, leftovers, release
from batchlab.deploy.account import Account
from batchlab.deploy.apply import Apply, StackFailed
from batchlab.deploy.destroy import Destroy
from batchlab.deploy.settings import Settings
from batchlab.deploy.stack import Stack
from batchlab.deploy.stack_records import NEXT, State, refuse_unchangeable
from batchlab.runtime.home import Home
from tests.support.aws.deploy import Front
from tests.support.aws.stack_states import Cloud

DESTROY = "`batchlab deploy destroy` removes the remaining resources"


@dataclass(frozen=True)
class Case:
    """The expected behavior in one state. `applied` is the next action of apply ("create" or "update") or the text of
    its refusal, after the CloudFormation `calls` and the question `asked`. `planned` is the text with which a plan is
    refused. `ending` are the calls of a destroy."""

    applied: str
    planned: str = ""
    calls: tuple[str, ...] = ()
    asked: str = ""
    ending: tuple[str, ...] = ("unprotect", "delete")


FOLLOWED = "apply` waits for the end"
TABLE = {
    "REVIEW_IN_PROGRESS": Case("create"),
    "CREATE_COMPLETE": Case("update"),
    "UPDATE_COMPLETE": Case("update"),
    "UPDATE_ROLLBACK_COMPLETE": Case("update"),
    "IMPORT_COMPLETE": Case("update"),
    "IMPORT_ROLLBACK_COMPLETE": Case("update"),
    "ROLLBACK_COMPLETE": Case(
        "create", "deletes the empty stack", ("unprotect", "delete"), "Delete the empty stack grid"
    ),
    "UPDATE_ROLLBACK_FAILED": Case("update", "continues the rollback", ("resume",), "Continue the rollback?"),
    "CREATE_FAILED": Case(DESTROY, DESTROY),
    "ROLLBACK_FAILED": Case(DESTROY, DESTROY),
    "DELETE_FAILED": Case("--stack-name grid --retain-resources", "deploy destroy` again"),
    "UPDATE_FAILED": Case("rollback-stack --stack-name grid", "rollback-stack"),
    "IMPORT_ROLLBACK_FAILED": Case("CloudFormation's console", "CloudFormation's console"),
    # The operation is followed to its end, and then handled as its final state.
    "CREATE_IN_PROGRESS": Case("update", FOLLOWED),
    "UPDATE_IN_PROGRESS": Case("update", FOLLOWED),
    "UPDATE_COMPLETE_CLEANUP_IN_PROGRESS": Case("update", FOLLOWED),
    "UPDATE_ROLLBACK_IN_PROGRESS": Case("update", FOLLOWED),
    "UPDATE_ROLLBACK_COMPLETE_CLEANUP_IN_PROGRESS": Case("update", FOLLOWED),
    "IMPORT_IN_PROGRESS": Case("update", FOLLOWED),
    "IMPORT_ROLLBACK_IN_PROGRESS": Case("update", FOLLOWED),
    "ROLLBACK_IN_PROGRESS": Case("create", FOLLOWED, ("unprotect", "delete"), "Delete the empty stack grid"),
    "DELETE_IN_PROGRESS": Case("create", FOLLOWED, ending=()),
}


class ReachedError(Exception):
    """The next action of apply would be to create or to update."""


@pytest.fixture(autouse=True)
def _plans(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def planned(_stack: Stack, _wanted: Settings, _source: object, state: State | None, **_: object) -> Iterator[None]:
        raise ReachedError("create" if state is None or state.is_new else "update")
        yield

    monkeypatch.setattr(apply, "create_plan", planned)
    monkeypatch.setattr(release, "release_of", lambda _: "0" * 64)


def stack_of(cloud: Cloud, **clients: Any) -> Stack:
    account = Account("us-east-1", "1", "arn:aws:iam::1:user/me")
    account._clients.update({"cloudformation": cloud, **clients})
    return Stack(account, "grid", sleep=lambda _: None)


def apply_to(cloud: Cloud, front: Front, tmp_path: Path) -> str:
    run = Apply(stack_of(cloud), Settings(), {}, Home(tmp_path), front, lambda: tmp_path)
    with pytest.raises((ReachedError, Refused, StackFailed)) as ended:
        run.run()
    return f"{ended.value} {getattr(ended.value, 'remedy', '')}"


def test_the_table_has_every_state_that_aws_has() -> None:
    client: Any = boto3.client("cloudformation", region_name="us-east-1")
    every = set(client.meta.service_model.shape_for("StackStatus").enum)
    assert TABLE.keys() == every - {"DELETE_COMPLETE"}, "a stack of that name is none"
    assert NEXT.keys() < every


@pytest.mark.parametrize("status", TABLE)
def test_apply_in_each_state(status: str, tmp_path: Path) -> None:
    case, cloud, front = TABLE[status], Cloud(status), Front()
    assert case.applied in apply_to(cloud, front, tmp_path)
    assert tuple(cloud.calls) == case.calls
    assert len(front.questions) == bool(case.asked)
    assert all(case.asked in question for question in front.questions)
    followed = [one for one in front.said if "Waiting for the end of this operation" in one]
    assert len(followed) == (case.planned == FOLLOWED)


@pytest.mark.parametrize("status", [name for name, case in TABLE.items() if case.asked])
def test_declined_confirmation_leaves_the_stack_unchanged(status: str, tmp_path: Path) -> None:
    cloud, front = Cloud(status), Front(agreed=False)
    run = Apply(stack_of(cloud), Settings(), {}, Home(tmp_path), front, lambda: tmp_path)
    if status == "UPDATE_ROLLBACK_FAILED":
        with pytest.raises(Refused, match="stays UPDATE_ROLLBACK_FAILED"):
            run.run()
    else:
        assert run.run() is None
    assert cloud.calls == []


@pytest.mark.parametrize("status", TABLE)
def test_a_plan_in_each_state(status: str) -> None:
    state = stack_of(Cloud(status)).state()
    assert state
    if not TABLE[status].planned:
        refuse_unchangeable(state)
        return
    with pytest.raises(Refused, match=f"grid is {status}") as refused:
        refuse_unchangeable(state)
    assert TABLE[status].planned in refused.value.remedy


@pytest.mark.parametrize("status", TABLE)
def test_destroy_in_each_state(status: str) -> None:
    cloud, front = Cloud(status), Front()
    assert Destroy(stack_of(cloud), front, delete_data=False).run() == []
    assert tuple(cloud.calls) == TABLE[status].ending
    assert cloud.status == "DELETE_COMPLETE"


def test_failed_rollback_names_its_cause_and_what_can_be_skipped(tmp_path: Path) -> None:
    again = {"UPDATE_ROLLBACK_IN_PROGRESS": "UPDATE_ROLLBACK_FAILED"}
    told = apply_to(Cloud("UPDATE_ROLLBACK_FAILED", fails=again), Front(), tmp_path)
    assert "grid is UPDATE_ROLLBACK_FAILED: Queue (AWS::SQS::Queue): it is in use" in told
    assert "--stack-name grid --resources-to-skip" in told


def test_failed_deletion_names_its_cause_and_what_can_be_retained() -> None:
    cloud = Cloud("CREATE_COMPLETE", fails={"DELETE_IN_PROGRESS": "DELETE_FAILED"})
    with pytest.raises(StackFailed) as failed:
        Destroy(stack_of(cloud), Front(), delete_data=False).run()
    assert "grid is DELETE_FAILED: Queue (AWS::SQS::Queue): it is in use." in str(failed.value)
    assert "--stack-name grid --retain-resources" in failed.value.remedy
    # After the problem is fixed, the command succeeds.
    cloud.fails.clear()
    assert Destroy(stack_of(cloud), Front(), delete_data=False).run() == []
    assert cloud.calls == ["unprotect", "delete", "delete"]


def test_resources_that_were_never_created_are_not_emptied() -> None:
    """The creation of the bucket failed because its name belongs to another account."""
    parts = [
        ("Bucket", "AWS::S3::Bucket", "somebody-elses", "CREATE_FAILED"),
        ("Database", "AWS::RDS::DBInstance", "", "CREATE_FAILED"),
    ]
    cloud = Cloud("CREATE_FAILED", resources=parts)
    # The account cannot call another service.
    assert Destroy(stack_of(cloud, rds=None, s3=None), Front(), delete_data=True).run() == []


def test_resources_deleted_by_hand_do_not_block() -> None:
    s3: Any = boto3.client("s3", region_name="us-east-1", aws_access_key_id="a", aws_secret_access_key="b")
    from botocore.stub import Stubber

    parts = [("Bucket", "AWS::S3::Bucket", "gone", "DELETE_FAILED")]
    with Stubber(s3) as stub:
        for _ in range(2):
            stub.add_client_error("list_object_versions", "NoSuchBucket", http_status_code=404)
        cloud = Cloud("DELETE_FAILED", resources=parts)
        assert Destroy(stack_of(cloud, s3=s3), Front(), delete_data=False).run() == []
        stub.assert_no_pending_responses()
        stub.add_client_error("list_object_versions", "NoSuchBucket", http_status_code=404)
        assert leftovers.empty(stack_of(cloud, s3=s3).account, "gone", lambda _: None) == 0
