"""Command `batchlab run`, which runs a job file on a grid or in the simulator."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import ExitStack, redirect_stdout
from pathlib import Path

import typer

from batchlab.cli import output
from batchlab.cli.groups import Commands
from batchlab.cli.option_values import cap_of, home_of, parameters_of, resume_command
from batchlab.cli.options import AS_IF, BACKEND, ENDPOINT, FILE, HOME, JSON, MAX_COST, OUT, RESUME, SET, flag, option
from batchlab.core.capabilities import capabilities_of
from batchlab.core.errors import UsageError

app = Commands()


@app.command()
def run(
    file: Path = FILE,
    out: Path | None = OUT,
    set_: list[str] | None = SET,
    resume: bool = RESUME,
    cache: bool = flag(
        "Fetch the results of the last run if neither the job file nor its code and input have changed.", "--cache"
    ),
    workers: int | None = option("Maximum number of workers per pool. Default: the number of CPUs.", min=1),
    keep_up: bool = flag("Keep the grid running after the end of the job.", "--keep-up"),
    home: Path | None = HOME,
    backend: str = BACKEND,
    endpoint: str | None = ENDPOINT,
    max_cost: str | None = MAX_COST,
    as_if_aws: bool = AS_IF,
    seed: int = option("Seed of the random values in a simulated run (--backend sim).", default=1),
    json: bool = JSON,
) -> None:
    """Run a job file to its end and fetch its results.

    The command starts a grid and stops the grid after the job, unless the grid is running already.
    After an interruption, the same command with --resume continues the job. With --backend sim, the
    job's own code runs on a grid in virtual time, and the command keeps only the job's results.

    \b
    Example: batchlab run job.yaml --out out/claims --set year=2026
    """
    from batchlab.cli import run_job
    from batchlab.runtime import factory

    parameters = parameters_of(set_)
    if capabilities_of(backend).simulated:
        if resume or cache or keep_up:
            remedy = "Leave out --resume, --cache, and --keep-up."
            raise UsageError("A simulated run cannot be resumed or reused.", remedy=remedy)
        if max_cost or as_if_aws:
            remedy = "Leave out --max-cost and --as-if-aws, or use `batchlab cost estimate`."
            raise UsageError("A simulated run does not record costs.", remedy=remedy)
        factory.load(backend, endpoint)
        run_simulated(file, out, parameters, workers=workers, seed=seed, json=json)
        return
    request = run_job.RunRequest(
        file=file,
        home=home_of(home),
        backend=backend,
        endpoint=endpoint,
        again=resume_command(sys.argv[1:]),
        out=out,
        overrides=parameters,
        resume=resume,
        cache=cache,
        workers=workers,
        keep_up=keep_up,
        max_cost_usd=cap_of(max_cost) if max_cost else None,
        as_if_aws=as_if_aws,
    )
    summary = run_job.run(request, run_job.Phases.of_process())
    output.answer(json, summary.to_json(), summary.text())
    if summary.job["state"] != "SUCCEEDED":
        raise typer.Exit(1)


PRINTED = "printed.log"


def run_simulated(
    file: Path, out: Path | None, overrides: Mapping[str, str], *, workers: int | None, seed: int, json: bool
) -> None:
    """Run a job in the simulator, and print the summary. Exit with code 1 unless the job succeeded."""
    # The import of the simulator takes half a second, so only this function imports the simulator.
    from batchlab.cli.run_job import pools_for
    from batchlab.cli.submission import default_folder
    from batchlab.core.pricing.price_book import load as load_prices
    from batchlab.jobs.job_file import load
    from batchlab.reports.tables.build import Setting
    from batchlab.runtime import factory
    from batchlab.sim.job_run import REPORT, run_job

    jobfile = load(file, overrides)
    backend = factory.load("sim")
    pools = pools_for(backend, jobfile, workers) or backend.pools
    folder = out or default_folder(jobfile.job.name)
    output.check_folder(folder)
    setting = Setting(backend.name, pools, backend.pace, load_prices())
    with ExitStack() as accepted, output.as_keyboard_interrupt():

        def on_accepted() -> None:
            # The job's handlers run in this process, so the output of the handlers is written to a file, separate from
            # the output of the command.
            folder.mkdir(parents=True, exist_ok=True)
            printed = accepted.enter_context((folder / PRINTED).open("w"))
            accepted.enter_context(redirect_stdout(printed))

        ended = run_job(jobfile, pools, seed=seed, out=folder, setting=setting, on_accepted=on_accepted)
    job, report = ended.view, folder / REPORT
    duration, instances = output.span(ended.virtual_s), output.count(ended.instances, "simulated instance")
    lines = [f"{job['id']} {job['state']} after {duration} of virtual time on {instances}"]
    if job["reason"]:
        lines.append(job["reason"])
    for stage in job["stages"]:
        counts = (f"{stage['failed']} failed", f"{stage['cancelled']} cancelled", f"{stage['retried']} retried")
        lines.append(f"  {stage['name']}: {stage['succeeded']} of {stage['planned']} succeeded, {', '.join(counts)}")
    lines.append(f"Results in {ended.fetched.folder}, output of the tasks in {PRINTED} there")
    lines.append(f"Summary of the run: batchlab report query summary {report}")
    figures = output.attributes(ended, "virtual_s", "instances")
    output.answer(json, {"job": job, **figures, "out": str(folder), "report": str(report)}, "\n".join(lines))
    if job["state"] != "SUCCEEDED":
        raise typer.Exit(1)
