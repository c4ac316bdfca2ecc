"""Import of newer prices from files (AWS's price lists, AWS's Spot history, or a small CSV).

Invariant: a refused file does not change any price. A price that an imported file does not contain stays unchanged.
"""

from __future__ import annotations

import csv
import json
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import date, datetime
from pathlib import Path
from typing import Any

from batchlab.core.errors import UsageError
from batchlab.core.pricing.price_book import Block, PriceBook

SMALL = ("region", "instance_type", "linux_on_demand_usd_per_hour")
"""Required columns of a small CSV file."""
FORMS = (
    "Give the offer file of AmazonEC2, AmazonRDS or AWSDataTransfer from AWS's price list (CSV or "
    "JSON), the output of `aws ec2 describe-spot-price-history`, or a CSV with the columns " + ",".join(SMALL) + "."
)
_METADATA_ROWS = 5


@dataclass(frozen=True, slots=True)
class ImportedPrices:
    """Prices that a file contains for one block of the price book.

    `table` has prices in USD per hour by instance type. `prices` has prices by their names in the price book.
    """

    block: str
    region: str
    date: date
    source: str
    table: Mapping[str, Any]
    prices: Mapping[str, float] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return len(self.table) + len(self.prices)


def refresh(book: PriceBook, imported: ImportedPrices) -> PriceBook:
    """Return the price book with the imported prices.

    If the region of the imported prices differs from the region of the block, the imported prices replace all prices of
    the block. Otherwise, the import does not change the prices of other instance types.
    """
    before = book.blocks[imported.block]
    same = before.region == imported.region
    table = {**(before.table if same else {}), **imported.table}
    block = Block(
        imported.block,
        imported.region,
        imported.date,
        imported.source,
        {**before.prices, **imported.prices},
        dict(sorted(table.items())),
    )
    return replace(book, blocks={**book.blocks, imported.block: block})


def find(path: Path, *, region: str = "", day: date | None = None) -> ImportedPrices:
    """Return the prices in a file with a price list, a Spot history, or a small CSV.

    `region` selects the region if the file has several regions. `day` is required if the file lacks a date. Raise
    UsageError if the file does not contain usable prices.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            start = file.read(1)
            file.seek(0)
            if start in ("{", "["):
                return _of_json(json.load(file), path, region)
            return _of_csv(csv.reader(file), path, region, day)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read: {error.strerror}.", remedy="Name an existing file that can be read."
        ) from error
    except (ValueError, csv.Error) as error:
        raise UsageError(f"{path} cannot be read as prices: {error}.", remedy=FORMS) from error


def _of_json(doc: Any, path: Path, region: str) -> ImportedPrices:
    if isinstance(doc, dict) and isinstance(doc.get("SpotPriceHistory"), list):
        return _spot(doc["SpotPriceHistory"], path, region)
    if isinstance(doc, dict) and isinstance(doc.get("products"), dict) and "offerCode" in doc:
        published = str(doc.get("publicationDate", ""))
        return _offer(str(doc["offerCode"]), published, _json_rows(doc), path, region)
    raise UsageError(f"{path} is JSON, but not a price list of AWS.", remedy=FORMS)


def _of_csv(rows: Iterator[list[str]], path: Path, region: str, day: date | None) -> ImportedPrices:
    first = next(rows, [])
    if tuple(first) == SMALL:
        return _small((dict(zip(SMALL, row, strict=True)) for row in rows), path, region, day)
    if first[:1] != ["FormatVersion"]:
        raise UsageError(f"{path} is not a list of prices.", remedy=FORMS)
    facts = {row[0]: row[1] for row in [next(rows, []) for _ in range(_METADATA_ROWS - 1)] if row[1:]}
    columns = [_plain(name) for name in next(rows, [])]
    records = (dict(zip(columns, row, strict=False)) for row in rows)
    published = facts.get("Publication Date", "")
    return _offer(facts.get("OfferCode", ""), published, records, path, region)


def _small(rows: Iterable[Mapping[str, str]], path: Path, region: str, day: date | None) -> ImportedPrices:
    if day is None:
        raise UsageError(f"{path} lacks the date of its prices.", remedy="Set it with --date, as in --date 2026-07-20.")
    table: dict[str, dict[str, float]] = {}
    for row in rows:
        usd_h = _price(row["linux_on_demand_usd_per_hour"], path)
        table.setdefault(row["region"], {})[row["instance_type"]] = usd_h
    region = _only_region(table, path, region)
    return ImportedPrices("on_demand", region, day, f"{path.name}, Linux on-demand", table[region])


# --- AWS's price list ----------------------------------------------------------------------------

_OFFERS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "AmazonEC2": (
        "on_demand",
        {"operatingsystem": "Linux", "tenancy": "Shared", "preinstalledsw": "NA", "capacitystatus": "Used"},
    ),
    "AmazonRDS": (
        "rds",
        {"databaseengine": "PostgreSQL", "deploymentoption": "Single-AZ", "productfamily": "Database Instance"},
    ),
}
"""Map of each offer in AWS's price list to a block of the price book and the required attributes of the offer's rows.
"""


def _offer(code: str, published: str, rows: Iterable[Mapping[str, str]], path: Path, region: str) -> ImportedPrices:
    if code == "AWSDataTransfer":
        return _transfer(published, rows, path, region)
    if code not in _OFFERS:
        raise UsageError(f"{path} is the price list of {code or 'nothing'}.", remedy=FORMS)
    block, wanted = _OFFERS[code]
    table: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.get("termtype") != "OnDemand" or row.get("unit") != "Hrs":
            continue
        if any(row.get(key) != value for key, value in wanted.items()):
            continue
        _check_currency(row, path)
        name, place = row.get("instancetype", ""), row.get("regioncode", "")
        usd_h = _price(row.get("priceperunit", ""), path)
        if not (name and place and usd_h):
            continue
        # AWS has several offers for some instance types, such as storage with and without I/O. Take the cheapest offer,
        # which is the offer without extras.
        known = table.setdefault(place, {})
        known[name] = min(usd_h, known.get(name, usd_h))
    day = _day(published, path)
    region = _only_region(table, path, region)
    return ImportedPrices(block, region, day, f"AWS's price list of {code}, {path.name}", table[region])


_TRANSFERS: Mapping[str, str] = {
    "DataTransfer-Out-Bytes": "internet_usd_per_gb",
    "DataTransfer-Regional-Bytes": "zone_usd_per_gb_each_way",
}
"""Map of AWS's usage types of data transfer, without their region prefix, to names of prices in the price book."""


def _transfer(published: str, rows: Iterable[Mapping[str, str]], path: Path, region: str) -> ImportedPrices:
    """Return the prices of data transfer.

    If a price has tiers, take the highest price, which is the price of the first billed tier. The tier before the first
    billed tier is free, and each later tier is cheaper.
    """
    table: dict[str, dict[str, float]] = {}
    for row in rows:
        usage = re.sub(r"^[A-Z0-9]+-(?=DataTransfer-)", "", row.get("usagetype", ""))
        if usage not in _TRANSFERS or row.get("termtype") != "OnDemand":
            continue
        _check_currency(row, path)
        place, name = row.get("fromregioncode", ""), _TRANSFERS[usage]
        if place and row.get("unit") == "GB":
            known = table.setdefault(place, {})
            known[name] = max(_price(row.get("priceperunit", ""), path), known.get(name, 0.0))
    region = _only_region(table, path, region)
    if missing := [usage for usage, name in _TRANSFERS.items() if name not in table[region]]:
        raise UsageError(f"{path} has no price of {missing[0]} in {region}.", remedy=FORMS)
    source = f"AWS's price list of AWSDataTransfer, {path.name}: first tier"
    return ImportedPrices("transfer", region, _day(published, path), source, {}, table[region])


def _check_currency(row: Mapping[str, str], path: Path) -> None:
    if row.get("currency", "USD") != "USD":
        raise UsageError(
            f"{path} has prices in {row['currency']}, not in USD.",
            remedy="Take the price list of a region that AWS bills in USD.",
        )


def _json_rows(doc: Mapping[str, Any]) -> Iterator[Mapping[str, str]]:
    terms = doc.get("terms", {}).get("OnDemand", {})
    for sku, product in doc["products"].items():
        facts = {_plain(k): str(v) for k, v in product.get("attributes", {}).items()}
        facts["productfamily"] = str(product.get("productFamily", ""))
        for term in terms.get(sku, {}).values():
            for price in term.get("priceDimensions", {}).values():
                for currency, amount in price.get("pricePerUnit", {}).items():
                    yield {
                        **facts,
                        "termtype": "OnDemand",
                        "unit": str(price.get("unit", "")),
                        "priceperunit": str(amount),
                        "currency": str(currency),
                    }


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


# --- Spot ----------------------------------------------------------------------------------------


def _spot(history: Iterable[Mapping[str, Any]], path: Path, region: str) -> ImportedPrices:
    """Return the lowest, median, and highest Spot price of each instance type over all zones and times."""
    prices_by_region: dict[str, dict[str, list[float]]] = {}
    newest = ""
    for entry in history:
        if "Linux" not in str(entry.get("ProductDescription", "")):
            continue
        place = str(entry.get("AvailabilityZone", "")).rstrip("abcdefghij")
        usd_h = _price(str(entry.get("SpotPrice", "")), path)
        prices_by_region.setdefault(place, {}).setdefault(str(entry.get("InstanceType")), []).append(usd_h)
        newest = max(newest, str(entry.get("Timestamp", "")))
    region = _only_region(prices_by_region, path, region)
    table = {
        name: (min(prices), statistics.median(prices), max(prices)) for name, prices in prices_by_region[region].items()
    }
    source = f"Spot price history, {path.name}: lowest, median and highest of each type"
    return ImportedPrices("spot", region, _day(newest, path), source, table)


# --- Shared functions -----------------------------------------------------------------------------


def _only_region(table: Mapping[str, Any], path: Path, region: str) -> str:
    if not table:
        raise UsageError(f"{path} does not contain a price for the price book.", remedy=FORMS)
    if region and region not in table:
        raise UsageError(f"{path} has no prices for {region}.", remedy=f"It has {', '.join(sorted(table))}.")
    if not region and len(table) > 1:
        raise UsageError(
            f"{path} has prices for {len(table)} regions.",
            remedy=f"Set --region. The file has {', '.join(sorted(table))}.",
        )
    return region or next(iter(table))


def _price(text: str, path: Path) -> float:
    try:
        usd_h = float(text)
    except ValueError:
        usd_h = -1.0
    if not 0 <= usd_h < 1e6:
        raise UsageError(f"{path} has {text!r} where a price in USD belongs.", remedy=FORMS)
    return usd_h


def _day(text: str, path: Path) -> date:
    try:
        return datetime.fromisoformat(text).date()
    except ValueError:
        raise UsageError(f"{path} lacks the date of its prices.", remedy=FORMS) from None
