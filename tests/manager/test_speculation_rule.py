"""The rule that decides which bundles get a speculative copy."""

from __future__ import annotations

import pytest

from batchlab.core.job_definition import StageDef
from batchlab.core.model import JobId, StageCounts, StageName
from batchlab.core.protocol import json_format
from batchlab.manager.speculation import is_near_end, limit_s, quota
from tests.support.sim.scenes import job

A = StageName("a")


@pytest.mark.parametrize(
    ("planned", "succeeded", "uncut", "expected"),
    [
        (100, 75, 0, True),
        (100, 74, 0, False),
        (100, 99, 0, True),
        (100, 100, 0, False),
        (100, 99, 1, False),
        (6, 5, 0, True),
        (5, 4, 0, False),
        (None, 50, 0, False),
    ],
)
def test_only_the_last_tasks_of_a_stage_get_copies(
    planned: int | None, succeeded: int, uncut: int, expected: bool
) -> None:
    counts = StageCounts(A, planned, succeeded)
    assert is_near_end(counts, uncut) is expected


def test_a_failed_task_counts_as_ended() -> None:
    assert is_near_end(StageCounts(A, 20, 5, failed=12), 0)
    assert not is_near_end(StageCounts(A, 20, 4, failed=13), 0)


def test_the_number_of_copies_is_limited() -> None:
    assert quota(1000, 0) == 100
    assert quota(1000, 100) == 0
    assert (quota(6, 0), quota(6, 1)) == (1, 0)


def test_a_straggler_runs_twice_as_long_as_three_quarters_of_the_tasks() -> None:
    assert limit_s([10.0, 10.0, 10.0, 20.0, 90.0], None, 1, 5.0) == pytest.approx(40.0)


def test_the_limit_grows_with_the_tasks_of_a_bundle() -> None:
    assert limit_s([1.0] * 10, None, 7, 5.0) == pytest.approx(14.0)


def test_short_tasks_have_a_minimum_limit() -> None:
    assert limit_s([0.01] * 10, None, 1, 5.0) == pytest.approx(5.0)


def test_a_new_leader_uses_the_mean_of_the_ledger() -> None:
    assert limit_s([1.0] * 4, 30.0, 1, 5.0) == pytest.approx(60.0)
    assert limit_s([], None, 1, 5.0) is None


def test_a_definition_of_an_older_release_has_no_copies() -> None:
    made = job(StageDef(A, handler="sim:task", speculative_copies=True))
    doc = json_format.job_to_json(made)
    assert json_format.job_from_json(doc) == made
    del doc["stages"][0]["speculative_copies"]
    assert not json_format.job_from_json(doc).stages[0].may_be_copied


def test_a_definition_without_copies_is_readable_by_an_older_release() -> None:
    doc = json_format.job_to_json(job(StageDef(A, handler="sim:task")))
    assert not {"side_effects", "speculative_copies"} & doc["stages"][0].keys()
    assert doc["id"] == JobId("job")


def test_tasks_with_side_effects_are_never_copied() -> None:
    assert not StageDef(A, side_effects=True, speculative_copies=True).may_be_copied
