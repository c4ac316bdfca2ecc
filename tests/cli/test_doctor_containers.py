"""The doctor's output if a requirement of containers is missing or wrong."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from batchlab.adapters.docker.engine import LabeledResource
from batchlab.cli import doctor
from batchlab.cli.doctor import Finding, Level, container_findings
from batchlab.runtime import compose_project, factory
from batchlab.runtime.home import Home

WELL = {
    "version": "26.1.5\n",
    "compose": "Docker Compose version 2.26.1",
    "buildx": "github.com/docker/buildx 0.13.1",
    "info": "/",
    "image": "[]",
    "network": "",
    "ps": "",
}


def examined(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    *,
    broken: Mapping[str, str] = {},
    said: Mapping[str, str] = {},
    env: Mapping[str, str] = {},
    left: Sequence[LabeledResource] = (),
) -> dict[str, Finding]:
    """Return the doctor's findings by their subject, with a scripted Docker. The commands in `broken` fail with the
    given text on stderr, and `left` are the resources with a grid's label."""

    def docker(*arguments: str) -> subprocess.CompletedProcess[str]:
        first = arguments[0]
        if first in broken:
            return subprocess.CompletedProcess(arguments, 1, "", broken[first])
        return subprocess.CompletedProcess(arguments, 0, {**WELL, **said}[first], "")

    monkeypatch.setattr(compose_project, "docker", docker)
    monkeypatch.setattr(compose_project, "docker", docker)
    monkeypatch.setattr(compose_project, "find_resources", lambda *_: left)
    monkeypatch.setattr(compose_project, "networks", list)
    for name in ("BATCHLAB_LOCALSTACK_IMAGE", "LOCALSTACK_AUTH_TOKEN", "BATCHLAB_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    found = container_findings(Home(tmp_path), factory.load("localstack"))
    return {one.about: one for one in found}


def test_nothing_is_wrong_where_all_is_well(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "FAIL_BELOW_BYTES", 0)
    found = examined(monkeypatch, tmp_path)
    assert {one.level for one in found.values()} == {Level.OK}
    assert set(found) == {"docker", "compose", "buildx", "disk", "token", "image", "network"}


@pytest.mark.parametrize(
    ("about", "broken", "said", "env", "text"),
    [
        ("docker", {"version": "Cannot connect to the daemon"}, {}, {}, "Cannot connect"),
        ("docker", {}, {"version": "24.0.7"}, {}, "too old"),
        ("compose", {"compose": "not a docker command"}, {}, {}, "no `docker compose`"),
        ("compose", {}, {"compose": "Docker Compose version 2.3.3"}, {}, "too old"),
        ("buildx", {"buildx": "not a docker command"}, {}, {}, "no `docker buildx`"),
        ("token", {}, {}, {"BATCHLAB_LOCALSTACK_IMAGE": "localstack/localstack:4.15"}, "token"),
        ("token", {}, {}, {"BATCHLAB_LOCALSTACK_IMAGE": "localstack/localstack:3.8"}, "too old"),
    ],
)
def test_problems_are_named_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    about: str,
    broken: dict[str, str],
    said: dict[str, str],
    env: dict[str, str],
    text: str,
) -> None:
    one = examined(monkeypatch, tmp_path, broken=broken, said=said, env=env)[about]
    assert one.level is Level.FAIL
    assert text in one.text
    assert one.remedy


def test_a_token_is_enough_for_a_newer_image(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    env = {"BATCHLAB_LOCALSTACK_IMAGE": "localstack/localstack:5.1", "LOCALSTACK_AUTH_TOKEN": "x"}
    one = examined(monkeypatch, tmp_path, env=env)["token"]
    assert one.level is Level.OK
    assert "x" not in one.text.split()


def test_missing_image_and_full_disk_are_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "FAIL_BELOW_BYTES", 2**80)
    found = examined(monkeypatch, tmp_path, broken={"image": "No such image"})
    assert found["image"].level is Level.WARN
    assert "compose/offline" in found["image"].remedy
    assert found["disk"].level is Level.FAIL


def test_leftovers_are_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    labels = {compose_project.LABEL: "batchlab-1", compose_project.HOME_LABEL: str(tmp_path / "gone")}
    volume = LabeledResource("volume", "1", "postgres", labels)
    one = examined(monkeypatch, tmp_path, left=[volume])["orphans"]
    assert one.level is Level.WARN
    assert "batchlab gc" in one.remedy
