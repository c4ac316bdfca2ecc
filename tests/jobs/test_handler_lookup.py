"""The lookup of handlers, which does not run the user's code."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from batchlab.jobs import handler_lookup
from tests.support.job_files import FOLDER, MINIMAL, WORK, compiled, load, refused, told, write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with code and three input files."""
    write(tmp_path, FOLDER)
    return tmp_path


@pytest.mark.parametrize(
    "source",
    [
        "def go(item): ...",
        "async def go(item): ...",
        "class go: ...",
        "go = lambda item: item",
        "go: object = print",
        "a, go = 1, print",
        "from json import loads as go",
        "import json.decoder as go",
        "import go.inner",
        "if True:\n    def go(item): ...",
        "try:\n    import a\nexcept ImportError:\n    def go(item): ...",
        "match 1:\n    case 1:\n        go = print",
        "from other import *",
        "from .other import *",
        "from elsewhere_not_here import *",
        "def __getattr__(name): ...",
        "x = '\\d'\ndef go(item): ...",
    ],
)
def test_a_handler_is_found_in_every_form_it_can_have(folder: Path, source: str) -> None:
    write(folder, {"pkg/deep.py": source, "pkg/other.py": "def go(item): ...", "other.py": "go = 1"})
    assert load(folder, MINIMAL.replace("work:one", "pkg.deep:go"))


@pytest.mark.parametrize(
    "source",
    ["def other(): go = 1", "class A:\n    def go(self): ...", "go.x = 1", "print('go')", "from other import *", ""],
)
def test_a_handler_that_does_not_exist_is_refused_before_anything_is_queued(folder: Path, source: str) -> None:
    """Without this check, the job would be accepted and every task would fail."""
    write(folder, {"deep.py": source, "other.py": "go_ = 2\nfrom deep import *"})
    [(line, text)] = told(refused(folder, MINIMAL.replace("work:one", "deep:go")))
    assert line == 4
    assert "The handler does not exist: deep.py has no 'go'." in text


def test_checking_a_handler_runs_none_of_the_users_code(folder: Path) -> None:
    boom = "raise SystemExit('the module was run')\n"
    write(folder, {"work.py": boom + WORK, "pkg/__init__.py": boom, "pkg/sub.py": boom + WORK})
    sys.path.insert(0, str(folder))
    try:
        assert load(folder, MINIMAL)
        text = MINIMAL.replace("work:one", "pkg.sub:one") + "code: data\n"
        assert load(folder, text)  # the module is installed
    finally:
        sys.path.remove(str(folder))
    assert not {"work", "pkg", "pkg.sub"} & set(sys.modules)


@pytest.mark.parametrize("handler", ["json:loads", "json.decoder:JSONDecoder", "math:sqrt"])
def test_a_handler_may_be_in_an_installed_module(folder: Path, handler: str) -> None:
    assert compiled(load(folder, MINIMAL.replace("work:one", handler))).stages[0].handler == handler


def test_the_current_folder_does_not_count_as_installed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend("")
    [error] = refused(folder, MINIMAL + "code: data\n")
    assert "there is no module 'work'" in error.message


@pytest.mark.parametrize(
    ("handler", "remedy"),
    [
        ("wrok:one", "Write work:one."),
        ("work:oen", "Did you mean 'work:one'?"),
        ("json:laods", "Did you mean 'json:loads'?"),
        ("pkg.absent:one", "Create pkg/absent.py there, or set 'code' to its folder."),
        ("work.one:one", "Write work:one."),
        ("bad:one", "Correct the module."),
    ],
)
def test_the_remedy_for_a_missing_handler_names_the_nearest(folder: Path, handler: str, remedy: str) -> None:
    write(folder, {"bad.py": "def one(:\n"})
    [error] = refused(folder, MINIMAL.replace("work:one", handler))
    assert (error.line, error.remedy) == (4, remedy)


def test_each_module_is_read_once_however_they_import_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manager checks submitted code in a thread that cannot be interrupted."""
    names = [f"m{number}" for number in range(12)]
    for name in names:
        others = "".join(f"from {other} import *\n" for other in names if other != name)
        (tmp_path / f"{name}.py").write_text(others)
    (tmp_path / "last.py").write_text("".join(f"from {name} import *\n" for name in names))
    read: list[str] = []
    parse = ast.parse

    def noted(text: bytes, filename: str) -> ast.Module:
        read.append(filename)
        return parse(text, filename)

    monkeypatch.setattr(ast, "parse", noted)
    found = handler_lookup.missing("last:absent", tmp_path)
    assert found is not None
    assert len(read) == len(set(read)) == 13


def test_a_module_that_is_data_is_not_parsed(tmp_path: Path) -> None:
    (tmp_path / "big.py").write_text("x = 1\n" * (handler_lookup.READ_BYTES // 6 + 1))
    assert handler_lookup.missing("big:anything", tmp_path) is None


def test_a_module_that_cannot_be_read_is_one_mistake_of_all_its_stages(folder: Path) -> None:
    write(folder, {"work.py": "def one(:\n", "other.py": "def go(item): ...\n"})
    text = """\
        name: j
        input: {files: data/*}
        stages:
          - {name: one, python: "work:one"}
          - {name: two, python: "work:two"}
          - {name: three, python: "other:gone"}
          - {name: four, python: "other:gone"}
        """
    found = told(refused(folder, text))
    assert [line for line, _ in found] == [4, 6, 7]
    assert "work.py line 1 cannot be read as Python" in found[0][1]
    assert all("other.py has no 'gone'." in said for _, said in found[1:])
