"""`sim`: the grid in the simulator, tried over many seeds."""

from __future__ import annotations

import typer

app = typer.Typer(no_args_is_help=True)


@app.callback()
def sim_() -> None:
    """Try the grid's promises in the simulator."""
