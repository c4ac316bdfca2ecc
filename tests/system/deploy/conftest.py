"""An account on MiniStack, and `batchlab deploy` with a small template in this account."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from batchlab.runtime.home import Home
from tests.support.aws.deploy import use
from tests.support.aws.ministack import Plane, served
from tests.support.cli import Run, runner


@pytest.fixture(scope="session")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plane]:
    with served(tmp_path_factory.mktemp("aws")) as plane:
        yield plane


@pytest.fixture
def account(cloud: Plane, monkeypatch: pytest.MonkeyPatch) -> str:
    return use(monkeypatch, cloud.url)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture
def deploy(account: str, home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    run = runner(monkeypatch, capsys)

    def deploy(*arguments: object) -> tuple[int, str, str]:
        return run("deploy", *arguments, "--home", home.path)

    return deploy
