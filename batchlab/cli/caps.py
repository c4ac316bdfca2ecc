"""`grid cap` and `job cap`: what may be spent before nothing more is launched."""

from __future__ import annotations

from batchlab.cli import output
from batchlab.cli.options import CapArgument, HomeOption, JobArgument, JsonOption, cap_of, home_of


def job_cap(
    job: JobArgument, amount: CapArgument, home: HomeOption = None, json: JsonOption = False
) -> None:
    """Cap what a job costs on AWS: beyond it nothing more is launched, what runs is finished.

    A job that a cap holds back goes on once that is raised.

    \b
    Example: batchlab job cap last 10USD
    """
    from batchlab.cli.session import connect, resolve

    usd = cap_of(amount)
    with connect(home_of(home)) as client:
        view = client.cap_job(resolve(client, job)["id"], usd)
    if json:
        output.show_json(view)
    else:
        said = "is not capped" if usd is None else f"is capped at {usd:g} USD"
        output.show(f"What {view['job']} costs {said}.")


def grid_cap(amount: CapArgument, home: HomeOption = None, json: JsonOption = False) -> None:
    """Cap what the grid costs on AWS: beyond it nothing more is launched, what runs is finished.

    It counts from the day the grid's account was opened; `grid status` says how far it is.

    \b
    Example: batchlab grid cap 50USD
    """
    from batchlab.cli.session import connect

    usd = cap_of(amount)
    with connect(home_of(home)) as client:
        view = client.cap_grid(usd)
    if json:
        output.show_json(view)
    else:
        said = "is not capped" if usd is None else f"is capped at {usd:g} USD"
        output.show(f"What the grid costs {said}.")
