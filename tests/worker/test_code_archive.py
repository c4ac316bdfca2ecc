"""The code zip, which is equal for equal code and cannot write outside of its folder."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import threading
import zipfile
from pathlib import Path

import pytest

from batchlab.core.errors import UsageError
from batchlab.worker import code_cache


def a_folder(root: Path) -> Path:
    (root / "pkg").mkdir(parents=True)
    (root / "handlers.py").write_text("x = 1\n")
    (root / "pkg" / "__init__.py").write_text("")
    (root / "run.sh").write_text("#!/bin/sh\n")
    (root / "run.sh").chmod(0o755)
    return root


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def a_zip(*names: str, mode: int = stat.S_IFREG | 0o644, content: bytes = b"x") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            info.create_system = 3
            archive.writestr(info, content, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def test_archive_round_trips_with_file_modes(tmp_path: Path) -> None:
    data = code_cache.pack(a_folder(tmp_path / "code"))
    key = code_cache.key(data)
    assert key == f"code/{digest(data)}.zip"
    assert code_cache.digest_of(key) == digest(data)
    target = tmp_path / "deep" / "unpacked"
    code_cache.unpack(data, digest(data), target)
    found = {p.relative_to(target).as_posix() for p in target.rglob("*") if p.is_file()}
    assert found == {"handlers.py", "pkg/__init__.py", "run.sh"}
    assert os.access(target / "run.sh", os.X_OK)
    assert not os.access(target / "handlers.py", os.X_OK)
    assert (target / "handlers.py").read_text() == "x = 1\n"


def test_the_same_code_packs_to_the_same_bytes(tmp_path: Path) -> None:
    one, other = a_folder(tmp_path / "one"), a_folder(tmp_path / "other")
    os.utime(other / "handlers.py", (1, 1))
    for skipped in ("__pycache__", ".git", ".venv", "pkg/__pycache__"):
        (other / skipped).mkdir()
        (other / skipped / "junk").write_text("junk")
    (other / "myenv").mkdir()
    (other / "myenv" / "pyvenv.cfg").write_text("")
    assert code_cache.pack(one) == code_cache.pack(other)


@pytest.mark.parametrize("target", ["/etc/passwd", "../outside.py", "pkg", "nowhere"])
def test_a_link_that_leaves_the_folder_is_not_packed(tmp_path: Path, target: str) -> None:
    folder = a_folder(tmp_path / "code")
    (tmp_path / "outside.py").write_text("secret")
    (folder / "link").symlink_to(target)
    with pytest.raises(UsageError, match="link"):
        code_cache.pack(folder)


def test_a_link_within_the_folder_is_packed_as_its_content(tmp_path: Path) -> None:
    folder = a_folder(tmp_path / "code")
    (folder / "same.py").symlink_to("handlers.py")
    data = code_cache.pack(folder)
    code_cache.unpack(data, digest(data), tmp_path / "out")
    assert not (tmp_path / "out" / "same.py").is_symlink()
    assert (tmp_path / "out" / "same.py").read_text() == "x = 1\n"


def test_special_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        code_cache.pack(tmp_path / "missing")
    folder = a_folder(tmp_path / "code")
    os.mkfifo(folder / "pipe")
    with pytest.raises(UsageError, match="neither a file nor a folder"):
        code_cache.pack(folder)


@pytest.mark.parametrize("limit", ["MAX_BYTES", "MAX_FILES"])
def test_too_much_code_is_refused_where_it_is_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(code_cache, limit, 2)
    with pytest.raises(UsageError, match="the limits are"):
        code_cache.pack(a_folder(tmp_path / "code"))


@pytest.mark.parametrize("name", ["/abs", "../up", "a/../../up", "..", "a\\b"])
def test_a_name_that_leaves_the_folder_is_not_unpacked(tmp_path: Path, name: str) -> None:
    data = a_zip("fine.py", name)
    with pytest.raises(UsageError, match="outside its folder"):
        code_cache.unpack(data, digest(data), tmp_path / "deep" / "out")
    assert [p.name for p in tmp_path.rglob("*")] == ["deep"]


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
def test_links_and_devices_are_not_unpacked(tmp_path: Path, kind: int) -> None:
    data = a_zip("evil", mode=kind | 0o777, content=b"/etc/passwd")
    with pytest.raises(UsageError, match="link or a device"):
        code_cache.unpack(data, digest(data), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_zip_is_refused(tmp_path: Path) -> None:
    data = a_zip("a.py")
    with pytest.raises(UsageError, match="does not match"):
        code_cache.unpack(data + b"!", digest(data), tmp_path / "out")
    junk = b"no zip at all"
    with pytest.raises(UsageError, match="cannot be read"):
        code_cache.unpack(junk, digest(junk), tmp_path / "out")
    twice = a_zip("a.py")
    corrupt = twice.replace(b"a.py", b"b.py", 1)  # the two directories of the zip disagree
    with pytest.raises(UsageError, match="cannot be read"):
        code_cache.unpack(corrupt, digest(corrupt), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_zip_bomb_is_refused_by_its_unpacked_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_cache, "MAX_BYTES", 1_000_000)
    data = a_zip("a", "b", content=bytes(600_000))
    assert len(data) < 10_000
    with pytest.raises(UsageError, match="unpacks to more"):
        code_cache.unpack(data, digest(data), tmp_path / "out")
    monkeypatch.setattr(code_cache, "MAX_FILES", 1)
    with pytest.raises(UsageError, match="has 2 files"):
        code_cache.unpack(data, digest(data), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_same_name_twice_is_refused(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        data = a_zip("a.py", "a.py")
    with pytest.raises(UsageError, match="twice"):
        code_cache.unpack(data, digest(data), tmp_path / "out")


def test_many_may_unpack_the_same_code_at_once(tmp_path: Path) -> None:
    data = a_zip(*(f"m{i}.py" for i in range(50)))
    found: list[int] = []
    start = threading.Barrier(8)

    def unpack() -> None:
        start.wait()
        code_cache.unpack(data, digest(data), tmp_path / "out")
        found.append(len(list((tmp_path / "out").iterdir())))

    threads = [threading.Thread(target=unpack) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [50] * 8
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("key", ["code/abc.zip", "raw/x", f"code/{'g' * 64}.zip", "code/../x.zip"])
def test_key_that_is_not_a_code_archive_is_refused(key: str) -> None:
    with pytest.raises(UsageError, match="not the key of a code zip"):
        code_cache.digest_of(key)


def test_the_jobs_input_is_not_code(tmp_path: Path) -> None:
    folder = a_folder(tmp_path / "code")
    before = code_cache.pack(folder)
    big = folder / "data.csv"
    big.write_text("1,2\n")
    assert code_cache.pack(folder, [big]) == before
    assert code_cache.pack(folder) != before
