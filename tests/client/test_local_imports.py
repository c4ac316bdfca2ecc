"""Local modules that functions import while they run on workers."""

from __future__ import annotations

import importlib
import io
import pickle
import sys
import zipfile
from pathlib import Path

import cloudpickle
import pytest

from batchlab.client.local_imports import LocalImports, find, imported_names
from batchlab.client.submission import ObjectPickler
from batchlab.core.errors import UsageError
from batchlab.worker import code_cache


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.fixture
def imports() -> LocalImports:
    return LocalImports(lambda places: set(places))


def names(imports: LocalImports) -> list[str]:
    data = imports.pack()
    return zipfile.ZipFile(io.BytesIO(data)).namelist() if data else []


def test_names_come_from_import_statements_only() -> None:
    source = (
        "def f(x):\n    import a.b, json\n    from c.d import e\n    from . import g\n    return x.import_module(h)"
    )
    code = compile(source, "s", "exec")
    assert list(imported_names(code, None)) == ["a", "json", "c"]
    assert list(imported_names(code, "p.q")) == ["a", "json", "c", "p"]
    assert list(imported_names((lambda x: x.json).__code__, "p.q")) == []


def test_modules_of_workers_are_not_searched() -> None:
    assert find("json") is None
    assert find("batchlab") is None
    assert find("__main__") is None
    assert find("no_such_module_at_all") is None


def test_modules_and_packages_are_packed_with_their_own_imports(folder: Path, imports: LocalImports) -> None:
    (folder / "first_one.py").write_text("import json\ndef f():\n    from second_one.part import x\n")
    package = folder / "second_one"
    (package / "__pycache__").mkdir(parents=True)
    (package / "__pycache__" / "part.pyc").touch()
    (package / "__init__.py").touch()
    (package / "part.py").write_text("from . import other\nimport first_one, third_one\n")
    (package / "table.csv").write_text("1,2")
    (folder / "third_one.py").touch()
    (folder / "fourth_one.py").touch()
    imports.add(["first_one", "missing_one"])
    assert names(imports) == [
        "first_one.py",
        "second_one/__init__.py",
        "second_one/part.py",
        "second_one/table.csv",
        "third_one.py",
    ]


def test_a_pack_follows_the_files(folder: Path, imports: LocalImports) -> None:
    assert imports.pack() == b""
    imports.add(["later_one"])
    assert imports.pack() == b""
    (folder / "later_one.py").write_text("x = 1")
    imports.add(["later_one"])
    first = imports.pack()
    assert imports.pack() is first
    (folder / "later_one.py").write_text("x = 1234")
    assert imports.pack() != first


def test_modules_that_workers_have_are_not_packed(folder: Path) -> None:
    (folder / "theirs_one.py").write_text("import ours_one\n")
    (folder / "ours_one.py").touch()
    imports = LocalImports(lambda places: places.keys() & {"ours_one"})
    imports.add(["theirs_one"])
    assert names(imports) == []
    imports.add(["ours_one"])
    assert names(imports) == ["ours_one.py"]


def test_files_that_are_not_python_are_packed(folder: Path, imports: LocalImports) -> None:
    package = folder / "template_one"
    package.mkdir()
    (package / "__init__.py").write_text("import other_one\n")
    (package / "{{name}}.py").write_text("import {{ name }}\n")
    (package / "zero.py").write_bytes(b"\0")
    (folder / "other_one.py").touch()
    imports.add(["template_one"])
    assert names(imports) == [
        "other_one.py",
        "template_one/__init__.py",
        "template_one/zero.py",
        "template_one/{{name}}.py",
    ]


def test_an_import_that_is_added_later_is_found(folder: Path, imports: LocalImports) -> None:
    (folder / "growing_one.py").touch()
    (folder / "added_one.py").touch()
    imports.add(["growing_one"])
    (folder / "growing_one.py").write_text("import added_one")
    imports.add([])
    assert names(imports) == ["added_one.py", "growing_one.py"]


def test_a_renamed_module_does_not_affect_other_functions(
    folder: Path, imports: LocalImports, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "old_one.py").write_text("x = 1")
    (folder / "user_one.py").write_text("import old_one")
    (folder / "stays_one.py").touch()
    monkeypatch.setitem(sys.modules, "old_one", importlib.import_module("old_one"))
    imports.add(["user_one"])
    (folder / "old_one.py").rename(folder / "new_one.py")
    imports.add(["stays_one"])
    assert names(imports) == ["stays_one.py", "user_one.py"]
    assert imports.names == {"stays_one", "user_one"}
    (folder / "new_one.py").rename(folder / "old_one.py")
    imports.add(["stays_one"])
    assert names(imports) == ["old_one.py", "stays_one.py", "user_one.py"]


def test_a_lock_of_an_editor_is_not_packed(folder: Path, imports: LocalImports) -> None:
    package = folder / "edited_one"
    package.mkdir()
    (package / "__init__.py").touch()
    imports.add(["edited_one"])
    (package / ".#a.py").symlink_to("user@host.4711:1")
    imports.add(["edited_one"])
    assert names(imports) == ["edited_one/__init__.py"]


def test_a_package_that_cannot_be_packed_affects_only_its_importers(folder: Path, imports: LocalImports) -> None:
    package = folder / "linked_one"
    package.mkdir()
    (package / "__init__.py").touch()
    (folder / "importer_one.py").write_text("import linked_one")
    (folder / "other_one.py").touch()
    imports.add(["importer_one", "other_one"])
    (package / "data").symlink_to(folder)
    imports.add(["other_one"])
    assert names(imports) == ["importer_one.py", "other_one.py"]
    for name in ("linked_one", "importer_one"):
        with pytest.raises(UsageError) as raised:
            imports.add([name])
        assert raised.value.remedy == "Remove the link from the package linked_one, which the function imports."
    (package / "data").unlink()
    imports.add(["other_one"])
    assert names(imports) == ["importer_one.py", "linked_one/__init__.py", "other_one.py"]


def test_sources_that_cannot_be_parsed_are_packed(folder: Path, imports: LocalImports) -> None:
    package = folder / "deep_one"
    (package / "folder.py").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "folder.py" / "data.csv").touch()
    (package / "table.py").write_text("x = " + "-" * 50_000 + "1")
    imports.add(["deep_one"])
    assert names(imports) == ["deep_one/__init__.py", "deep_one/folder.py/data.csv", "deep_one/table.py"]


def test_modules_that_workers_would_refuse_together_are_refused(
    folder: Path, imports: LocalImports, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(code_cache, "MAX_FILES", 3)
    for name in ("one_one", "two_one", "three_one"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").touch()
    for name in ("one_one", "two_one"):
        (folder / name / "a.py").touch()
    imports.add(["one_one"])
    with pytest.raises(UsageError, match="local modules one_one, two_one, which functions import, are too large"):
        imports.add(["two_one"])
    imports.add(["three_one"])
    assert names(imports) == ["one_one/__init__.py", "one_one/a.py", "three_one/__init__.py"]
    (folder / "three_one" / "a.py").touch()
    with pytest.raises(UsageError, match="local modules one_one, three_one, which functions import, are too large"):
        imports.pack()


def test_a_packed_module_is_pickled_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a worker would have two copies of the module, whose types differ."""
    package = folder / "named_one"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "types_one.py").write_text("class Box: ...\n")
    (package / "work_one.py").write_text(
        "from .types_one import Box\n"
        "def plain(): return Box\n"
        "def relative():\n    from . import types_one\n    return types_one.Box, Box\n"
    )
    work = importlib.import_module("named_one.work_one")
    pickler = ObjectPickler()
    by_value = pickler.function(work.plain).data
    by_name = pickler.function(work.relative).data
    assert names(pickler.imports) == ["named_one/__init__.py", "named_one/types_one.py", "named_one/work_one.py"]
    assert len(pickler.function(work.plain).data) < len(by_value)
    with pickler.by_value():
        assert pickle.loads(cloudpickle.dumps(work.Box)) is work.Box
    for name in [name for name in sys.modules if name.startswith("named_one")]:
        monkeypatch.delitem(sys.modules, name)
    assert len(set(pickle.loads(by_name)())) == 1
    assert not cloudpickle.list_registry_pickle_by_value()


def test_a_pickled_function_records_its_imports(folder: Path) -> None:
    (folder / "nested_one.py").touch()

    def outer(x: int) -> object:
        def inner() -> object:
            import nested_one  # type: ignore[import-not-found]
            import pytest

            return nested_one, pytest

        return inner

    pickler = ObjectPickler()
    assert pickler.function(outer).imports == {"nested_one", "pytest"}
    assert names(pickler.imports) == ["nested_one.py"]
