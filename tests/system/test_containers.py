"""A grid in containers as its user sees it. The grid starts, works, and ends without remains."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from batchlab.runtime import compose_deployment
from batchlab.runtime.compose_project import IMAGE_LABEL, REPOSITORY, check_reference, remove_image, unused_images
from batchlab.runtime.home import Home
from tests.support.docker.grid import need_containers
from tests.support.grid.backends import command as batchlab
from tests.support.waiting import until

OURS = ("asg", "manager")


def inspected(*filters: str) -> list[dict[str, Any]]:
    ids = check_reference("ps", "-aq", *filters).split()
    found: list[dict[str, Any]] = json.loads(check_reference("inspect", *ids)) if ids else []
    return found


def test_grid_works_with_the_aws_cli_and_leaves_nothing(tmp_path: Path) -> None:
    need_containers(tmp_path)
    home = Home(tmp_path / "home")
    batchlab("grid", "up", "--backend", "localstack", "--home", home.path)
    at = compose_deployment.read(home)
    assert at is not None
    label = f"label=batchlab.grid={at.project}"
    try:
        services = inspected("--filter", label, "--filter", "label=com.docker.compose.service")
        for service in services:
            check_restraint(service)
        assert {name_of(service) for service in services} == {"localstack", "postgres", *OURS}
        # The scratch folder is on the disk and is writable.
        ask = ("python", "-c", "import tempfile; print(tempfile.gettempdir())")
        assert check_reference("exec", f"{at.project}-manager-1", *ask).strip() == "/var/tmp"
        killed_container_is_named_and_started_again(home, at)
        batchlab("doctor", "--backend", "localstack", "--home", home.path)
        desired_capacity_makes_containers(home, at)
        batchlab("gc")  # resources in use are not orphans
        assert len(check_reference("ps", "-q", "--filter", label).split()) >= len(services)
    finally:
        batchlab("grid", "down", "--home", home.path)
    for kind in (("ps", "-aq"), ("network", "ls", "-q"), ("volume", "ls", "-q")):
        assert not check_reference(*kind, "--filter", label).split(), kind
    assert compose_deployment.read(home) is None


def name_of(one: dict[str, Any]) -> str:
    return str(one["Config"]["Labels"]["com.docker.compose.service"])


def check_restraint(one: dict[str, Any]) -> None:
    """Check that a container has only the needed rights, and uses no port of the machine."""
    host, name = one["HostConfig"], name_of(one)
    assert host["CapDrop"] == ["ALL"], name
    assert host["SecurityOpt"] == ["no-new-privileges:true"], name
    assert host["Memory"] > 0, name
    assert host["NanoCpus"] > 0, name
    assert not host["PortBindings"], name
    assert one["Config"]["User"] not in ("", "0", "root", "0:0"), name
    assert one["State"]["Health"]["Status"] == "healthy", name
    if name in OURS:
        assert host["ReadonlyRootfs"], name
    has_socket = any(m["Destination"] == "/var/run/docker.sock" for m in one["Mounts"])
    assert has_socket == (name == "asg")


def killed_container_is_named_and_started_again(home: Home, at: compose_deployment.Deployment) -> None:
    """Docker does not restart a container that `docker kill` has ended."""
    check_reference("kill", f"{at.project}-asg-1")
    # For some time, Docker may report an ended container as running.
    until(lambda: "The container of asg is exited." in batchlab("grid", "status", "--home", home.path)[0], 30.0)
    _, said = batchlab("grid", "up", "--backend", "localstack", "--home", home.path)
    assert "asg has ended and is started again." in said
    assert "asg" not in batchlab("grid", "status", "--home", home.path)[0]


def desired_capacity_makes_containers(home: Home, at: compose_deployment.Deployment) -> None:
    """The AWS CLI, which is independent of batchlab, launches and terminates instances."""
    group = f"{at.project}-by-hand"

    def aws(*arguments: str) -> str:
        cli = os.environ.get("BATCHLAB_AWSCLI")
        if cli is None:
            if os.environ.get("CI"):
                pytest.fail("CI promises the AWS CLI, but BATCHLAB_AWSCLI is not set")
            pytest.skip("BATCHLAB_AWSCLI names no AWS CLI")
        own = compose_deployment.autoscaling(home, at)
        keys = {"AWS_ACCESS_KEY_ID": own.access_key, "AWS_SECRET_ACCESS_KEY": own.secret_key}
        done = subprocess.run(
            [cli, "--endpoint-url", at.autoscaling_url, "autoscaling", *arguments],
            env={"PATH": os.environ["PATH"], "AWS_DEFAULT_REGION": "us-east-1", **keys},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert not done.returncode, (arguments, done.stderr)
        return done.stdout

    def containers() -> list[str]:
        ours = ("--filter", f"label=batchlab.grid={at.project}")
        return check_reference("ps", "-q", *ours, "--filter", f"label=batchlab.pool={group}").split()

    aws(
        "create-auto-scaling-group",
        "--auto-scaling-group-name",
        group,
        "--launch-template",
        "LaunchTemplateName=worker-default",
        "--min-size",
        "0",
        "--max-size",
        "3",
        "--availability-zones",
        "us-east-1a",
        "--tags",
        "Key=batchlab:pool,Value=default,PropagateAtLaunch=true",
        "Key=batchlab:slots,Value=1,PropagateAtLaunch=true",
    )
    aws("set-desired-capacity", "--auto-scaling-group-name", group, "--desired-capacity", "2")
    until(lambda: len(containers()) == 2, 60.0, pause_s=0.3)
    described = json.loads(aws("describe-auto-scaling-groups", "--auto-scaling-group-names", group))
    (found,) = described["AutoScalingGroups"]
    assert [one["InstanceType"] for one in found["Instances"]] == ["m7i.large"] * 2
    aws("delete-auto-scaling-group", "--auto-scaling-group-name", group, "--force-delete")
    until(lambda: not containers(), 60.0, pause_s=0.3)


def test_leftovers_of_a_grid_are_removed(tmp_path: Path) -> None:
    need_containers(tmp_path)
    name = f"batchlab-left-{tmp_path.name[-20:].strip('_-')}"
    labels = ["--label", f"batchlab.grid={name}", "--label", f"batchlab.home={tmp_path / 'gone'}"]
    check_reference("network", "create", *labels, "--subnet", "10.212.250.0/28", name)
    check_reference("volume", "create", *labels, name)
    batchlab("gc", "--dry-run")
    assert check_reference("volume", "ls", "-q", "--filter", f"label=batchlab.grid={name}").split()
    batchlab("gc")
    for kind in ("network", "volume"):
        assert not check_reference(kind, "ls", "-q", "--filter", f"label=batchlab.grid={name}").split()


def test_an_image_is_unused_without_a_container(tmp_path: Path) -> None:
    need_containers(tmp_path)
    tag, other = f"{REPOSITORY}:{tmp_path.name}".lower(), f"batchlab-test:{tmp_path.name}".lower()
    (tmp_path / "Dockerfile").write_text(f'FROM scratch\nLABEL test="{tmp_path}"\nCMD ["/none"]\n')
    check_reference("build", "-t", tag, "-t", other, "--label", f"{IMAGE_LABEL}=1", str(tmp_path))
    try:
        assert tag in unused_images()
        assert other not in unused_images(), "batchlab has not built an image with this name"
        container = check_reference("create", tag).strip()
        assert tag not in unused_images()
        check_reference("rm", container)
        printed = batchlab("gc", "--dry-run", "--images")[0]
        assert f"{tag}: an image of" in printed
        remove_image(tag)
        assert tag not in unused_images()
    finally:
        check_reference("rmi", other)
