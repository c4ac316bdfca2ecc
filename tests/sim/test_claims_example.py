"""The claims job in the simulator with its real handlers, whose results equal those of other backends."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from batchlab.core.model import JobState, Pool
from batchlab.core.port_retries import Patience
from batchlab.core.ports import Objects
from batchlab.jobs import submission
from batchlab.jobs.job_file import load
from batchlab.sim import invariants, trial
from batchlab.sim.event_loop import SimLoop
from batchlab.sim.faults import Faults
from batchlab.sim.world import World
from batchlab.worker.inflight_message import Runner
from batchlab.worker.inline_child import InlineChildren, SimulatedTaskRunner
from examples.example_data import write_claims
from tests.support import ROOT

EXAMPLE = ROOT / "examples" / "claims"


def real_handlers(children: InlineChildren, world: World, die: Callable[[], None], objects: Objects) -> Runner:
    rng = world.rng("durations")
    return SimulatedTaskRunner(objects, world.clock, lambda _work, _task: rng.uniform(0.1, 2.0), children)


@pytest.mark.parametrize("crashes", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_claims_in_virtual_time_add_up(tmp_path: Path, crashes: bool) -> None:
    job_file = shutil.copytree(EXAMPLE, tmp_path / "claims") / "job.yaml"
    facts = write_claims(tmp_path / "claims" / "data", seed=4, files=15, claims_per_file=10)
    faults = Faults(random.Random(7), trial.CRASHES, budget=trial.BUDGET) if crashes else trial.calm(7)

    async def main(children: InlineChildren) -> None:
        pools = (Pool("default", 0, 3, 1, boot_s=10.0),)
        world = World(7, pools, faults=faults, make_runner=partial(real_handlers, children))
        supervisor = asyncio.create_task(world.supervise())
        job = await submission.prepare(
            load(job_file, {}),
            objects=world.objects,
            clock=world.clock,
            patience=Patience(world.rng("client")),
            token="t",
        )
        await world.submit(job)
        record = await world.ended(job.id)
        assert record.state is JobState.SUCCEEDED, record.reason
        await invariants.check_all(world, [job.id])
        results = await invariants.results_of(world.objects, world.ledger, job.id, "totals")
        totals = {row["payer"]: row for row in results.values()}
        assert set(totals) == set(facts.payers)
        for payer, truth in facts.payers.items():
            assert totals[payer]["claims"] == truth.claims
            assert totals[payer]["charge_cents"] == truth.charge_cents
        supervisor.cancel()
        await world.ledger.close()

    with InlineChildren() as children:
        SimLoop(inline_executor=True).run(main(children), limit_s=100_000)


@pytest.mark.slow
def test_run_with_the_sim_backend_gives_the_same_results(tmp_path: Path) -> None:
    """The test runs the command, and compares its results with the generator's facts."""
    job_file = shutil.copytree(EXAMPLE, tmp_path / "claims") / "job.yaml"
    facts = write_claims(tmp_path / "claims" / "data", seed=2, files=6, claims_per_file=5)
    command = [sys.executable, "-m", "batchlab", "run", str(job_file), "--backend", "sim"]
    answers = [
        subprocess.run(
            [*command, "--out", str(tmp_path / out), "--json"], capture_output=True, check=True, text=True
        ).stdout
        for out in ("one", "other")
    ]
    one, other = (json.loads(answer) for answer in answers)
    assert one["job"]["state"] == "SUCCEEDED"
    assert one["virtual_s"] == other["virtual_s"] > 10
    lines = (tmp_path / "one" / "totals.jsonl").read_text().splitlines()
    rows = [json.loads(line)["value"] for line in lines]
    assert {r["payer"]: r["claims"] for r in rows} == {payer: truth.claims for payer, truth in facts.payers.items()}


@pytest.mark.slow
def test_run_with_the_sim_backend_reports_a_handler_that_ends_its_process(tmp_path: Path) -> None:
    (tmp_path / "handlers.py").write_text(
        "import os\n\n\ndef run(item):\n    return os._exit(0) if '1' in item else item\n"
    )
    (tmp_path / "data.txt").write_text("0\n1\n2\n")
    (tmp_path / "job.yaml").write_text(
        "name: ending\ninput: {files: data.txt, split: lines, size: 1}\n"
        "stages:\n  - {name: run, python: 'handlers:run', retry: 1}\n"
    )
    command = [sys.executable, "-m", "batchlab", "run", str(tmp_path / "job.yaml")]
    ended = subprocess.run(
        [*command, "--backend", "sim", "--out", str(tmp_path / "out"), "--json"],
        capture_output=True,
        check=False,
        text=True,
    )
    assert ended.returncode == 1, ended.stderr
    view = json.loads(ended.stdout)["job"]
    assert view["state"] == "FAILED"
