"""`batchlab scenario …`: a peak written down, looked at, forecast, lived through and judged."""

from __future__ import annotations

import typer

from batchlab.cli import faulting, forecasting, planning, replaying, scenarios

app = typer.Typer(no_args_is_help=True)


@app.callback()
def scenario_() -> None:
    """Rehearse a peak: check it, forecast it, replay it, judge it.

    \b
    Example: batchlab scenario check claims-month-end
    """


scenarios.register(app)
forecasting.register(app)
replaying.register(app)
planning.register(app)
faulting.register(app)
