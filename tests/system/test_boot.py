"""The user data of instances, which are containers with systemd that boot with it and run a job."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from batchlab.deploy.release import key_of
from tests.support.aws.container_image import HOST, NAME, Trusting, registry, trusting
from tests.support.aws.custom_image import own_image
from tests.support.aws.instance_boot import POOL, Fleet, fleet, instance_release
from tests.support.docker.pool_images import JOB, build_image, remove_images, write_job
from tests.support.grid.backends import command
from tests.support.waiting import until
from tests.system.test_aws_backend import job_of

__all__ = ["own_image"]

BOOT_S = 240.0
SOON_S = 60.0
"""Half of the drain hook's timeout for an instance without a completion."""


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the release of this checkout for the instance image."""
    return instance_release(tmp_path_factory)


@pytest.fixture(scope="module")
def trusted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trusting]:
    """Build an instance image that trusts the registry of the container image."""
    with trusting(tmp_path_factory.mktemp("trusted")) as found:
        yield found


@pytest.fixture(scope="module")
def there(archive: Path, trusted: Trusting, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    # The fixture of the image is older, so it is removed after its containers. Otherwise, the image would remain
    # without a name.
    with fleet(tmp_path_factory.mktemp("account"), archive) as found:
        yield found


def batchlab(there: Fleet, *arguments: object) -> str:
    return command(*arguments, env=there.account.env)[0]


def test_a_job_completes_on_instances_that_booted_by_user_data(there: Fleet, tmp_path: Path) -> None:
    (manager,) = until(lambda: there.instances(there.account.at.manager_group), 60)
    until(lambda: there.is_active(manager, "manager"), BOOT_S, pause_s=1.0)
    home, out = there.account.home(), tmp_path / "out"
    job = job_of(tmp_path / "job", 20)
    batchlab(there, "run", job, "--backend", "aws", "--home", home.path, "--out", out)
    value = json.loads((out / "total.jsonl").read_text())["value"]
    assert value == sum(i * i for i in range(20))
    group = f"{there.account.at.groups_prefix}{POOL.name}"
    worker = until(lambda: in_service(there, group), 60)
    assert there.is_active(worker, "worker")
    check_restraint(there, worker)
    check_end(there, group, worker)


def check_end(there: Fleet, group: str, worker: str) -> None:
    """Check that the worker completes the drain hook, which would otherwise hold for two minutes."""
    until(lambda: there.instances(group).get(worker) != "InService", 150, pause_s=0.5)
    until(lambda: worker not in there.instances(group), SOON_S, pause_s=0.5)
    ended = next(activity for activity in there.activities(group) if is_end(activity, worker))
    assert (ended["EndTime"] - ended["StartTime"]).total_seconds() < SOON_S


def in_service(there: Fleet, group: str) -> str:
    states = there.instances(group)
    return next((name for name, state in states.items() if state == "InService"), "")


def is_end(activity: dict[str, Any], instance: str) -> bool:
    said = activity["Description"]
    return said.startswith("Terminating") and instance in said and "EndTime" in activity


def check_restraint(there: Fleet, worker: str) -> None:
    """Check that the worker is not root, and that its systemd unit restricts the worker."""
    shown = there.run(
        worker,
        "systemctl",
        "show",
        "batchlab-worker",
        "-p",
        "User,NoNewPrivileges,ProtectSystem,PrivateTmp,MainPID,KillMode",
    )
    told = dict(line.split("=", 1) for line in shown.splitlines())
    pid = told.pop("MainPID")
    assert told == {
        "User": "batchlab",
        "NoNewPrivileges": "yes",
        "ProtectSystem": "strict",
        "PrivateTmp": "yes",
        "KillMode": "mixed",
    }
    status = there.run(worker, "cat", f"/proc/{pid}/status")
    lines = dict(line.split(":\t", 1) for line in status.splitlines())
    assert lines["Uid"].split()[0] not in ("", "0")
    assert (lines["NoNewPrivs"], int(lines["CapEff"], 16)) == ("1", 0)


def test_release_with_a_wrong_name_is_abandoned(there: Fleet) -> None:
    at, wrong = there.account.at, "0" * 64
    there.account.aws("s3").put_object(Bucket=at.bucket, Key=key_of(wrong), Body=b"no such thing")
    group = there.pool(replace(POOL, name="broken"), 1, Release=wrong)
    first = abandoned(there, group)
    there.resize(group, 0)
    said = there.logged()
    assert f"{first} of {group} does not come up as a worker: " in said
    assert "the release is not what its name says" in said


def abandoned(there: Fleet, group: str) -> str:
    """Wait until the first instance's launch is canceled, and return this instance, which ends itself."""
    (first,) = until(lambda: there.instances(group), 60)
    said = until(lambda: cancelled(there, group, first), BOOT_S, pause_s=0.5)
    assert "was abandoned" in said
    assert "Heartbeat Timeout" not in said, "it said so itself"
    until(lambda: there.grid.state(first)["Status"] == "exited", 60, pause_s=0.5)
    return first


def cancelled(there: Fleet, group: str, instance: str) -> str:
    """Return the message of the canceled launch of an instance, or "" before the cancellation."""
    for activity in there.activities(group):
        if activity["StatusCode"] == "Cancelled" and instance in activity["Description"]:
            return str(activity["StatusMessage"])
    return ""


def test_an_image_that_has_the_release_fetches_nothing(there: Fleet, own_image: str) -> None:
    # The bucket does not exist, so an instance that needs an object would not start.
    group = there.pool(replace(POOL, name="own"), 1, image=own_image, Bucket="batchlab-none")
    (worker,) = until(lambda: there.instances(group), 60)
    until(lambda: there.is_active(worker, "worker"), BOOT_S, pause_s=0.5)
    assert "trying again" not in there.run(worker, "cat", "/var/log/batchlab/boot.log")
    again = f"/opt/batchlab/releases/{there.release}/boot.sh"
    assert "is started" in there.run(worker, again, "worker"), "it may be run again"
    assert there.is_active(worker, "worker")
    there.resize(group, 0)


def test_a_worker_that_ends_again_and_again_ends_its_instance(there: Fleet, own_image: str) -> None:
    group = there.pool(replace(POOL, name="loop"), 1, image=own_image, Deployment="{}")
    first = abandoned(there, group)
    there.resize(group, 0)
    assert f"{first} of {group} does not come up as a worker: its worker has ended" in there.logged()
    assert in_service(there, group) == ""
    kept, _ = there.grid.api.get_archive(there.grid.name(first), "/var/log/batchlab/worker.log")
    assert b"".join(kept).count(b"is not a description of a stack") == 5, "not at the first time"


def test_a_job_completes_on_instances_that_run_a_container_image(
    there: Fleet, trusted: Trusting, tmp_path: Path
) -> None:
    """The manager and the worker each sign in to the registry, pull the image, and run from it."""
    at = there.account.at
    group = f"{at.groups_prefix}{POOL.name}"
    until(lambda: not there.instances(group), 240, pause_s=0.5)  # the job of another test had some instances
    boxed = {"image": trusted.image, "ContainerImage": NAME}
    (before,) = until(lambda: there.instances(at.manager_group), 60)
    with registry(there, trusted, tmp_path / "registry") as served:
        there.template(group, "worker", POOL.slots, **boxed)
        there.template(at.manager_group, "manager", 1, **boxed)
        try:
            there.account.aws("autoscaling").terminate_instance_in_auto_scaling_group(
                InstanceId=before, ShouldDecrementDesiredCapacity=False
            )
            manager = until(lambda: another(there, at.manager_group, before), 120, pause_s=0.5)
            until(lambda: there.is_active(manager, "manager"), BOOT_S, pause_s=1.0)
            home, out = there.account.home("boxed"), tmp_path / "out"
            job = job_of(tmp_path / "job", 20)
            batchlab(there, "run", job, "--backend", "aws", "--home", home.path, "--out", out)
            value = json.loads((out / "total.jsonl").read_text())["value"]
            assert value == sum(i * i for i in range(20))
            worker = until(lambda: in_service(there, group), 60)
            # The worker ends first, after it has been idle for a while.
            for instance, role in ((worker, "worker"), (manager, "manager")):
                check_box(there, instance, role)
            check_pulls(served.asked(), 2)
            check_end(there, group, worker)
        finally:
            there.template(group, "worker", POOL.slots)
            there.template(at.manager_group, "manager", 1)


def test_a_command_uses_the_tool_of_its_pools_image(there: Fleet, trusted: Trusting, tmp_path: Path) -> None:
    """The image of the pool has a tool and Python, and the instance adds batchlab from the release."""
    group = f"{there.account.at.groups_prefix}{POOL.name}"
    until(lambda: not there.instances(group), 240, pause_s=0.5)
    image = build_image("batchlab-tests/pool:1", {"cut-tool": 'cut -c1-3 "$1" > "$2"'})
    job = write_job(tmp_path / "job")
    job.write_text(JOB.partition("  - name: join")[0].replace("pool: cutters", f"pool: {POOL.name}"))
    try:
        with registry(there, trusted, tmp_path / "registry", image):
            there.template(group, "worker", POOL.slots, image=trusted.image, OwnImage=NAME)
            home, out = there.account.home("pool-image"), tmp_path / "out"
            batchlab(there, "run", job, "--backend", "aws", "--home", home.path, "--out", out)
            assert [path.read_text() for path in out.rglob("cut.txt")] == ["abc\nghi\n"] * 3
            worker = until(lambda: in_service(there, group), 60)
            (box,) = json.loads(there.run(worker, "docker", "inspect", "batchlab-worker"))
            assert (box["Config"]["Image"], box["Path"]) == (NAME, "/opt/batchlab/current/pool-image/bin/batchlab")
            assert f"BATCHLAB_POOL_IMAGE={NAME}" in box["Config"]["Env"]
            again = f"/opt/batchlab/releases/{there.release}/boot.sh"
            assert "is started" in there.run(worker, again, "worker"), "it may be run again"
            check_end(there, group, worker)
    finally:
        there.template(group, "worker", POOL.slots)
        remove_images(image)


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("missing", {"OwnImage": f"{HOST}/none:1"}, f"the image {HOST}/none:1 cannot be pulled"),
        ("toolkit", {"OwnImage": NAME, "Gpus": "1"}, "the machine image has no NVIDIA Container Toolkit"),
    ],
)
def test_instance_whose_container_cannot_start_is_abandoned(
    there: Fleet, trusted: Trusting, tmp_path: Path, name: str, settings: dict[str, str], reason: str
) -> None:
    """The registry does not have the image, or the instance has GPUs and Docker cannot give them to a container."""
    image = build_image("batchlab-tests/pool:1", {})
    try:
        with registry(there, trusted, tmp_path / "registry", image):
            group = there.pool(replace(POOL, name=name), 1, image=trusted.image, **settings)
            first = abandoned(there, group)
            there.resize(group, 0)
    finally:
        remove_images(image)
    said = there.logged()
    assert f"{first} of {group} does not come up as a worker: the release cannot be installed (exit 1: {reason}" in said


def another(there: Fleet, group: str, before: str) -> str:
    return next((instance for instance in there.instances(group) if instance != before), "")


def check_box(there: Fleet, instance: str, role: str) -> None:
    """Check that the service is exactly that container, and that the container is restricted."""
    assert there.is_active(instance, role)
    told = json.loads(there.run(instance, "docker", "inspect", f"batchlab-{role}"))
    (box,) = told
    host, image = box["HostConfig"], box["Config"]["Image"]
    assert (image, box["State"]["Running"]) == (NAME, True)
    assert box["Args"][:3] == [role, "--backend", "aws"]
    assert host["NetworkMode"] == "host"
    assert host["ReadonlyRootfs"] is True
    assert host["CapDrop"] == ["ALL"]
    assert host["SecurityOpt"] == ["no-new-privileges"]
    uid = there.run(instance, "id", "-u", "batchlab").strip()
    status = there.run(instance, "cat", f"/proc/{box['State']['Pid']}/status")
    lines = dict(line.split(":\t", 1) for line in status.splitlines())
    assert uid not in ("", "0")
    assert lines["Uid"].split()[0] == uid
    assert (lines["NoNewPrivs"], int(lines["CapEff"], 16)) == ("1", 0)
    assert not there.run(instance, "sh", "-c", "ls -d /opt/batchlab/current/venv 2>/dev/null")
    if role == "manager":
        # The scratch folder is on the disk and is writable.
        assert "TMPDIR=/var/tmp" in box["Config"]["Env"]
        (place,) = (one for one in box["Mounts"] if one["Destination"] == "/var/tmp")
        assert (place["Type"], place["RW"]) == ("volume", True)


def check_pulls(asked: list[str], times: int) -> None:
    """Check that only signed-in clients had access, and that each instance pulled the image."""
    assert any(one.startswith("401 ") for one in asked)
    assert asked.count("200 GET /v2/") >= times
    manifests = [one for one in asked if one.startswith("200 GET /v2/batchlab/manifests/sha256")]
    assert len(manifests) == times
    assert not [one for one in asked if one.startswith("404 ")]
