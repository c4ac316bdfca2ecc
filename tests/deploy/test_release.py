"""The content of a release: wheels for an instance, and boot scripts."""

from __future__ import annotations

import asyncio
import configparser
import hashlib
import random
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.utils import parse_wheel_filename

import batchlab
from batchlab.adapters.aws.group_descriptions import READY_HOOK, GroupParameters
from batchlab.adapters.local.objects import open_local
from batchlab.core import installation
from batchlab.core.errors import BackendError, UsageError
from batchlab.core.port_retries import Patience
from batchlab.deploy import release
from batchlab.deploy.release import Target
from batchlab.runtime import compose_project, descriptor, factory
from batchlab.worker.loop import LEAVE_S
from tests.support.aws.deploy import rds_bundle
from tests.support.aws.instance_boot import USER_DATA, rendered

BOOT = installation.folder("backends") / "aws" / "boot"
TARGET = Target("x86_64", "3.12")
VALUES = {
    "Role": "worker",
    "Group": "try-pool-default",
    "AWS_StackName": "try",
    "AWS_Region": "eu-central-1",
    "Bucket": "try-bucket",
    "Release": "0" * 64,
    "LogGroup": "/batchlab/try",
    "ContainerImage": "",
    "OwnImage": "",
    "Gpus": "0",
    "Deployment": '{"stack": "try"}',
}


def wheel(folder: Path, name: str, version: str, *requires: str, tag: str = "py3-none-any") -> Path:
    """Write a wheel with these requirements."""
    path = folder / f"{name}-{version}-{tag}.whl"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {require}" for require in requires]
    with zipfile.ZipFile(path, "w") as made:
        # A fixed time keeps the wheel's hash constant, because a wheel contains the time of its files.
        entry = zipfile.ZipInfo(f"{name}-{version}.dist-info/METADATA")
        made.writestr(entry, "\n".join(lines) + "\n")
    return path


class Pip(release._Pip):
    """A fake pip with the index of a test. `asked` are the fetched packages."""

    index: dict[str, Callable[[Path], object]] = {}  # noqa: RUF012 - a test's own
    asked: list[str]

    def download(self, requirements: object) -> None:
        assert isinstance(requirements, list)
        self.asked = [*getattr(self, "asked", []), *requirements]
        for requirement in requirements:
            if make := self.index.get(requirement):
                make(self._folder)


def test_wheels_match_the_target_and_the_local_versions(tmp_path: Path) -> None:
    Pip.index = {
        "absent<2,>=1": lambda folder: wheel(
            folder,
            "absent",
            "1.5",
            "more; python_version < '3.13'",
            "never; sys_platform == 'win32'",
            "httpx[http2]; extra == 'web'",
        ),
        "more": lambda folder: wheel(folder, "more", "7.0"),
        "h2<5,>=3": lambda folder: wheel(folder, "h2", "4.1"),
    }
    pip = Pip(TARGET, tmp_path)
    with pip:
        pins, missing = release._closure(["absent[web]>=1,<2", "httpx"], TARGET, pip)
    assert sorted(missing) == ["absent==1.5", "h2==4.1", "more==7.0"]
    names = {pin.partition("==")[0] for pin in pins}
    assert {"httpx", "httpcore", "anyio"} <= names, "what those need that are here"
    assert sorted(pip.asked) == sorted(Pip.index), "and nothing that another platform needs"
    assert all("==" in pin for pin in pins)


def test_an_architecture_or_a_python_that_no_instance_has_is_refused() -> None:
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert Target.of("aarch64", "") == Target("aarch64", here)
    with pytest.raises(UsageError, match="The architecture 'sparc' is not supported"):
        Target.of("sparc", "")
    with pytest.raises(UsageError, match=r"Instances do not run Python 2\.7"):
        Target.of("x86_64", "2.7")
    with pytest.raises(UsageError, match="is not a requirement"):
        release._requirement("duckdb=1")


def test_pips_word_on_what_cannot_be_had_is_passed_on(tmp_path: Path) -> None:
    said = r"The packages for Python 3\.12 on x86_64 cannot be fetched: .*surely-absent==1"
    with release._Pip(TARGET, tmp_path) as pip, pytest.raises(BackendError, match=said):
        pip.download(["--no-index", "surely-absent==1"])


def test_our_own_wheel_is_the_package_that_runs_and_the_same_each_time(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    first, second = (release.own_wheel(tmp_path / name) for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    name, version, _, _ = parse_wheel_filename(first.name)
    assert name == "batchlab"
    with zipfile.ZipFile(first) as made:
        content = {one: made.read(one) for one in made.namelist()}
    info = f"batchlab-{version}.dist-info"
    assert content["batchlab/__init__.py"] == Path(batchlab.__file__).read_bytes()
    assert content["batchlab/_data/backends/aws/boot/boot.sh"] == (BOOT / "boot.sh").read_bytes()
    assert not [one for one in content if "__pycache__" in one]
    assert f"{info}/licenses/LICENSE" in content
    entry = configparser.ConfigParser()
    entry.read_string(content[f"{info}/entry_points.txt"].decode())
    assert entry["console_scripts"]["batchlab"] == "batchlab.cli:main"
    recorded = content[f"{info}/RECORD"].decode().splitlines()
    assert {line.partition(",")[0] for line in recorded} == set(content)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace the package index, and return the list of requested packages."""
    asked: list[str] = []

    def fetch(folder: Path, target: Target, packages: object) -> list[str]:
        asked.append(f"{target} {packages}")
        wheel(folder, "six", "1.17.0")
        return ["six==1.17.0"]

    monkeypatch.setattr(release, "fetch", fetch)
    return asked


def test_a_release_is_named_by_its_content_and_the_same_each_time(tmp_path: Path, made: list[str]) -> None:
    said: list[str] = []
    first = release.build_release(tmp_path / "a", python="3.12", say=said.append)
    second = release.build_release(tmp_path / "b", python="3.12", packages=["duckdb"])
    assert first.name == second.name
    assert made == ["Python 3.12 on x86_64 ()", "Python 3.12 on x86_64 ['duckdb']"]
    assert release.release_of(first) == hashlib.sha256(first.read_bytes()).hexdigest()
    assert said[0] == "Fetching the packages for Python 3.12 on x86_64."
    with tarfile.open(first) as archive:
        modes = {one.name: one.mode for one in archive}
        version = archive.extractfile("version")
        assert version is not None
        assert b"PYTHON=3.12\nARCHITECTURE=x86_64\n" in version.read()
    assert modes["boot.sh"] == 0o755
    assert {"units/batchlab-worker.service", "units/batchlab-manager.service"} <= set(modes)
    assert {"wheels/six-1.17.0-py3-none-any.whl", "packages.txt"} <= set(modes)
    other = release.build_release(tmp_path / "a", python="3.12", architecture="aarch64")
    assert other.name != first.name


def test_the_databases_certificates_travel_with_it(tmp_path: Path, made: list[str]) -> None:
    ca = rds_bundle(tmp_path)
    with_ca = release.build_release(tmp_path, database_ca=ca)
    assert release.read_member(with_ca, release.DATABASE_CA) == ca.read_bytes()
    assert release.read_member(with_ca, "other.pem") is None
    with pytest.raises(UsageError, match=r"is not a release: database-ca\.pem is not a file of at most 10 bytes"):
        release.read_member(with_ca, release.DATABASE_CA, 10)
    ca.write_text("hello")
    with pytest.raises(UsageError, match="does not contain certificates"):
        release.build_release(tmp_path, database_ca=ca)
    with pytest.raises(UsageError, match="cannot be read"):
        release.build_release(tmp_path, database_ca=tmp_path / "none")


def test_variables_travel_with_it_and_secrets_do_not(tmp_path: Path, made: list[str]) -> None:
    variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://10.0.0.1:4318", "BATCHLAB_LOG": "DEBUG"}
    descriptor.check(variables, "here")
    with tarfile.open(release.build_release(tmp_path, variables=variables)) as archive:
        file = archive.extractfile(descriptor.FILE)
        assert file
        text = file.read().decode()
    assert text == "BATCHLAB_LOG=DEBUG\nOTEL_EXPORTER_OTLP_ENDPOINT=http://10.0.0.1:4318\n"
    with tarfile.open(release.build_release(tmp_path)) as archive:
        assert descriptor.FILE not in archive.getnames()


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("OTEL_EXPORTER_OTLP_HEADERS", "x-api-key=k", "is the name of a secret"),
        ("BATCHLAB_NOTIFY_SECRET", "k", "is the name of a secret"),
        ("low", "x", "not a valid name of a variable"),
        ("A", "two words", "systemd and Docker read differently"),
        ("A", "$HOME", "systemd and Docker read differently"),
        ("A", "x\nB=y", "systemd and Docker read differently"),
    ],
)
def test_packages_without_wheels_are_reported(name: str, value: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        descriptor.check({name: value}, "settings.yaml: environment")


def test_a_release_is_uploaded_once(tmp_path: Path) -> None:
    archive = tmp_path / f"{'a' * 64}.tar.gz"
    archive.write_bytes(b"release")
    said: list[str] = []
    patience = Patience(random.Random(1))
    key = release.upload(open_local(tmp_path / "bucket"), archive, patience, said.append)
    assert key == f"boot/{'a' * 64}.tar.gz"
    assert (tmp_path / "bucket" / key).read_bytes() == b"release"
    again = release.upload(open_local(tmp_path / "bucket"), archive, patience, said.append)
    assert again == key
    assert [one.partition(" the ")[0] for one in said[:1]] == ["Uploading"]
    assert "is in the bucket already" in said[1]


def test_user_data_fits_and_has_no_braces_but_cloudformations(tmp_path: Path) -> None:
    text = rendered(**VALUES)
    assert "${" not in text, "Fn::Sub would take it for a variable of its own"
    assert len(text.encode()) < 8 * 1024, "half of what EC2 takes is the deployment's"
    check_shell(tmp_path, "user-data", text)


def test_scripts_are_clean() -> None:
    offline = installation.folder("compose") / "offline"
    shellcheck(*BOOT.glob("*.sh"), USER_DATA, offline / "build.sh")
    shellcheck(offline / "instance" / "begin", offline / "instance" / "run-user-data")


def check_shell(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(text)
    shellcheck(path)


def shellcheck(*paths: Path) -> None:
    program = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([program, *paths], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stdout


def test_the_scripts_and_the_code_agree_on_names_and_times() -> None:
    assert f"--lifecycle-hook-name {READY_HOOK} " in USER_DATA.read_text()
    backend = factory.load("aws")
    worker = unit("worker")
    stop_s = float(worker["TimeoutStopSec"])
    assert stop_s > backend.worker.drain_s + LEAVE_S
    assert stop_s > GroupParameters("t").drain_s, "systemd would end the worker while its group waits"
    for role in ("worker", "manager"):
        one = unit(role)
        assert one["ExecStart"].startswith(f"/opt/batchlab/current/venv/bin/batchlab {role} --backend aws ")
        assert one["KillMode"] == "mixed", "children are the worker's to drain"
        assert one["NoNewPrivileges"] == "yes"
        assert one["ProtectSystem"] == "strict"
    assert worker["Restart"] == "on-failure", "one that has drained stays away"
    assert unit("manager")["Restart"] == "always"


def unit(role: str) -> dict[str, str]:
    """Return the last value of each setting of a unit's service."""
    found: dict[str, str] = {}
    for line in (BOOT / "units" / f"batchlab-{role}.service").read_text().splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found[name] = value
    return found


def test_the_image_has_the_files_that_a_wheel_has(tmp_path: Path) -> None:
    compose_project._fill(tmp_path)
    for name, path in installation.files():
        assert (tmp_path / name).read_bytes() == path.read_bytes()


def test_build_products_of_examples_are_not_packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {"batchlab/__init__.py", "examples/claims/job.yaml", "examples/.gitignore"}
    kept |= {f"{name}/x" for name in ("backends", "scenarios", "compose")}
    made = {"data/a.837", "out/totals.jsonl", ".batchlab/token", "__pycache__/parse.pyc"}
    for name in kept | {f"examples/claims/{one}" for one in made}:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(installation, "_PACKAGE", tmp_path / "batchlab")
    assert {path.relative_to(tmp_path).as_posix() for _, path in installation.files()} == kept


def test_the_image_is_made_of_the_package_and_of_pinned_packages_alone(tmp_path: Path) -> None:
    compose_project._fill(tmp_path)
    made = {path.name for path in tmp_path.iterdir()}
    assert made == {"Dockerfile", "batchlab", "constraints.txt", "requirements.txt"}
    recipe = (tmp_path / "Dockerfile").read_text()
    copied = {name for line in re.findall(r"^(?:COPY|ADD) (.+)$", recipe, re.MULTILINE) for name in line.split()[:-1]}
    assert copied == made - {"Dockerfile"}
    users = re.findall(r"^USER (.+)$", recipe, re.MULTILINE)
    # Only the build runs as root, also on a base image with another user.
    assert users[:-1] == ["0"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1]), "root, or a name"
    assert "-c /opt/batchlab/constraints.txt" in recipe
    pinned = {line.partition("==")[0] for line in (tmp_path / "constraints.txt").read_text().splitlines()}
    wanted = (tmp_path / "requirements.txt").read_text()
    direct = {line.partition("==")[0].partition("[")[0] for line in wanted.splitlines()}
    assert direct <= pinned
    assert {"botocore", "psycopg-binary", "h11"} <= pinned - direct
    assert "batchlab" not in pinned


def test_obstacles_of_an_upload_are_reported(tmp_path: Path) -> None:
    archive = tmp_path / f"{'b' * 64}.tar.gz"
    archive.write_bytes(b"release")

    class Away:
        async def head(self, key: str) -> None:
            raise BackendError("The bucket is gone.")

    with pytest.raises(BackendError, match="The bucket is gone"):
        release.upload(Away(), archive, Patience(random.Random(1)), print)  # type: ignore[arg-type]
    assert asyncio.run(asyncio.sleep(0, "no loop is left behind"))
