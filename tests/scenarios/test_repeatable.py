"""Repeatability: the same scenario, seed, and settings give the same log, byte for byte, in any process."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from dataclasses import replace

from batchlab.scenarios.forecast.simulate import simulate
from batchlab.scenarios.model.values import Fault, FaultName, Scenario
from tests.support.scenarios.small_scenarios import PARSE, PRICE, claims

FAULTS = (
    Fault(FaultName.KILL, 140.0, count=1),
    Fault(FaultName.S3_ERRORS, 150.0, 20.0),
    Fault(FaultName.SQS_DUPLICATES, 160.0, 20.0),
)


def plan() -> Scenario:
    return claims(replace(PARSE, fails=0.1), PRICE, jobs=2, tasks=10, faults=FAULTS)


def digest(seed: int) -> str:
    log: list[str] = []
    record = simulate(plan(), seed=seed, log=log)
    text = "".join(f"{line}\n" for line in log)
    assert record.log_digest == hashlib.sha256(text.encode()).hexdigest()
    assert len(log) > 500
    return record.log_digest


def test_log_does_not_depend_on_the_hash_seed() -> None:
    program = "from tests.scenarios.test_repeatable import digest; print(digest(3))"
    found = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for hash_seed in ("0", "12345")
    }
    assert found == {digest(3)}
    assert digest(4) not in found


def test_the_record_is_the_same_but_for_how_long_it_took() -> None:
    one, two = (replace(simulate(plan()), wall_s=0.0) for _ in range(2))
    assert one == two
