"""The test account whose instances boot, in which the groups follow the current state of the stack, never a future
state."""

from __future__ import annotations

import base64
import threading
import tomllib
from pathlib import Path
from typing import Any, cast

from tests.support.aws import cfn, instance_boot
from tests.support.aws.control_plane import ControlPlane
from tests.support.aws.ministack import Plane, Stack
from tests.support.docker.containers import DockerGrid

TEMPLATE = cfn.load("""\
AWSTemplateFormatVersion: '2010-09-09'
Parameters: {Release: {Type: String, Default: ''}}
Conditions: {Runs: !Not [!Equals [!Ref Release, '']]}
Resources:
  Template:
    Type: AWS::EC2::LaunchTemplate
    Properties:
      LaunchTemplateName: mirrored
      LaunchTemplateData: {UserData: {'Fn::Base64': !Sub 'RELEASE=${Release}'}}
  Group:
    Type: AWS::AutoScaling::AutoScalingGroup
    Properties:
      AutoScalingGroupName: mirrored
      MinSize: !If [Runs, '1', '0']
      MaxSize: !If [Runs, '1', '0']
      AvailabilityZones: [us-east-1a]
      LaunchTemplate:
        {LaunchTemplateId: !Ref Template, Version: !GetAtt Template.LatestVersionNumber}
      Tags: []
Outputs: {}
""")


class Looks(threading.Event):
    """An event that is set after a number of looks."""

    def __init__(self, left: int) -> None:
        super().__init__()
        self.left = left

    def wait(self, timeout: float | None = None) -> bool:
        self.left -= 1
        return self.left < 0


class Scaling:
    """A fake Auto Scaling service that records each created or changed group and the user data of its instances."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.known: dict[str, Any] = {}
        self.made: list[tuple[int, str]] = []

    def describe_auto_scaling_groups(self) -> dict[str, Any]:
        return {"AutoScalingGroups": list(self.known.values())}

    def create_auto_scaling_group(self, **asked: Any) -> None:
        (version,) = tomllib.loads(instance_boot.templates_in(self.folder).read_text())["mirrored"]["version"]
        self.known[asked["AutoScalingGroupName"]] = asked
        self.made.append((asked["MinSize"], base64.b64decode(version["user_data"]).decode()))

    update_auto_scaling_group = create_auto_scaling_group


class Mirror(ControlPlane):
    """A control plane with recorded groups. An update of the stack begins during a look."""

    noted: Scaling
    waiting: list[Stack]

    @property
    def scaling(self) -> Any:
        return self.noted

    def _described(self, stack: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], str]:
        groups, templates = super()._described(stack)
        if self.waiting:
            assert self.waiting.pop().execute("release") == "UPDATE_COMPLETE"
        return groups, templates


def mirror_of(cloud: Plane, folder: Path, stack: Stack, waiting: list[Stack]) -> Mirror:
    grid = cast(DockerGrid, type("Grid", (), {"id": "grid"}))
    made = Mirror(grid, folder, {}, {}, cloud.url, stack.name)
    made.noted, made.waiting = Scaling(folder), waiting
    return made


def test_no_instance_boots_before_its_template_names_the_release(cloud: Plane, tmp_path: Path) -> None:
    stack = Stack(cloud, "mirrored")
    assert stack.create(TEMPLATE) == "CREATE_COMPLETE"
    try:
        assert stack.change_set("release", TEMPLATE, Release="abc")
        planned = mirror_of(cloud, tmp_path, stack, [])
        planned.mirror(Looks(2))
        assert planned.noted.made == [(0, "RELEASE=")]
        updated = mirror_of(cloud, tmp_path, stack, [stack])
        updated.mirror(Looks(1))
        assert updated.noted.made == []
        updated.mirror(Looks(2))
        assert updated.noted.made == [(1, "RELEASE=abc")]
    finally:
        stack.delete()
