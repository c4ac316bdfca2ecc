"""`run --backend sim`: the job in virtual time, with its real handlers."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path

import typer

from batchlab import backends
from batchlab.cli import output, signals
from batchlab.cli.runner import pools_for
from batchlab.cli.watching import default_folder
from batchlab.costs.prices import load as load_prices
from batchlab.report.building import Setting
from batchlab.sim.job import REPORT, Simulated, run_job
from batchlab.spec.jobfile import load

PRINTED = "printed.log"


def run(
    file: Path,
    out: Path | None,
    overrides: Mapping[str, str],
    *,
    workers: int | None,
    seed: int,
    json: bool,
) -> None:
    """Run, fetch, tell; exits with 1 unless the job succeeded."""
    jobfile = load(file, overrides)
    backend = backends.load("sim")
    pools = pools_for(backend, jobfile, workers) or backend.pools
    folder = out or default_folder(jobfile.job.name)
    output.check_folder(folder)
    # The handlers run in this process; what they print must not mix with what we answer.
    with (folder / PRINTED).open("w") as printed, redirect_stdout(printed):
        setting = Setting(backend.name, pools, backend.pace, load_prices())
        with signals.as_keyboard_interrupt():
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


def _text(ended: Simulated) -> str:
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
