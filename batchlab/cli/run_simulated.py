"""`batchlab run --backend sim`: a job's own handlers in virtual time.

The module is separate from `run`, because the simulator takes half a second to import.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path

import typer

from batchlab.cli import output
from batchlab.cli.run_job import pools_for
from batchlab.cli.submission import default_folder
from batchlab.core.pricing.price_book import load as load_prices
from batchlab.jobs.job_file import load
from batchlab.reports.tables.build import Setting
from batchlab.runtime import factory
from batchlab.sim.job_run import REPORT, SimulatedRun, run_job

PRINTED = "printed.log"


def run_simulated(
    file: Path, out: Path | None, overrides: Mapping[str, str], *, workers: int | None, seed: int, json: bool
) -> None:
    """Run a job in the simulator and print its end; exit with 1 unless it succeeded."""
    jobfile = load(file, overrides)
    backend = factory.load("sim")
    pools = pools_for(backend, jobfile, workers) or backend.pools
    folder = out or default_folder(jobfile.job.name)
    output.check_folder(folder)
    # The handlers run in this process. Their output must not mix with the output of this command.
    with (folder / PRINTED).open("w") as printed, redirect_stdout(printed):
        setting = Setting(backend.name, pools, backend.pace, load_prices())
        with output.as_keyboard_interrupt():
            ended = run_job(jobfile, pools, seed=seed, out=folder, setting=setting)
    if json:
        output.show_json(
            {
                "job": ended.view,
                "virtual_s": ended.virtual_s,
                "instances": ended.instances,
                "out": str(folder),
                "report": str(folder / REPORT),
            }
        )
    else:
        output.show(_text(ended))
    if ended.view["state"] != "SUCCEEDED":
        raise typer.Exit(1)


def _text(ended: SimulatedRun) -> str:
    view = ended.view
    told = [
        f"{view['id']} {view['state']} after {output.span(ended.virtual_s)} of virtual time on "
        f"{output.count(ended.instances, 'simulated instance')}"
    ]
    if view["reason"]:
        told.append(view["reason"])
    told += [
        f"  {stage['name']}: {stage['succeeded']} of {stage['planned']} succeeded, "
        f"{stage['failed']} failed, {stage['cancelled']} cancelled, {stage['retried']} retried"
        for stage in view["stages"]
    ]
    told.append(f"Results in {ended.fetched.folder}, what the tasks printed in {PRINTED} there")
    told.append(f"How it went: batchlab report query summary {ended.fetched.folder / REPORT}")
    return "\n".join(told)
