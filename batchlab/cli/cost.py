"""`batchlab cost`: estimates and bills of the cost on AWS.

Invariant: an estimate lists each value that it assumes.

`batchlab prices`: the price book with its sources.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from batchlab.cli import output
from batchlab.cli.options import FILE, HOME, JOB, JSON, POOL, SET, argument, home_of, option
from batchlab.core.errors import BackendError, UsageError
from batchlab.core.pricing.estimate import MEASURED, Estimate, Policy, PoolPlan, Three, loads
from batchlab.core.pricing.estimate import estimate as compute_estimate
from batchlab.core.pricing.price_book import load as load_prices
from batchlab.runtime.home import Home

if TYPE_CHECKING:
    from batchlab.core.model import Pool
    from batchlab.core.pricing.price_book import PriceBook
    from batchlab.jobs.job_file import JobFile
    from batchlab.runtime.factory import Backend

app = typer.Typer(no_args_is_help=True)
prices_app = typer.Typer(no_args_is_help=True)


def register(root: typer.Typer) -> None:
    """Add the groups `cost` and `prices` to the root command."""
    root.add_typer(app, name="cost")
    root.add_typer(prices_app, name="prices")


TYPES = option("Instance type on AWS of pools without one. May be repeated.", "[POOL=]TYPE")


@app.callback()
def cost() -> None:
    """Compute what a run costs on AWS, in USD.

    The commands use list prices, before the run or after it.

    \b
    Example: batchlab cost estimate job.yaml --seconds 2.5
    """


@app.command()
def estimate(
    file: Path = FILE,
    set_: list[str] | None = SET,
    seconds: list[str] | None = option(
        "Seconds per task, or a range. May be repeated. Default: as in an earlier run.", "[STAGE=]S[-S]"
    ),
    tasks: list[str] | None = option(
        "Number of tasks of the first stages, or of one stage, if the input cannot be counted. May be repeated.",
        "[STAGE=]N",
    ),
    pool: list[str] | None = POOL,
    instance_type: list[str] | None = TYPES,
    spot: float = option("Percentage of Spot instances.", default=0.0, min=0, max=100),
    results: str = option(
        "Size of the results that will be fetched, such as 500MB. Default: as at the last fetch.", "SIZE", default=""
    ),
    home: Path | None = HOME,
    json: bool = JSON,
) -> None:
    """Estimate the cost of a run of a job file, as a range for each item.

    \b
    Example: batchlab cost estimate job.yaml --seconds 2-5 --pool default:0-20x2 --spot 80
    """
    from batchlab.cli.submission import overrides

    if 0 < spot < 1:
        raise UsageError(
            f"--spot is a percentage, and {spot:g} is less than 1%.", remedy=f"Write --spot {spot * 100:g}."
        )
    request = EstimateRequest(
        file,
        home_of(home),
        overrides(set_ or ()),
        tuple(seconds or ()),
        tuple(tasks or ()),
        tuple(pool or ()),
        tuple(instance_type or ()),
        spot / 100,
        results,
    )
    estimate = estimate_job(request)
    if json:
        output.show_json(estimate.to_json())
    else:
        output.show(text(estimate))


@app.command()
def bill(job: str = JOB, instance_type: list[str] | None = TYPES, home: Path | None = HOME, json: bool = JSON) -> None:
    """Show the bill of a job on AWS, or what it would have cost there.

    The items are compute, wasted work, idle time, requests, storage, and data out of AWS.

    \b
    Example: batchlab cost bill last --instance-type c7g.large
    """
    from batchlab.cli.bills import bill_of, bill_text
    from batchlab.runtime import factory

    place = home_of(home)
    record = place.record()
    pools = factory.load(record.backend if record else "local").pools
    types = by_name(instance_type or (), [pool.name for pool in pools])
    view, bill = bill_of(place, job, types)
    if json:
        output.show_json({"job": view["id"], "state": view["state"], **bill.to_json()})
    else:
        output.show(bill_text(view, bill))


DEFAULT_TYPE = "m7i.large"
"""Instance type of a pool without one."""
LOOKED_BACK = 200
"""Most recent jobs that are searched for an earlier run."""


@dataclass(frozen=True, slots=True)
class EstimateRequest:
    """Arguments of an estimate. `spot` is a share from 0 to 1."""

    file: Path
    home: Home
    overrides: Mapping[str, str]
    seconds: Sequence[str] = ()
    tasks: Sequence[str] = ()
    pools: Sequence[str] = ()
    types: Sequence[str] = ()
    spot: float = 0.0
    results: str = ""
    """Size of the fetched results; empty if unknown."""


def estimate_job(request: EstimateRequest) -> Estimate:
    """Return the estimate; raise UsageError or JobFileErrors."""
    from batchlab.core.model import JobId
    from batchlab.jobs import job_file
    from batchlab.jobs.job_file import compile_job
    from batchlab.runtime import factory

    jobfile = job_file.load(request.file, request.overrides, needs_input=not request.tasks)
    job = compile_job(jobfile, job_id=JobId("estimate"), token="", code_key=None, input_keys=(), submitted_s=0.0)
    names = [str(stage.name) for stage in job.stages]
    roots = [str(stage.name) for stage in job.roots()]
    given = {n: _whole(text) for n, text in by_name(request.tasks, names, all_=roots).items()}
    told = {name: _seconds(text) for name, text in by_name(request.seconds, names).items()}
    assumed: list[str] = []
    if len(told) < len(names):
        measured, whence = _measured(request.home, jobfile.job.name)
        told = {**{n: s for n, s in measured.items() if n in names}, **told}
        assumed += [whence] if whence else []
    root_tasks, size_bytes, files = 0, 0, 0
    if not set(roots) <= given.keys():
        jobfile = job_file.load(request.file, request.overrides)
        root_tasks, files, size_bytes = asyncio.run(count(jobfile))
    stages, more = loads(job.stages, root_tasks, told, given)
    backend = factory.load("aws")
    pools = plan_pools(request, backend, sorted({stage.pool for stage in stages}), assumed)
    return compute_estimate(
        stages,
        pools,
        load_prices(request.home.path),
        Policy(backend.manager.drain_target_s, backend.manager.idle_s, backend.pace),
        input_files=files,
        input_bytes=size_bytes,
        result_bytes=_results(request, jobfile.job.name, assumed),
        assumed=[*assumed, *more],
    )


def by_name(texts: Sequence[str], names: Sequence[str], *, all_: Sequence[str] | None = None) -> dict[str, str]:
    """Parse `NAME=VALUE` for one name and `VALUE` for all others (or for `all_`).

    Raise UsageError for an unknown name.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.rpartition("=")
        if equals and name not in names:
            raise UsageError(
                f"{text!r} names {name!r}, which does not exist.", remedy=f"Name one of {', '.join(names)}."
            )
        if equals:
            found[name] = value
        else:
            found = {**dict.fromkeys(names if all_ is None else all_, value), **found}
    return found


def _results(request: EstimateRequest, name: str, assumed: list[str]) -> int | None:
    """Return the size of fetched results as given, or as in an earlier run, or None.

    An earlier run is noted in `assumed`.
    """
    from batchlab.core import text as units
    from batchlab.runtime import home as fetches

    if request.results:
        try:
            return units.size_bytes(request.results)
        except ValueError as error:
            raise UsageError(f"{error}.", remedy="Write for example --results 500MB.") from error
    if (known := fetches.last_fetch(request.home, name)) is None:
        return None
    job, size_bytes = known
    assumed.append(f"results are as large as those of {job} that were fetched to here")
    return size_bytes


def _whole(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text) <= 10**10:
        raise UsageError(f"{text!r} is not a number of tasks.", remedy="Write for example 1000.")
    return int(text)


def _seconds(text: str) -> Three:
    """Parse `2.5`, or a range such as `1-4`."""
    try:
        low, _, high = text.partition("-")
        span = (float(low), float(high or low))
    except ValueError:
        span = (0.0, 0.0)
    if not 0 < span[0] <= span[1] < 1e8:
        raise UsageError(f"{text!r} is not a number of seconds.", remedy="Write for example 2.5, or a range: 1-4.")
    return (span[0], (span[0] * span[1]) ** 0.5, span[1])


async def count(jobfile: JobFile) -> tuple[int, int, int]:
    """Return tasks, files, and bytes of a job's input, split like the planner splits it.

    Raise UsageError if the input is not on this machine.
    """
    from batchlab.adapters.local.objects import open_local
    from batchlab.core.job_definition import InputDef, SplitBy
    from batchlab.jobs.job_file import task_size
    from batchlab.manager.input_split import items

    tasks = size_bytes = 0
    how = SplitBy(jobfile.job.input.split)
    for file in jobfile.files:
        if not isinstance(file, Path):
            raise UsageError(
                f"The tasks of {file} cannot be counted from here.", remedy="Say how many there are with --tasks N."
            )
        size_bytes += file.stat().st_size
        if how is SplitBy.FILE:
            tasks += 1
            continue
        raw = InputDef((file.name,), how, task_size(jobfile.job), jobfile.job.input.header)
        async for _ in items(open_local(file.parent), raw):
            tasks += 1
    return tasks, len(jobfile.files), size_bytes


# --- Earlier runs --------------------------------------------------------------------------------


def _measured(home: Home, name: str) -> tuple[dict[str, Three], str]:
    """Return seconds per task by stage of the last run of a job, and a sentence on that run."""
    for job, means in _earlier(home, name):
        found: dict[str, Three] = {}
        for stage, mean_s in means.items():
            low, typical, high = (mean_s * factor for factor in MEASURED)
            found[stage] = (low, typical, high)
        if found:
            return found, f"a task takes as long as in {job} on the machine that ran it"
    return {}, ""


def _earlier(home: Home, name: str) -> list[tuple[str, dict[str, float]]]:
    if home.record() is not None:
        from batchlab.cli.session import connect

        with connect(home) as client, suppress(BackendError):
            views = client.jobs(limit=LOOKED_BACK)
            return [
                (v["id"], {s["name"]: s["mean_s"] for s in v["stages"] if s["mean_s"]})
                for v in views
                if v["name"] == name
            ]
    if home.ledger_file.exists():
        return asyncio.run(_in_ledger(home, name))
    return []


async def _in_ledger(home: Home, name: str) -> list[tuple[str, dict[str, float]]]:
    """Return earlier runs from the ledger of a grid that is down."""
    from batchlab.runtime import factory

    ledger = factory.load("local").open_ledger(home)
    try:
        records = await ledger.jobs(limit=LOOKED_BACK)
        found = []
        for record in records:
            if record.job.name == name:
                rows = await ledger.rows(record.job.id)
                means = {str(s.counts.stage): s.counts.mean_s or 0.0 for s in rows.stages}
                found.append((str(record.job.id), {k: v for k, v in means.items() if v}))
        return found
    finally:
        await ledger.close()


# --- Pools ---------------------------------------------------------------------------------------


def plan_pools(request: EstimateRequest, backend: Backend, names: Sequence[str], assumed: list[str]) -> list[PoolPlan]:
    """Return the job's pools as they would be on AWS. Note assumptions in `assumed`."""
    from batchlab.cli.options import parse_pools
    from batchlab.core import instance_types

    types = by_name(request.types, names)
    known: dict[str, Pool] = {pool.name: pool for pool in backend.pools}
    own = {pool.name: pool for pool in parse_pools(request.pools)}
    pool_plans: list[PoolPlan] = []
    for name in names:
        base = own.get(name) or known.get(name)
        kind = types.get(name) or (known[name].instance_type if name in known else "")
        if not kind:
            kind = DEFAULT_TYPE
            assumed.append(f"pool {name} is of {kind}, unless --instance-type says otherwise")
        row = instance_types.load().types.get(kind)
        if base is None:
            slots = row.vcpu if row else 2
            plan = PoolPlan(name, kind, slots, 0, 10)
            assumed.append(f"pool {name} has up to 10 instances of {slots} slots, unless --pool says otherwise")
        else:
            plan = PoolPlan(name, kind, base.slots, base.min_size, base.max_size, base.boot_s)
        pool_plans.append(replace(plan, spot_share=request.spot))
    return pool_plans


def text(found: Estimate) -> str:
    """Return the estimate as text."""
    rows = [
        (item.what, *(f"{usd:.4f}" for usd in (item.usd.low, item.usd.typical, item.usd.high)), item.how)
        for item in found.items
    ]
    usd = found.usd
    rows.append(("all", f"{usd.low:.4f}", f"{usd.typical:.4f}", f"{usd.high:.4f}", ""))
    low, typical, high = (output.span(span_s) for span_s in found.span_s)
    return "\n".join(
        [
            f"It will cost {usd}, and take {typical} ({low} to {high}).",
            "",
            output.table(("USD", "from", "typical", "to", "how"), rows),
            "",
            f"Prices: {found.prices}, before tax, free tiers and discounts.",
            *(f"Assumed: {one}." for one in found.assumed),
        ]
    )


@prices_app.callback()
def prices() -> None:
    """Show and update the price book.

    \b
    Example: batchlab prices show
    """


@prices_app.command()
def show(
    types: list[str] | None = argument("Only these instance types.", "TYPE", default=None),
    home: Path | None = HOME,
    json: bool = JSON,
) -> None:
    """Show prices with their region, date, and source.

    \b
    Example: batchlab prices show m7i.large c7g.large
    """
    from batchlab.core.pricing.price_book import load

    book = load(home_of(home).path)
    for name in types or ():
        book.instance_usd_h(name)  # raises UsageError for an unknown type
    if json:
        output.show_json(_json(book, types))
    else:
        output.show(_text(book, types))


def _json(book: PriceBook, types: list[str] | None) -> dict[str, object]:
    blocks = {
        name: {
            "region": block.region,
            "date": block.date.isoformat(),
            "source": block.source,
            **block.prices,
            **({"usd_per_hour": _some(block.table, types, name)} if block.table else {}),
        }
        for name, block in book.blocks.items()
    }
    return {"currency": "USD", "path": str(book.path), "blocks": blocks}


def _some(table: object, types: list[str] | None, block: str) -> object:
    if types is None or block == "rds" or not isinstance(table, dict):
        return table
    return {name: price for name, price in table.items() if name in types}


def _text(book: PriceBook, types: list[str] | None) -> str:
    from batchlab.core.model import Market

    names = types or sorted(book.blocks["on_demand"].table)
    instances = []
    for name in names:
        spot = book.instance_usd_h(name, Market.SPOT)
        figures = (book.instance_usd_h(name).typical, spot.low, spot.typical, spot.high)
        instances.append((name, *(f"{usd:.4f}" for usd in figures)))
    columns = ("instance, USD/h", "on-demand", "Spot from", "typical", "to")
    others = [
        (name, f"{key.replace('_', ' ').replace('usd', 'USD')}", f"{price:g}")
        for name, block in book.blocks.items()
        for key, price in block.prices.items()
    ]
    others += [("rds", f"{name} USD per hour", f"{price:g}") for name, price in book.blocks["rds"].table.items()]
    sources = [(name, block.region, block.date.isoformat(), block.source) for name, block in book.blocks.items()]
    parts = [output.table(columns, instances)]
    if types is None:
        parts.append(output.table(("block", "price", "amount"), others))
    parts.append(output.table(("block", "region", "as of", "source"), sources))
    return "\n\n".join([*parts, f"Price book: {book.path}"])


@prices_app.command()
def refresh(
    from_: Path = option(
        "AWS's price list of AmazonEC2, AmazonRDS, or AWSDataTransfer (CSV or JSON), the "
        "output of `aws ec2 describe-spot-price-history`, or a CSV of on-demand prices.",
        "FILE",
        "--from",
        default=...,
    ),
    region: str = option("Region, if the file has several.", default=""),
    date: datetime | None = option("Date of the prices, if the file does not have one.", formats=["%Y-%m-%d"]),
    home: Path | None = HOME,
    json: bool = JSON,
) -> None:
    """Copy newer prices from a file to the grid's price book, which overrides the shipped one.

    \b
    Example: batchlab prices refresh --from AmazonEC2.csv --region us-east-1
    """
    from batchlab.core.atomic_write import write_whole
    from batchlab.core.pricing import price_refresh
    from batchlab.core.pricing.price_book import NAME, load, write

    place = home_of(home)
    found = price_refresh.find(from_, region=region, day=date.date() if date else None)
    book = price_refresh.refreshed(load(place.path), found)
    place.make()
    path = place.path / NAME
    # Prices are public, and the manager of a grid in containers may be another user.
    write_whole(path, write(book), mode=0o644)
    if json:
        output.show_json(
            {
                "path": str(path),
                "block": found.block,
                "region": found.region,
                "date": found.date.isoformat(),
                "types": len(found.table),
                "prices": dict(found.prices),
            }
        )
        return
    output.show(
        f"{output.count(found.count, 'price')} of [{found.block}] for {found.region}, as of "
        f"{found.date.isoformat()}, are in {path}."
    )
    others = sorted(b.name for b in book.blocks.values() if b.region != found.region)
    if others:
        output.say(f"Still of another region: {', '.join(others)}. Their prices are few: write them into that file.")
