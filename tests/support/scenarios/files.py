"""A scenario file that tests change, and a function that returns its errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchlab.core.errors import JobFileError
from batchlab.jobs.yaml_source import JobFileErrors
from batchlab.scenarios.model import loader
from batchlab.scenarios.model.values import Scenario
from tests.support.mistakes import complete

FULL = """\
name: evening
about: A peak. It teaches.
zones: 2
jobs:
  claims:
    tasks: {lognormal: {median: 20, sigma: 0.5}}
    deadline: 1h
    stages:
      - {name: parse, task: 4s}
      - {name: sum, gather: all, task: 5s}
  small: {task: 2s}
arrivals:
  - {job: claims, poisson: {per_hour: 60, until: 1h}}
  - {job: small, at: [0s, {at: 5m, count: 3}]}
pools:
  default: {max: 4, slots: 2, instance_type: m7i.large, spot: 0.5}
policy: {drain_target: 5m}
prewarm: [{min: 2, at: 10m, until: 20m}]
faults: [{at: 30m, fault: kill, count: 1}]
expect: {late: 0, cost: 2 USD, jobs: {claims: {p95_wait: 5m}}}
"""


def load(folder: Path, text: str = FULL) -> Scenario:
    """Write a scenario file into `folder`, and load it."""
    (folder / "s.yaml").write_text(text)
    return loader.load(folder / "s.yaml")


def refused(folder: Path, text: str) -> tuple[JobFileError, ...]:
    """Return the errors of loading a scenario, after checking that each error is complete."""
    with pytest.raises(JobFileErrors) as caught:
        load(folder, text)
    return complete(caught.value.errors, folder / "s.yaml", text)


def changed(old: str, new: str) -> str:
    """Return FULL with its only occurrence of `old` replaced."""
    assert FULL.count(old) == 1, old
    return FULL.replace(old, new)
