"""The record of downloaded results in a home, one line per download."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from batchlab.runtime import home as fetches
from batchlab.runtime.home import Home

JOB, OTHER = "sums-0123456789", "sums-abcdef0123"


@pytest.fixture
def home(tmp_path: Path) -> Home:
    made = Home(tmp_path / "home")
    made.make()
    return made


def test_fetches_of_a_job_add_up(home: Home) -> None:
    assert fetches.fetched_bytes(home, JOB) == 0
    for size in (100, 250):
        fetches.record_fetch(home, JOB, size)
    fetches.record_fetch(home, OTHER, 7)
    assert fetches.fetched_bytes(home, JOB) == 350
    assert fetches.fetched_bytes(home, OTHER) == 7


def test_the_last_fetch_of_a_job_of_that_name(home: Home) -> None:
    assert fetches.last_fetch(home, "sums") is None
    for job, size in ((JOB, 100), (OTHER, 250), ("sums-more-0123456789", 9), ("sum-0123456789", 8)):
        fetches.record_fetch(home, job, size)
    assert fetches.last_fetch(home, "sums") == (OTHER, 250)
    assert fetches.last_fetch(home, "su.s") is None


def test_invalid_line_is_reported_and_skipped(home: Home, caplog: pytest.LogCaptureFixture) -> None:
    fetches.record_fetch(home, JOB, 100)
    with home.fetched_file.open("a") as file:
        file.write('{"job": "sums\n[]\n{"job": "x"}\n')
    fetches.record_fetch(home, JOB, 1)
    with caplog.at_level(logging.WARNING):
        assert fetches.fetched_bytes(home, JOB) == 101
    assert len(caplog.records) == 3


def test_results_arrive_even_if_the_record_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fetches.record_fetch(Home(tmp_path / "nowhere"), JOB, 1)
    assert "cannot be written: No such file" in caplog.text
