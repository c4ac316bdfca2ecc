"""Numbers, durations, and choices as options of the command line, valid and invalid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from batchlab.cli.scenario_replay import ReplayRequest
from batchlab.cli.users import Outcome
from batchlab.manager.audit_log import OUTCOMES
from batchlab.server.autoscaling_api.engine_loop import AsgSettings
from tests.support.cli import Run

# --- Durations -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "limit_s"), [("5m", 300.0), ("90", 90.0), ("1.5", 1.5)])
def test_a_replays_limit_is_a_duration_or_a_number_of_seconds(
    run: Run, monkeypatch: pytest.MonkeyPatch, text: str, limit_s: float
) -> None:
    found: list[ReplayRequest] = []
    monkeypatch.setattr("batchlab.cli.scenario_replay.run", lambda request, **_: found.append(request))
    assert run("scenario", "replay", "claims-month-end", "--limit", text)[0] == 0
    assert [one.limit_s for one in found] == [limit_s]


def test_the_notice_and_the_drain_of_an_auto_scaling_endpoint_are_durations(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    noticed: list[Any] = []
    served: list[AsgSettings] = []
    monkeypatch.setattr(
        "batchlab.server.autoscaling_api.metadata.send_notice", lambda *given, **_: noticed.append(given)
    )
    monkeypatch.setattr("batchlab.server.autoscaling_api.engine_loop.asg_main", lambda given, _: served.append(given))
    interrupt = ("asg", "interrupt", "i-1", "--endpoint", "http://here")
    serve = ("asg", "serve", "--templates", tmp_path / "templates.toml")
    for more in ((), ("--notice", "1m30s"), ("--notice", 30)):
        assert run(*interrupt, *more)[0] == 0
    for more in ((), ("--drain", "2m"), ("--drain", 10)):
        assert run(*serve, *more)[0] == 0
    assert [given[3] for given in noticed] == [120.0, 90.0, 30.0]
    assert [given.drain_s for given in served] == [30.0, 120.0, 10.0]


@pytest.mark.parametrize(
    ("arguments", "message", "remedy"),
    [
        (
            ("scenario", "replay", "claims-month-end", "--limit", "soon"),
            "--limit: 'soon' is not a duration.",
            "Write 30s, 5m, 1h30m, 2d, 250ms or a number of seconds.",
        ),
        (
            ("scenario", "replay", "claims-month-end", "--limit", "500ms"),
            "--limit: '500ms' is too short.",
            "Write 1s or more.",
        ),
        (
            ("asg", "interrupt", "i-1", "--notice", "-1"),
            "--notice: '-1' is not a duration.",
            "Write 30s, 5m, 1h30m, 2d, 250ms or a number of seconds.",
        ),
    ],
)
def test_invalid_duration_is_refused_with_the_valid_forms(
    run: Run, arguments: tuple[str, ...], message: str, remedy: str
) -> None:
    assert run(*arguments) == (2, "", f"Error: {message}\n  {remedy}\n")


# --- Numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message", "remedy"),
    [
        (
            ("run", "job.yaml", "--workers", "0"),
            "--workers is a number from 1 on, not 0.",
            "Write for example --workers 1.",
        ),
        (
            ("run", "job.yaml", "--workers", "two"),
            "--workers is a whole number from 1 on, not two.",
            "Write for example --workers 1.",
        ),
        (("job", "list", "--limit", "-5"), "--limit is a number from 1 on, not -5.", "Write for example --limit 20."),
        (
            ("cost", "estimate", "job.yaml", "--spot", "120"),
            "--spot is a number from 0 to 100, not 120.",
            "Write for example --spot 0.",
        ),
        (
            ("scenario", "replay", "claims-month-end", "--compress", "fast"),
            "--compress is a number from 0.001 on, not fast.",
            "Write for example --compress 1.",
        ),
        (
            ("scenario", "replay", "claims-month-end", "--seed", "1.5"),
            "--seed is a whole number, not 1.5.",
            "Write for example --seed 1.",
        ),
        (("sim", "replay", "many"), "SEED is a whole number from 0 on, not many.", "Write for example 1."),
    ],
)
def test_a_number_that_cannot_be_is_refused_in_a_sentence(
    run: Run, arguments: tuple[str, ...], message: str, remedy: str
) -> None:
    assert run(*arguments) == (2, "", f"Error: {message}\n  {remedy}\n")


def test_an_unknown_choice_is_refused_with_the_choices(run: Run) -> None:
    message = "--outcome: 'lost' is not one of 'done', 'refused', 'failed', 'unknown', 'allowed'."
    remedy = "`batchlab audit --help` describes the choices."
    assert run("audit", "--outcome", "lost") == (2, "", f"Error: {message}\n  {remedy}\n")
    assert {outcome.value for outcome in Outcome} == set(OUTCOMES)


def test_other_parser_errors_keep_their_text(run: Run) -> None:
    code, _, err = run("run")
    assert code == 2
    assert "Missing argument 'FILE'" in err
