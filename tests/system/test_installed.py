"""The built package, which contains the written files, and works without a source folder as after `pip install`."""

from __future__ import annotations

import email
import json
import os
import re
import subprocess
import sys
import tarfile
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from http.cookiejar import CookieJar
from pathlib import Path

import pytest

import batchlab
from batchlab.core import installation
from batchlab.core.installation import FOLDERS
from tests.support import ROOT
from tests.support.supply import EXTRAS
from tests.support.uv import Uv, uv

__all__ = ["uv"]

WAIT_S = 120.0
DATA = "batchlab/_data"


@dataclass(frozen=True)
class Built:
    wheel: Path
    sdist: Path


@pytest.fixture(scope="module")
def built(uv: Uv, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Build the wheel from the source distribution, as a package index has it."""
    folder = tmp_path_factory.mktemp("dist")
    uv("build", "-q", "--out-dir", folder, ROOT)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return Built(wheel, sdist)


# --- Content -------------------------------------------------------------------------------------


def written(*folders: str) -> set[str]:
    """Return the files below these folders that git tracks or would add."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *folders],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return {name for name in listed.split("\0") if name and (ROOT / name).is_file()}


def test_the_wheel_has_what_was_written_and_nothing_else(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as wheel:
        content = {one: wheel.read(one) for one in wheel.namelist()}
    info = f"batchlab-{batchlab.__version__}.dist-info"
    own = {one for one in content if not one.startswith(f"{info}/")}
    data = {f"{DATA}/{one}" for one in written(*FOLDERS)}
    assert own == written("batchlab") | data
    assert own == {name for name, _ in installation.files()}, "of these images and releases are made"
    for name in own:
        source = name.removeprefix(f"{DATA}/")
        assert content[name] == (ROOT / source).read_bytes(), name
    vendor = "batchlab/server/web/static/vendor"
    assert {"batchlab/py.typed", f"{vendor}/htmx.min.js", f"{DATA}/compose/compose.yaml"} <= own
    licences = {one.removeprefix(f"{info}/licenses/") for one in content if "/licenses/" in one}
    assert licences == {"LICENSE", *(one for one in own if one.endswith(".LICENSE"))}
    for load in json.loads(content[f"{vendor}/versions.json"]):
        name = load["name"].removesuffix(".org")
        assert f"{vendor}/{name}.LICENSE" in licences, "vendored without its licence"


def test_the_source_distribution_is_enough_and_has_no_tests(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {one.name.partition("/")[2] for one in archive if one.isfile()}
    made = {"PKG-INFO", ".gitignore", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"}
    assert names == made | written("batchlab", *FOLDERS, "docs")


def test_metadata_of_the_package_is_complete(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as wheel:
        (name,) = (one for one in wheel.namelist() if one.endswith(".dist-info/METADATA"))
        told = email.message_from_bytes(wheel.read(name))
    assert (told["Name"], told["Version"]) == ("batchlab", batchlab.__version__)
    assert told["Requires-Python"] == ">=3.11"
    assert told["License-Expression"] == "Apache-2.0 AND MIT AND 0BSD"
    vendored = json.loads((ROOT / "batchlab/server/web/static/vendor/versions.json").read_text())
    assert {one["licence"] for one in vendored} | {"Apache-2.0"} == set(told["License-Expression"].split(" AND "))
    assert told["Description-Content-Type"] == "text/markdown"
    assert str(told.get_payload()).startswith("# batchlab\n")
    classifiers = told.get_all("Classifier", [])
    assert "Typing :: Typed" in classifiers
    assert not [classifier for classifier in classifiers if classifier.startswith("License ::")]
    assert set(told.get_all("Provides-Extra", [])) == set(EXTRAS)


# --- Behavior ------------------------------------------------------------------------------------


class Installed:
    """batchlab in its own environment, called in a folder without source files."""

    def __init__(self, environment: Path, folder: Path) -> None:
        self.python = environment / "bin" / "python"
        self.folder = folder
        self.installing: dict[str, str] = {}
        """The environment variables for later installations."""
        self._program = environment / "bin" / "batchlab"
        # The environment must not inherit the tests' environment, in which batchlab is the checkout.
        self.env = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "LANG": "C.UTF-8"}

    def __call__(self, *arguments: str) -> str:
        return self.call(str(self._program), *arguments)

    def call(self, *command: str) -> str:
        done = self._done(*command)
        assert not done.returncode, f"{' '.join(command)}: {done.stdout}\n{done.stderr}"
        return done.stdout

    def refused(self, *arguments: str) -> str:
        """Return the stderr of a command that fails with the exit code for wrong usage."""
        done = self._done(str(self._program), *arguments)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr

    def _done(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=self.folder,
            env=self.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=WAIT_S,
        )


@pytest.fixture(scope="module")
def installed(built: Built, uv: Uv, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    """Install batchlab without extras, in the versions of the lock file, for the Python of the tests."""
    folder = tmp_path_factory.mktemp("installed")
    environment, pins = folder / "environment", folder / "pins.txt"
    uv("venv", "-q", "--python", sys.executable, environment)
    uv("export", "-q", "--frozen", "--no-dev", "--all-extras", "--no-hashes", "--no-emit-project",
       "--project", ROOT, "--output-file", pins)  # fmt: skip
    uv("pip", "install", "-q", "--python", environment / "bin" / "python",
       "--constraints", pins, built.wheel)  # fmt: skip
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    made = Installed(environment, elsewhere)
    # Later installations use the same versions from the same place.
    made.installing = {**os.environ, "UV_CONSTRAINT": str(pins)}
    yield made
    made("grid", "down")


def of_extras(installed: Installed) -> dict[str, str]:
    """Return the doctor's report on extras."""
    (found,) = (load for load in json.loads(installed("doctor", "--json")) if load["check"] == "extras")
    told: dict[str, str] = found
    return told


def test_missing_extra_is_named(installed: Installed) -> None:
    found = of_extras(installed)
    assert found["text"].startswith("installed: none; not installed")
    assert f"batchlab[{','.join(EXTRAS)}] @ file:///" in found["remedy"]
    for extra, command in (
        ("aws", "deploy status --region eu-west-1"),
        ("aws", "grid up --backend aws"),
        ("docker", "grid up --backend localstack"),
        ("ministack", "grid up --backend ministack"),
    ):
        said = installed.refused(*command.split())
        assert f"needs batchlab's extra `{extra}`, which is not installed" in said, command
        assert f"'batchlab[{extra}] @ file:///" in said, command


def test_readme_commands_run_without_the_source(installed: Installed) -> None:
    code = "import batchlab; print(batchlab.__file__)"
    where = installed.call(str(installed.python), "-c", code).strip()
    assert Path(where).is_relative_to(installed.python.parent.parent)
    assert installed("--version") == f"batchlab {batchlab.__version__}\n"
    assert "batchlab demo" in installed("--help")
    assert "fail" not in {line.split()[0] for line in installed("doctor").splitlines()}
    said = installed("demo", "--files", "10")
    assert said.rstrip().endswith("totals agree with the generator: yes")
    installed("init", "rides", "--example", "transform")
    installed("run", "rides/job.yaml", "--out", "rides/out")
    installed("init", "first")
    installed("run", "first/job.yaml", "--out", "out")
    assert (installed.folder / "out" / "total.jsonl").read_text().count("\n") == 3
    assert "first-claims" in installed("report", "query", "SELECT DISTINCT job FROM tasks", "last")
    installed("report", "html", "last", "--out", "run.html")
    page = (installed.folder / "run.html").read_text()
    assert "first-claims" in page
    assert "<script" not in page
    assert "claims-month-end" in installed("scenario", "list")


def test_its_page_has_all_that_it_shows(installed: Installed) -> None:
    installed("grid", "up")
    opened = json.loads(installed("grid", "open", "--json"))["url"]
    address, _, word = opened.partition("#")
    browser = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPCookieProcessor(CookieJar())
    )
    login = urllib.parse.urljoin(address, "/ui/login")
    body = urllib.parse.urlencode({"word": word.rpartition("=")[2]}).encode()
    ours = {"Origin": urllib.parse.urljoin(address, "/").rstrip("/")}
    with browser.open(urllib.request.Request(login, body, ours), timeout=WAIT_S) as answer:
        assert re.search("/ui/s/[0-9a-f]+/$", answer.url)
        page = answer.read().decode()
    assets = set(re.findall(r'(?:src|href)="(/ui/static/[^"]+)"', page))
    assert any("/vendor/htmx" in asset for asset in assets)
    for asset in assets:
        with browser.open(urllib.parse.urljoin(address, asset), timeout=WAIT_S) as answer:
            assert answer.status == 200, asset
    installed("grid", "down")
