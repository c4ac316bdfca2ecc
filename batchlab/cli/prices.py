"""`batchlab prices`: the price book with its sources."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from batchlab.cli import output
from batchlab.cli.options import HomeOption, JsonOption, home_of

if TYPE_CHECKING:
    from batchlab.core.pricing.price_book import PriceBook

app = typer.Typer(no_args_is_help=True)


def register(root: typer.Typer) -> None:
    """Add the group `prices` to the root command."""
    root.add_typer(app, name="prices")


@app.callback()
def prices() -> None:
    """Show and update the price book.

    \b
    Example: batchlab prices show
    """


@app.command()
def show(
    types: Annotated[
        list[str] | None,
        typer.Argument(metavar="TYPE", help="Only these instance types.", show_default=False),
    ] = None,
    home: HomeOption = None,
    json: JsonOption = False,
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
    others += [
        ("rds", f"{name} USD per hour", f"{price:g}")
        for name, price in book.blocks["rds"].table.items()
    ]
    sources = [
        (name, block.region, block.date.isoformat(), block.source)
        for name, block in book.blocks.items()
    ]
    parts = [output.table(columns, instances)]
    if types is None:
        parts.append(output.table(("block", "price", "amount"), others))
    parts.append(output.table(("block", "region", "as of", "source"), sources))
    return "\n\n".join([*parts, f"Price book: {book.path}"])


@app.command()
def refresh(
    from_: Annotated[
        Path,
        typer.Option(
            "--from",
            metavar="FILE",
            help="AWS's price list of AmazonEC2, AmazonRDS, or AWSDataTransfer (CSV or JSON), the "
            "output of `aws ec2 describe-spot-price-history`, or a CSV of on-demand prices.",
            show_default=False,
        ),
    ],
    region: Annotated[
        str, typer.Option("--region", help="Region, if the file has several.", show_default=False)
    ] = "",
    date: Annotated[
        datetime | None,
        typer.Option(
            "--date",
            formats=["%Y-%m-%d"],
            help="Date of the prices, if the file does not have one.",
            show_default=False,
        ),
    ] = None,
    home: HomeOption = None,
    json: JsonOption = False,
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
        output.say(
            f"Still of another region: {', '.join(others)}. Their prices are few: write them "
            f"into that file."
        )
