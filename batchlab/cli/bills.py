"""Bill of a job, and the current cost of a grid.

Invariant: if the grid's bucket is a local folder, the bill of a job does not need a running grid.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from batchlab.cli import output
from batchlab.cli.option_values import connect, resolve
from batchlab.core.api_usage_types import JobUseView, account_of, job_use_view
from batchlab.core.capabilities import capabilities_of
from batchlab.core.errors import BatchlabError, NotFound, UsageError
from batchlab.core.model import JobId, Market
from batchlab.core.pricing.bill import Bill, burn_usd_h, job_bill, spent_usd
from batchlab.core.pricing.price_book import PriceBook, Usd, decimals, range_json
from batchlab.core.pricing.request_costs import TransferredData
from batchlab.core.pricing.usage import Account, Kind
from batchlab.core.protocol import object_keys
from batchlab.core.text import join_list, significant
from batchlab.runtime import home as fetches
from batchlab.runtime.home import Home

if TYPE_CHECKING:
    from batchlab.client.http import Client
    from batchlab.core.api_types import GridView, JobView
    from batchlab.core.ports import Objects


# --- Bill of a job -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Facts:
    """A job, its usage, and the backend of its grid."""

    job: JobView
    use: JobUseView
    backend: str


def bill_of(home: Home, job: str, types: Mapping[str, str]) -> tuple[JobView, Bill]:
    """Return a job and its bill. Raise UsageError if the job does not exist, or if the price of an instance type is
    unknown.

    `types` contains instance types by pool. For a pool in `types`, the bill uses this instance type instead of the
    recorded instance type.
    """
    from batchlab.runtime import aws_deployment, factory

    facts = facts_of(home, job)
    backend = factory.load(facts.backend)
    book = aws_deployment.prices_of(home)
    for name in types.values():
        book.instance_usd_h(name)  # `instance_usd_h` raises UsageError for an unknown instance type.
    size = asyncio.run(_stored_bytes(backend.open_objects(home), facts.job["id"]))
    deployment = aws_deployment.read(home) if capabilities_of(facts.backend).stack else None
    egress = deployment.egress if deployment else ""
    moved = TransferredData(fetches.fetched_bytes(home, facts.job["id"]), egress)
    found = job_bill(facts.job, facts.use, book, types=types, stored_bytes=size, pace=backend.pace, moved=moved)
    return facts.job, found


def facts_of(home: Home, job: str) -> Facts:
    """Return a job and its usage, even if the grid is down. Raise UsageError if the job does not exist."""
    home.require_folder()
    record = home.record()
    if record is None:
        return asyncio.run(_facts_in_folder(home, job))
    with connect(home) as client:
        view = resolve(client, job)
        return Facts(view, client.job_use(view["id"]), record.backend)


async def _facts_in_folder(home: Home, text: str) -> Facts:
    """Return a job and its usage from the ledger in the folder of a grid that is down."""
    from batchlab.runtime import factory
    from batchlab.server.job_views import job_view

    if not home.ledger_file.exists():
        raise UsageError(
            f"No grid is up in {home.path}, and the folder has no ledger with jobs.",
            remedy="Start the grid with `batchlab grid up`, or name another folder with --home.",
        )
    backend = factory.load("local")
    ledger, objects = backend.open_ledger(home), backend.open_objects(home)
    try:
        page = await ledger.jobs(limit=1000)
        matching = [rows for rows in page if text == "last" or rows.id.startswith(text)]
        exact = [rows for rows in matching if rows.id == text]
        if not matching or (len(matching) > 1 and text != "last" and not exact):
            what = "There is no job" if not matching else "More than one job begins with"
            ids = join_list([str(rows.id) for rows in matching or page]) or "none"
            do = "Write the whole id" if matching else "The folder's ledger has"
            raise UsageError(f"{what} {text!r}.", remedy=f"{do}: {ids}.")
        rows = (exact or matching)[0]
        record = rows.job
        account = await _stored_account(objects, record.job.id)
        use = job_use_view(record.job, account, backend.pools_in(home), max_cost_usd=record.job.max_cost_usd)
        return Facts(job_view(record, rows.stages), use, backend.name)
    finally:
        await ledger.close()


async def _stored_account(objects: Objects, job: str) -> Account | None:
    """Return the account of a job that the grid's last manager stored, or None if no account is stored."""
    from batchlab.core.protocol import json_format, object_keys

    for key in (object_keys.reference_key(JobId(job)), object_keys.USE):
        try:
            doc = json_format.loads(await objects.get(key))
        except NotFound:
            continue
        account = doc.get("account") or doc.get("jobs", {}).get(job)
        if account:
            return Account.from_json(account)
    return None


async def _stored_bytes(objects: Objects, job: str) -> int:
    """Return the total size in bytes of a job's objects in the bucket."""
    size_bytes = 0
    for prefix in object_keys.everything_of(JobId(job)):
        async for page in objects.list(prefix):
            size_bytes += sum(info.size for info in page)
    return size_bytes


def bill_text(job: JobView, bill: Bill) -> str:
    """Return the bill of a job on AWS as text for a terminal."""
    usd = bill.usd
    places = decimals(usd.typical)
    rows = [(i.what, f"{i.usd.typical:.{places}f}", i.how) for i in bill.items]
    rows.append(("all", f"{usd.typical:.{places}f}", ""))
    further = [(i.what, f"{i.usd.typical:.{places}f}", i.how) for i in bill.further]
    exact = usd.low == usd.high
    between = f"between {usd.low:.{places}f} and {usd.high:.{places}f} USD"
    spread = "" if exact else f" By what Spot and other zones may cost it is {between}."
    return "\n".join(
        [
            f"{job['id']} {job['state']}: {usd} on AWS.{spread}",
            "",
            output.table(("what", "USD", "how"), rows),
            *(["", output.table(("further costs", "USD", "how"), further)] if further else []),
            "",
            f"Prices: {bill.prices}, before tax, free tiers and discounts.",
            *(f"Note: {note}." for note in bill.notes),
        ]
    )


# --- Current cost --------------------------------------------------------------------------------


class LiveCost:
    """Current cost of a grid or a job.

    Commands show this cost on billed backends, and with --as-if-aws on all backends.
    """

    def __init__(self, home: Home, *, as_if_aws: bool) -> None:
        self._home = home
        self._as_if = as_if_aws
        self._book: PriceBook | None = None

    def applies(self, backend: str) -> bool:
        return self._as_if or capabilities_of(backend).billed

    def _prices(self) -> PriceBook:
        from batchlab.runtime import aws_deployment

        if self._book is None:
            self._book = aws_deployment.prices_of(self._home)
        return self._book

    def grid(self, client: Client) -> dict[str, object]:
        """Return the cost per hour, the cost so far, and the cost cap of the grid, in USD."""
        view = client.use()
        living = {Kind(one["pool"], one["type"], Market(one["market"])): one["instances"] for one in view["living"]}
        spent = spent_usd(account_of(view["total"]), {}, self._prices())
        return self._figures(living, {}, spent, view["max_cost_usd"], view["capped"])

    def job(self, client: Client, job: JobView, grid: GridView | None = None) -> dict[str, object]:
        """Return the cost per hour, the cost so far, and the cost cap of one job, in USD.

        The cost per hour includes all instances of the job's pools.
        """
        from batchlab.runtime import factory

        view = client.job_use(job["id"])
        account = account_of(view["account"]) if view["account"] else Account()
        used_pools = {kind.pool for kind in account.billed_s}
        living: dict[Kind, int] = {}
        for pool in grid["pools"] if grid else ():
            running = sum(instance["state"] != "Terminated" for instance in pool["instances"])
            kind = Kind(pool["name"], view["types"].get(pool["name"], ""))
            living[kind] = running if pool["name"] in used_pools else 0
        pace = factory.load(grid["backend"]).pace if grid else None
        spent = job_bill(job, view, self._prices(), pace=pace).usd
        return self._figures(living, view["types"], spent, view["max_cost_usd"], view["capped"])

    def line(self, client: Client, job: JobView, grid: GridView | None) -> str:
        """Return a predicate about the cost, such as "costs 0.5 USD an hour now", or the reason why the cost is
        unknown.
        """
        try:
            return str(self.job(client, job, grid)["text"])
        except BatchlabError as error:
            return f"has an unknown cost: {error.message}"

    def _figures(
        self, living: Mapping[Kind, int], types: Mapping[str, str], spent: Usd, cap: float | None, capped: object
    ) -> dict[str, object]:
        now = burn_usd_h(living, types, self._prices())
        text = f"{'would cost on AWS' if self._as_if else 'costs'} {now} an hour now, {spent} so far"
        if cap is not None:
            text += f", cap {significant(cap, 6)} USD"
        if capped:
            text += ", reached: no more is launched than it pays for"
        if note := self._prices().mismatch:
            text += f" ({note})"
        usd = {"usd_per_hour": range_json(now), "spent_usd": range_json(spent)}
        return {**usd, "max_cost_usd": cap, "capped": capped, "text": text}
