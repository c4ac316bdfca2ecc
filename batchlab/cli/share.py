"""Commands of `batchlab share`, for the fair-share policy of a grid.

Invariant: the options have the meaning of AWS Batch's fair-share scheduling policy.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from batchlab.cli import output
from batchlab.cli.groups import command_group
from batchlab.cli.option_values import connect, seconds_of
from batchlab.cli.options import HOME, JSON, argument, flag, option
from batchlab.core.errors import UsageError
from batchlab.core.fair_share import MAX_DECAY_S, MAX_RESERVATION, ShareAttributes
from batchlab.core.model import Json

if TYPE_CHECKING:
    from batchlab.client.http import Client
    from batchlab.core.api_usage_types import SharesView, ShareView

app = command_group("share")

SHARE = argument("Share identifier, or a prefix and an asterisk, such as 'team*'.", "SHARE")
NO_POLICY = "The grid has no fair-share policy. `batchlab share set SHARE --weight 0.5` creates one."


@app.callback()
def share() -> None:
    """Set and show the fair-share policy, which divides pools among shares of jobs.

    \b
    Example: batchlab share list
    """


@app.command("set")
def set_(
    share: str = SHARE,
    weight: float | None = option(
        "Weight factor of the share. A lower weight factor means a larger share: 0.5 gets twice the slots of 1."
    ),
    max_slots: str | None = option(
        "Maximum number of slots that the share uses in each pool, or none to remove the limit.", "N"
    ),
    home: Path | None = HOME,
    json: bool = JSON,
) -> None:
    """Set the weight factor or the limit of a share, which the keys `share` of job files name.

    The first share creates the policy of the grid. A share without an entry has the weight factor 1.
    Jobs without a share belong to the share `default`. An identifier such as 'team*' applies to
    each share with the prefix, and each of these shares is a share of its own.

    \b
    Example: batchlab share set research --weight 0.5 --max-slots 16
    """
    if weight is None and max_slots is None:
        raise UsageError("The command sets nothing.", remedy="Add --weight 0.5 or --max-slots 8.")
    ShareAttributes(share, 1.0 if weight is None else weight)  # an identifier or weight factor out of range is an error
    entry: dict[str, Json] = {"identifier": share, "weight": weight}
    if max_slots is not None:
        entry["max_slots"] = 0 if max_slots == "none" else _slots_of(max_slots)
    _show(home, lambda client: client.set_share(entry), json)


def _slots_of(text: str) -> int:
    if text.isascii() and text.isdigit() and 0 < int(text) < 10**9:
        return int(text)
    raise UsageError(f"--max-slots: {text[:80]!r} is not a number of slots.", remedy="Write 8, or none for no limit.")


@app.command()
def policy(
    decay: str | None = option(
        "Share decay: the time, such as 1h, after which 37% of a use still counts. A longer decay balances the shares "
        "over a longer period.",
        "SPAN",
    ),
    reservation: str | None = option(
        "Compute reservation: the part of each pool's maximum, such as 10%, that stays free for shares without work.",
        "PERCENT",
    ),
    only_listed: str | None = option("Whether a job may name only a share with an entry: yes or no.", "YES|NO"),
    home: Path | None = HOME,
    json: bool = JSON,
) -> None:
    """Set the share decay, the compute reservation, or the permitted shares of the policy.

    With n active shares, the compute reservation keeps (PERCENT/100)^n of the maximum slots of each
    pool free, as in AWS Batch. With --only-listed yes, the manager refuses new jobs that name a share
    without an entry in the policy. Without it, a job may name any share.

    \b
    Example: batchlab share policy --decay 1h --reservation 10%
    """
    changes: dict[str, Json] = {}
    if decay is not None:
        decay_s = seconds_of("--decay", decay, least_s=1.0)
        if decay_s > MAX_DECAY_S:
            raise UsageError(f"--decay: {decay[:80]!r} is too long.", remedy="Write at most 7d.")
        changes["decay_s"] = decay_s
    if reservation is not None:
        changes["reservation"] = _percent_of(reservation)
    if only_listed is not None:
        if only_listed not in ("yes", "no"):
            raise UsageError(f"--only-listed: {only_listed[:80]!r} is neither yes nor no.", remedy="Write yes or no.")
        changes["only_listed"] = only_listed == "yes"
    if not changes:
        raise UsageError("The command sets nothing.", remedy="Add --decay 1h or --reservation 10%.")
    _show(home, lambda client: client.set_share_policy(changes), json)


def _percent_of(text: str) -> int:
    number = text.removesuffix("%").strip()
    if number.isascii() and number.isdigit() and int(number) <= MAX_RESERVATION:
        return int(number)
    raise UsageError(
        f"--reservation: {text[:80]!r} is not a percentage from 0% to {MAX_RESERVATION}%.",
        remedy="Write for example 10%, without a fraction.",
    )


@app.command("list")
def list_(home: Path | None = HOME, json: bool = JSON) -> None:
    """List the shares with their weight factors, their use, their slots, and their waiting work.

    The column part is the share's part of the pool while all active shares have work. The use is in
    slot seconds, and decays with time. The column slots counts the slots of all sent bundles, and
    the column running only the slots that run a bundle according to the last heartbeats. Waiting bundles
    are sent and do not run, and waiting tasks are not sent.

    \b
    Example: batchlab share list
    """
    _show(home, lambda client: client.shares(), json)


@app.command()
def remove(
    share: str | None = argument("Share identifier in the policy.", "SHARE", default=None),
    all_: bool = flag("Remove the whole policy, so that shares have no effect.", "--all"),
    home: Path | None = HOME,
    json: bool = JSON,
) -> None:
    """Remove a share from the policy. Its jobs continue with the weight factor 1 and without a limit.

    \b
    Example: batchlab share remove research
    """
    if (share is None) is not all_:
        raise UsageError("The command needs either a share or --all.", remedy="`batchlab share list` shows the shares.")
    _show(home, lambda client: client.remove_share(share), json)


def _show(home: Path | None, call: Callable[[Client], SharesView], json: bool) -> None:
    """Call the manager, and show the policy and the shares in its answer."""
    with connect(home) as client:
        view = call(client)
    if json:
        output.show_json(view)
        return
    policy = view["policy"]
    if problem := view.get("problem"):  # managers of earlier releases do not send the field
        output.show(problem)
    if policy is None:
        if not problem:
            output.show(NO_POLICY)
        return
    decay = output.span(policy["decay_s"])
    listed = ", only listed shares" if policy.get("only_listed") else ""
    output.show(f"share decay {decay}, compute reservation {policy['reservation']}%{listed}")
    for entry in policy["shares"]:
        if entry["identifier"].endswith("*"):
            limit = f", at most {output.count(entry['max_slots'], 'slot')} each" if entry["max_slots"] else ""
            output.show(f"shares {entry['identifier']}: weight factor {entry['weight']:g}{limit}")
    if view["shares"]:
        output.show("\n" + output.table(_COLUMNS, map(_row, view["shares"])))


_COLUMNS = (
    *("share", "pool", "weight", "part", "limit", "use"),
    *("slots", "running", "jobs", "waiting bundles", "waiting tasks"),
)


def _row(view: ShareView) -> tuple[object, ...]:
    return (
        view["share"],
        view["pool"],
        f"{view['weight']:g}",
        f"{view['part']:.0%}",
        view["max_slots"] or "-",
        f"{view['use_s']:.0f}",
        view["slots"],
        view.get("running_slots", "-"),  # the manager of an earlier release does not count them
        view["jobs"],
        view.get("waiting_bundles", "-"),
        view["waiting_tasks"],
    )
