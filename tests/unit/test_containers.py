"""A grid in containers, as far as that can be told without Docker."""

from __future__ import annotations

import re
import stat
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from batchlab import backends, containers
from batchlab.adapters.compose import deployment
from batchlab.adapters.compose.deployment import Deployment
from batchlab.adapters.compose.images import Recipe, requirements
from batchlab.adapters.compose.project import Found, name_for
from batchlab.asg.templates import TemplateFile
from batchlab.errors import BackendError, UsageError
from batchlab.fleet.api import LaunchTemplate
from batchlab.home import Home, Place
from batchlab.model import Pool

AT = Deployment("batchlab-0123456789", "10.213.70", "image:1", "1000:1000", "3.9")
PLACE = Place("http://10.213.70.10:4566", "bucket-1", named=False)


def test_a_network_is_chosen_that_overlaps_none() -> None:
    assert deployment.free_subnet([]) == "10.213.64"
    assert deployment.free_subnet(["10.213.64.0/24", "172.17.0.0/16"]) == "10.213.65"
    assert deployment.free_subnet(["10.213.64.0/20"]) == "10.213.80"
    assert deployment.free_subnet(["10.213.64.7/32", "fd00::/8"]) == "10.213.65"
    with pytest.raises(UsageError, match="are taken"):
        deployment.free_subnet(["10.0.0.0/8"])


def test_a_deployment_is_kept_and_forgotten(tmp_path: Path) -> None:
    home = Home(tmp_path)
    assert deployment.read(home) is None
    deployment.write(home, AT)
    assert deployment.read(home) == AT
    secret = deployment.password_file(home)
    password = secret.read_text()
    assert len(password) >= 32
    assert stat.S_IMODE(secret.parent.stat().st_mode) == 0o700
    assert password in AT.postgres_url(password)
    assert password not in repr(AT)
    deployment.write(home, AT)
    assert secret.read_text() == password
    deployment.forget(home)
    assert deployment.read(home) is None
    assert not secret.exists()


def test_a_deployment_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    home = Home(tmp_path)
    deployment.write(home, AT)
    (deployment.folder(home) / "deployment.json").write_text('{"project": 1}')
    with pytest.raises(BackendError, match="cannot be read"):
        deployment.read(home)


def test_every_address_is_in_the_grids_own_network() -> None:
    urls = [AT.manager_url, AT.autoscaling_url, AT.metadata_url, AT.storage_url(4566)]
    assert all(url.startswith("http://10.213.70.") for url in urls)
    assert len(set(urls)) == len(urls)


def test_the_image_has_what_is_installed_here_and_no_extras() -> None:
    found = requirements()
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+(\[\w+\])?==[\w.+!]+", line) for line in found)
    names = {re.split(r"[\[=]", line)[0] for line in found}
    assert {"boto3", "docker", "psycopg", "localstack-client"} <= names
    assert "duckdb" not in names


def test_settings_say_what_else_is_in_the_image() -> None:
    image = backends.load("localstack").image
    plain = Recipe.of({}, apt=image.apt, pip=image.pip)
    assert "ffmpeg" in plain.apt
    assert plain.base.startswith("python:3.")
    named = {"BATCHLAB_BASE_IMAGE": "mine", "BATCHLAB_IMAGE_APT": "", "BATCHLAB_IMAGE_PIP": "a b"}
    assert Recipe.of(named, apt=image.apt, pip=image.pip) == Recipe("mine", [], ["a", "b"])


def test_every_pool_has_a_launch_template(tmp_path: Path) -> None:
    pools = [Pool("default", 0, 2, 1, instance_type="t3.small"), Pool("big", 0, 1, 4)]
    path = tmp_path / "templates.toml"
    path.write_text(containers.templates_for(AT, PLACE, pools))
    file = TemplateFile(path)
    small = file.template(LaunchTemplate(launch_template_name="worker-default"))
    big = file.template(LaunchTemplate(launch_template_name="worker-big"))
    assert (small.instance_type, small.slots) == ("t3.small", 1)
    assert big.slots == 4
    env = dict(big.env)
    assert env["BATCHLAB_ENDPOINT"] == "http://10.213.70.10:4566/bucket-1"
    assert env["AWS_EC2_METADATA_SERVICE_ENDPOINT"] == AT.metadata_url


def test_an_instance_knows_its_bucket_from_its_environment_alone(tmp_path: Path) -> None:
    backend = backends.load("localstack", "http://10.213.70.10:4566/bucket-1")
    place = backend.place(Home(tmp_path))
    assert (place.url, place.bucket) == ("http://10.213.70.10:4566", "bucket-1")


def test_what_a_folder_knows_nothing_of_is_an_orphan(tmp_path: Path) -> None:
    home = Home(tmp_path)
    project = name_for(home)
    assert Found(project, str(tmp_path), 3).is_orphan
    deployment.write(home, Deployment(project, "10.213.70", "image", "1:1", "3.13"))
    assert not Found(project, str(tmp_path), 3).is_orphan
    assert Found("batchlab-other", str(tmp_path), 1).is_orphan
    assert not Found("somebody", "", 1).is_orphan


def test_functions_are_sent_to_the_same_python_only(tmp_path: Path) -> None:
    home = Home(tmp_path)
    containers.check_python(home)
    deployment.write(home, AT)
    with pytest.raises(UsageError, match=r"run on Python 3\.9"):
        containers.check_python(home)
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    deployment.write(home, replace(AT, python=here))
    containers.check_python(home)
