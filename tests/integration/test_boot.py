"""User data really runs: instances that are containers with systemd boot by it, and do a job."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from batchlab.deploy.release import key_of
from tests.boot_rig import IMAGE, POOL, Fleet, fleet, instance_release
from tests.integration.test_aws_backend import job_of
from tests.integration.worlds import command
from tests.waiting import until

BOOT_S = 240.0
SOON_S = 60.0
"""Half of what the drain hook gives an instance that nobody speaks for."""


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This code's release, for the instance image."""
    return instance_release(tmp_path_factory.mktemp("release"))


@pytest.fixture(scope="module")
def own_image(archive: Path) -> Iterator[str]:
    """An image that the release is installed in, as in an AMI of one's own."""
    name, tag = f"batchlab-test-ami-{os.getpid()}", f"batchlab-test/ami:{os.getpid()}"
    place = f"/opt/batchlab/releases/{archive.name.removesuffix('.tar.gz')}"
    script = f"mkdir -p {place} && tar -xzf /archive -C {place} && {place}/boot.sh image"
    mount = f"type=bind,source={archive},target=/archive,readonly"
    run = ["run", "--name", name, "--network", "none", "--mount", mount, IMAGE]
    try:
        docker(*run, "sh", "-c", script)
        docker("commit", "--change", 'CMD ["/usr/local/sbin/begin"]', name, tag)
        yield tag
    finally:
        docker("rm", "--force", name)
        docker("rmi", "--force", tag)


def docker(*arguments: str) -> None:
    subprocess.run(["docker", *arguments], check=True, capture_output=True, timeout=300)


@pytest.fixture(scope="module")
def there(
    archive: Path, own_image: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fleet]:
    # The image is older, so it goes after its containers: else it would stay, without a name.
    with fleet(tmp_path_factory.mktemp("account"), archive) as found:
        yield found


def batchlab(there: Fleet, *arguments: object) -> str:
    return command(*arguments, env=there.account.env)[0]


def test_a_job_completes_on_instances_that_booted_by_user_data(
    there: Fleet, tmp_path: Path
) -> None:
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
    # Nobody but the worker completes the drain hook, and it would hold for two minutes.
    until(lambda: there.instances(group).get(worker) != "InService", 150, pause_s=0.5)
    until(lambda: worker not in there.instances(group), SOON_S, pause_s=0.5)
    ended = next(one for one in there.activities(group) if is_end(one, worker))
    assert (ended["EndTime"] - ended["StartTime"]).total_seconds() < SOON_S


def in_service(there: Fleet, group: str) -> str:
    states = there.instances(group)
    return next((name for name, state in states.items() if state == "InService"), "")


def is_end(activity: dict[str, Any], instance: str) -> bool:
    said = activity["Description"]
    return said.startswith("Terminating") and instance in said and "EndTime" in activity


def check_restraint(there: Fleet, worker: str) -> None:
    """The worker is not root, and its unit restrains it."""
    shown = there.run(
        *(worker, "systemctl", "show", "batchlab-worker"),
        *("-p", "User,NoNewPrivileges,ProtectSystem,PrivateTmp,MainPID,KillMode"),
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


def test_a_release_that_is_not_what_its_name_says_is_abandoned(there: Fleet) -> None:
    at, wrong = there.account.at, "0" * 64
    there.account.aws("s3").put_object(Bucket=at.bucket, Key=key_of(wrong), Body=b"no such thing")
    group = there.pool(replace(POOL, name="broken"), 1, Release=wrong)
    first = abandoned(there, group)
    there.resize(group, 0)
    said = there.logged()
    assert f"{first} of {group} does not come up as a worker: " in said
    assert "the release is not what its name says" in said


def abandoned(there: Fleet, group: str) -> str:
    """Wait until the first instance's launch is cancelled; that instance, which ends itself."""
    (first,) = until(lambda: there.instances(group), 60)
    said = until(lambda: cancelled(there, group, first), BOOT_S, pause_s=0.5)
    assert "was abandoned" in said
    assert "Heartbeat Timeout" not in said, "it said so itself"
    until(lambda: there.grid.state(first)["Status"] == "exited", 60, pause_s=0.5)
    return first


def cancelled(there: Fleet, group: str, instance: str) -> str:
    """What is said of its launch once that is cancelled."""
    for one in there.activities(group):
        if one["StatusCode"] == "Cancelled" and instance in one["Description"]:
            return str(one["StatusMessage"])
    return ""


def test_an_image_that_has_the_release_fetches_nothing(there: Fleet, own_image: str) -> None:
    # A bucket that is not there: whoever asked for anything would not come up.
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
    assert f"{first} of {group} does not come up as a worker: its worker ends" in there.logged()
    assert in_service(there, group) == ""
    kept, _ = there.grid.api.get_archive(there.grid.name(first), "/var/log/batchlab/worker.log")
    assert b"".join(kept).count(b"is not a description of a stack") == 5, "not at the first time"


DOCKER = """\
#!/bin/sh
echo "docker $*"
case $1 in
  image) exit 1 ;;
  run) exec sleep 1000 ;;
esac
"""


def test_a_container_image_runs_the_same_command(there: Fleet, own_image: str) -> None:
    """There is no Docker in Docker here: a program of that name notes what it is asked."""
    image = "registry.example/batchlab:1"
    group = there.pool(replace(POOL, name="boxed"), 1, image=own_image)
    (worker,) = until(lambda: there.instances(group), 60)
    until(lambda: there.is_active(worker, "worker"), BOOT_S, pause_s=0.5)
    script = f"""
        printf '%s' '{DOCKER}' > /usr/bin/docker && chmod +x /usr/bin/docker
        printf '[Service]\\nExecStart=/bin/sleep 1000\\n' > /etc/systemd/system/docker.service
        systemctl daemon-reload && systemctl stop batchlab-worker
        sed -i "s|^CONTAINER_IMAGE=.*|CONTAINER_IMAGE='{image}'|" /opt/batchlab/boot/settings
        /opt/batchlab/current/boot.sh worker
    """
    said = there.run(worker, "sh", "-ec", script)
    assert "is started" in said, said
    assert there.is_active(worker, "worker")
    assert f"docker pull --quiet {image}" in said
    log = "/var/log/batchlab/worker.log"
    run = until(lambda: [one for one in lines(there, worker, log) if "docker run" in one], 20)[-1]
    assert run.endswith(f" {image} worker --backend aws --home /var/lib/batchlab")
    assert "--cap-drop ALL" in run
    assert "--volume /var/lib/batchlab:/var/lib/batchlab" in run
    there.resize(group, 0)


def lines(there: Fleet, instance: str, path: str) -> list[str]:
    return there.run(instance, "cat", path).splitlines()
