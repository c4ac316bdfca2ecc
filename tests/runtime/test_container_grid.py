"""A grid in containers, tested without Docker."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from docker.errors import APIError

from batchlab.adapters.aws.group_descriptions import GPUS_TAG, GroupParameters
from batchlab.adapters.docker.container import Template, container_settings, start_container
from batchlab.cli import grid
from batchlab.client.grid_link import Link
from batchlab.core import installation
from batchlab.core.errors import BackendError, Unreachable, UsageError
from batchlab.core.model import Pool
from batchlab.fleet.api_types import LaunchTemplate
from batchlab.runtime import compose_deployment, compose_project, container_grid, descriptor, factory, manager_process
from batchlab.runtime.compose_deployment import Deployment
from batchlab.runtime.compose_project import Project, ProjectParts, Recipe, name_for, requirements, unpulled_images
from batchlab.runtime.home import Home, ManagerRecord, Place
from batchlab.server.autoscaling_api.launch_templates import TemplateFile

AT = Deployment("batchlab-0123456789", "10.213.70", "image:1", "1000:1000", "3.9")
PLACE = Place("http://10.213.70.10:4566", "bucket-1", named=False)


def test_a_network_is_chosen_that_overlaps_none() -> None:
    assert compose_deployment.free_subnet([]) == "10.213.64"
    assert compose_deployment.free_subnet(["10.213.64.0/24", "172.17.0.0/16"]) == "10.213.65"
    assert compose_deployment.free_subnet(["10.213.64.0/20"]) == "10.213.80"
    assert compose_deployment.free_subnet(["10.213.64.7/32", "fd00::/8"]) == "10.213.65"
    begins = {compose_deployment.free_subnet([], f"batchlab-{n}") for n in range(20)}
    assert len(begins) > 10
    with pytest.raises(UsageError, match="are in use"):
        compose_deployment.free_subnet(["10.0.0.0/8"])


def test_deployment_is_stored_and_removed(tmp_path: Path) -> None:
    home = Home(tmp_path)
    assert compose_deployment.read(home) is None
    compose_deployment.write(home, AT)
    assert compose_deployment.read(home) == AT
    secret = compose_deployment.password_file(home)
    password = secret.read_text()
    assert len(password) >= 32
    assert stat.S_IMODE(secret.parent.stat().st_mode) == 0o700
    assert password in AT.postgres_url(password)
    assert password not in repr(AT)
    compose_deployment.write(home, AT)
    assert secret.read_text() == password
    compose_deployment.forget(home)
    assert compose_deployment.read(home) is None
    assert not secret.exists()


def test_unreadable_deployment_is_reported(tmp_path: Path) -> None:
    home = Home(tmp_path)
    compose_deployment.write(home, AT)
    (compose_deployment.folder(home) / "deployment.json").write_text('{"project": 1}')
    with pytest.raises(BackendError, match="is not a description of a grid in containers"):
        compose_deployment.read(home)


def test_every_address_is_in_the_grids_own_network() -> None:
    urls = [AT.autoscaling_url, AT.metadata_url, AT.storage_url(4566)]
    assert all(url.startswith("http://10.213.70.") for url in urls)
    assert AT.manager_host.startswith("10.213.70.")
    assert len({AT.manager_host, *urls}) == len(urls) + 1


def test_the_image_has_what_is_installed_here_and_no_extras() -> None:
    found = requirements()
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+(\[\w+\])?==[\w.+!]+", line) for line in found)
    names = {re.split(r"[\[=]", line)[0] for line in found}
    assert {"boto3", "docker", "psycopg", "localstack-client"} <= names
    assert "opentelemetry-sdk" not in names


def test_settings_add_packages_to_the_image() -> None:
    image = factory.load("localstack").image
    plain = Recipe.from_settings({}, apt=image.apt, pip=image.pip)
    assert "ffmpeg" in plain.apt
    assert plain.base.startswith("python:3.")
    named = {"BATCHLAB_BASE_IMAGE": "mine", "BATCHLAB_IMAGE_APT": "", "BATCHLAB_IMAGE_PIP": "a b"}
    assert Recipe.from_settings(named, apt=image.apt, pip=image.pip) == Recipe("mine", [], ["a", "b"])


def test_every_pool_has_a_launch_template(tmp_path: Path) -> None:
    pools = [Pool("default", 0, 2, 1, instance_type="t3.small"), Pool("big", 0, 1, 4)]
    path = tmp_path / "templates.toml"
    path.write_text(container_grid.templates_for(AT, PLACE, pools))
    file = TemplateFile(path)
    small = file.template(LaunchTemplate(launch_template_name="worker-default"))
    big = file.template(LaunchTemplate(launch_template_name="worker-big"))
    assert (small.instance_type, small.slots) == ("t3.small", 1)
    assert big.slots == 4
    env = dict(big.env)
    assert env["BATCHLAB_ENDPOINT"] == "http://10.213.70.10:4566/bucket-1"
    assert env["AWS_EC2_METADATA_SERVICE_ENDPOINT"] == AT.metadata_url


def test_launch_template_of_a_pool_has_the_pools_image(tmp_path: Path) -> None:
    at = replace(AT, pool_images={"big": ("tools:1@sha256:0", "batchlab/grid:tools")})
    path = tmp_path / "templates.toml"
    path.write_text(container_grid.templates_for(at, PLACE, [Pool("default"), Pool("big")]))
    file = TemplateFile(path, ["image:1", "batchlab/grid:tools"])

    def version(name: str) -> tuple[str, str | None]:
        version = file.referred(LaunchTemplate(launch_template_name=name))
        return version.image, version.env.get("BATCHLAB_POOL_IMAGE")

    assert version("worker-default") == ("image:1", None)
    assert version("worker-big") == ("batchlab/grid:tools", "tools:1@sha256:0")


def test_deployment_of_an_earlier_release_has_no_images_of_pools(tmp_path: Path) -> None:
    home = Home(tmp_path)
    at = replace(AT, pool_images={"big": ("tools:1@sha256:0", "batchlab/grid:tools")})
    compose_deployment.write(home, at)
    assert compose_deployment.read(home) == at
    path = compose_deployment.folder(home) / "deployment.json"
    stored = json.loads(path.read_text())
    del stored["pool_images"]
    path.write_text(json.dumps(stored))
    assert compose_deployment.read(home) == AT


def test_how_a_grid_is_observed_is_passed_on(tmp_path: Path) -> None:
    """Compose passes the settings to the manager, and launch templates pass them to instances."""
    compose = yaml.safe_load((installation.folder("compose") / "compose.yaml").read_text())
    services = compose["services"]
    assert tuple(services["asg"]["environment"]) == descriptor.INHERITED
    assert set(services["manager"]["environment"]) >= set(descriptor.INHERITED)
    passed = {name: services["manager"]["environment"][name] for name in descriptor.INHERITED}
    assert not any(passed.values()), "as it is outside, or not at all"
    told = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://10.0.0.1:4318", "HOME": "/root", "OTEL_X": "1"}
    path = tmp_path / "templates.toml"
    more = descriptor.inherited_variables(told)
    path.write_text(container_grid.templates_for(AT, PLACE, [Pool("default")], more))
    template = TemplateFile(path).template(LaunchTemplate(launch_template_name="worker-default"))
    env = dict(template.env)
    assert env["OTEL_EXPORTER_OTLP_ENDPOINT"] == "http://10.0.0.1:4318"
    assert not {"HOME", "OTEL_X"} & env.keys()


def test_secrets_of_notifications_are_passed_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def run(argv: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(argv)
        return subprocess.CompletedProcess(argv, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(Project, "_wait", lambda *_: None)
    Project(Home(tmp_path), AT, settings={}, passed=["OPS_HOOK_URL"]).up(print, storage=False)
    (argv,) = asked
    more = Path([argv[n + 1] for n, word in enumerate(argv) if word == "--file"][1])
    assert yaml.safe_load(more.read_text()) == {"services": {"manager": {"environment": {"OPS_HOOK_URL": None}}}}


def test_mistake_in_notify_toml_is_reported_before_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, brought = Home(tmp_path), Brought(monkeypatch)
    home.notify_file.write_text("[ops]\nwebhook = 'env:NOT_SET_HERE'\n")
    with pytest.raises(UsageError, match="NOT_SET_HERE"):
        container_grid.up(home, brought.backend, [], print)
    assert brought.done == []
    assert compose_deployment.read(home) is None


def test_uploads_are_not_kept_in_the_managers_memory() -> None:
    """The manager's /tmp is in memory, and its container has less memory than one upload may need."""
    compose = yaml.safe_load((installation.folder("compose") / "compose.yaml").read_text())
    manager = compose["services"]["manager"]
    assert manager["environment"]["TMPDIR"] in manager["volumes"]
    assert manager["environment"]["TMPDIR"] not in manager["tmpfs"]
    unit = (installation.folder("backends") / "aws/boot/units/batchlab-manager.service").read_text()
    assert "TMPDIR=/var/tmp" in unit
    assert "PrivateTmp=yes" in unit, "it is private, and goes with the service"


def test_a_container_does_not_restart_without_the_folder_of_its_grid() -> None:
    """Docker would create the missing source of a short bind mount, and restart the manager of a deleted grid."""
    compose = yaml.safe_load((installation.folder("compose") / "compose.yaml").read_text())
    for service in ("manager", "asg"):
        volumes = compose["services"][service]["volumes"]
        assert not any("BATCHLAB_HOME_FOLDER" in volume for volume in volumes if isinstance(volume, str))
        binds = [volume for volume in volumes if isinstance(volume, dict)]
        assert any(volume["source"].startswith("${BATCHLAB_HOME_FOLDER") for volume in binds)
        assert all(volume["bind"] == {"create_host_path": False} for volume in binds)


def test_instance_finds_its_bucket_by_environment_only(tmp_path: Path) -> None:
    backend = factory.load("localstack", "http://10.213.70.10:4566/bucket-1")
    place = backend.place(Home(tmp_path))
    assert (place.url, place.bucket) == ("http://10.213.70.10:4566", "bucket-1")


def test_resources_without_a_folder_are_orphans(tmp_path: Path) -> None:
    home = Home(tmp_path)
    project = name_for(home)
    assert ProjectParts(project, str(tmp_path), 3).is_orphan
    compose_deployment.write(home, Deployment(project, "10.213.70", "image", "1:1", "3.13"))
    assert not ProjectParts(project, str(tmp_path), 3).is_orphan
    assert ProjectParts("batchlab-other", str(tmp_path), 1).is_orphan
    assert not ProjectParts("somebody", "", 1).is_orphan


def test_functions_are_sent_to_the_same_python_only(tmp_path: Path) -> None:
    home, backend = Home(tmp_path), factory.load("localstack")
    backend.check_python(home)
    compose_deployment.write(home, AT)
    with pytest.raises(UsageError, match=r"run on Python 3\.9"):
        backend.check_python(home)
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    compose_deployment.write(home, replace(AT, python=here))
    backend.check_python(home)


def test_resources_of_an_unreadable_folder_are_not_orphans(tmp_path: Path) -> None:
    home = Home(tmp_path)
    compose_deployment.write(home, AT)
    (compose_deployment.folder(home) / "deployment.json").write_text("[")
    assert not ProjectParts(AT.project, str(tmp_path), 3).is_orphan
    no_folder = tmp_path / "file"
    no_folder.touch()
    assert compose_deployment.read(Home(no_folder)) is None


def test_empty_password_is_never_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Home(tmp_path)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            compose_deployment.write(home, AT)
    compose_deployment.write(home, AT)
    assert len(compose_deployment.password_file(home).read_text()) >= 32


def test_groups_end_with_their_grid(tmp_path: Path) -> None:
    home = Home(tmp_path)
    compose_deployment.write(home, AT)
    groups = compose_deployment.folder(home) / compose_deployment.STATE / "groups.json"
    groups.write_text("{}")
    compose_deployment.forget(home)
    assert not groups.exists()


def test_other_files_in_the_folder_keep_their_owner(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.make()
    home.token()
    compose_deployment.write(home, AT)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").touch()
    handed = container_grid.container_paths(home)
    assert {tmp_path, tmp_path / "token", compose_deployment.password_file(home)} <= set(handed)
    assert not [path for path in handed if "thesis" in path.parts]


def test_an_endpoint_that_containers_cannot_reach_is_refused(tmp_path: Path) -> None:
    backend = factory.load("localstack", "http://127.0.0.1:9000")
    with pytest.raises(UsageError, match="the container itself"):
        container_grid.up(Home(tmp_path), backend, [], print)


def test_failed_service_is_not_reported_as_a_missing_image() -> None:
    assert unpulled_images([" postgres Error manifest unknown"]) == ["postgres"]
    assert not unpulled_images(["Container x-postgres-1  Error dependency failed to start"])


class Brought:
    """A replacement of Compose that records its calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[tuple[str, Deployment]] = []
        self.fails = False
        self.image = "image:1"

        def up(project: Project, *_: object, **__: object) -> None:
            self.done.append(("up", project._at))
            if self.fails:
                raise BackendError("It did not become ready.")

        def down(project: Project, **_: object) -> None:
            self.done.append(("down", project._at))

        monkeypatch.setattr(Project, "up", up)
        monkeypatch.setattr(Project, "down", down)
        monkeypatch.setattr(Project, "last_line", lambda *_: "said")
        monkeypatch.setattr(compose_project, "provide", lambda *_: self.image)
        monkeypatch.setattr(compose_project, "python_of", lambda _: "3.13")
        monkeypatch.setattr(container_grid, "networks", list)
        monkeypatch.setattr(container_grid, "_change_owner", lambda *_: None)
        monkeypatch.delenv("BATCHLAB_ENDPOINT", raising=False)
        self.backend = factory.load("localstack")

    def up(self, home: Home, *pools: Pool) -> None:
        """Start the grid without a manager, so that the start fails with the end of the manager or another error."""
        with pytest.raises(BackendError):
            container_grid.up(home, self.backend, pools, print)


def test_stopped_grid_restarts_with_the_current_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, brought = Home(tmp_path), Brought(monkeypatch)
    brought.up(home, Pool("big", 0, 1, 4))
    place, path = home.place("localstack"), compose_deployment.folder(home) / "templates.toml"
    path.write_text(path.read_text() + 'market = "spot"\n')
    brought.image = "image:2"
    brought.up(home)
    (_, first), (_, second) = brought.done
    assert second == replace(first, image="image:2")
    assert second.pools == ("big:0-1x4",)
    assert home.place("localstack") == place
    assert 'image = "image:2"' in path.read_text()
    assert "spot" in path.read_text()
    brought.up(home, Pool("default", 0, 2, 1))
    assert "worker-default" in path.read_text()


def test_failed_start_removes_only_a_new_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, brought = Home(tmp_path), Brought(monkeypatch)
    brought.fails = True
    brought.up(home)
    assert [what for what, _ in brought.done] == ["up", "down"]
    assert compose_deployment.read(home) is None
    brought.fails = False
    brought.up(home)
    brought.fails = True
    brought.up(home)
    assert [what for what, _ in brought.done[2:]] == ["up", "up"]
    assert compose_deployment.read(home) is not None


def test_manager_in_a_container_is_not_signaled_by_pid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Home(tmp_path)
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("a signal to somebody else"))
    with home.lock():
        home.write_record(ManagerRecord("http://10.213.70.13:8080", os.getpid(), "m", "localstack"))
        with pytest.raises(BackendError, match="in a container"):
            manager_process.stop_manager(home)


def test_containers_without_a_manager_are_taken_down_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, brought = Home(tmp_path), Brought(monkeypatch)
    brought.up(home)
    grid.down(home=tmp_path)
    assert [what for what, _ in brought.done] == ["up", "down"]
    assert compose_deployment.read(home) is None


def test_command_does_not_wait_for_a_service_that_keeps_exiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = iter(range(7, 100))  # the counter does not begin at 0

    def inspected(_: Project) -> dict[str, Any]:
        state = {"Status": "running", "Health": {"Status": "starting"}}
        return {"manager": {"State": state, "RestartCount": next(seen)}}

    monkeypatch.setattr(Project, "_inspect", inspected)
    monkeypatch.setattr(Project, "_compose", lambda *_: None)
    monkeypatch.setattr(Project, "_keep_logs", lambda _: tmp_path)
    monkeypatch.setattr(Project, "last_line", lambda *_: "no such option")
    monkeypatch.setattr(compose_project, "_POLL_S", 0.0)
    with pytest.raises(BackendError, match=r"manager did not become ready: no such option\."):
        Project(Home(tmp_path), AT, settings={}).up(print, storage=False)
    assert next(seen) == 11


def test_resume_starts_only_containers_that_have_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, brought = Home(tmp_path), Brought(monkeypatch)
    brought.up(home)
    services = {
        name: {"Id": f"id-{name}", "State": {"Status": status, "Health": {"Status": "healthy"}}, "RestartCount": 0}
        for name, status in [("asg", "exited"), ("localstack", "running"), ("manager", "running"), ("postgres", "dead")]
    }
    started: list[tuple[str, ...]] = []

    def docker(*arguments: str) -> str:
        started.append(arguments)
        services[arguments[1].removeprefix("id-")]["State"]["Status"] = "running"  # type: ignore[index]
        return ""

    monkeypatch.setattr(Project, "_inspect", lambda _: services)
    monkeypatch.setattr(compose_project, "check_reference", docker)
    said: list[str] = []
    container_grid.resume(home, brought.backend, said.append)
    assert started == [("start", "id-asg"), ("start", "id-postgres")]
    assert [line for line in said if "localstack" in line or "manager" in line] == []
    assert "asg has ended and is started again." in said
    # A container that was removed is created again.
    del services["asg"]
    with pytest.raises(Unreachable):
        container_grid.resume(home, brought.backend, said.append)
    assert [what for what, _ in brought.done] == ["up", "up"]


def test_root_does_not_change_the_owner_of_a_foreign_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getuid", lambda: 0)
    (tmp_path / "letters").write_text("mine")
    with pytest.raises(UsageError, match="contains other files"):
        container_grid.up(Home(tmp_path), factory.load("localstack"), (), lambda _: None)
    assert [path.name for path in tmp_path.iterdir()] == ["letters"]


@pytest.mark.parametrize("stood", [False, True])
def test_a_program_takes_down_containers_only_if_it_brought_them_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stood: bool
) -> None:
    """A grid may be running although its manager does not answer now."""
    stopped: list[Home] = []
    record = ManagerRecord("http://10.213.70.13:8080", 7, "manager", "localstack")
    here = f"{sys.version_info.major}.{sys.version_info.minor}"

    def start(home: Home, *_: object, **__: object) -> ManagerRecord:
        compose_deployment.write(home, replace(AT, python=here))
        return record

    monkeypatch.setattr("batchlab.runtime.manager_process.start_manager", start)
    monkeypatch.setattr("batchlab.runtime.manager_process.stop_manager", stopped.append)
    home = Home(tmp_path)
    home.backend_folder("localstack").mkdir()
    home.write_place("localstack", PLACE)
    if stood:
        start(home)
        monkeypatch.setattr(compose_deployment, "_CREATED_HERE", set())  # another process created it
    monkeypatch.setattr(Home, "record", lambda _: None)
    link = Link(factory.load("localstack"), home, ())
    assert link.ours is not stood
    monkeypatch.setattr(Home, "record", lambda _: record)
    link.close()
    assert stopped == ([] if stood else [home])


def test_a_program_waits_for_a_manager_that_docker_starts_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The grid was running before, so the program must not start it."""
    record = ManagerRecord("http://10.213.70.13:8080", 7, "manager", "localstack")
    home, here = Home(tmp_path), f"{sys.version_info.major}.{sys.version_info.minor}"
    compose_deployment.write(home, replace(AT, python=here))
    home.write_place("localstack", PLACE)
    monkeypatch.setattr(Home, "record", lambda _: record)
    link = Link(factory.load("localstack"), home, ())
    try:
        assert not link.ours
        monkeypatch.setattr(Home, "record", lambda _: None)
        away = iter([True, True, False])

        def ask(_: object) -> str:
            if next(away):
                raise Unreachable("Connection refused.")
            return "answer"

        assert link.call(ask) == "answer"
        compose_deployment.forget(home)  # the grid was taken down
        away = iter([True])
        with pytest.raises(Unreachable):
            link.call(ask)
    finally:
        link.close()


# --- GPUs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("declared", "devices"), [(None, 2), ("1", 2), ("0", 0)])
def test_launch_template_of_a_pool_requests_its_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, declared: str | None, devices: int
) -> None:
    """BATCHLAB_DOCKER_GPUS=0 declares GPUs on a machine whose Docker has none."""
    monkeypatch.delenv("BATCHLAB_DOCKER_GPUS", raising=False)
    if declared is not None:
        monkeypatch.setenv("BATCHLAB_DOCKER_GPUS", declared)
    path = tmp_path / "templates.toml"
    path.write_text(container_grid.templates_for(AT, PLACE, [Pool("default", 0, 1, 8, gpus=2), Pool("plain", 0, 2, 1)]))
    templates = TemplateFile(path)
    launched = templates.template(LaunchTemplate("", compose_deployment.TEMPLATE.replace("{pool}", "default"), "1"))
    assert launched.gpus == 2
    version = templates.launched(Pool("default", env=launched.env))
    assert (version.gpus if version.gpu_devices else 0) == devices
    plain = templates.template(LaunchTemplate("", compose_deployment.TEMPLATE.replace("{pool}", "plain"), "1"))
    assert plain.gpus == 0
    (tag,) = (tag for tag in GroupParameters("t").request("g", Pool("a", gpus=2))["Tags"] if tag["Key"] == GPUS_TAG)
    assert (tag["Value"], tag["PropagateAtLaunch"]) == ("2", True)


def test_a_container_with_gpus_needs_a_gpu_runtime() -> None:
    class Api:
        def start(self, container: str) -> None:
            raise APIError(f'could not select device driver "" with capabilities: [[gpu]] for {container}')

    settings = container_settings(Template("image", (), gpus=2), "i-1", None, {}, {})
    assert settings["host_config"]["device_requests"] == [{"Driver": "", "Count": 2, "Capabilities": [["gpu"]]}]
    assert "device_requests" not in container_settings(Template("image", ()), "i-1", None, {}, {})["host_config"]
    with pytest.raises(BackendError, match="cannot give GPUs to containers") as found:
        start_container("c", cast(Any, Api()))
    assert "BATCHLAB_DOCKER_GPUS=0" in found.value.remedy


@pytest.mark.parametrize("backend", ["local", "ministack", "localstack"])
def test_several_instances_of_one_machine_have_no_gpus(tmp_path: Path, backend: str) -> None:
    home = Home(tmp_path)
    pools = [Pool("a", 0, 1, 4, gpus=1), Pool("b", 0, 1, 4, gpus=1)]
    with pytest.raises(UsageError, match="share one machine"):
        manager_process.begin_manager(home, factory.load(backend), pools=pools)
