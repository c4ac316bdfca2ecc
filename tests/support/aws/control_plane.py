"""An account in which `batchlab deploy apply` creates the shipped stack and its instances boot.

MiniStack serves CloudFormation, S3, SQS, Secrets Manager, EC2's launch templates, logs, and alarms. MiniStack's Auto
Scaling groups do not start instances, so batchlab's own endpoint mirrors each group. Its instances are containers with
systemd that run the user data rendered by MiniStack. Session Manager is a stub.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from botocore.exceptions import ClientError

from batchlab.adapters.aws.endpoint import Endpoint
from batchlab.adapters.docker.engine import Engine
from tests.support.aws import cfn, instance_boot
from tests.support.aws.account import Sessions, laptop
from tests.support.aws.autoscaling_api import aws
from tests.support.aws.emulators import Server, free_port, ministack_python
from tests.support.docker.containers import DockerGrid, docker_grid, ensure_network
from tests.support.http_proxy import standing
from tests.support.waiting import until

REGION = "us-east-1"
LOOK_S = 0.5
_GROUP = "AWS::AutoScaling::AutoScalingGroup"


@dataclass
class ControlPlane:
    """An emulated control plane. `env` has the environment variables for commands on a laptop, and `inside` those for
    an instance."""

    grid: DockerGrid
    folder: Path
    env: dict[str, str]
    inside: Mapping[str, str]
    url: str
    """The address of MiniStack."""
    name: str = "batchlab"
    image: str = instance_boot.IMAGE
    """The container image that replaces the AMI."""

    def aws(self, service: str) -> Any:
        """Return a boto3 client of MiniStack with the credentials of the account's owner."""
        return aws(Endpoint(self.url, REGION), service)

    @property
    def scaling(self) -> Any:
        """Return an Auto Scaling client for the mirrored groups, which have real instances."""
        return aws(Endpoint(self.env["AWS_ENDPOINT_URL_AUTO_SCALING"], REGION), "autoscaling")

    def groups(self) -> dict[str, Any]:
        found = self.scaling.describe_auto_scaling_groups()["AutoScalingGroups"]
        return {one["AutoScalingGroupName"]: one for one in found}

    def until_without_groups(self) -> None:
        """Wait until the mirrored groups of a deleted stack are deleted. AWS deletes a stack after its groups.
        MiniStack deletes the stack first, and the last instances end a moment later."""
        until(lambda: not self.groups(), 60.0, pause_s=LOOK_S)

    # --- Mirroring -------------------------------------------------------------------------------

    def mirror(self, stop: threading.Event) -> None:
        """Mirror the groups of the stack's template until `stop` is set."""
        done: object = None
        while not stop.wait(LOOK_S):
            stack = self._stack()
            state = _state_of(stack)
            if state == done:
                continue
            if stack is None:
                for name in self.groups():
                    self.scaling.delete_auto_scaling_group(AutoScalingGroupName=name, ForceDelete=True)
            elif stack["StackStatus"] in ("CREATE_COMPLETE", "UPDATE_COMPLETE"):
                groups, templates = self._described(stack)
                if _state_of(self._stack()) != state:
                    # During an update of the stack, the groups and the launch templates may be of different versions.
                    # For example, a group may have instances while its old launch template does not name a release.
                    continue
                self._take_over(groups, templates)
            done = state

    def _stack(self) -> dict[str, Any] | None:
        try:
            (found,) = self.aws("cloudformation").describe_stacks(StackName=self.name)["Stacks"]
        except ClientError:
            return None
        return None if found["StackStatus"] == "DELETE_COMPLETE" else found

    def _described(self, stack: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], str]:
        """Return the current groups of the stack by name, and the text of their launch templates."""
        told = self.aws("cloudformation").get_template(StackName=self.name, TemplateStage="Original")["TemplateBody"]
        parameters = {one["ParameterKey"]: one["ParameterValue"] for one in stack["Parameters"]}
        # botocore parses a JSON template itself.
        template = cfn.load(told) if isinstance(told, str) else told
        rendered = cfn.Rendered(template, stack=self.name, **parameters)
        groups = {str(one["AutoScalingGroupName"]): one for one in rendered.of_type(_GROUP).values()}
        slots = parameters.get("PoolSlots", "2")
        return groups, "".join(self._launch_template(name, slots) for name in groups)

    def _take_over(self, groups: dict[str, dict[str, Any]], templates: str) -> None:
        path = instance_boot.templates_in(self.folder)
        fresh = path.with_name("fresh")
        fresh.write_text(templates)
        fresh.replace(path)
        known = self.groups()
        for name in known.keys() - groups.keys():
            self.scaling.delete_auto_scaling_group(AutoScalingGroupName=name, ForceDelete=True)
        for name, one in groups.items():
            sizes = {"MinSize": int(one["MinSize"]), "MaxSize": int(one["MaxSize"])}
            if name in known:
                self.scaling.update_auto_scaling_group(AutoScalingGroupName=name, **sizes)
            else:
                self.scaling.create_auto_scaling_group(**self._request(name, one, sizes))

    def _request(self, name: str, one: dict[str, Any], sizes: dict[str, int]) -> dict[str, Any]:
        hooks = one.get("LifecycleHookSpecificationList", [])
        return {
            "AutoScalingGroupName": name,
            **sizes,
            "LaunchTemplate": {"LaunchTemplateName": name, "Version": "$Latest"},
            "AvailabilityZones": [f"{REGION}a"],
            "DefaultCooldown": 0,
            "HealthCheckGracePeriod": 0,
            "TerminationPolicies": one.get("TerminationPolicies", ["Default"]),
            "LifecycleHookSpecificationList": [
                {**hook, "HeartbeatTimeout": int(hook["HeartbeatTimeout"])} for hook in hooks
            ],
            "Tags": [{**tag, "Value": str(tag["Value"]), "PropagateAtLaunch": True} for tag in one["Tags"]],
        }

    def _launch_template(self, name: str, slots: str) -> str:
        """Return the stack's launch template with a container image in place of the AMI."""
        (version,) = self.aws("ec2").describe_launch_template_versions(LaunchTemplateName=name, Versions=["$Latest"])[
            "LaunchTemplateVersions"
        ]
        data = version["LaunchTemplateData"]
        table = ", ".join(f"{key} = {json.dumps(value)}" for key, value in self.inside.items())
        return f"""
[[{json.dumps(name)}.version]]
system = true
image = {json.dumps(self.image)}
network = {json.dumps(self.grid.id)}
type = {json.dumps(data.get("InstanceType", "m7i.large"))}
slots = {slots}
role = {{ name = "instance", access_key = "test", secret_key = "test" }}
env = {{ {table} }}
user_data = {json.dumps(data["UserData"])}
"""


def _state_of(stack: dict[str, Any] | None) -> tuple[str, object] | None:
    return (stack["StackStatus"], stack.get("LastUpdatedTime")) if stack else None


@contextmanager
def control_plane(folder: Path, image: str) -> Iterator[ControlPlane]:
    """Create the account in `folder`, whose instances run `image`, and remove the account on exit."""
    instance_boot.need_instances()
    sessions = Sessions()
    with docker_grid(folder / "docker") as grid:
        with Engine() as engine:
            here = ensure_network(engine, grid.id, grid.labels, internal=True)
        ministack = _ministack(here, folder / "ministack")
        try:
            ministack.start()
            url = str(ministack.endpoint.url)
            with instance_boot.auto_scaling(folder, grid, here) as scaling, standing(sessions) as session_manager:
                instance_boot.install_plugin(folder / "bin", grid)
                inside = {"AWS_ENDPOINT_URL": url, **scaling}
                urls = {
                    "AWS_ENDPOINT_URL": url,
                    "AWS_ENDPOINT_URL_AUTO_SCALING": scaling["AWS_ENDPOINT_URL_AUTO_SCALING"],
                    "AWS_ENDPOINT_URL_SSM": session_manager,
                }
                env = laptop(folder, {**urls, "AWS_DEFAULT_REGION": REGION})
                plane = ControlPlane(grid, folder, env, inside, url, image=image)
                with mirrored(plane):
                    yield plane
        finally:
            ministack.kill()


@contextmanager
def mirrored(plane: ControlPlane) -> Iterator[None]:
    """Mirror the groups of the stack while the context is active."""
    stop = threading.Event()
    mirroring = threading.Thread(target=plane.mirror, args=(stop,))
    mirroring.start()
    try:
        yield
    finally:
        stop.set()
        mirroring.join()


def _ministack(here: str, folder: Path) -> Server:
    """Start MiniStack on an address that containers can reach."""
    port = free_port()
    env = {
        "GATEWAY_PORT": str(port),
        "BIND_HOST": here,
        "MINISTACK_HOST": here,
        "IOT_MTLS_ENABLED": "0",
        "LOG_LEVEL": "WARNING",
    }
    command = [str(ministack_python()), "-m", "ministack"]
    return Server(command, folder, port=port, env=env, host=here)
