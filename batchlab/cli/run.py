"""`batchlab run`, `demo`, and `init`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from batchlab.cli import options, output
from batchlab.cli.options import (
    AS_IF,
    BACKEND,
    ENDPOINT,
    FILE,
    HOME,
    JSON,
    MAX_COST,
    OUT,
    SET,
    argument,
    cap_of,
    flag,
    home_of,
    option,
)
from batchlab.core.capabilities import capabilities_of
from batchlab.core.errors import UsageError

if TYPE_CHECKING:
    from batchlab.cli.run_job import Summary

RESUME = flag("Resume the interrupted run, if there is one.", "--resume")


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (demo, init, run):
        app.command()(command)


def run(
    file: Path = FILE,
    out: Path | None = OUT,
    set_: list[str] | None = SET,
    resume: bool = RESUME,
    cache: bool = flag("Use the results of the last run if nothing has changed.", "--cache"),
    workers: int | None = option("Most workers per pool. Default: the number of CPUs.", min=1),
    keep_up: bool = flag("Keep the grid running for the next job.", "--keep-up"),
    home: Path | None = HOME,
    backend: str = BACKEND,
    endpoint: str | None = ENDPOINT,
    max_cost: str | None = MAX_COST,
    as_if_aws: bool = AS_IF,
    seed: int = option("Seed of a simulated run (--backend sim).", default=1),
    json: bool = JSON,
) -> None:
    """Run a job file to its end and fetch its results.

    The command starts a grid and stops it at the end, unless one is running already. After an
    interruption, the same command with --resume continues the job. With --backend sim the job's
    own code runs on a grid in virtual time, and only the results are kept.

    \b
    Example: batchlab run job.yaml --out out/claims --set year=2026
    """
    from batchlab.cli.submission import overrides
    from batchlab.runtime import factory

    if capabilities_of(backend).simulated:
        if resume or cache or keep_up:
            raise UsageError(
                "A simulated run cannot be resumed or reused.", remedy="Leave out --resume, --cache and --keep-up."
            )
        if max_cost or as_if_aws:
            raise UsageError(
                "A simulated run does not record costs.",
                remedy="Leave out --max-cost and --as-if-aws, or use `batchlab cost estimate`.",
            )
        from batchlab.cli.run_simulated import run_simulated

        factory.load(backend, endpoint)
        changes = overrides(set_ or ())
        run_simulated(file, out, changes, workers=workers, seed=seed, json=json)
        return
    from batchlab.cli import run_job
    from batchlab.cli.run_job import Phases

    request = run_job.RunRequest(
        file=file,
        home=home_of(home),
        backend=backend,
        endpoint=endpoint,
        again=again(sys.argv[1:]),
        out=out,
        overrides=overrides(set_ or ()),
        resume=resume,
        cache=cache,
        workers=workers,
        keep_up=keep_up,
        max_cost_usd=cap_of(max_cost) if max_cost else None,
        as_if_aws=as_if_aws,
    )
    show_summary(run_job.run(request, Phases.of_process()), json=json)


def show_summary(summary: Summary, *, json: bool) -> None:
    """Print the summary of a run; exit with 1 unless it succeeded."""
    if json:
        output.show_json(summary.to_json())
    else:
        output.show(summary.text())
    if summary.job["state"] != "SUCCEEDED":
        raise typer.Exit(1)


def again(arguments: Iterable[str]) -> str:
    """Return the command line that resumes this one."""
    same = [argument for argument in arguments if argument not in ("--resume", "--debug")]
    return shlex.join(["batchlab", *same, "--resume"])


def demo(
    out: Path | None = OUT,
    seed: int = option("Seed of the generated claims.", default=1),
    files: int = option("Number of files of claims.", default=100, min=1),
    claims_per_file: int = option("Claims in each file.", default=40, min=1),
    resume: bool = RESUME,
    home: Path | None = HOME,
    backend: str = BACKEND,
    endpoint: str | None = ENDPOINT,
    json: bool = JSON,
) -> None:
    """Run a demo job on generated insurance claims.

    The command writes a month-end of claims and the job's code into the grid's folder, runs the job
    like `run`, and compares the totals with those of the generator.

    \b
    Example: batchlab demo --files 400
    """
    from batchlab.cli import demo as claims_demo
    from batchlab.cli import run_job
    from batchlab.cli.run_job import Phases

    phases = Phases.of_process()
    with phases.phase("data"):
        prepared = claims_demo.prepare(home_of(home), seed=seed, files=files, claims_per_file=claims_per_file)
    request = run_job.RunRequest(
        file=prepared.job_file,
        home=home_of(home),
        backend=backend,
        endpoint=endpoint,
        again=again(sys.argv[1:]),
        out=out,
        resume=resume,
    )
    summary = run_job.run(request, phases)
    verdict = claims_demo.check(prepared, summary)
    if json:
        output.show_json({**summary.to_json(), "totals": verdict.to_json()})
    else:
        output.show(f"{summary.text()}\n\n{verdict.text()}")
    if not verdict.agrees:
        raise typer.Exit(1)


def init(
    folder: Path = argument("Folder for the files.", "DIR", default=Path(), show_default="here"),
    example: str | None = option(
        "A shipped example instead of the small starter job: claims (three stages), "
        "transform (CSV to Parquet), media (video), or sort (more than a worker's memory).",
        "NAME",
        autocompletion=options.examples,
    ),
) -> None:
    """Write the files of a first job.

    They are a job file, its code, and data for it. Existing files are not replaced.

    \b
    Example: batchlab init first && batchlab run first/job.yaml
    """
    from batchlab.cli.demo import DATA, check_free, example_files, make_data, starter_files, write

    if example is None:
        output.say(f"Wrote {', '.join(write(folder, starter_files()))}.")
    else:
        files = example_files(example)
        check_free(folder, [*files, DATA])
        # The data comes first: if it cannot be generated, nothing else is written.
        data = make_data(example, folder / DATA)
        output.say(f"Wrote {', '.join(write(folder, files))}, and {data} into {DATA}.")
    output.say(f"Now run it: batchlab run {shlex.quote(str(folder / 'job.yaml'))}")
