"""Extras: modules that the core does not import, and the error for a missing extra."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import batchlab
from batchlab import cli
from batchlab.adapters.aws.endpoint import Endpoint
from batchlab.adapters.notifications import Topics
from batchlab.cli.startup import REQUIRED_MODULES, missing_module_message
from batchlab.client.grid import Grid
from batchlab.core import installation
from batchlab.core.capabilities import backend_names
from batchlab.core.errors import UsageError
from batchlab.core.notifications import NotDelivered, Notification, Target
from batchlab.runtime import compose_project, factory
from tests.support import ROOT
from tests.support.cli import Run, run
from tests.support.supply import EXTRAS

__all__ = ["run"]

OF_EXTRAS = frozenset(module for modules in installation.MODULES.values() for module in modules)


def project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return found


def names(lines: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in lines}


def test_extras_of_the_code_match_the_package() -> None:
    asked = project()["project"]["optional-dependencies"]
    assert set(asked) == set(installation.MODULES) == set(EXTRAS)
    homes = metadata.packages_distributions()
    for extra, lines in asked.items():
        given = {canonicalize_name(name) for one in installation.MODULES[extra]
                 for name in homes[one.partition(".")[0]]}  # fmt: skip
        assert names(lines) <= given, extra
        assert extra == "otel" or given - names(lines) <= {"botocore"}, "boto3 brings it"
    assert OF_EXTRAS.isdisjoint(REQUIRED_MODULES)
    every = names([line for lines in asked.values() for line in lines])
    assert every.isdisjoint(names(project()["project"]["dependencies"]))


def test_a_clone_has_all_of_them() -> None:
    """The README's first command installs every dependency group except dev, and its second command installs all
    groups."""
    found = project()
    assert found["tool"]["uv"]["default-groups"] == ["all", "dev"]
    (every,) = map(Requirement, found["dependency-groups"]["all"])
    assert every.extras == set(EXTRAS) - {"otel"}
    (dev,) = (one for one in map(Requirement, found["dependency-groups"]["dev"]) if one.name == "batchlab")
    assert dev.extras == set(EXTRAS)


def test_the_main_job_needs_none_of_them(tmp_path: Path) -> None:
    """A job needs only its imports and its adapters. `test_installed.py` runs the job in an environment without the
    extras."""
    code = f"""if True:
        import sys
        for name in {sorted(OF_EXTRAS)!r}:
            sys.modules[name] = None
        from pathlib import Path
        import batchlab.cli.demo, batchlab.cli.report, batchlab.cli.run_job, batchlab.client.grid
        import batchlab.reports.tables.build, batchlab.reports.tables.write
        import batchlab.reports.queries.store
        import batchlab.server.manager_service, batchlab.server.worker_service, batchlab.worker.loop
        import batchlab.server.report_writer
        from batchlab.runtime import factory
        from batchlab.server import web
        from batchlab.server.http import create_app
        from batchlab.runtime.home import Home

        home, local = Home(Path({str(tmp_path)!r})), factory.load("local")
        clock = local.open_clock()
        objects = local.open_objects(home)
        local.open_queue(home, clock)
        local.open_ledger(home)
        local.open_fleet(home, local.open_launcher(home, clock), clock)
        local.open_deliveries(home, clock)
        batchlab.server.report_writer.open_reporter(local, home, objects, local.pools)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr


@pytest.mark.parametrize(
    ("module", "extra", "command"),
    [
        ("boto3", "aws", "deploy status --region eu-west-1"),
        ("boto3", "aws", "grid up --backend aws"),
        ("psycopg", "aws", "grid up --backend aws"),
        ("boto3", "aws", "conform --endpoint http://127.0.0.1:9"),
        ("botocore", "aws", "asg serve --templates templates.toml"),
        ("docker", "docker", "asg serve --templates templates.toml --launcher docker"),
        ("docker", "docker", "grid up --backend localstack"),
        ("boto3", "docker", "grid up --backend localstack"),
        ("boto3", "ministack", "grid up --backend ministack"),
        ("boto3", "ministack", "demo --backend ministack --files 1"),
    ],
)
def test_missing_extra_is_one_clear_sentence(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, module: str, extra: str, command: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(installation, "_origin", dict)
    code, out, err = run(*command.split())
    assert (code, out) == (2, "")
    said, remedy = err.splitlines()[-2:]
    assert said.startswith("Error: ")
    assert f"needs batchlab's extra `{extra}`, which is not installed" in said
    assert said.endswith(f"there is no package '{module}'.")
    assert f"install {'--python ' * ('-m pip' not in remedy)}" in remedy
    assert f"'batchlab[{extra}] @ file:///…/batchlab-….whl'` brings it." in remedy
    assert "Traceback" not in err


@pytest.mark.parametrize("backend", ["ministack", "localstack", "aws"])
def test_from_python_it_is_a_usage_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, backend: str) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(UsageError, match=f"The backend {backend} needs batchlab's extra"):
        _ = Grid(backend, home=tmp_path).client
    assert not [one for one in tmp_path.iterdir() if one.suffix == ".log"], "nothing was started"


@pytest.mark.parametrize("platform", ["cygwin", "win32"])
def test_windows_is_refused_with_a_sentence_about_wsl2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], platform: str
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    with pytest.raises(UsageError, match="batchlab does not run on Windows"):
        _ = batchlab.Grid
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        "Error: batchlab does not run on Windows.",
        "  Install WSL2 (`wsl --install`), and then install and run batchlab in WSL2.",
    ]


def test_unexpected_missing_import_is_one_clear_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "_origin", dict)
    told = missing_module_message(ModuleNotFoundError(name="docker.errors"))
    assert told is not None
    assert told.startswith("Error: This command needs batchlab's extra `docker`, which is not ")
    assert "batchlab[docker]" in told.splitlines()[1]
    assert missing_module_message(ModuleNotFoundError(name="pandas")) is None
    assert missing_module_message(ModuleNotFoundError()) is None


def test_the_doctor_names_what_is_missing(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    monkeypatch.setattr(installation, "_origin", dict)
    code, out, _ = run("doctor", "--json", "--home", tmp_path / "h")
    assert code == 0, "the backend local needs none"
    (found,) = (load for load in json.loads(out) if load["check"] == "extras")
    assert found["text"].startswith("installed: otel; not installed")
    assert "batchlab[aws,docker,ministack]" in found["remedy"]
    code, out, _ = run("doctor", "--json", "--home", tmp_path / "h", "--backend", "ministack")
    assert code == 1
    (found,) = (load for load in json.loads(out) if load["check"] == "extra")
    assert found["level"] == "fail"
    assert "The backend ministack needs batchlab's extra `ministack`" in found["text"]
    assert "batchlab[ministack]" in found["remedy"]


WHEEL = "file:///home/a%20b/dist/batchlab-0.1.0-py3-none-any.whl"


@pytest.mark.parametrize(
    ("origin", "what"),
    [
        ({"url": WHEEL, "archive_info": {}}, f"'batchlab[otel] @ {WHEEL}'"),
        ({"url": "file:///a%20b", "dir_info": {"editable": True}}, "-e '/a b[otel]'"),
        ({"url": "file:///src", "dir_info": {}}, "'batchlab[otel] @ file:///src'"),
        (
            {"url": "https://x.example/b", "vcs_info": {"vcs": "git", "commit_id": "c0"}},
            "'batchlab[otel] @ git+https://x.example/b@c0'",
        ),
        ({}, "'batchlab[otel] @ file:///…/batchlab-….whl'"),
    ],
)
def test_install_command_uses_the_source_of_the_installation(
    monkeypatch: pytest.MonkeyPatch, origin: dict[str, Any], what: str
) -> None:
    monkeypatch.setattr(installation, "_origin", lambda: origin)
    assert installation.remedy("otel").endswith(f" {what}` brings it.")
    monkeypatch.setattr(installation, "find_spec", lambda _: None)
    assert installation.remedy("otel").startswith(f"`uv pip install --python {sys.executable} ")


def test_every_backend_names_its_extra() -> None:
    extras = {name: factory.load(name).extra for name in backend_names()}
    needed = {name: extra for name, extra in extras.items() if extra}
    assert needed == {"aws": "aws", "localstack": "docker", "ministack": "ministack"}


def test_topic_without_the_sdk_is_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    target = Target("ops", "sns", "arn:aws:sns:eu-west-1:123456789012:ops")
    one = Notification("n", "ended", "sums-1", "ops", None, "{}", 0.0)
    with pytest.raises(NotDelivered, match="needs batchlab's extra `aws`") as told:
        asyncio.run(Topics(lambda _: Endpoint("http://127.0.0.1:9")).publish(target, one))
    assert told.value.final


def test_images_and_releases_have_the_extras_that_are_here(monkeypatch: pytest.MonkeyPatch) -> None:
    every = {line.partition("=")[0].partition("[")[0] for line in compose_project.requirements()}
    asked = project()["project"]
    brought = [line for extra, lines in asked["optional-dependencies"].items()
               if extra != "otel" for line in lines]  # fmt: skip
    assert {canonicalize_name(one) for one in every} == names([*asked["dependencies"], *brought])
    monkeypatch.setitem(sys.modules, "docker", None)
    fewer = {line.partition("=")[0].partition("[")[0] for line in compose_project.requirements()}
    assert every - fewer == {"docker", "localstack-client"}
    assert "docker" not in {line.partition("=")[0] for line in compose_project.constraints()}
