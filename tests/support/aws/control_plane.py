"""An account on which `batchlab deploy apply` makes the stack that ships, and its instances boot.

CloudFormation, S3, SQS, Secrets Manager, EC2's launch templates, logs and alarms are MiniStack's.
Its Auto Scaling groups are numbers, so each is mirrored in batchlab's own endpoint, as the template
describes it: containers with systemd that run the user data which MiniStack has rendered. Session
Manager is a stub.
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
LOOK_S = 0.3
_GROUP = "AWS::AutoScaling::AutoScalingGroup"


@dataclass
class ControlPlane:
    """`env` makes AWS of it for a laptop's commands, `inside` for an instance."""

    grid: DockerGrid
    folder: Path
    env: dict[str, str]
    inside: Mapping[str, str]
    url: str
    """Where MiniStack answers."""
    name: str = "batchlab"
    image: str = instance_boot.IMAGE
    """In place of the AMI."""

    def aws(self, service: str) -> Any:
        """A client of the account's owner, at MiniStack."""
        return aws(Endpoint(self.url, REGION), service)

    @property
    def scaling(self) -> Any:
        """A client of the groups whose instances are real."""
        return aws(Endpoint(self.env["AWS_ENDPOINT_URL_AUTO_SCALING"], REGION), "autoscaling")

    def groups(self) -> dict[str, Any]:
        found = self.scaling.describe_auto_scaling_groups()["AutoScalingGroups"]
        return {one["AutoScalingGroupName"]: one for one in found}

    def until_without_groups(self) -> None:
        """Returns once the groups of a stack that is gone are gone, too: AWS's own waits for them,
        this one is gone a look before they are, and their last instances end."""
        until(lambda: not self.groups(), 60.0, pause_s=LOOK_S)

    # --- Mirroring -------------------------------------------------------------------------------

    def mirror(self, stop: threading.Event) -> None:
        """Keep the groups as the stack's template has them, until told to stop."""
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
                    # Half of this may be of an update: a group that has instances, and a launch
                    # template of before it that names no release.
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
        """The groups of the stack as it is, by name, and the file of their launch templates."""
        told = self.aws("cloudformation").get_template(StackName=self.name, TemplateStage="Original")["TemplateBody"]
        parameters = {one["ParameterKey"]: one["ParameterValue"] for one in stack["Parameters"]}
        # botocore reads JSON by itself.
        template = cfn.load(told) if isinstance(told, str) else told
        rendered = cfn.Rendered(template, **parameters)
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
        """As the stack's says, but for its AMI."""
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
    """The account in `folder`, whose instances have that image; what is left of it ends with it."""
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
                with _mirrored(plane):
                    yield plane
        finally:
            ministack.kill()


@contextmanager
def _mirrored(plane: ControlPlane) -> Iterator[None]:
    stop = threading.Event()
    mirroring = threading.Thread(target=plane.mirror, args=(stop,))
    mirroring.start()
    try:
        yield
    finally:
        stop.set()
        mirroring.join()


def _ministack(here: str, folder: Path) -> Server:
    """On an address that containers reach."""
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
