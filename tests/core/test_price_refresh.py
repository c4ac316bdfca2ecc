"""Newer prices from files in AWS's published format, which the tests generate."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

import pytest

from batchlab.core.errors import UsageError
from batchlab.core.model import Market
from batchlab.core.pricing import price_book
from batchlab.core.pricing.price_refresh import find, refresh

SHIPPED = price_book.load()

OFFER = """"FormatVersion","v1.0"
"Disclaimer","This pricing list is for informational purposes only."
"Publication Date","2026-09-01T12:00:00Z"
"Version","20260901120000"
"OfferCode","AmazonEC2"
"SKU","OfferTermCode","RateCode","TermType","PriceDescription","EffectiveDate","StartingRange",\
"EndingRange","Unit","PricePerUnit","Currency","Product Family","serviceCode","Region Code",\
"Instance Type","Tenancy","Operating System","Pre Installed S/W","CapacityStatus"
"""


def row(kind: str, usd: str, **changes: str) -> str:
    told = {
        "TermType": "OnDemand",
        "Unit": "Hrs",
        "Currency": "USD",
        "Region": "eu-west-1",
        "Tenancy": "Shared",
        "System": "Linux",
        "Software": "NA",
        "Status": "Used",
        **changes,
    }
    cells = [
        "SKU1",
        "JRTCKXETXF",
        "SKU1.JRT",
        told["TermType"],
        "per hour",
        "2026-09-01",
        "0",
        "Inf",
        told["Unit"],
        usd,
        told["Currency"],
        "Compute Instance",
        "AmazonEC2",
        told["Region"],
        kind,
        told["Tenancy"],
        told["System"],
        told["Software"],
        told["Status"],
    ]
    return ",".join(f'"{cell}"' for cell in cells) + "\n"


def wrote(folder: Path, text: str, name: str = "offer.csv") -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_awss_own_price_list_as_csv(tmp_path: Path) -> None:
    path = wrote(
        tmp_path,
        OFFER
        + row("m7i.large", "0.1123")
        + row("m7i.large", "0.2043", System="Windows")
        + row("m7i.large", "0.0700", TermType="Reserved")
        + row("m7i.large", "0.1200", Tenancy="Dedicated")
        + row("m7i.large", "0.5900", Software="SQL Std")
        + row("m7i.large", "0.1123", Status="UnusedCapacityReservation")
        + row("x9z.huge", "12.5"),
    )
    found = find(path)
    assert (found.block, found.region, found.date) == ("on_demand", "eu-west-1", date(2026, 9, 1))
    assert found.table == {"m7i.large": 0.1123, "x9z.huge": 12.5}
    book = refresh(SHIPPED, found)
    assert book.instance_usd_h("x9z.huge").typical == 12.5
    # Prices of another region replace all of a block's prices. The other blocks stay, and the command reports this.
    with pytest.raises(UsageError, match=r"no instance type 'c7g\.large'"):
        book.instance_usd_h("c7g.large")
    with pytest.raises(UsageError, match="blocks spot, sqs"):
        book.at("eu-west-1")


def test_awss_own_price_list_as_json(tmp_path: Path) -> None:
    doc = {
        "formatVersion": "v1.0",
        "offerCode": "AmazonRDS",
        "publicationDate": "2026-09-02T00:00:00Z",
        "products": {
            "A1": {
                "sku": "A1",
                "productFamily": "Database Instance",
                "attributes": {
                    "instanceType": "db.r7g.large",
                    "databaseEngine": "PostgreSQL",
                    "deploymentOption": "Single-AZ",
                    "regionCode": "us-east-1",
                },
            },
            "A2": {
                "sku": "A2",
                "productFamily": "Database Instance",
                "attributes": {
                    "instanceType": "db.r7g.large",
                    "databaseEngine": "Oracle",
                    "deploymentOption": "Single-AZ",
                    "regionCode": "us-east-1",
                },
            },
        },
        "terms": {
            "OnDemand": {
                sku: {f"{sku}.T": {"priceDimensions": {f"{sku}.T.R": {"unit": "Hrs", "pricePerUnit": {"USD": usd}}}}}
                for sku, usd in (("A1", "0.2390"), ("A2", "0.9"))
            }
        },
    }
    found = find(wrote(tmp_path, json.dumps(doc), "offer.json"))
    book = refresh(SHIPPED, found)
    assert book.database_usd_h("db.r7g.large") == 0.239
    assert book.database_usd_h("db.t4g.micro") == 0.016  # the price is of the same region and stays
    assert book.blocks["rds"].date == date(2026, 9, 2)


TRANSFER = OFFER.replace("AmazonEC2", "AWSDataTransfer").replace(
    """"Region Code",\
"Instance Type","Tenancy","Operating System","Pre Installed S/W","CapacityStatus"
""",
    """"Transfer Type",\
"From Location","To Location","usageType","From Region Code","To Region Code"
""",
)


def moved(usage: str, usd: str, region: str = "eu-west-1", **changes: str) -> str:
    """Return a row of the price list for data transfer."""
    told = {"TermType": "OnDemand", "Unit": "GB", "Currency": "USD", **changes}
    cells = [
        "SKU1",
        "JRTCKXETXF",
        "SKU1.JRT",
        told["TermType"],
        "per GB",
        "2026-09-01",
        "0",
        "Inf",
        told["Unit"],
        usd,
        told["Currency"],
        "Data Transfer",
        "AWSDataTransfer",
        "AWS Outbound",
        "EU (Ireland)",
        "External",
        usage,
        region,
        "",
    ]
    return ",".join(f'"{cell}"' for cell in cells) + "\n"


OUT = "EU-DataTransfer-Out-Bytes"
ZONES = "EU-DataTransfer-Regional-Bytes"


def test_the_price_list_of_data_transfer_gives_the_first_tier_that_is_billed(tmp_path: Path) -> None:
    path = wrote(
        tmp_path,
        TRANSFER
        + moved(OUT, "0.0000000000")
        + moved(OUT, "0.0920000000")
        + moved(OUT, "0.0850000000")
        + moved(ZONES, "0.0110000000")
        + moved("EU-USE1-AWS-Out-Bytes", "0.0200000000")
        + moved("EU-DataTransfer-xAZ-Out-Bytes", "0.5")
        + moved("DataTransfer-Out-Bytes", "0.0700000000", "us-east-1")
        + moved("DataTransfer-Regional-Bytes", "0.0200000000", "us-east-1"),
    )
    with pytest.raises(UsageError, match="2 regions"):
        find(path)
    found = find(path, region="eu-west-1")
    assert (found.block, found.region, found.count) == ("transfer", "eu-west-1", 2)
    book = refresh(SHIPPED, found)
    assert book.price("transfer", "internet_usd_per_gb") == 0.092
    assert book.price("transfer", "zone_usd_per_gb_each_way") == 0.011
    assert (book.blocks["transfer"].region, book.blocks["transfer"].date) == ("eu-west-1", date(2026, 9, 1))
    assert book.blocks["network"] == SHIPPED.blocks["network"]
    (tmp_path / price_book.NAME).write_text(price_book.write(book))
    assert price_book.load(tmp_path).blocks == book.blocks
    here = refresh(SHIPPED, find(path, region="us-east-1"))
    assert here.price("transfer", "internet_usd_per_gb") == 0.07


def test_the_price_list_of_data_transfer_as_json(tmp_path: Path) -> None:
    prices_of = {"DataTransfer-Out-Bytes": "0.09", "DataTransfer-Regional-Bytes": "0.01"}
    doc = {
        "offerCode": "AWSDataTransfer",
        "publicationDate": "2026-09-02T00:00:00Z",
        "products": {
            usage: {"productFamily": "Data Transfer", "attributes": {"usagetype": usage, "fromRegionCode": "us-east-1"}}
            for usage in prices_of
        },
        "terms": {
            "OnDemand": {
                usage: {"T": {"priceDimensions": {"R": {"unit": "GB", "pricePerUnit": {"USD": p}}}}}
                for usage, p in prices_of.items()
            }
        },
    }
    found = find(wrote(tmp_path, json.dumps(doc), "offer.json"))
    assert found.prices == {"internet_usd_per_gb": 0.09, "zone_usd_per_gb_each_way": 0.01}
    assert found.date == date(2026, 9, 2)


def test_spot_history_makes_a_range_of_what_was_paid(tmp_path: Path) -> None:
    def one(usd: str, zone: str, **more: str) -> dict[str, str]:
        return {
            "AvailabilityZone": zone,
            "InstanceType": "m7i.large",
            "ProductDescription": "Linux/UNIX",
            "SpotPrice": usd,
            "Timestamp": "2026-09-03T10:00:00+00:00",
            **more,
        }

    history = [
        one("0.0400", "us-east-1a"),
        one("0.0500", "us-east-1b"),
        one("0.0450", "us-east-1c"),
        one("0.0900", "us-east-1a", ProductDescription="Windows"),
    ]
    path = wrote(tmp_path, json.dumps({"SpotPriceHistory": history}), "spot.json")
    book = refresh(SHIPPED, find(path))
    usd = book.instance_usd_h("m7i.large", Market.SPOT)
    assert (usd.low, usd.typical, usd.high) == (0.04, 0.045, 0.05)
    assert book.instance_usd_h("m7a.large", Market.SPOT).high == pytest.approx(0.11592 * 0.7)
    (tmp_path / price_book.NAME).write_text(price_book.write(book))
    assert price_book.load(tmp_path).blocks == book.blocks


def test_a_small_csv_needs_its_day_and_of_several_regions_one(tmp_path: Path) -> None:
    text = "region,instance_type,linux_on_demand_usd_per_hour\nus-east-1,m7i.large,0.11\neu-west-1,m7i.large,0.12\n"
    path = wrote(tmp_path, text)
    with pytest.raises(UsageError, match="lacks the date") as caught:
        find(path, region="us-east-1")
    assert "--date" in caught.value.remedy
    day = date(2026, 10, 1)
    with pytest.raises(UsageError, match="2 regions"):
        find(path, day=day)
    with pytest.raises(UsageError, match="no prices for us-west-9"):
        find(path, day=day, region="us-west-9")
    book = refresh(SHIPPED, find(path, day=day, region="us-east-1"))
    assert book.instance_usd_h("m7i.large").typical == 0.11
    assert book.blocks["on_demand"].date == day


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "not a list of prices"),
        ("a,b,c\n1,2,3\n", "not a list of prices"),
        ("{}", "not a price list of AWS"),
        ("{", "cannot be read as prices"),
        (OFFER, "does not contain a price for the price book"),
        (OFFER + row("m7i.large", "cheap"), "'cheap' where a price"),
        (OFFER + row("m7i.large", "0.9", Currency="CNY"), "prices in CNY"),
        (OFFER.replace("AmazonEC2", "AmazonS3"), "price list of AmazonS3"),
        (TRANSFER, "does not contain a price for the price book"),
        (TRANSFER + moved(OUT, "0.09"), "no price of DataTransfer-Regional-Bytes in eu-west-1"),
        (TRANSFER + moved(OUT, "0.09", Currency="CNY"), "prices in CNY"),
        (OFFER.replace("2026-09-01T12", "soon") + row("m7i.large", "1"), "lacks the date"),
    ],
)
def test_file_that_is_not_a_price_list_is_a_clear_error(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        find(wrote(tmp_path, text))


def test_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        find(tmp_path / "none.csv")
