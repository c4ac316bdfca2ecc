"""`batchlab notify` with a fake manager."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from batchlab.cli import session
from batchlab.runtime.home import Home, ManagerRecord
from tests.support.cli import FakeClient, Run, runner

TARGET = {
    "name": "ops",
    "kind": "webhook",
    "to": "https://hooks.example.org/…",
    "on": ["failed", "failures", "stuck"],
    "signed": True,
    "failures": 10,
    "stuck_s": 600.0,
    "job": "",
    "jobs": True,
}
NOTIFICATION = {
    "id": "1d" * 16,
    "moment": "failed",
    "job": "sums-0123456789",
    "target": "ops",
    "at_s": 1_700_000_000.0,
    "state": "pending",
    "attempts": 3,
    "due_s": 1_700_000_008.0,
    "ended_s": None,
    "error": "It answered\x1b[31m with HTTP 500.",
}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    FakeClient.answers, FakeClient.asked = {}, []
    record = ManagerRecord("http://nowhere", 1, "manager-1", "local")
    monkeypatch.setattr(session, "Client", FakeClient)
    monkeypatch.setattr("batchlab.client.http.Client", FakeClient)
    monkeypatch.setattr(Home, "record", lambda self: record)
    monkeypatch.setattr(Home, "token", lambda self: "secret")
    return runner(monkeypatch, capsys)


def test_targets_are_listed(run: Run) -> None:
    FakeClient.answers = {"notify_targets": [TARGET]}
    code, out, _ = run("notify", "list")
    assert code == 0
    of, signed, for_jobs = [one for one in out.splitlines()[1].split("  ") if one.strip()][-3:]
    assert of == "failed, failures from 10, stuck for 10 min 00 s"
    assert (signed.strip(), for_jobs.strip()) == ("yes", "yes")
    assert json.loads(run("notify", "list", "--json")[1]) == [TARGET]


def test_list_reports_a_mistake_in_the_file(run: Run, tmp_path: Path) -> None:
    FakeClient.answers = {"notify_targets": []}
    (tmp_path / "notify.toml").write_text('[ops]\nwebhok = "https://hooks.example.org"\n')
    code, _, err = run("notify", "list", "--home", str(tmp_path))
    assert code == 0
    assert "notify.toml is invalid" in err
    assert "webhok" in err


def test_missing_targets_are_a_clear_sentence(run: Run) -> None:
    FakeClient.answers = {"notify_targets": [], "notifications": []}
    assert run("notify", "list")[2].startswith("There are no targets. ")
    assert run("notify", "log")[2] == "There are no notifications yet.\n"
    assert run("notify", "log", "--json")[1] == "[]\n"


def test_failed_test_notification_exits_with_1(run: Run) -> None:
    FakeClient.answers = {"notify_test": {"target": "ops", "error": ""}}
    assert run("notify", "test", "ops") == (0, "ops was notified.\n", "")
    FakeClient.answers = {"notify_test": {"target": "ops", "error": "It is away."}}
    assert run("notify", "test", "ops") == (1, "", "ops was not notified: It is away.\n")
    code, out, _ = run("notify", "test", "ops", "--json")
    assert (code, json.loads(out)["error"]) == (1, "It is away.")


def test_the_log_shows_no_control_character(run: Run) -> None:
    FakeClient.answers = {"notifications": [NOTIFICATION]}
    code, out, _ = run("notify", "log", "--limit", "5")
    assert code == 0
    assert "\x1b" not in out
    assert "pending" in out
    assert FakeClient.asked[-1][2] == {"limit": 5}


# --- Grids for following a job -------------------------------------------------------------------


def test_unknown_format_is_refused_before_the_start(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHLAB_LOG_FORMAT", "text")
    code, _, err = run("grid", "up", "--log-format", "xml")
    assert (code, err.splitlines()[0]) == (2, "Error: --log-format is 'xml', which is not a format.")


def test_only_a_manager_of_this_machine_takes_a_port(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Home, "record", lambda self: None)
    home = str(tmp_path / "home")
    code, _, err = run("grid", "up", "--backend", "localstack", "--port", "8080", "--home", home)
    assert (code, err.splitlines()[0]) == (2, "Error: On localstack the manager has a port of its own.")
