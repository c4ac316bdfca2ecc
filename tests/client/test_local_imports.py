"""Local modules that functions import while they run on workers."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest

from batchlab.client.local_imports import LocalImports, find, imported_names
from batchlab.client.submission import ObjectPickler
from batchlab.core.errors import UsageError


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
    (code,) = (one for one in compile(source, "s", "exec").co_consts if hasattr(one, "co_code"))
    assert list(imported_names(code)) == ["a", "json", "c"]
    assert list(imported_names((lambda x: x.json).__code__)) == []


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


def test_a_module_that_cannot_be_parsed_is_named(folder: Path, imports: LocalImports) -> None:
    (folder / "broken_one.py").write_text("def (:\n")
    with pytest.raises(UsageError, match=r"broken_one\.py, which a mapped function imports, cannot be read"):
        imports.add(["broken_one"])


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
