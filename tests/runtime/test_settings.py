"""Manager settings in a home, which override those of the backend."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from batchlab.core.errors import UsageError
from batchlab.runtime import factory, settings
from batchlab.runtime.home import Home


def _home(folder: Path, text: str | None) -> Home:
    home = Home(folder / "home")
    home.make()
    if text is not None:
        home.settings_file.write_text(text)
    return home


def test_a_home_without_a_file_changes_nothing(tmp_path: Path) -> None:
    backend = factory.load("local")
    assert settings.with_home_settings(backend, _home(tmp_path, None)) == backend


def test_settings_file_overrides_the_backend(tmp_path: Path) -> None:
    home = _home(tmp_path, "[manager]\ndrain_target_s = 600\nmax_receives = 3\n")
    backend = factory.load("local")
    wanted = replace(backend.manager, drain_target_s=600, max_receives=3)
    assert settings.with_home_settings(backend, home) == replace(backend, manager=wanted)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("manager = 5\n", "sets manager = 5 instead of a table"),
        ("[manager]\ndrain_s = 3\n", "unknown manager setting 'drain_s'"),
        ("[manager]\ntick_s = 0\n", "tick_s = 0, which is not a valid number"),
        ("[manager]\nidle_s = -1\n", "which is not a valid number"),
        ("[manager]\nidle_s = inf\n", "which is not a valid number"),
        ("[manager]\nidle_s = true\n", "which is not a valid number"),
        ("[manager]\nmax_receives = 2.5\n", "which is not a valid number"),
        ("[manager]\nwindow = 2.5\n", "which is not a valid number"),
        ("[worker]\nbeat_s = 3\n", "unknown table or key 'worker'"),
        ("[manager\n", "is not TOML"),
    ],
)
def test_invalid_setting_is_a_clear_error(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        settings.read(_home(tmp_path, text))


def test_a_control_lease_shorter_than_the_workers_is_refused(tmp_path: Path) -> None:
    """The workers' control lease is the lower limit. Before, 31 tasks started after an acknowledged cancellation."""
    backend = factory.load("local")
    home = _home(tmp_path, "[manager]\ncontrol_lease_s = 0.2\n")
    with pytest.raises(UsageError, match="shorter than the lease of the workers"):
        settings.with_home_settings(backend, home)
    longer = _home(tmp_path, "[manager]\ncontrol_lease_s = 3\n")
    assert settings.with_home_settings(backend, longer).manager.control_lease_s == 3


@pytest.mark.parametrize("before", [None, "# mine\n[manager]\nidle_s = 7\n"])
def test_temporary_setting_is_restored(tmp_path: Path, before: str | None) -> None:
    home = _home(tmp_path, before)
    own = settings.read(home)
    with settings.temporary_settings(home, {"drain_target_s": 2.5}, why="For a while."):
        assert settings.read(home) == {**own, "drain_target_s": 2.5}
        assert home.settings_file.read_text().startswith("# For a while.\n")
    assert settings.read(home) == own
    assert home.settings_file.exists() == (before is not None)
    with settings.temporary_settings(home, {"idle_s": 9.0}, why="For good.", keep=True):
        pass
    assert settings.read(home) == {**own, "idle_s": 9.0}


def test_empty_settings_write_no_file(tmp_path: Path) -> None:
    home = _home(tmp_path, None)
    with settings.temporary_settings(home, {}, why="Nothing."):
        assert not home.settings_file.exists()
