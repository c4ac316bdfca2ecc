"""Values that processes load once from a stored object."""

from __future__ import annotations

import gc
import hashlib
import pickle
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import pytest

from batchlab.core import shared_values
from batchlab.core.protocol import values
from batchlab.core.shared_values import Shared, StoredFile
from batchlab.core.task_context import File


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(shared_values, "_files", {})
    loaded = dict(shared_values._loaded)
    shared_values._loaded.clear()
    yield
    shared_values._loaded.clear()
    shared_values._loaded.update(loaded)


def stored(folder: Path, value: object) -> Shared[Any]:
    """Return a reference to a value whose file is on this machine."""
    data = pickle.dumps(value)
    digest = hashlib.sha256(data).hexdigest()
    path = folder / digest
    path.write_bytes(data)
    shared_values._restore(digest, len(data), File(path))
    return Shared(digest, len(data))


def test_value_is_loaded_once(tmp_path: Path) -> None:
    shared = stored(tmp_path, [1, 2])
    assert shared.value is shared.value
    (tmp_path / shared.digest).unlink()
    assert Shared[list[int]](shared.digest, shared.size).value == [1, 2]


class Slow:
    """Value whose loads are counted and take a while."""

    loads: ClassVar[list[int]] = []

    def __setstate__(self, state: dict[str, int]) -> None:
        self.loads.append(state["number"])
        time.sleep(0.02)


def slow(number: int) -> Slow:
    value = Slow()
    value.__dict__["number"] = number
    return value


def test_threads_of_a_task_load_a_value_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Slow, "loads", [])
    shared = stored(tmp_path, slow(1))
    with ThreadPoolExecutor(4) as threads:
        loaded = list(threads.map(lambda _: shared.value, range(4)))
    assert all(value is loaded[0] for value in loaded)
    assert Slow.loads == [1]


def test_changed_content_is_refused(tmp_path: Path) -> None:
    shared = stored(tmp_path, [1, 2])
    (tmp_path / shared.digest).write_bytes(pickle.dumps([1, 3]))
    with pytest.raises(ValueError, match="has changed"):
        _ = shared.value


def test_loaded_values_are_limited_and_the_last_one_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = (stored(tmp_path, bytes([n]) * 1000) for n in range(3))
    monkeypatch.setattr(shared_values, "MAX_LOADED_BYTES", 2500)
    for shared in (first, second, first, third):
        assert len(shared.value) == 1000
    assert list(shared_values._loaded) == [first.digest, third.digest]
    monkeypatch.setattr(shared_values, "MAX_LOADED_BYTES", 10)
    assert len(second.value) == 1000
    assert list(shared_values._loaded) == [second.digest]


def test_reference_travels_with_its_file(tmp_path: Path) -> None:
    shared: Shared[list[int]] = Shared("a" * 64, 5)
    reference = values.file_ref(f"code/{'a' * 64}.pkl", "a.pkl", 5)
    shared_values.attach_value(shared, [1, 2], StoredFile(reference), lambda: None)
    encoded = values.encode_object((1, [shared]), lambda file: file.origin())
    assert list(values.references(encoded)) == [reference]
    (_, (remote,)) = values.decode(encoded, StoredFile, pickles=True)
    with pytest.raises(LookupError, match=r"Read the value of Grid\.put only in tasks"):
        _ = remote.value
    fetched = stored(tmp_path, 7)
    _, (copy,) = values.decode(encoded, lambda _: File(tmp_path / fetched.digest), pickles=True)
    assert copy.digest == shared.digest
    assert shared_values._files[shared.digest].path == tmp_path / fetched.digest


def test_process_that_has_stored_a_value_keeps_it_until_the_reference_is_closed() -> None:
    class Value:
        pass

    closed: list[int] = []
    value = Value()
    shared: Shared[Value] = Shared("b" * 64, 5)
    stored = StoredFile(values.file_ref(f"code/{'b' * 64}.pkl", "b.pkl", 5))
    shared_values.attach_value(shared, value, stored, lambda: closed.append(1))
    assert shared.value is value
    with shared:
        values.encode_object([shared], lambda file: file.origin())
    shared.close()
    assert closed == [1]
    assert len(gc.get_referrers(value)) <= 1
    with pytest.raises(values.NotAValue, match="is closed"):
        values.encode_object([shared], lambda file: file.origin())
