"""Allowed and forbidden notification targets, and the grid's own targets in its file."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core import notifications
from batchlab.core.errors import UsageError
from batchlab.core.job_definition import JobDef, NotifyDef, StageDef
from batchlab.core.model import JobId, StageName
from batchlab.core.notifications import NotificationSettings, Target
from batchlab.core.protocol import json_format
from batchlab.manager.admission import admit
from batchlab.runtime import settings
from batchlab.runtime.home import Home

TOPIC = "arn:aws:sns:eu-central-1:123456789012:batch"
URL = "https://hooks.example.org/T0/s3cret?x=1"


def a_job(*notify: NotifyDef) -> JobDef:
    stages = (StageDef(StageName("map"), handler="m:f"),)
    return JobDef(JobId("sums-1"), "sums", stages, 1.0, notify=notify)


# --- Targets that a job may name -----------------------------------------------------------------


@pytest.mark.parametrize(
    "one",
    [
        NotifyDef("webhook", URL),
        NotifyDef("webhook", "https://10.1.2.3:8443/", ("failed", "stuck")),
        NotifyDef("webhook", "http://127.0.0.1:8000/hook"),
        NotifyDef("webhook", "http://localhost/"),
        NotifyDef("webhook", "http://[::1]:80/"),
        NotifyDef("webhook", URL, ("ended",), "env:BATCHLAB_NOTIFY_SECRET"),
        NotifyDef("sns", TOPIC),
        NotifyDef("target", "chat", ("failed",)),
        NotifyDef("sns", TOPIC + ".fifo", ("capped",), failures=3, stuck_s=1.0),
    ],
)
def test_targets_that_a_job_may_name(one: NotifyDef) -> None:
    assert notifications.problem(one) == ""
    job = a_job(one)
    admit(job, {"default": 1})
    assert json_format.job_from_json(json_format.job_to_json(job)) == job


@pytest.mark.parametrize(
    ("one", "told"),
    [
        (NotifyDef("command", "rm"), "Only the settings of the grid may define commands"),
        (NotifyDef("webhook", "http://hooks.example.org/"), "Only addresses of this machine may begin with http"),
        (NotifyDef("webhook", "ftp://hooks.example.org/"), "must begin with https"),
        (NotifyDef("webhook", "file:///etc/passwd"), "not a URL"),
        (NotifyDef("webhook", "hooks.example.org"), "not a URL"),
        (NotifyDef("webhook", "https://h.example.org:x/"), "not a URL"),
        (NotifyDef("webhook", "https://h.example.org/a b"), "not a URL"),
        (NotifyDef("webhook", "https://h\u00e9.example.org/"), "not a URL"),
        (NotifyDef("webhook", "https://h.example.org/\r\nX: y"), "not a URL"),
        (NotifyDef("webhook", "https://h.example.org/" + "x" * 3000), "not a URL"),
        (NotifyDef("webhook", "https://me:pw@h.example.org/"), "must not contain a user or a password"),
        (NotifyDef("webhook", "https://169.254.169.254/latest/meta-data"), "link-local or metadata"),
        (NotifyDef("webhook", "http://169.254.169.254/"), "Only addresses of this machine may begin with http"),
        (NotifyDef("webhook", "https://[fe80::1]/"), "link-local or metadata"),
        (NotifyDef("webhook", "https://[::ffff:169.254.169.254]/"), "link-local or metadata"),
        (NotifyDef("webhook", "https://[fd00:ec2::254]/"), "link-local or metadata"),
        (NotifyDef("webhook", "https://0.0.0.0/"), "not the address of a single machine"),
        (NotifyDef("webhook", URL, secret="env:AWS_SECRET_ACCESS_KEY"), "env:BATCHLAB_NOTIFY_"),
        (NotifyDef("webhook", URL, secret="file:/etc/shadow"), "env:BATCHLAB_NOTIFY_"),
        (NotifyDef("webhook", URL, secret="hunter2"), "env:BATCHLAB_NOTIFY_"),
        (NotifyDef("webhook", URL, ("always",)), "The moments are"),
        (NotifyDef("webhook", URL, ()), "The moments are"),
        (NotifyDef("webhook", URL, failures=0), "number of failures must be 1 to"),
        (NotifyDef("webhook", URL, failures=1 << 54), "number of failures must be 1 to"),
        (NotifyDef("webhook", URL, stuck_s=float("inf")), "seconds without progress 1 to 1e"),
        (NotifyDef("webhook", URL, stuck_s=2e11), "seconds without progress 1 to 1e"),
        (NotifyDef("webhook", "https://[64:ff9b::a9fe:a9fe]/"), "link-local or metadata"),
        (NotifyDef("webhook", "https://[64:ff9b:1::a9fe:a9fe]/"), "link-local or metadata"),
        (NotifyDef("webhook", "https://[::169.254.169.254]/"), "link-local or metadata"),
        (NotifyDef("sns", "batch"), "Write the ARN"),
        (NotifyDef("target", "../ops"), "cannot have this name"),
        (NotifyDef("target", "chat", secret="env:BATCHLAB_NOTIFY_X"), "must not name a secret"),
        (NotifyDef("sns", TOPIC, secret="env:BATCHLAB_NOTIFY_X"), "webhook"),
    ],
)
def test_targets_that_a_job_may_not_name(one: NotifyDef, told: str) -> None:
    assert told in notifications.problem(one)
    with pytest.raises(UsageError) as caught:
        admit(a_job(one), {"default": 1})
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "bad", ["a\x1b[2Jb", "two\nlines", "a\rb", "\x9b31m", "\u202egnp.exe", "zero\u200bwidth", "\x7f"]
)
def test_texts_of_a_job_contain_no_control_characters(bad: str) -> None:
    named, tagged = replace(a_job(), name=bad), replace(a_job(), tags=(("team", bad),))
    with pytest.raises(UsageError, match="The job's name holds characters that cannot be printed"):
        admit(named, {"default": 1})
    with pytest.raises(UsageError, match="A tag holds characters") as caught:
        admit(tagged, {"default": 1})
    assert bad not in str(caught.value)
    with pytest.raises(UsageError, match="has 201 characters"):
        admit(replace(a_job(), name="x" * 201), {"default": 1})
    admit(replace(a_job(), name="<lambda> für Übung 日本", tags=(("", "ok"),)), {"default": 1})


def test_a_job_names_so_many_targets_at_the_most() -> None:
    many = [NotifyDef("sns", TOPIC)] * (notifications.MAX_TARGETS + 1)
    with pytest.raises(UsageError, match="notifies 11 targets"):
        admit(a_job(*many), {"default": 1})


@given(st.integers(0, 0xFFFF))
def test_no_way_of_writing_a_link_local_address_gets_through(low: int) -> None:
    v4 = f"169.254.{low >> 8}.{low & 255}"
    number = (169 << 24) + (254 << 16) + low
    words = f"{number >> 16:x}:{number & 0xFFFF:x}"
    for address in (
        v4,
        f"::ffff:{v4}",
        f"::ffff:{words}",
        f"64:ff9b::{words}",
        f"2002:{words}::1",
        f"::{v4}",
        f"64:ff9b:1::{words}",
        # The following addresses use the other prefix lengths of an address translator: /48, /56, and /64 (RFC 6052).
        f"64:ff9b:1:a9fe:{low >> 8:x}:{(low & 255) << 8:x}::",
        f"64:ff9b:1:a9:fe:{low:x}::",
        f"64:ff9b:1:0:a9:{0xFE00 | low >> 8:x}:{(low & 255) << 8:x}:0",
        f"fe80::{low:x}",
        f"fe80::{low:x}%eth0",
    ):
        assert notifications.address_refusal(address), address


@pytest.mark.parametrize("address", ["8.8.8.8", "10.0.0.1", "127.0.0.1", "::1", "2001:db8::1"])
def test_other_addresses_are_let_through(address: str) -> None:
    assert notifications.address_refusal(address) == ""


def test_ids_of_different_notifications_differ() -> None:
    one = Target("ops", "webhook", URL)
    ids = {
        notifications.derive_id(one, "j", 0, "failed"),
        notifications.derive_id(one, "j", 1, "failed"),
        notifications.derive_id(one, "k", 0, "failed"),
        notifications.derive_id(one, "j", 0, "stuck", "1"),
        notifications.derive_id(one, "j", 0, "stuck", "2"),
        notifications.derive_id(Target("ops", "webhook", URL + "2"), "j", 0, "failed"),
        notifications.derive_id(Target("ops2", "webhook", URL), "j", 0, "failed"),
    }
    assert len(ids) == 7
    assert notifications.derive_id(one, "j", 0, "failed") in ids


def test_an_address_is_shown_without_its_path() -> None:
    assert Target("ops", "webhook", URL).shown == "https://hooks.example.org/…"


# --- Permissions of a job in this grid -----------------------------------------------------------

A = "env:BATCHLAB_NOTIFY_A"
KNOWN = NotificationSettings(
    (
        Target("ops", "webhook", URL),
        Target("chat", "webhook", URL, on=(), secret="file:/etc/batchlab/secret", jobs=True),
    ),
    frozenset({"http://127.0.0.1:8000"}),
    {"BATCHLAB_NOTIFY_A": frozenset({"https://hooks.example.org:443"})},
)


@pytest.mark.parametrize(
    ("one", "told"),
    [
        (NotifyDef("webhook", "http://127.0.0.1:8001/"), "the manager's own machine"),
        (NotifyDef("webhook", "https://127.0.0.1:8000/"), "the manager's own machine"),
        (NotifyDef("webhook", "http://localhost:8000/"), "the manager's own machine"),
        (NotifyDef("webhook", "https://[::1]/"), "the manager's own machine"),
        (NotifyDef("webhook", "https://[::ffff:127.0.0.1]/"), "the manager's own machine"),
        (NotifyDef("webhook", "https://[::127.0.0.2]/"), "the manager's own machine"),
        (NotifyDef("webhook", "https://[64:ff9b::7f00:1]/"), "the manager's own machine"),
        (NotifyDef("webhook", "https://mine.example.net/", secret=A), "may sign"),
        (NotifyDef("webhook", "https://hooks.example.org:8443/", secret=A), "may sign"),
        (NotifyDef("webhook", URL, secret="env:BATCHLAB_NOTIFY_B"), "may sign"),
        (NotifyDef("target", "ops"), "does not have a target 'ops' for jobs. Its targets for jobs: chat"),
        (NotifyDef("target", "nobody"), "does not have a target 'nobody'"),
    ],
)
def test_target_without_permission_is_refused(one: NotifyDef, told: str) -> None:
    with pytest.raises(UsageError, match=re.escape(told)):
        admit(a_job(one), {"default": 1}, KNOWN)


def test_without_a_word_of_the_operators_jobs_sign_nothing_and_reach_nothing_here() -> None:
    for one in (NotifyDef("webhook", "http://localhost/"), NotifyDef("webhook", URL, secret=A)):
        with pytest.raises(UsageError, match="only if the grid's operator lists"):
            admit(a_job(one), {"default": 1}, NotificationSettings())
    admit(a_job(NotifyDef("webhook", URL)), {"default": 1}, NotificationSettings())


def test_permitted_targets() -> None:
    own = NotifyDef("webhook", "http://127.0.0.1:8000/hook?x=1")
    signed = NotifyDef("webhook", "https://HOOKS.example.org:443/any/path", secret=A)
    named = NotifyDef("target", "chat", ("failed",), failures=3)
    admit(a_job(own, signed, named), {"default": 1}, KNOWN)
    assert not KNOWN.own("sums-1", 1, own).stays_out
    assert KNOWN.own("sums-1", 2, signed).stays_out
    assert KNOWN.own("sums-1", 3, named) == Target(
        name="sums-1#3",
        kind="webhook",
        to=URL,
        command=(),
        on=("failed",),
        secret="file:/etc/batchlab/secret",
        failures=3,
        job="sums-1",
        local=True,
    )


# --- The grid's own file -------------------------------------------------------------------------


def at(folder: Path, text: str | None) -> Home:
    home = Home(folder / "home")
    home.make()
    if text is not None:
        home.notify_file.write_text(text)
    return home


def test_the_grids_own_targets(tmp_path: Path) -> None:
    home = at(
        tmp_path,
        f"""
[ops]
webhook = "{URL}"
on = ["failed", "stuck"]
secret = "file:/etc/batchlab/secret"
stuck_after = "5m"

[chat]
webhook = "env:CHAT_URL"
jobs = true
on = []

[jobs]
local = ["http://127.0.0.1:8000", "http://LOCALHOST"]

[jobs.secrets]
BATCHLAB_NOTIFY_A = ["https://Hooks.Example.org/", "https://[2001:DB8:0::1]:8443"]

[topic]
sns = "{TOPIC}"
on = "failures"
failures = 10

[pager]
command = ["/usr/local/bin/page", "--urgent"]
""",
    )
    read = settings.read_notifications(home, {"CHAT_URL": "https://chat.example/x"})
    found = {target.name: target for target in read.targets}
    assert found == {
        "ops": Target(
            name="ops",
            kind="webhook",
            to=URL,
            command=(),
            on=("failed", "stuck"),
            secret="file:/etc/batchlab/secret",
            stuck_s=300.0,
        ),
        "chat": Target("chat", "webhook", "https://chat.example/x", on=(), jobs=True),
        "topic": Target("topic", "sns", TOPIC, on=("failures",), failures=10),
        "pager": Target("pager", "command", "", ("/usr/local/bin/page", "--urgent")),
    }
    assert read.local == {"http://127.0.0.1:8000", "http://localhost:80"}
    assert read.secrets == {"BATCHLAB_NOTIFY_A": {"https://hooks.example.org:443", "https://[2001:db8::1]:8443"}}


def test_missing_file_means_no_target(tmp_path: Path) -> None:
    assert settings.read_notifications(at(tmp_path, None)) == NotificationSettings()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[ops\n", "is not TOML"),
        ("ops = 3\n", "is not a table"),
        ("[Ops]\ncommand = ['x']\n", "has an invalid name"),
        ("[ops]\n", "Write exactly one of webhook, sns, and command"),
        (f"[ops]\nwebhook = '{URL}'\nsns = '{TOPIC}'\n", "has 2 addresses"),
        (f"[ops]\nwebhook = '{URL}'\nto = 'x'\n", "unknown key 'to'"),
        (f"[ops]\nwebhook = '{URL}'\non = 3\n", "'on' that is not a list"),
        (f"[ops]\nwebhook = '{URL}'\non = ['late']\n", "The moments are"),
        (f"[ops]\nwebhook = '{URL}'\nsecret = 'hunter2'\n", "never the secret itself"),
        (f"[ops]\nwebhook = '{URL}'\nfailures = true\n", "whole number"),
        (f"[ops]\nwebhook = '{URL}'\nstuck_after = 'soon'\n", "stuck_after"),
        ("[ops]\nwebhook = 'env:NOT_SET_HERE'\n", "needs the variable NOT_SET_HERE, which is not set"),
        ("[ops]\ncommand = 'page'\n", "not a list of texts"),
        (f"[ops]\nwebhook = '{URL}'\non = []\n", "The moments are"),
        (f"[ops]\nwebhook = '{URL}'\njobs = 'yes'\n", "Write true if jobs may name it"),
        ("[ops]\ncommand = ['x']\njobs = true\n", "may not use a command"),
        (f"[jobs]\nwebhook = '{URL}'\n", "unknown key 'webhook'"),
        ("[jobs]\nlocal = 'http://127.0.0.1'\n", "is not a list"),
        ("[jobs]\nlocal = ['http://127.0.0.1/x']\n", "not an origin"),
        ("[jobs]\nlocal = ['127.0.0.1:8000']\n", "not an origin"),
        ("[jobs]\nlocal = ['http://127.0.0.1:x']\n", "not an origin"),
        ("[jobs.secrets]\nBATCHLAB_NOTIFY_A = ['https://u@h.example']\n", "not an origin"),
        ("[jobs.secrets]\nPATH = ['https://h.example']\n", "jobs cannot use as a secret"),
        ("jobs = 3\n", "must be a table with the limits"),
        ("[jobs]\nsecrets = 3\n", "must be a table with the limits"),
        ("[ops]\ncommand = []\n", "a program and its arguments"),
    ],
)
def test_mistake_is_a_clear_error(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(UsageError) as caught:
        settings.read_notifications(at(tmp_path, text))
    assert told in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_the_manager_needs_the_variables_that_are_named(tmp_path: Path) -> None:
    text = "[ops]\nwebhook = 'env:HOOK'\nsecret = 'env:KEY'\n[chat]\nwebhook = 'https://a.b'\n"
    home = at(tmp_path, text + "secret = 'env:NOT_SET'\n")
    environ = {"HOOK": URL, "KEY": "k", "BATCHLAB_NOTIFY_TEAM": "t", "OTHER": "o"}
    assert settings.notification_variables(home, environ) == ["BATCHLAB_NOTIFY_TEAM", "HOOK", "KEY"]
    home.notify_file.unlink()
    assert settings.notification_variables(home, environ) == ["BATCHLAB_NOTIFY_TEAM"]
    home.notify_file.write_text("[ops\n")
    with pytest.raises(UsageError, match="is not TOML"):
        settings.notification_variables(home, environ)


def test_the_file_is_read_again_when_it_changes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    home = at(tmp_path, "[a]\ncommand = ['x']\n")
    now = settings.notification_watcher(home)

    def names() -> list[str]:
        return [target.name for target in now().targets]

    assert names() == ["a"]
    home.notify_file.write_text("[a]\ncommand = ['x']\n[b]\ncommand = ['y']\n")
    assert names() == ["a", "b"]
    with caplog.at_level(logging.WARNING):
        home.notify_file.write_text("[c\n")
        assert names() == ["a", "b"] == names()
    assert len(caplog.records) == 1
    home.notify_file.unlink()
    assert names() == []
