"""User errors and their handling: an error message, a remedy, and the right exit code.

The tables contain the test cases. `CASES` contains every row of the tables.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.grid.local_grid import processes_of
from tests.system.bad_input import acts, asked, folders, job_files, jobs, places, scenarios, tampered
from tests.system.bad_input.acts import Act
from tests.system.bad_input.asked import Question
from tests.system.bad_input.case import Case, check, sound
from tests.system.bad_input.jobs import Job
from tests.system.bad_input.shell import Shell, Told
from tests.system.bad_input.tampered import Tampered
from tests.system.bad_input.trial import Evidence

REFUSED = [*job_files.CASES, *folders.CASES, *scenarios.CASES]
CASES: list[Any] = [*REFUSED, *places.PLACES, *jobs.JOBS, *tampered.TAMPERED, *asked.QUESTIONS, *acts.ACTS]


def by_name(case: Any) -> str:
    return str(case.name)


def test_bad_inputs_are_numerous_and_named() -> None:
    assert all(case.does for case in CASES if not isinstance(case, Act))
    assert len({(type(one), one.name) for one in CASES}) == len(CASES) >= 60


@pytest.mark.parametrize("case", REFUSED, ids=by_name)
def test_bad_input_is_refused_before_any_effect(case: Case, tmp_path: Path) -> None:
    folder = tmp_path / "job"
    sound(folder)
    case.make(folder)
    check(Shell(tmp_path, folder)(*case.command), code=case.code, says=case.says)
    assert not (tmp_path / "home").exists()
    assert not (folder / "run").exists(), "code of the file was run"


@pytest.mark.parametrize("case", places.PLACES, ids=by_name)
def test_refused_run_starts_no_grid(case: Case, tmp_path: Path) -> None:
    folder = tmp_path / "job"
    sound(folder)
    case.make(folder)
    told = Shell(tmp_path, folder)(*case.command)
    check(told, code=case.code, says=case.says)
    assert places.PASSWORD not in told.out + told.err
    assert not processes_of(tmp_path / "home")


# --- On a grid -----------------------------------------------------------------------------------


@pytest.mark.parametrize("job", jobs.JOBS, ids=by_name)
def test_failed_job_gives_a_reason_and_keeps_its_results(job: Job, evidence: Evidence) -> None:
    found = evidence[f"job {job.name}"]
    check(Told.of(found["told"]), code=job.code, says=job.says)
    assert found["kept"] == job.kept


@pytest.mark.parametrize("one", tampered.TAMPERED, ids=by_name)
def test_a_job_that_was_tampered_with_ends_with_a_reason(one: Tampered, evidence: Evidence) -> None:
    check(Told.of(evidence[f"tampered {one.name}"]["told"]), code=1, says=one.says)


@pytest.mark.parametrize("question", asked.QUESTIONS, ids=by_name)
def test_a_grid_declines(question: Question, evidence: Evidence) -> None:
    ids = evidence["asked"]["ids"]
    told = Told.of(evidence["asked"]["told"][question.name])
    check(told, code=question.code, says=question.says.format(**ids))


def test_a_job_is_cancelled_once(evidence: Evidence) -> None:
    check(Told.of(evidence["asked"]["cancelled"]), code=0, says=evidence["asked"]["ids"]["running"])
    check(Told.of(evidence["asked"]["twice"]), code=2, says="so it cannot be cancelled")


def test_one_token_is_one_job(evidence: Evidence) -> None:
    """A second submission returns the same job, and another job with the same token is refused."""
    found = evidence["twice"]
    assert found["first"] == found["again"]
    assert found["refused"]["code"] == 2
    assert "submitted with the same client token" in found["refused"]["said"]


@pytest.mark.parametrize("act", acts.ACTS, ids=by_name)
def test_effects_of_a_task_stay_with_the_task(act: Act, evidence: Evidence) -> None:
    found = evidence["acts"]
    task = str(2 * acts.ACTS.index(act))
    failure = found["failures"].get(task)
    if not act.kind:
        assert failure is None
        assert found["values"][task] == act.value
        return
    assert failure, f"it gave {found['values'].get(task)!r}"
    assert failure["kind"] == act.kind
    assert act.says in failure["reason"]
    assert failure["reason"].isprintable()
    assert len(failure["reason"]) < 2500
    assert task not in found["values"]


def test_no_neighbour_is_lost(evidence: Evidence) -> None:
    """Each act is followed by a task that returns its number."""
    found = evidence["acts"]
    values = {task: value for task, value in found["values"].items() if int(task) % 2}
    assert values == {str(2 * i + 1): i for i in range(len(acts.ACTS))}
    told = Told.of(found["told"])
    failed = sum(bool(act.kind) for act in acts.ACTS)
    check(told, code=1, says=f"{failed} tasks failed ({failed} of {len(acts.ITEMS)} in stage act)")


def test_the_grid_outlives_all_of_it(evidence: Evidence) -> None:
    assert evidence["up"]["code"] == 0
    assert evidence["down"]["code"] == 0
    assert evidence["left"] == []


def test_no_secret_is_written_down(evidence: Evidence) -> None:
    assert evidence["leaks"] == []
