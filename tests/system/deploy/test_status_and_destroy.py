"""The commands `batchlab deploy status`, `destroy`, and `gc --aws` on MiniStack."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from batchlab.deploy import settings, template
from batchlab.runtime import aws_deployment
from batchlab.runtime.home import Home
from tests.support.aws.deploy import SMALL, client, group, queues, rds_bundle, release, stacks
from tests.support.cli import Run, runner
from tests.support.simpledb.fixtures import Sdb


def test_status_shows_groups_queues_and_alarms(deploy: Run, tmp_path: Path) -> None:
    deploy("apply", "--yes", "--release", release(tmp_path), "--pool", "default:1-4x2")
    sqs = client("sqs")
    sqs.send_message(QueueUrl=sqs.get_queue_url(QueueName="batchlab-tasks-default")["QueueUrl"], MessageBody="x")
    sqs.create_queue(QueueName="batchlab-two-tasks-default")
    client("cloudwatch").put_metric_alarm(
        AlarmName="batchlab-two-manager-down",
        MetricName="m",
        Namespace="n",
        Statistic="Sum",
        Period=60,
        EvaluationPeriods=1,
        Threshold=1.0,
        ComparisonOperator="LessThanThreshold",
    )
    client("autoscaling").set_desired_capacity(AutoScalingGroupName="batchlab-manager", DesiredCapacity=1)
    (instance,) = group("batchlab-manager")["Instances"]
    code, out, err = deploy("status")
    assert (code, err) == (0, "")
    assert re.search(r"stack batchlab: UPDATE_COMPLETE since .*, protected", out)
    assert f"manager {instance['InstanceId']}" in out
    assert re.search(r"^batchlab-tasks-default +1 +0 +0$", out, re.M)
    assert re.search(r"^batchlab-manager +1 +1 +1 +1 +0", out, re.M)
    assert re.search(r"^batchlab-pool-default-dead-letters +INSUFFICIENT_DATA", out, re.M)
    assert "batchlab-two" not in out, "of a stack whose name begins alike"
    found = json.loads(deploy("status", "--json")[1])
    assert len(found["queues"]) == 3
    assert len(found["alarms"]) == 1
    assert found["manager"] == instance["InstanceId"]
    assert found["drift"] == []
    assert {one["name"] for one in found["groups"]} == {"batchlab-manager", "batchlab-pool-default"}


def test_home_without_a_stack_is_reported(deploy: Run, home: Home, tmp_path: Path) -> None:
    """Another laptop has neither settings nor a deployment, and finds the stack by its name."""
    deploy("apply", "--yes", "--release", release(tmp_path), "--stack", "team")
    known = aws_deployment.read(home)
    assert known is not None
    aws_deployment.path_in(home).unlink()
    settings.path_in(home).unlink()
    code, _, err = deploy("status", "--stack", "team")
    assert code == 0
    assert "is written anew (no file)" in err
    found = aws_deployment.read(home)
    assert found is not None
    assert found.bucket == known.bucket
    assert found.pools == known.pools
    assert found.egress == "endpoints"
    # The settings come from the stack, so a plan does not change anything.
    code, out, err = deploy("plan", "--stack", "team")
    assert code == 0, err
    assert "No changes" in out


def test_drifted_file_is_reported_by_field(deploy: Run, home: Home, tmp_path: Path) -> None:
    deploy("apply", "--yes", "--release", release(tmp_path))
    path = aws_deployment.path_in(home)
    path.write_text(path.read_text().replace('"log_group": "/', '"log_group": "/old/'))
    found = json.loads(deploy("status", "--json")[1])
    assert found["drift"] == ["log_group"]
    assert json.loads(deploy("status", "--json")[1])["drift"] == []
    path.write_text("{")
    assert json.loads(deploy("status", "--json")[1])["drift"] == ["the whole file"]


def test_status_of_no_stack(deploy: Run) -> None:
    code, _, err = deploy("status", "--stack", "none")
    assert code == 3
    assert "The stack none does not exist in us-east-1" in err


# --- destroy --------------------------------------------------------------------------------------


def test_stack_without_data_is_deleted_completely(deploy: Run, home: Home, tmp_path: Path) -> None:
    deploy("apply", "--yes", "--release", release(tmp_path))
    client("autoscaling").set_desired_capacity(AutoScalingGroupName="batchlab-pool-default", DesiredCapacity=3)
    code, out, err = deploy("destroy", "--yes")
    assert (code, out) == (0, "")
    assert "The stack batchlab is gone." in err
    assert stacks() == {}
    assert queues() == []
    # The bucket contained only a release.
    assert client("s3").list_buckets()["Buckets"] == []
    assert client("autoscaling").describe_auto_scaling_groups()["AutoScalingGroups"] == []
    assert aws_deployment.read(home) is None
    assert settings.read(home) is not None


def filled(home: Home, count: int) -> str:
    """Fill the stack's bucket with `count` objects, each with an older version, and return the bucket."""
    found = aws_deployment.read(home)
    assert found is not None
    s3 = client("s3")
    for number in range(count):
        for body in (b"old", b"new"):
            s3.put_object(Bucket=found.bucket, Key=f"jobs/j/{number:05d}", Body=body)
    s3.delete_object(Bucket=found.bucket, Key="jobs/j/00000")
    return found.bucket


def test_bucket_with_data_is_retained_and_listed(deploy: Run, home: Home, tmp_path: Path) -> None:
    deploy("apply", "--yes", "--release", release(tmp_path))
    bucket = filled(home, 2)
    code, out, _ = deploy("destroy", "--yes")
    assert code == 0
    assert out == f"{bucket} (AWS::S3::Bucket) stays.\n"
    assert stacks() == {}
    told = client("s3").list_object_versions(Bucket=bucket, Prefix="jobs/")
    assert (len(told["Versions"]), len(told["DeleteMarkers"])) == (4, 1)


def test_stack_with_data_is_deleted_in_batches(deploy: Run, home: Home, tmp_path: Path) -> None:
    deploy("apply", "--yes", "--release", release(tmp_path))
    bucket = filled(home, 600)
    code, out, err = deploy("destroy", "--yes", "--delete-data", "--json")
    assert code == 0, err
    assert json.loads(out) == {"stack": "batchlab", "kept": []}
    # The bucket has 600 objects with two versions each, a delete marker, and the release.
    assert f"{bucket}: 1,000 versions of objects deleted." in err
    assert f"{bucket}: 1,202 versions of objects deleted." in err
    assert client("s3").list_buckets()["Buckets"] == []


def test_deletion_of_data_needs_an_option(
    deploy: Run, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bucket of this template is deleted with the stack."""
    careless = tmp_path / "stack.yaml"
    careless.write_text(SMALL.read_text().replace("RetainExceptOnCreate", "Delete"))
    monkeypatch.setattr(template, "shipped_template", lambda: careless)
    deploy("apply", "--yes", "--release", release(tmp_path))
    bucket = filled(home, 1)
    code, _, err = deploy("destroy", "--yes")
    assert code == 2
    assert f"would be deleted: {bucket} (objects)" in err
    assert "--delete-data" in err
    assert stacks() == {"batchlab": "UPDATE_COMPLETE"}
    assert client("cloudformation").describe_stacks()["Stacks"][0]["EnableTerminationProtection"]
    code, _, err = deploy("destroy", "--yes", "--delete-data")
    assert code == 0, err
    assert client("s3").list_buckets()["Buckets"] == []


@pytest.mark.parametrize("policy", ["Delete", "Snapshot"])
def test_a_database_that_leaves_no_snapshot_is_data(
    deploy: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    """The database is also protected by its own setting, which CloudFormation does not remove."""
    source = template.load(SMALL)
    source["Resources"]["Database"]["DeletionPolicy"] = policy
    file = tmp_path / "stack.json"
    file.write_text(json.dumps(source))
    monkeypatch.setattr(template, "shipped_template", lambda: file)
    archive = release(tmp_path, database_ca=rds_bundle(tmp_path).read_bytes())
    code, _, err = deploy("apply", "--yes", "--release", archive, "--ledger", "postgres")
    assert code == 0, err
    (database,) = client("rds").describe_db_instances()["DBInstances"]
    assert database["DeletionProtection"]
    # RDS itself would create this log group.
    client("logs").create_log_group(logGroupName="/aws/rds/instance/batchlab-ledger/postgresql")
    code, out, err = deploy("destroy", "--yes")
    if policy == "Delete":
        assert code == 2
        assert "would be deleted: batchlab-ledger (a PostgreSQL database)" in err
        assert client("rds").describe_db_instances()["DBInstances"][0]["DeletionProtection"]
        code, _, err = deploy("destroy", "--yes", "--delete-data")
    assert code == 0, err
    assert client("rds").describe_db_instances()["DBInstances"] == []
    left = [snapshot["DBSnapshotIdentifier"] for snapshot in client("rds").describe_db_snapshots()["DBSnapshots"]]
    assert len(left) == (policy == "Snapshot")
    assert client("logs").describe_log_groups()["logGroups"] == []
    assert [name for name in left if f"{name} (AWS::RDS::DBSnapshot) stays." in out] == left
    assert stacks() == {}


@pytest.mark.parametrize(("typed", "is_gone"), [("y", False), ("batchlab", True)])
def test_for_data_the_stacks_name_is_typed(
    deploy: Run, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: str, is_gone: bool
) -> None:
    deploy("apply", "--yes", "--release", release(tmp_path))
    bucket = filled(home, 1)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda: typed)
    code, _, err = deploy("destroy", "--delete-data")
    assert f"and with it {bucket} (objects)? [type batchlab to go on]" in err
    assert code == (0 if is_gone else 1)
    assert (stacks() == {}) == is_gone


def test_destroy_without_a_stack_has_no_effect(deploy: Run) -> None:
    code, _, err = deploy("destroy", "--yes")
    assert code == 2
    assert "The stack batchlab does not exist in us-east-1." in err


# --- gc -------------------------------------------------------------------------------------------


def test_gc_lists_leftovers_and_removes_them_on_request(
    deploy: Run, account: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    deploy("apply", "--yes", "--release", release(tmp_path))
    tags = {"batchlab.stack": "gone"}
    client("sqs").create_queue(QueueName="gone-events", tags=tags)
    client("sqs").create_queue(QueueName="somebody-elses")
    s3 = client("s3")
    s3.create_bucket(Bucket=f"gone-{account}")
    s3.put_bucket_tagging(Bucket=f"gone-{account}", Tagging={"TagSet": [{"Key": "batchlab.stack", "Value": "gone"}]})
    s3.put_object(Bucket=f"gone-{account}", Key="jobs/x", Body=b"x")
    run = runner(monkeypatch, capsys)

    code, out, err = run("gc", "--aws")
    assert code == 0
    assert re.search(r"^gone +sqs:queue +gone-events +left$", out, re.M)
    assert re.search(rf"^gone +s3:bucket +gone-{account} +left$", out, re.M)
    assert re.search(r"^batchlab +sqs:queue +batchlab-tasks-default +in use$", out, re.M)
    assert "somebody-elses" not in out
    assert "2 resources left. `batchlab gc --aws --yes` removes them." in err
    assert "gone-events" in queues()

    run("gc", "--aws", "--yes", "--dry-run")
    assert "gone-events" in queues()
    code, out, _ = run("gc", "--aws", "--yes", "--json")
    assert code == 0
    removed = [load["name"] for load in json.loads(out) if load["removed"]]
    assert removed == [f"gone-{account}", "gone-events"]
    assert queues() == ["batchlab-events", "batchlab-tasks-default", "batchlab-tasks-default-dead", "somebody-elses"]
    assert f"gone-{account}" not in [bucket["Name"] for bucket in s3.list_buckets()["Buckets"]]
    _, _, err = run("gc", "--yes")
    assert "Add --aws" in err


def test_leftover_known_only_by_name_needs_that_name(
    deploy: Run, simpledb: Sdb, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A SimpleDB domain cannot have tags, and a log group that RDS creates does not have tags."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_SIMPLEDB", simpledb.url)
    domain, logs = "gone-LedgerDomain-1ABCDEF2GHIJK", "/aws/rds/instance/gone-ledger/upgrade"
    sdb = client("sdb")
    sdb.create_domain(DomainName=domain)
    client("logs").create_log_group(logGroupName=logs)
    run = runner(monkeypatch, capsys)

    def there() -> tuple[bool, bool]:
        groups = client("logs").describe_log_groups()["logGroups"]
        return domain in sdb.list_domains()["DomainNames"], bool(groups)

    code, out, err = run("gc", "--aws", "--yes")
    assert code == 0
    assert re.search(rf"^gone +sdb:domain +{domain} +left, by its name$", out, re.M)
    assert re.search(rf"^gone +logs:log-group +{logs} +left, by its name$", out, re.M)
    assert simpledb.domain not in out
    assert "2 resources left that only the name assigns to a stack" in err
    assert there() == (True, True)
    code, _, err = run("gc", "--aws", "--yes", "--name", simpledb.domain)
    assert code == 3
    assert f"No leftover that needs --name has the name {simpledb.domain}" in err
    code, out, err = run("gc", "--aws", "--yes", "--name", domain, "--json")
    assert code == 0
    assert [(load["name"], load["known_by"], load["removed"]) for load in json.loads(out)] == [
        (logs, "name", False),
        (domain, "name", True),
    ]
    assert there() == (False, True)
    run("gc", "--aws", "--yes", "--name", logs)
    assert there() == (False, False)


def test_region_without_simpledb_lists_the_rest(
    deploy: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    deploy("apply", "--yes", "--release", release(tmp_path))
    code, out, err = runner(monkeypatch, capsys)("gc", "--aws")
    assert code == 0
    assert "batchlab-tasks-default" in out
    assert "SimpleDB domains are not listed: " in err
