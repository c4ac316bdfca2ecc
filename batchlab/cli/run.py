"""`run`, `demo` and `init`: from nothing to results.

`run --backend sim`: the job in virtual time, with its real handlers.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from batchlab.cli import completion, output, signals
from batchlab.cli.options import (
    AsIfOption,
    BackendOption,
    EndpointOption,
    FileArgument,
    HomeOption,
    JsonOption,
    MaxCostOption,
    OutOption,
    SetOption,
    cap_of,
    home_of,
)
from batchlab.cli.run_job import pools_for
from batchlab.cli.submission import default_folder
from batchlab.core.capabilities import capabilities_of
from batchlab.core.errors import UsageError
from batchlab.core.pricing.price_book import load as load_prices
from batchlab.jobs.job_file import load
from batchlab.reports.tables.build import Setting
from batchlab.runtime import factory
from batchlab.sim.job_run import REPORT, Simulated, run_job

if TYPE_CHECKING:
    from batchlab.cli.summary import Summary

ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Go on with the run that was interrupted, if there is one.")
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (demo, init, run):
        app.command()(command)


def run(
    file: FileArgument,
    out: OutOption = None,
    set_: SetOption = None,
    resume: ResumeOption = False,
    cache: Annotated[
        bool, typer.Option("--cache", help="Take the results of the last run if nothing changed.")
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers", min=1, help="Most workers per pool; as many as CPUs unless said."
        ),
    ] = None,
    keep_up: Annotated[
        bool, typer.Option("--keep-up", help="Leave the grid up for the next job.")
    ] = False,
    home: HomeOption = None,
    backend: BackendOption = "local",
    endpoint: EndpointOption = None,
    max_cost: MaxCostOption = None,
    as_if_aws: AsIfOption = False,
    seed: Annotated[
        int, typer.Option("--seed", help="With --backend sim: another seed, another course.")
    ] = 1,
    json: JsonOption = False,
) -> None:
    """Run a job file to its end and fetch its results.

    A grid is brought up for it, and taken down again, unless one is up already. Interrupted, it
    loses nothing: the same command with --resume goes on. With --backend sim the job's own code
    runs on a grid in virtual time, of which nothing is kept but the results.

    \b
    Example: batchlab run job.yaml --out out/claims --set year=2026
    """
    from batchlab.cli.submission import overrides
    from batchlab.runtime import factory

    if capabilities_of(backend).simulated:
        if resume or cache or keep_up:
            raise UsageError(
                "The simulator keeps nothing to go on with.",
                remedy="Leave out --resume, --cache and --keep-up.",
            )
        if max_cost or as_if_aws:
            raise UsageError(
                "The simulator keeps no account.",
                remedy="Leave out --max-cost and --as-if-aws; `batchlab cost estimate` reckons.",
            )
        factory.load(backend, endpoint)
        changes = overrides(set_ or ())
        run_simulated(file, out, changes, workers=workers, seed=seed, json=json)
        return
    from batchlab.cli import run_job as runner
    from batchlab.cli.summary import Phases

    request = runner.Request(
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
    tell(runner.run(request, Phases.of_process()), json=json)


def tell(summary: Summary, *, json: bool) -> None:
    """Print how a run ended; exits with 1 unless it succeeded."""
    if json:
        output.show_json(summary.to_json())
    else:
        output.show(summary.text())
    if summary.job["state"] != "SUCCEEDED":
        raise typer.Exit(1)


def again(arguments: Iterable[str]) -> str:
    """The command line that goes on with this one."""
    kept = [one for one in arguments if one not in ("--resume", "--debug")]
    return shlex.join(["batchlab", *kept, "--resume"])


def demo(
    out: OutOption = None,
    seed: Annotated[int, typer.Option("--seed", help="Another seed makes other claims.")] = 1,
    files: Annotated[int, typer.Option("--files", min=1, help="Files of claims to make.")] = 100,
    claims_per_file: Annotated[
        int, typer.Option("--claims-per-file", min=1, help="Claims in each of them.")
    ] = 40,
    resume: ResumeOption = False,
    home: HomeOption = None,
    backend: BackendOption = "local",
    endpoint: EndpointOption = None,
    json: JsonOption = False,
) -> None:
    """See it work on made-up insurance claims.

    Writes a month-end of claims and the job's code into the grid's folder, runs the job as `run`
    does, and compares the totals with what the generator says of its claims.

    \b
    Example: batchlab demo --files 400
    """
    from batchlab.cli import demo as claims_demo
    from batchlab.cli import run_job as runner
    from batchlab.cli.summary import Phases

    phases = Phases.of_process()
    with phases.phase("data"):
        prepared = claims_demo.prepare(
            home_of(home), seed=seed, files=files, claims_per_file=claims_per_file
        )
    request = runner.Request(
        file=prepared.job_file,
        home=home_of(home),
        backend=backend,
        endpoint=endpoint,
        again=again(sys.argv[1:]),
        out=out,
        resume=resume,
    )
    summary = runner.run(request, phases)
    verdict = claims_demo.check(prepared, summary)
    if json:
        output.show_json({**summary.to_json(), "totals": verdict.to_json()})
    else:
        output.show(f"{summary.text()}\n\n{verdict.text()}")
    if not verdict.agrees:
        raise typer.Exit(1)


def init(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder to write into.", show_default="here")
    ] = Path(),
    example: Annotated[
        str | None,
        typer.Option(
            "--example",
            metavar="NAME",
            help="In place of the small starter job: claims (three stages), transform (CSV to "
            "Parquet), media (video), or sort (more than a worker's memory).",
            autocompletion=completion.examples,
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write a first job of your own.

    It is a job file, its code, and some data to run it on. Nothing is replaced.

    \b
    Example: batchlab init first && batchlab run first/job.yaml
    """
    from batchlab.cli.demo import DATA, check_free, example_files, make_data, starter_files, write

    if example is None:
        output.say(f"Wrote {', '.join(write(folder, starter_files()))}.")
    else:
        files = example_files(example)
        check_free(folder, [*files, DATA])
        # First: what it needs may not be here, and then nothing is written.
        data = make_data(example, folder / DATA)
        output.say(f"Wrote {', '.join(write(folder, files))}, and {data} into {DATA}.")
    output.say(f"Now run it: batchlab run {shlex.quote(str(folder / 'job.yaml'))}")


PRINTED = "printed.log"


def run_simulated(
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
    backend = factory.load("sim")
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
