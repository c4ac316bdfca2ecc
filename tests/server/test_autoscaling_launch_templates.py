"""Launch templates from a file, and the errors of an invalid file."""

from __future__ import annotations

import os
from base64 import b64encode
from pathlib import Path

import pytest

from batchlab.core.errors import UsageError
from batchlab.core.model import Market, Pool
from batchlab.fleet.api_types import LaunchTemplate, ValidationError
from batchlab.server.autoscaling_api.launch_templates import VARIABLE, TemplateFile, template_id

FILE = """\
[worker]
default = 2
[[worker.version]]
command = ["old"]
[[worker.version]]
type = "m7i.large"
market = "spot"
slots = 3
boot_s = 1.5
env = { A = "b" }
command = ["new", "{instance}", "--in={group}", "{slots}"]
[[worker.version]]
command = ["newest"]
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "templates.toml"
    path.write_text(FILE)
    return path


def named(version: str = "$Default") -> LaunchTemplate:
    return LaunchTemplate(launch_template_name="worker", version=version)


def test_template_version_describes_its_instances(path: Path) -> None:
    found = TemplateFile(path).template(named("2"))
    assert found.reference == LaunchTemplate(template_id("worker"), "worker", "2")
    assert (found.instance_type, found.market) == ("m7i.large", Market.SPOT)
    assert (found.slots, found.boot_s) == (3, 1.5)
    assert found.env == (("A", "b"), (VARIABLE, "worker:2"))


def test_the_words_of_a_command_are_filled_in(path: Path) -> None:
    templates = TemplateFile(path)
    pool = Pool("g", slots=3, env=templates.template(named()).env)
    assert templates.argv(pool, "i-1") == ["new", "i-1", "--in=g", "3"]


@pytest.mark.parametrize(("version", "number"), [("", 2), ("$Default", 2), ("$Latest", 3), ("1", 1)])
def test_a_version_may_be_named_or_not(path: Path, version: str, number: int) -> None:
    templates = TemplateFile(path)
    by_name = templates.template(named(version))
    by_id = templates.template(LaunchTemplate(template_id("worker"), "", version))
    assert by_name == by_id
    assert by_name.reference.version == str(number)


@pytest.mark.parametrize(
    "reference",
    [
        named("4"),
        named("0"),
        named("-1"),
        named("$Oldest"),
        LaunchTemplate(launch_template_name="nobody"),
        LaunchTemplate("lt-00000000000000000"),
        LaunchTemplate(),
    ],
)
def test_missing_template_is_refused(path: Path, reference: LaunchTemplate) -> None:
    with pytest.raises(ValidationError, match="does not exist"):
        TemplateFile(path).template(reference)


def test_a_file_that_changes_is_read_again(path: Path) -> None:
    templates = TemplateFile(path)
    path.write_text(FILE + '[[worker.version]]\ncommand = ["after"]\n')
    assert templates.template(named("$Latest")).reference.version == "4"


def test_broken_template_file_refuses_launches_until_it_is_fixed(path: Path) -> None:
    templates = TemplateFile(path)
    path.write_text("[worker")
    with pytest.raises(ValidationError, match="is not TOML"):
        templates.template(named())
    path.unlink()
    with pytest.raises(ValidationError, match=r"templates\.toml"):
        templates.template(named())
    path.write_text(FILE)
    assert templates.template(named()).reference.version == "2"


WRONG = {
    "no TOML": ("[worker", "is not TOML"),
    "no UTF-8": (b"\xff".decode("latin-1"), "is not TOML"),
    "no versions": ("[worker]\nversion = []", "worker.version: Tuple should have at least 1"),
    "no such default": ("[worker]\ndefault = 2\n[[worker.version]]", "worker does not have a version 2"),
    "no such key": ("[worker]\n[[worker.version]]\nimages = 'x'", "worker.version.0.images"),
    "no such name": ('["a b"]\n[["a b".version]]', "a b"),
    "no slots": ("[worker]\n[[worker.version]]\nslots = 0", "worker.version.0.slots"),
    "no base64": (
        "[worker]\n[[worker.version]]\nuser_data = 'hello!'",
        "worker.version.0.user_data: Value error, the user data is not base64-encoded text",
    ),
    "no text": (
        f"[worker]\n[[worker.version]]\nuser_data = '{b64encode(bytes([255])).decode()}'",
        "the user data is not base64-encoded text",
    ),
    "too much": (
        f"[worker]\n[[worker.version]]\nuser_data = '{b64encode(bytes(16_385)).decode()}'",
        "16385 bytes of user data, but EC2 accepts at most 16384",
    ),
    "no role": (
        "[worker]\n[[worker.version]]\nrole = { name = 'a b', access_key = '', secret_key = '' }",
        "worker.version.0.role.name",
    ),
    "no market": ("[worker]\n[[worker.version]]\nmarket = 'fish'", "worker.version.0.market"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_missing_template_file_is_a_clear_error(wrong: str, path: Path) -> None:
    content, told = WRONG[wrong]
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UsageError) as refused:
        TemplateFile(path)
    assert told in str(refused.value)


def test_unreadable_template_file_is_a_clear_error(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(UsageError, match=f"cannot be read: ({os.strerror(2)}|Is a dir)"):
            TemplateFile(path)
