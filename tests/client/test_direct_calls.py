"""Permission of the manager for direct calls."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchlab.runtime import factory
from batchlab.runtime.home import Home


def may_call(home: Home) -> bool:
    backend = factory.load("local")
    return backend.open_direct_queue(home, backend.open_clock()) is not None


@pytest.mark.parametrize(
    ("variable", "value"), [("BATCHLAB_SYNC", "all"), ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")]
)
def test_only_a_manager_permits_direct_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    """The client's own environment may differ from the environment of the grid."""
    home, backend = Home(tmp_path / "h"), factory.load("local")
    assert not may_call(home)  # the grid belongs to a manager of an earlier release
    backend.permit_direct_calls(home)
    assert may_call(home)
    backend.open_inbox(home).close()
    with monkeypatch.context() as patches:
        patches.setenv(variable, value)
        backend.permit_direct_calls(home)
    assert not may_call(home)
    with pytest.raises(FileNotFoundError):  # a client that made direct calls under an earlier manager
        backend.open_inbox(home)
