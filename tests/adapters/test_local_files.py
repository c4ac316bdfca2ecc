"""A folder as a bucket: a copy is whole or does not exist, and listings show only existing objects."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import BinaryIO

import pytest

from batchlab.adapters.local import objects
from batchlab.core.errors import AlreadyExists


class Torn(io.BytesIO):
    """A file that raises an error before its end."""

    def read(self, size: int | None = -1) -> bytes:
        if self.tell():
            raise OSError("the disk is torn")
        return super().read(10)


def copy_in(source: BinaryIO, root: Path, key: str) -> None:
    objects.FileWriter(root).replace(key, objects.copy_into(source), durable=True)


def keys(root: Path, prefix: str = "", after: str = "") -> list[str]:
    return [info.key for info in objects.walk(root, prefix, after)]


def test_a_copy_makes_the_folders_it_needs(tmp_path: Path) -> None:
    copy_in(io.BytesIO(b"content"), tmp_path, "a/b/c")
    assert (tmp_path / "a" / "b" / "c").read_bytes() == b"content"
    assert keys(tmp_path) == ["a/b/c"]


def test_copy_skips_a_file_that_another_writer_staged(tmp_path: Path) -> None:
    (tmp_path / "key#1").write_bytes(b"half")
    copy_in(io.BytesIO(b"whole"), tmp_path, "key")
    assert (tmp_path / "key#1").read_bytes() == b"half"
    assert (tmp_path / "key").read_bytes() == b"whole"


def test_a_copy_that_fails_leaves_the_object_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(b"before")
    with pytest.raises(OSError, match="torn"):
        copy_in(Torn(b"x" * 100), tmp_path, "key")
    assert [path.name for path in tmp_path.iterdir()] == ["key"]
    assert (tmp_path / "key").read_bytes() == b"before"


def test_folders_sort_where_their_keys_do(tmp_path: Path) -> None:
    for key in ("a/z", "a-b", "a.c", "a/b/c", "b"):
        copy_in(io.BytesIO(), tmp_path, key)
    assert keys(tmp_path) == sorted(["a/z", "a-b", "a.c", "a/b/c", "b"])
    assert keys(tmp_path, "a/") == ["a/b/c", "a/z"]
    assert keys(tmp_path, after="a/b/c") == ["a/z", "b"]
    assert keys(tmp_path, "nowhere/") == []


def test_folder_is_not_an_object(tmp_path: Path) -> None:
    copy_in(io.BytesIO(), tmp_path, "a/b")
    assert objects.head(tmp_path, "a") is None
    assert objects.head(tmp_path, "a/b/c") is None
    assert objects.head(tmp_path, "a/b") is not None


def test_put_keeps_a_file_that_another_writer_stages_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name of a staged file becomes free when the file is renamed, so another writer may use the name at once."""
    rename = os.rename

    def rename_and_stage(source: str, target: str) -> None:
        rename(source, target)
        Path(source).write_bytes(b"another's")

    monkeypatch.setattr(os, "rename", rename_and_stage)
    copy_in(io.BytesIO(b"ours"), tmp_path, "key")
    assert (tmp_path / "key").read_bytes() == b"ours"
    assert (tmp_path / "key#1").read_bytes() == b"another's"


def test_a_writer_that_finds_an_object_waits_until_its_name_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer relies on the object that it found, so a power cut must not remove this object afterwards."""
    waits: list[str] = []
    writer = objects.FileWriter(tmp_path)
    writer.create("jobs/x", objects.copy_into(io.BytesIO(b"{}")), durable=False)
    monkeypatch.setattr(objects, "sync_folder", waits.append)
    with pytest.raises(AlreadyExists):
        writer.create("jobs/x", objects.copy_into(io.BytesIO(b"[]")), durable=True)
    assert str(tmp_path / "jobs") in waits
