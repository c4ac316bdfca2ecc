"""Webhook deliveries as a receiver sees them: signed, in time, and never to a forbidden address."""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from batchlab.adapters import notifications
from batchlab.adapters.aws.endpoint import Endpoint
from batchlab.adapters.clock import WallClock
from batchlab.adapters.notifications import Deliveries
from batchlab.core.job_definition import NotifyDef
from batchlab.core.notifications import NotDelivered, Notification, Target
from tests.support import ROOT
from tests.support.certificates import Authority
from tests.support.processes import is_running
from tests.support.webhook_receiver import Hook

ONE = Notification("1d" * 16, "failed", "sums-1", "ops", None, '{"v":1,"job":"sümß"}', 1.0)
PATH = "T0/s3cret-path"


def deliver(target: Target, one: Notification = ONE) -> None:
    ways = Deliveries(WallClock(), lambda region: Endpoint("http://127.0.0.1:9", region))
    asyncio.run(ways(target, one))


def refused(target: Target, one: Notification = ONE) -> NotDelivered:
    with pytest.raises(NotDelivered) as caught:
        deliver(target, one)
    return caught.value


def at(hook: Hook, secret: str = "") -> Target:
    return Target("ops", "webhook", hook.url + PATH, secret=secret)


# --- Requests at a receiver ----------------------------------------------------------------------


def test_a_receiver_gets_the_notification(caplog: pytest.LogCaptureFixture) -> None:
    with Hook(204) as hook, caplog.at_level(logging.DEBUG, "batchlab"), caplog.at_level(logging.INFO):
        deliver(at(hook))
    (call,) = hook.calls
    assert (call.path, call.body.decode()) == (f"/{PATH}", ONE.body)
    assert call.headers["Batchlab-Notification"] == ONE.id
    assert call.headers["Batchlab-Moment"] == "failed"
    assert call.headers["Batchlab-Attempt"] == "1"
    assert call.headers["Host"] == f"127.0.0.1:{hook.port}"
    assert call.headers["Content-Type"] == "application/json"
    assert "Batchlab-Signature" not in call.headers
    assert "s3cret" not in caplog.text, "not even by the HTTP client"


def snippet() -> Callable[..., bool]:
    """Return the verification function from the documentation."""
    page = (ROOT / "docs" / "notifications.md").read_text()
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", page, re.S) if "def is_genuine" in b]
    found: dict[str, Any] = {}
    exec(block, found)
    genuine: Callable[..., bool] = found["is_genuine"]
    return genuine


def test_the_documented_snippet_verifies_what_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    is_genuine = snippet()
    file = tmp_path / "secret"
    file.write_text("of the file\n")
    monkeypatch.setenv("HOOK_SECRET", "of the environment")
    for named, key in (("env:HOOK_SECRET", b"of the environment"), (f"file:{file}", b"of the file")):
        with Hook() as hook:
            deliver(at(hook, named))
        (call,) = hook.calls
        header, now_s = call.headers["Batchlab-Signature"], time.time()
        assert is_genuine(key, header, call.body, now_s)
        assert not is_genuine(b"another", header, call.body, now_s)
        assert not is_genuine(key, header, call.body + b" ", now_s)
        assert not is_genuine(key, header, call.body, now_s + 3600), "replayed"
        assert not is_genuine(key, header.replace("t=", "t=1"), call.body, now_s)
        assert not is_genuine(key, "nonsense", call.body, now_s)


@pytest.mark.parametrize(
    ("secret", "told"), [("env:NOT_SET_HERE", "in the variable NOT_SET_HERE"), ("file:/no/such/file", "cannot be read")]
)
def test_without_its_secret_nothing_is_sent(secret: str, told: str) -> None:
    with Hook() as hook:
        error = refused(at(hook, secret))
    assert told in error.message
    assert not error.final, "somebody may set it"
    assert hook.calls == []


# --- Failed deliveries ---------------------------------------------------------------------------


@pytest.mark.parametrize(("status", "is_final"), [(301, True), (307, True), (404, False), (410, True), (500, False)])
def test_no_other_status_is_success_and_no_redirect_is_followed(status: int, is_final: bool) -> None:
    with Hook(status, 200) as hook:
        error = refused(at(hook))
    assert f"HTTP {status}" in error.message
    assert error.final == is_final
    assert len(hook.calls) == 1
    assert "s3cret" not in str(error)


def test_webhook_that_does_not_answer_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notifications, "WEBHOOK_TIMEOUT_S", 0.2)
    with Hook(wait_s=1.0) as hook:
        begun_s = time.monotonic()
        error = refused(at(hook))
        assert time.monotonic() - begun_s < 1.0
    assert "did not answer within" in error.message


def test_unreachable_webhook_is_a_clear_error() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        error = refused(Target("ops", "webhook", f"http://127.0.0.1:{port}/{PATH}"))
    assert error.message.startswith("The receiver cannot be reached: ")
    assert "s3cret" not in str(error)
    assert not error.final


def test_proxy_variables_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    with Hook() as hook:
        deliver(at(hook))
    assert len(hook.calls) == 1


# --- Forbidden addresses -------------------------------------------------------------------------


def lead(monkeypatch: pytest.MonkeyPatch, **names: list[str]) -> None:
    """Let host names resolve to the given addresses."""

    async def getaddrinfo(self: Any, host: str, port: int, **_: Any) -> list[Any]:
        found = names[host.replace(".", "_")]
        kinds = [socket.AF_INET6 if ":" in one else socket.AF_INET for one in found]
        return [(kind, socket.SOCK_STREAM, 6, "", (one, port)) for kind, one in zip(kinds, found, strict=True)]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", getaddrinfo)


@pytest.mark.parametrize(
    "addresses",
    [
        ["169.254.169.254"],
        ["93.184.216.34", "169.254.169.254"],
        ["::ffff:169.254.169.254"],
        ["fe80::1"],
        ["fd00:ec2::254"],
        ["0.0.0.0"],
    ],
)
def test_a_name_that_leads_to_metadata_is_refused(monkeypatch: pytest.MonkeyPatch, addresses: list[str]) -> None:
    lead(monkeypatch, evil_example=addresses)
    error = refused(Target("ops", "webhook", "https://evil.example/"))
    assert "has a refused address" in error.message
    assert error.final


def of_a_job(url: str, *, local: bool = False) -> Target:
    return Target("sums-1#1", "webhook", url, job="sums-1", local=local)


def own_address() -> str:
    """Return an address of this machine that is not loopback, or 127.0.0.1 if the machine does not have another
    address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        try:
            asked.connect(("192.0.2.1", 9))  # connect sends no packet for UDP
        except OSError:
            return "127.0.0.1"
        return str(asked.getsockname()[0])


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "here"])
def test_a_name_by_which_a_job_reaches_this_machine_is_refused(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    address = own_address() if address == "here" else address
    lead(monkeypatch, evil_example=["192.0.2.1", address])
    error = refused(of_a_job("https://evil.example/"))
    assert "the manager's own machine" in error.message
    assert error.final


def test_webhook_of_a_job_reaches_this_machine_if_the_operator_allows_it() -> None:
    with Hook() as hook:
        refused(of_a_job(hook.url))
        assert hook.calls == []
        deliver(of_a_job(hook.url, local=True))
        assert len(hook.calls) == 1


def test_http_leads_to_this_machine_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The resolver decides which address `localhost` has."""
    lead(monkeypatch, localhost=["192.0.2.7"])
    error = refused(Target("ops", "webhook", "http://localhost/"))
    assert "only https" in error.message
    assert error.final


def test_the_address_that_was_checked_is_connected_to_by_the_names_certificate(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The name is resolved once, and the server's certificate must match the name."""
    authority = Authority(tmp_path, "ours")
    key, certificate = authority.sign(tmp_path, "hooks.test")
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.bundle))
    lead(monkeypatch, hooks_test=["127.0.0.1"], other_test=["127.0.0.1"])
    with Hook(tls=(certificate, key)) as hook:
        deliver(Target("ops", "webhook", f"https://hooks.test:{hook.port}/x"))
        assert hook.calls[0].headers["Host"] == f"hooks.test:{hook.port}"
        error = refused(Target("ops", "webhook", f"https://other.test:{hook.port}/x"))
        assert "certificate" in error.message.lower()
        assert len(hook.calls) == 1


@pytest.mark.parametrize(
    "own", [NotifyDef("command", "id"), NotifyDef("webhook", "https://h.example/", secret="file:/etc/shadow")]
)
def test_forbidden_target_of_a_job_is_not_notified(own: NotifyDef) -> None:
    target = Target("sums-1#1", own.kind, own.to, ("id",), secret=own.secret, job="sums-1")
    one = Notification(ONE.id, "failed", "sums-1", target.name, own, "{}", 1.0)
    assert refused(target, one).final


# --- Commands ------------------------------------------------------------------------------------


def script(*lines: str) -> Target:
    return Target("pager", "command", "", (sys.executable, "-c", "\n".join(lines)))


def test_a_command_gets_the_notification_as_its_input(tmp_path: Path) -> None:
    out = tmp_path / "out"
    deliver(
        script(
            "import os, sys",
            f"with open({str(out)!r}, 'w') as f:",
            "    f.write(os.environ['BATCHLAB_MOMENT'] + ' ' + sys.stdin.read())",
        )
    )
    assert out.read_text() == f"failed {ONE.body}"


def test_failed_command_reports_its_error() -> None:
    error = refused(script("import sys", "print('busy', file=sys.stderr)", "sys.exit(75)"))
    assert error.message == "The command ended with status 75: busy."
    assert not error.final
    assert "No such file" in refused(Target("p", "command", "", ("/no/such/program",))).message


def test_a_command_that_hangs_ends_with_all_it_has_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(notifications, "COMMAND_TIMEOUT_S", 1.0)
    pid = tmp_path / "pid"
    error = refused(
        script(
            "import subprocess, time",
            "child = subprocess.Popen(['sleep', '60'])",
            f"open({str(pid)!r}, 'w').write(str(child.pid))",
            "time.sleep(60)",
        )
    )
    assert "has not ended after 1 s" in error.message
    end_s = time.monotonic() + 5
    while is_running(int(pid.read_text())):
        assert time.monotonic() < end_s
        time.sleep(0.02)


def test_command_that_does_not_read_its_input_succeeds() -> None:
    big = Notification(ONE.id, "failed", "sums-1", "ops", None, "x" * 1_000_000, 1.0)
    deliver(script("pass"), big)


def test_bug_in_one_delivery_is_reported_and_does_not_stop_others(caplog: pytest.LogCaptureFixture) -> None:
    error = refused(Target("odd", "carrier pigeon"))
    assert error.message == "An error inside the manager: KeyError."
    assert "because of a bug" in caplog.text
