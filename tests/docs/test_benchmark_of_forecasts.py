"""The benchmark of forecasts without measured data to compare."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import fact


def replayed(monkeypatch: pytest.MonkeyPatch, comparison: Any) -> None:
    said = json.dumps({"verdict": [], "cut": "", "comparison": comparison})
    done = subprocess.CompletedProcess[str]([], 0, said, "There is no forecast: so it is.")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    monkeypatch.setattr(fact, "LOOK_S", 0.0)


def difference(measure: str, forecast: float | None) -> dict[str, Any]:
    off = None if forecast is None else forecast - 4.0
    told = {"measure": measure, "template": "", "forecast": forecast, "fact": 4.0}
    return {**told, "absolute": off, "relative": None if off is None else off / 4.0}


def test_replay_without_a_forecast_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    replayed(monkeypatch, None)
    with pytest.raises(SystemExit, match=r"long-tail: .* no forecast: so it is"):
        fact.measured("long-tail", "local", 60, tmp_path)
    endless = [difference("makespan", None), difference("peak_fleet", 4.0)]
    replayed(monkeypatch, {"differences": endless})
    with pytest.raises(SystemExit, match="long-tail: a job did not end"):
        fact.measured("long-tail", "local", 60, tmp_path)
    replayed(monkeypatch, {"differences": [difference("makespan", 4.2), *endless[1:]]})
    row = fact.measured("long-tail", "local", 60, tmp_path)
    assert row.cells[4:7] == ("+5.0%", "4, 4", "yes")
