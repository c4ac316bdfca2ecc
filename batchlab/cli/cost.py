"""Commands of `batchlab cost`: estimates and bills of the cost on AWS, and the price book and its sources.

Invariant: the output of `batchlab cost estimate` lists each value that the estimate assumes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from batchlab.cli import output
from batchlab.cli.groups import command_group
from batchlab.cli.option_values import connect, home_of, parameters_of, parse_pools
from batchlab.cli.options import FILE, HOME, JOB, JSON, POOL, SET, argument, option
from batchlab.client import task_times
from batchlab.core import text as units
from batchlab.core.atomic_write import write_whole
from batchlab.core.errors import BackendError, UsageError
from batchlab.core.job_definition import InputDef, SplitBy
from batchlab.core.model import JobId, Market, Pool
from batchlab.core.pricing.estimate import MEASURED, Estimate, Policy, PoolPlan, StageLoad, Three, loads
from batchlab.core.pricing.estimate import estimate as compute_estimate
from batchlab.core.pricing.price_book import NAME, Item, PriceBook, decimals, load, write
from batchlab.core.task_sizes import SizeWarning, TaskTimes, size_warnings
from batchlab.core.text import significant
from batchlab.runtime import home as fetches
from batchlab.runtime.aws_deployment import prices_of
from batchlab.runtime.home import Home

if TYPE_CHECKING:
    from batchlab.jobs.job_file import JobFile
    from batchlab.runtime.factory import Backend

app = command_group("cost")


TYPES = option(
    "Instance type on AWS that the computation assumes for one pool, or for all pools. Repeatable.", "[POOL=]TYPE"
)


@app.callback()
def cost() -> None:
    """Compute the cost of a job's run on AWS, and show AWS's prices.

    The commands use AWS's list prices, and compute the cost before or after the run.

    \b
    Example: batchlab cost estimate job.yaml --seconds 2.5
    """


@app.command()
def estimate(
    file: Path = FILE,
    set_: list[str] | None = SET,
    seconds: list[str] | None = option(
        "Run time of one task in seconds, or a range of run times. Repeatable. Default: the run "
        "times of an earlier run.",
        "[STAGE=]S[-S]",
    ),
    tasks: list[str] | None = option(
        "Number of tasks of one stage, or of each stage that reads the job's input, if batchlab cannot count the "
        "input. Repeatable.",
        "[STAGE=]N",
    ),
    pool: list[str] | None = POOL,
    instance_type: list[str] | None = TYPES,
    spot: float = option("Percentage of the instances that are Spot Instances.", default=0.0, min=0, max=100),
    results: str = option(
        "Size of the results that the user will fetch, such as 500MB. Default: the size of the results at the last "
        "fetch.",
        "SIZE",
        default="",
    ),
    home: Path | None = HOME,
    json: bool = JSON,
) -> None:
    """Estimate the cost of a run of a job file on AWS, as a range for each item of the cost.

    \b
    Example: batchlab cost estimate job.yaml --seconds 2-5 --pool default:0-20x2 --spot 80
    """
    if 0 < spot < 1:
        raise UsageError(
            f"--spot is a percentage, and {spot:g} is less than 1%.", remedy=f"Write --spot {spot * 100:g}."
        )
    from batchlab.jobs import job_file
    from batchlab.jobs.job_file import compile_job
    from batchlab.runtime import factory

    place, parameters, assumed = home_of(home), parameters_of(set_), []
    jobfile = job_file.load(file, parameters, needs_input=not tasks)
    job = compile_job(jobfile, job_id=JobId("estimate"), token="", code_key=None, input_keys=(), submitted_s=0.0)
    names = [str(stage.name) for stage in job.stages]
    roots = [str(stage.name) for stage in job.roots()]
    task_counts = {name: _task_count(text) for name, text in by_name(tasks or (), names, all_=roots).items()}
    durations = {name: _duration_range(text) for name, text in by_name(seconds or (), names).items()}
    given = frozenset(durations)
    if len(durations) < len(names):
        measured, note = _measurements(place, jobfile.job.name)
        durations = {**{name: range_ for name, range_ in measured.items() if name in names}, **durations}
        assumed += [note] if note else []
    root_tasks, size_bytes, files = 0, 0, 0
    if not set(roots) <= task_counts.keys():
        jobfile = job_file.load(file, parameters)
        root_tasks, files, size_bytes = asyncio.run(count(jobfile))
    stages, more = loads(job.stages, root_tasks, durations, task_counts)
    backend = factory.load("aws")
    pool_names = sorted({stage.pool for stage in stages})
    types = by_name(instance_type or (), pool_names)
    pool_plans = _plan_pools(backend, pool_names, pool or (), types, spot / 100, assumed)
    _check_gpus(stages, pool_plans)
    result = compute_estimate(
        stages,
        pool_plans,
        prices_of(place),
        Policy(backend.manager.drain_target_s, backend.manager.idle_s, backend.pace),
        input_files=files,
        input_bytes=size_bytes,
        result_bytes=_result_bytes(results, place, jobfile.job.name, assumed),
        assumed=[*assumed, *more],
    )
    warnings = _size_warnings(place, jobfile.job.name, stages, given, has_spot=spot > 0)
    output.show_warnings(warnings)
    output.answer(json, {**result.to_json(), "warnings": [one.to_json() for one in warnings]}, text(result))


@app.command()
def bill(job: str = JOB, instance_type: list[str] | None = TYPES, home: Path | None = HOME, json: bool = JSON) -> None:
    """Show the cost of a job on AWS, or the cost that the job would have had on AWS.

    The items of the cost are compute, wasted work, idle time, requests, storage, and data transfer
    out of AWS.

    \b
    Example: batchlab cost bill last --instance-type c7g.large
    """
    from batchlab.cli.bills import bill_of, bill_text
    from batchlab.runtime import factory

    place = home_of(home)
    place.require_folder()
    record = place.record()
    pools = factory.load(record.backend if record else "local").pools
    types = by_name(instance_type or (), [pool.name for pool in pools])
    view, bill = bill_of(place, job, types)
    output.answer(json, {"job": view["id"], "state": view["state"], **bill.to_json()}, bill_text(view, bill))


DEFAULT_TYPE = "m7i.large"
"""Instance type that an estimate assumes for a pool without an instance type."""


def by_name(texts: Sequence[str], names: Sequence[str], *, all_: Sequence[str] | None = None) -> dict[str, str]:
    """Return values by name from texts in the form `NAME=VALUE`.

    The value of a text without a name applies to all other names, or only to the names in `all_`. Raise UsageError if a
    text has an unknown name.
    """
    values: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.rpartition("=")
        if equals and name not in names:
            raise UsageError(
                f"{text!r} names {name!r}, which does not exist.", remedy=f"Name one of {', '.join(names)}."
            )
        if equals:
            values[name] = value
        else:
            values = {**dict.fromkeys(names if all_ is None else all_, value), **values}
    return values


def _result_bytes(text: str, home: Home, name: str, assumed: list[str]) -> int | None:
    """Return the size in bytes of a job's results, from the option --results or from the last fetch of the job's
    results.

    If the size comes from the last fetch, append a note about the job of the fetch to `assumed`.
    """
    if text:
        try:
            return units.size_bytes(text)
        except ValueError as error:
            raise UsageError(f"{error}.", remedy="Write for example --results 500MB.") from error
    if (last_fetch := fetches.last_fetch(home, name)) is None:
        return None
    job, size_bytes = last_fetch
    assumed.append(f"results are as large as the results of {job} that this machine fetched")
    return size_bytes


def _task_count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text) <= 10**10:
        raise UsageError(f"{text!r} is not a number of tasks.", remedy="Write for example 1000.")
    return int(text)


def _duration_range(text: str) -> Three:
    """Return the low, typical, and high duration in seconds from a text such as `2.5` or `1-4`."""
    try:
        low, _, high = text.partition("-")
        span = (float(low), float(high or low))
    except ValueError:
        span = (0.0, 0.0)
    if not 0 < span[0] <= span[1] < 1e8:
        raise UsageError(f"{text!r} is not a number of seconds.", remedy="Write for example 2.5, or a range: 1-4.")
    return (span[0], (span[0] * span[1]) ** 0.5, span[1])


async def count(jobfile: JobFile) -> tuple[int, int, int]:
    """Return the numbers of tasks, files, and bytes of a job's input.

    `count` splits the input into tasks as the manager does. Raise UsageError if a file of the input is not on this
    machine.
    """
    from batchlab.adapters.local.objects import open_local
    from batchlab.jobs.job_file import task_size
    from batchlab.manager.input_split import items

    tasks = size_bytes = 0
    how = SplitBy(jobfile.job.input.split)
    for file in jobfile.files:
        if not isinstance(file, Path):
            remedy = "Give the number of tasks with --tasks N."
            raise UsageError(f"The tasks of {file} cannot be counted on this machine.", remedy=remedy)
        size_bytes += file.stat().st_size
        if how is SplitBy.FILE:
            tasks += 1
            continue
        raw = InputDef((file.name,), how, task_size(jobfile.job), jobfile.job.input.header)
        async for _ in items(open_local(file.parent), raw):
            tasks += 1
    return tasks, len(jobfile.files), size_bytes


# --- Earlier runs --------------------------------------------------------------------------------


def _measurements(home: Home, name: str) -> tuple[dict[str, Three], str]:
    """Return the task times in seconds by stage from the last run of a job, and a clause that names the run."""
    for job, means in _earlier(home, name):
        durations: dict[str, Three] = {}
        for stage, mean_s in means.items():
            low, typical, high = (mean_s * factor for factor in MEASURED)
            durations[stage] = (low, typical, high)
        if durations:
            return durations, f"a task takes as long as in {job} on the machine that ran it"
    return {}, ""


def _earlier(home: Home, name: str) -> list[tuple[str, dict[str, float]]]:
    """Return the earlier runs of a job with their mean task times by stage, from the grid or from its folder."""
    with suppress(BackendError), connect(home) as client:
        views = task_times.earlier_runs(client, name)
        return [(view["id"], {s["name"]: s["mean_s"] for s in view["stages"] if s["mean_s"]}) for view in views]
    return []


def _size_warnings(
    home: Home, name: str, stages: Sequence[StageLoad], given: Collection[str], *, has_spot: bool
) -> list[SizeWarning]:
    """Return the warnings about task times. `given` has the stages whose task times come from the option --seconds."""
    measured: dict[str, TaskTimes] = {}
    if others := {stage.name: stage.pool for stage in stages if stage.name not in given}:
        measured = {one.stage: one for one in task_times.last_times(connect(home), name, others)}
    times: list[TaskTimes] = []
    for stage in stages:
        spot = f"--spot plans Spot Instances in pool {stage.pool}" if has_spot else ""
        if stage.name in measured:
            times.append(replace(measured[stage.name], spot=spot))
        elif stage.name in given:
            tasks, source = round(stage.tasks[1]), "According to --seconds, a task takes"
            times.append(TaskTimes(stage.name, stage.seconds[1], tasks, source, is_whole=True, spot=spot))
    return size_warnings(times)


# --- Pools ---------------------------------------------------------------------------------------


def _check_gpus(stages: Sequence[StageLoad], pool_plans: Sequence[PoolPlan]) -> None:
    """Raise UsageError for a stage that needs more GPUs than the instance type of its pool has."""
    from batchlab.core import instance_types

    plans = {plan.name: plan for plan in pool_plans}
    for stage in stages:
        plan = plans[stage.pool]
        if stage.gpus > plan.gpus:
            enough = [one.name for one in instance_types.load().types.values() if one.gpus >= stage.gpus]
            raise UsageError(
                f"A task of stage {stage.name} needs {units.count(stage.gpus, 'GPU')}, and an instance of type "
                f"{plan.instance_type} has {plan.gpus}.",
                remedy=f"Name another type with --instance-type, such as {' or '.join(enough[:3])}.",
            )


def _plan_pools(
    backend: Backend,
    names: Sequence[str],
    pools: Sequence[str],
    types: Mapping[str, str],
    spot_share: float,
    assumed: list[str],
) -> list[PoolPlan]:
    """Return the assumed pools of a job on AWS, and append a text about each assumption to `assumed`."""
    from batchlab.core import instance_types

    backend_pools: dict[str, Pool] = {pool.name: pool for pool in backend.pools}
    own = {pool.name: pool for pool in parse_pools(pools)}
    catalog = instance_types.load()
    pool_plans: list[PoolPlan] = []
    for name in names:
        base = own.get(name) or backend_pools.get(name)
        kind = types.get(name) or (backend_pools[name].instance_type if name in backend_pools else "")
        if not kind:
            kind = DEFAULT_TYPE
            assumed.append(f"pool {name} is of {kind}, unless --instance-type names another")
        row = catalog.types.get(kind)
        if base is None:
            slots = row.vcpu if row else 2
            plan = PoolPlan(name, kind, slots, 0, 10)
            assumed.append(f"pool {name} has up to 10 instances of {slots} slots, unless --pool sets other numbers")
        else:
            plan = PoolPlan(name, kind, base.slots, base.min_size, base.max_size, base.boot_s)
        gpus = (base.gpus if base else 0) or catalog.gpus([kind])
        pool_plans.append(replace(plan, spot_share=spot_share, gpus=gpus))
    return pool_plans


def text(estimate: Estimate) -> str:
    """Return the estimate as text for a terminal."""
    places = decimals(estimate.usd.typical, least=4)

    def rows(items: Iterable[Item]) -> list[tuple[str, ...]]:
        ranges = ((i.what, i.usd.low, i.usd.typical, i.usd.high, i.how) for i in items)
        return [(what, *(f"{usd:.{places}f}" for usd in amounts), how) for what, *amounts, how in ranges]

    low, typical, high = (output.span(span_s) for span_s in estimate.span_s)
    lines = [f"The run will cost {estimate.usd}, and take {typical} ({low} to {high}).", ""]
    every = (*estimate.items, Item("all", estimate.usd, ""))
    lines += [output.table(("USD", "from", "typical", "to", "how"), rows(every)), ""]
    if estimate.further:
        lines += [output.table(("further costs", "from", "typical", "to", "how"), rows(estimate.further)), ""]
    lines.append(f"Prices: {estimate.prices}, before tax, free tiers, and discounts.")
    return "\n".join([*lines, *(f"Assumed: {assumption}." for assumption in estimate.assumed)])


@app.command()
def prices(
    types: list[str] | None = argument(
        "Instance type whose prices are shown. Default: all instance types.", "TYPE", default=None
    ),
    home: Path | None = HOME,
    json: bool = JSON,
) -> None:
    """Show AWS's prices with their region, date, and source.

    \b
    Example: batchlab cost prices m7i.large c7g.large
    """
    book = load(home_of(home).path)
    for name in types or ():
        book.instance_usd_h(name)  # `instance_usd_h` raises UsageError for an unknown instance type.
    blocks = {}
    for name, block in book.blocks.items():
        source = {"region": block.region, "date": block.date.isoformat(), "source": block.source}
        blocks[name] = {**source, **block.prices}
        if table := block.table:
            selected = table if types is None or name == "rds" else types
            blocks[name]["usd_per_hour"] = {key: usd for key, usd in table.items() if key in selected}
    output.answer(json, {"currency": "USD", "path": str(book.path), "blocks": blocks}, _prices_text(book, types))


def _prices_text(book: PriceBook, types: list[str] | None) -> str:
    from batchlab.core import instance_types

    catalog = instance_types.load()
    gpus = {name: catalog.gpus([name]) for name in types or sorted(book.blocks["on_demand"].table)}
    has_gpus = any(gpus.values())
    gpu_columns = ("GPUs", "on-demand per GPU") if has_gpus else ()
    columns = ("instance, USD/h", "on-demand", "Spot from", "typical", "to", *gpu_columns)
    instances: list[tuple[str, ...]] = []
    for name, number in gpus.items():
        usd_h, spot = book.instance_usd_h(name).typical, book.instance_usd_h(name, Market.SPOT)
        figures = (f"{usd:.4f}" for usd in (usd_h, spot.low, spot.typical, spot.high))
        instances.append((name, *figures, *(_per_gpu(usd_h, number) if has_gpus else ())))
    others = [
        (name, f"{key.replace('_', ' ').replace('usd', 'USD')}", significant(price, 6))
        for name, block in book.blocks.items()
        for key, price in block.prices.items()
    ]
    others += [
        ("rds", f"{name} USD per hour", significant(price, 6)) for name, price in book.blocks["rds"].table.items()
    ]
    sources = [(name, block.region, block.date.isoformat(), block.source) for name, block in book.blocks.items()]
    parts = [output.table(columns, instances)]
    if types is None:
        parts.append(output.table(("block", "price", "amount"), others))
    parts.append(output.table(("block", "region", "as of", "source"), sources))
    return "\n\n".join([*parts, f"Price book: {book.path}"])


def _per_gpu(usd_h: float, gpus: int) -> tuple[str, str]:
    return (str(gpus), f"{usd_h / gpus:.4f}") if gpus else ("-", "-")


@app.command("refresh-prices")
def refresh_prices(
    from_: Path = option(
        "AWS's price list of AmazonEC2, AmazonRDS, or AWSDataTransfer (CSV or JSON), the output of `aws ec2 "
        "describe-spot-price-history`, or a CSV file of on-demand prices.",
        "FILE",
        "--from",
        default=...,
    ),
    region: str = option("AWS region of the prices, if the file contains several regions.", default=""),
    date: datetime | None = option("Date of the prices, if the file does not contain a date.", formats=["%Y-%m-%d"]),
    home: Path | None = HOME,
    json: bool = JSON,
) -> None:
    """Copy newer prices from a file to the grid's price book, which overrides the shipped price book.

    \b
    Example: batchlab cost refresh-prices --from AmazonEC2.csv --region us-east-1
    """
    from batchlab.core.pricing import price_refresh

    place = home_of(home)
    update = price_refresh.find(from_, region=region, day=date.date() if date else None)
    book = price_refresh.refresh(load(place.path), update)
    place.make()
    path = place.path / NAME
    # All users may read the price book, because the manager of a grid in containers may run as another user.
    write_whole(path, write(book), mode=0o644)
    date_text = update.date.isoformat()
    document = {"path": str(path), "block": update.block, "region": update.region, "date": date_text}
    number = output.count(update.count, "price")
    output.answer(
        json,
        {**document, "types": len(update.table), "prices": dict(update.prices)},
        f"{number} of [{update.block}] for {update.region}, as of {date_text}, are in {path}.",
    )
    others = sorted(block.name for block in book.blocks.values() if block.region != update.region)
    if others and not json:
        output.say(f"Prices of another region: {', '.join(others)}. Edit {path} to change these few prices.")
