"""Attacks from within the containers of a grid on `localstack`."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from botocore.exceptions import ClientError

from batchlab.adapters.aws.endpoint import Endpoint
from batchlab.core import installation
from batchlab.core.errors import UsageError
from batchlab.runtime import compose_deployment, settings
from batchlab.runtime.compose_project import docker
from batchlab.runtime.home import Home
from tests.support.aws.autoscaling_api import aws
from tests.support.docker.grid import need_containers
from tests.support.grid.local_grid import LocalGrid
from tests.support.waiting import until

pytestmark = pytest.mark.slow

ROOT = """
[["worker-default".version]]
image = "alpine"
command = ["chroot", "/host"]
system = true
"""


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalGrid]:
    folder = tmp_path_factory.mktemp("attacked")
    need_containers(folder)
    grid = LocalGrid(folder / "home", (), backend="localstack")
    yield grid
    grid.stop()


@pytest.fixture
def at(grid: LocalGrid) -> compose_deployment.Deployment:
    found = compose_deployment.read(grid.home)
    assert found
    return found


def in_manager(at: compose_deployment.Deployment, *command: str) -> tuple[int, str]:
    """Run a command in the manager's container, and return its exit code and output."""
    done = docker("exec", f"{at.project}-manager-1", *command)
    return done.returncode, done.stdout + done.stderr


def test_the_manager_cannot_choose_what_docker_starts(grid: LocalGrid, at: compose_deployment.Deployment) -> None:
    """The manager must not decide what Docker starts. The service `asg` has Docker's socket, and launches the instances
    of templates.toml."""
    ours = compose_deployment.folder(grid.home)
    before = {path: path.read_bytes() for path in ours.rglob("*") if path.is_file()}
    there = f"{compose_deployment.HOME}/{compose_deployment.NAME}"
    for file in ("templates.toml", "deployment.json", "asg/groups.json", "compose.more.json"):
        script = f"printf '%s' '{ROOT}' > {there}/{file}"
        code, said = in_manager(at, "sh", "-c", script)
        assert (code, "Read-only file system" in said) == (2, True), (file, said)
    for script in (
        f"mv {there} {there}.old",
        f"rm -rf {there}/templates.toml",
        f"ln -sf /tmp/templates.toml {there}/templates.toml",
        f"mount -o remount,rw {there}",
        f"umount {there}",
    ):
        code, said = in_manager(at, "sh", "-c", script)
        assert code, (script, said)
    after = {path: path.read_bytes() for path in before}
    assert after == before
    assert "worker-default" in (ours / "templates.toml").read_text()


def test_endpoint_does_not_launch_a_foreign_image(grid: LocalGrid, at: compose_deployment.Deployment) -> None:
    """A writer of templates.toml cannot choose the image or the rights of a container. In this test, the host's user
    writes the file in place of the manager."""
    path = compose_deployment.folder(grid.home) / "templates.toml"
    template = path.read_text()
    scaling: Any = aws(compose_deployment.autoscaling(grid.home, at), "autoscaling")
    try:
        for forged in (
            template.replace(at.image, "alpine"),
            template.replace("slots = ", "system = true\nslots = "),
            template.replace(f"user = {json.dumps(at.user)}", 'user = "0:0"'),
            template.replace(f"user = {json.dumps(at.user)}", 'user = "00:1"'),
        ):
            assert forged != template
            path.write_text(forged)
            with pytest.raises(ClientError, match="does not launch version 1 of template"):
                scaling.create_auto_scaling_group(
                    AutoScalingGroupName="mine",
                    LaunchTemplate={"LaunchTemplateName": "worker-default"},
                    AvailabilityZones=["us-east-1a"],
                    MinSize=1,
                    MaxSize=1,
                )
    finally:
        path.write_text(template)


def test_only_signed_requests_change_groups(grid: LocalGrid, at: compose_deployment.Deployment) -> None:
    """Before, a worker's container could start and end every instance of the grid."""
    own = compose_deployment.autoscaling(grid.home, at)
    group = f"{at.project}-default"
    honest = aws(own, "autoscaling")
    honest.set_desired_capacity(AutoScalingGroupName=group, DesiredCapacity=1)

    def instances() -> list[str]:
        (found,) = honest.describe_auto_scaling_groups(AutoScalingGroupNames=[group])["AutoScalingGroups"]
        return [one["InstanceId"] for one in found["Instances"]]

    until(lambda: len(instances()) == 1, 30.0)
    (instance,) = instances()
    strangers = [Endpoint(at.autoscaling_url), Endpoint(at.autoscaling_url, access_key=own.access_key)]
    for stranger in strangers:
        scaling: Any = aws(stranger, "autoscaling")
        for call, asked in (
            (scaling.describe_auto_scaling_groups, {}),
            (scaling.set_desired_capacity, {"DesiredCapacity": 0, "AutoScalingGroupName": group}),
            (
                scaling.terminate_instance_in_auto_scaling_group,
                {"InstanceId": instance, "ShouldDecrementDesiredCapacity": True},
            ),
            (
                scaling.complete_lifecycle_action,
                {
                    "LifecycleHookName": "batchlab-ready",
                    "LifecycleActionResult": "ABANDON",
                    "AutoScalingGroupName": group,
                    "InstanceId": instance,
                },
            ),
        ):
            with pytest.raises(ClientError) as caught:
                call(**asked)
            code = caught.value.response["Error"]["Code"]
            assert code in ("InvalidClientTokenId", "SignatureDoesNotMatch")
    assert instances() == [instance]
    filters = ("--filter", f"label=batchlab.grid={at.project}", "--filter", "label=batchlab.pool")
    until(lambda: bool(docker("ps", "-q", *filters).stdout), 30.0)
    (what, *_) = json.loads(docker("inspect", *docker("ps", "-q", *filters).stdout.split()).stdout)
    assert own.secret_key not in json.dumps(what), "an instance has no keys"
    assert not [one for one in what["Mounts"] if one["Type"] == "bind"]
    file = compose_deployment.keys_file(grid.home)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    told = docker("inspect", f"{at.project}-asg-1", f"{at.project}-manager-1").stdout
    assert own.secret_key not in told


def test_a_manager_on_the_host_runs_no_command_that_a_container_has_written(tmp_path: Path) -> None:
    """A compromised container of a manager writes a command into notify.toml, and waits for a manager on the host that
    uses the same folder."""
    home = Home(tmp_path / "home")
    home.make()
    home.notify_file.write_text('[mine]\ncommand = ["touch", "/tmp/x"]\n')
    assert settings.read_notifications(home).targets[0].command
    compose_deployment.folder(home).mkdir()  # the manager's container cannot remove it
    with pytest.raises(UsageError, match="a manager in a container may have written it"):
        settings.read_notifications(home)
    assert settings.read_notifications(home, in_container=True).targets[0].command
    home.notify_file.write_text('[mine]\nwebhook = "https://hooks.example.org"\n')
    assert not settings.read_notifications(home).targets[0].command


def test_no_service_publishes_a_port() -> None:
    """No service of the grid publishes a port. LocalStack accepts any key, so only the grid's own network may
    reach it."""
    file = Path(str(installation.folder("compose") / "compose.yaml"))
    services = yaml.safe_load(file.read_text())["services"]
    assert not [name for name, one in services.items() if "ports" in one or "network_mode" in one]
    assert services["localstack"]["environment"]["S3_SKIP_SIGNATURE_VALIDATION"] == "0"
