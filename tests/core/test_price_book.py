"""The price book: the shipped prices are correct and dated, and mistakes in a file are reported."""

from __future__ import annotations

import csv
import re
from datetime import date
from pathlib import Path

import pytest

from batchlab.core import instance_types
from batchlab.core.errors import UsageError
from batchlab.core.model import Market
from batchlab.core.pricing import price_book
from batchlab.core.pricing.hourly import StackShape, hourly_cost
from batchlab.core.pricing.price_book import WORKER_DISK_GB, Usd, decimals, parse, shown
from batchlab.deploy import template
from tests.support import ROOT

DATA = Path(__file__).resolve().parents[3] / "shared/data/ec2/ec2_on_demand_us-east-1.csv"
SHIPPED = price_book.load()


def test_every_instance_type_of_the_catalogue_has_a_price_and_a_day() -> None:
    on_demand = SHIPPED.blocks["on_demand"]
    assert set(on_demand.table) >= set(instance_types.load().types)
    for block in SHIPPED.blocks.values():
        assert block.region == "us-east-1"
        assert date(2026, 1, 1) < block.date < date(2027, 1, 1)
        assert block.source


@pytest.mark.skipif(not DATA.exists(), reason="the prices of others are not at hand")
def test_prices_match_published_prices_of_the_day() -> None:
    with DATA.open() as file:
        listed = {row["instance_type"]: float(row["linux_on_demand_usd_per_hour"]) for row in csv.DictReader(file)}
    assert SHIPPED.blocks["on_demand"].date == date(2026, 7, 20)
    for name, usd_h in SHIPPED.blocks["on_demand"].table.items():
        assert usd_h == pytest.approx(listed[name], abs=1e-9), name


def test_data_has_a_price_for_each_way_that_it_takes() -> None:
    assert SHIPPED.price("transfer", "internet_usd_per_gb") == 0.09
    assert SHIPPED.price("transfer", "zone_usd_per_gb_each_way") == 0.01
    assert SHIPPED.price("network", "nat_usd_per_gb") == 0.045


def test_spot_is_a_range_below_on_demand() -> None:
    found = SHIPPED.instance_usd_h("m7i.large", Market.SPOT)
    assert (found.low, found.typical, found.high) == pytest.approx((0.01008, 0.04032, 0.07056))


def test_an_unknown_type_or_region_is_a_sentence_with_what_to_do() -> None:
    with pytest.raises(UsageError, match=r"no instance type 'm7i\.larg'") as caught:
        SHIPPED.instance_usd_h("m7i.larg")
    assert "m7i.large" in caught.value.remedy
    assert "cost refresh-prices" in caught.value.remedy
    with pytest.raises(UsageError, match="does not contain prices for eu-west-1") as caught:
        SHIPPED.at("eu-west-1")
    assert "prices.toml" in caught.value.remedy
    assert SHIPPED.at("us-east-1") is SHIPPED


def test_a_book_that_is_written_is_read_back_the_same(tmp_path: Path) -> None:
    (tmp_path / price_book.NAME).write_text(price_book.write(SHIPPED))
    again = price_book.load(tmp_path)
    assert again.blocks == SHIPPED.blocks
    assert again.path == tmp_path / price_book.NAME


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('currency = "USD"', 'currency = "EUR"', "currency is 'EUR'"),
        ("[sqs]", "[sqqs]", r"\[sqqs\]|\[sqs\]"),
        ("date = 2026-07-20", 'date = "lately"', "lacks the date"),
        ("date = 2026-07-20", "date = 2026-07-20T00:00:00", "lacks the date"),
        ('region = "us-east-1"', 'region = ""', "lacks its region"),
        ("0.0052", "-1", "t3.nano.* not a price"),
        ("0.0052", "true", "not a price"),
        ("0.0052", "nan", "not a price"),
        ("smallest_discount = 0.3", "smallest_discount = 0.7", "discounts"),
        ("largest_discount = 0.9", "largest_discount = 90", "discounts"),
        ("nat_usd_per_gb = 0.045", "", "nat_usd_per_gb.* None"),
        ("nat_usd_per_gb", "nut_usd_per_gb", "unknown key 'nut_usd_per_gb'"),
        ("[on_demand]", "[on_demand", "not TOML"),
    ],
)
def test_flaws_of_a_price_book_are_named(tmp_path: Path, old: str, new: str, told: str) -> None:
    text = price_book.write(SHIPPED).replace(old, new, 1)
    (tmp_path / price_book.NAME).write_text(text)
    with pytest.raises(UsageError, match=told):
        price_book.load(tmp_path)


def test_old_price_book_without_a_block_names_a_source(tmp_path: Path) -> None:
    text = price_book.write(SHIPPED)
    start, end = text.index("[transfer]"), text.index("[secrets]")
    (tmp_path / price_book.NAME).write_text(text[:start] + text[end:])
    with pytest.raises(UsageError, match=r"lacks block \[transfer\]") as caught:
        price_book.load(tmp_path)
    assert str(SHIPPED.path) in caught.value.remedy


# --- Money ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "usd"), [("5USD", 5.0), ("0.50 usd", 0.5), (" 12.5 USD ", 12.5), (".5USD", 0.5)])
def test_an_amount_needs_its_currency(text: str, usd: float) -> None:
    assert parse(text) == usd


@pytest.mark.parametrize("text", ["5", "5 EUR", "-5USD", "USD", "$5", "5 $", "1e3USD", "5USD 5USD"])
def test_an_amount_without_it_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not an amount in USD"):
        parse(text)


@pytest.mark.parametrize(("text", "converts"), [("5", False), ("5 EUR", True), ("$5", True)])
def test_other_currency_is_reported_as_not_converted(text: str, converts: bool) -> None:
    with pytest.raises(UsageError) as told:
        parse(text)
    assert told.value.remedy
    assert ("nothing is converted: write for" in told.value.remedy) is converts
    assert (told.value.remedy == f"Did you mean {text}USD?") is not converts


def test_amounts_are_shown_with_their_currency_and_the_digits_that_count() -> None:
    assert [shown(usd) for usd in (1234.5, 1.0, 0.1, 0.01234, 0.000123, 0.00000413, 1e-17, 0.0)] == [
        "1,234.50 USD",
        "1.00 USD",
        "0.1 USD",
        "0.0123 USD",
        "0.000123 USD",
        "0.00000413 USD",
        "0 USD",
        "0 USD",
    ]
    assert str(Usd(1.0, 2.0, 3.0)) == "2.00 USD (1.00 to 3.00)"


def test_tables_of_small_amounts_have_more_decimals() -> None:
    assert [decimals(total) for total in (0.0, 12.0, 0.000123, 0.0000123, 1e-20)] == [6, 6, 6, 7, 12]
    assert [decimals(total, least=4) for total in (0.0, 0.5, 0.0034)] == [4, 4, 5]


# --- Per hour ------------------------------------------------------------------------------------

SMALL = {"ManagerInstanceType": "t4g.small", "PoolInstanceTypes": "m7i.large", "PoolName": "default"}


def test_cost_of_the_smallest_stack_matches_a_hand_computation() -> None:
    """The hand computation is: manager 0.0168, its disk 20 GB × 0.08 / 730, 6 endpoints × 2 zones × 0.01, one secret at
    0.40 per month, and four alarms at 0.10 per month each."""
    found = hourly_cost(SMALL, SHIPPED)
    by_hand = 0.0168 + 20 * 0.08 / 730 + 0.12 + 0.40 / 730 + 0.40 / 730
    assert found.idle_usd_h.typical == pytest.approx(by_hand)
    assert found.idle_usd_h.low == found.idle_usd_h.high
    (worker,) = found.workers
    assert worker.pool == "default"
    assert worker.on_demand.typical == pytest.approx(0.1008 + 50 * 0.08 / 730)
    assert worker.spot.low == pytest.approx(0.01008 + 50 * 0.08 / 730)
    assert "2026-07-20" in found.prices
    assert "USD" in found.prices


def test_bills_and_estimates_give_a_worker_the_disk_that_the_stack_does() -> None:
    parameter = template.load(template.shipped_template())["Parameters"]["PoolDiskGiB"]
    assert parameter["Default"] == WORKER_DISK_GB


def test_cost_of_database_nat_and_minimum_workers_matches_a_hand_computation() -> None:
    """The hand computation is: RDS db.t4g.medium 0.065 and 30 GB × 0.115 per month, both in two zones, and its secret.
    The NAT gateway costs 0.045 and its address 0.005. The three minimum workers have 50 GB each, one of them is
    on-demand, and the others are half on-demand and half Spot."""
    stack = {
        **SMALL,
        "Ledger": "postgres",
        "DatabaseClass": "db.t4g.medium",
        "DatabaseGiB": "30",
        "DatabaseZones": "two",
        "PoolDiskGiB": "50",
        "Egress": "nat",
        "PoolMin": "3",
        "PoolOnDemandBase": 1,
        "PoolOnDemandPercent": 50,
    }
    found = hourly_cost(stack, SHIPPED)
    disk = 20 * 0.08 / 730
    fixed = 0.0168 + disk + 2 * (0.065 + 30 * 0.115 / 730) + 0.05 + (2 * 0.40 + 4 * 0.10) / 730
    disk = 50 * 0.08 / 730
    typical = 0.1008 + 2 * (0.1008 / 2 + 0.1008 * 0.4 / 2) + 3 * disk
    assert found.idle_usd_h.typical == pytest.approx(fixed + typical)
    high = 0.1008 + 2 * (0.1008 / 2 + 0.1008 * 0.7 / 2) + 3 * disk
    assert found.idle_usd_h.high == pytest.approx(fixed + high)


def test_each_pool_has_its_own_line_and_its_own_alarms() -> None:
    stack = {**SMALL, "PoolBigInstanceTypes": "c7i.xlarge, c7i.2xlarge", "PoolBigName": "big"}
    found = hourly_cost(stack, SHIPPED, region="us-east-1", shape=StackShape(interface_endpoints=5))
    assert [worker.pool for worker in found.workers] == ["default", "big"]
    assert found.workers[1].instance_type == "c7i.xlarge and 1 more"
    assert found.workers[1].spot.high > found.workers[1].on_demand.high  # the larger instance type counts
    endpoints = next(item for item in found.idle if item.what == "VPC endpoints")
    assert endpoints.usd.typical == pytest.approx(5 * 2 * 0.01)
    alarms = next(item for item in found.idle if item.what == "alarms")
    assert alarms.usd.typical == pytest.approx(6 * 0.10 / 730)
    assert "by use" in found.text()
    assert found.to_json()["idle_usd_per_hour"]


def test_own_network_adds_no_cost() -> None:
    found = hourly_cost({**SMALL, "VpcId": "vpc-1", "SubnetIds": "subnet-a,subnet-b"}, SHIPPED)
    network = next(item for item in found.idle if item.what == "network")
    assert network.usd.typical == 0.0
    assert "your own" in network.how


@pytest.mark.parametrize(
    ("row", "parameters"),
    [
        ("SQLite, `endpoints` (default)", {}),
        ("SQLite, `nat`", {"Egress": "nat"}),
        ("PostgreSQL, `endpoints`", {"Ledger": "postgres"}),
        ("PostgreSQL, `nat`", {"Ledger": "postgres", "Egress": "nat"}),
        ("SimpleDB, `nat`", {"Ledger": "simpledb", "Egress": "nat"}),
        ("SQLite, your own network", {"VpcId": "vpc-1", "SubnetIds": "subnet-a,subnet-b"}),
    ],
)
def test_docs_give_the_cost_of_an_idle_stack(row: str, parameters: dict[str, str]) -> None:
    """The page uses the template's default parameters and the shipped prices."""
    found = hourly_cost({"PoolInstanceTypes": "m7i.large", **parameters}, SHIPPED)
    month = f"{found.idle_usd_h.typical * 730:.0f}"
    docs = ROOT / "docs"
    assert f"| {row} | {month} |" in (docs / "costs.md").read_text()
    if not parameters:
        said = f"about {month} USD a month"
        for page in (docs.parent / "README.md", docs / "tutorial-aws.md", docs / "deploy.md"):
            assert said in " ".join(page.read_text().split()), page


def test_the_templates_own_defaults_have_prices() -> None:
    """`deploy plan` shows these prices first."""
    template = (ROOT / "backends/aws/stack.yaml").read_text()
    assert template.count("VpcEndpointType: Interface") == StackShape().interface_endpoints
    types = re.search(r"PoolInstanceTypes:\n(?:.*\n)??    Default: (\S+)", template)
    manager = re.search(r"ManagerInstanceType:\n(?:.*\n)??    Default: (\S+)", template)
    assert types
    assert manager
    for name in (*types[1].split(","), manager[1]):
        assert SHIPPED.instance_usd_h(name).typical > 0


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("Ledger", "oracle", "Ledger is 'oracle'"),
        ("Egress", "proxy", "Egress is 'proxy'"),
        ("DatabaseZones", "three", "DatabaseZones is 'three'"),
        ("ManagerInstanceType", "t4g.huge", "no instance type 't4g.huge'"),
        ("PoolInstanceTypes", " , ", "does not name an instance type"),
        ("PoolOnDemandPercent", "half", "not a number"),
    ],
)
def test_parameters_that_cannot_be_priced_are_named(key: str, value: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        hourly_cost({"Ledger": "postgres", **SMALL, key: value}, SHIPPED)
