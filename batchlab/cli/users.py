"""Commands of `batchlab user`, which add, list, and revoke users of a grid, and the command `batchlab audit`."""

from __future__ import annotations

import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from batchlab.cli import output
from batchlab.cli.groups import Commands, command_group
from batchlab.cli.option_values import connect, seconds_of
from batchlab.cli.options import HOME, JSON, argument, flag, option
from batchlab.core.errors import UsageError
from batchlab.core.users import Role

if TYPE_CHECKING:
    from batchlab.core.api_types import AuditRecordView, UserView

app = Commands()
user = command_group("user")
app.add_typer(user)

NAME = argument("Name of the user.", "NAME")


@user.callback()
def user_() -> None:
    """Add, list, change, and revoke users, who have tokens and limited permissions.

    A grid that one person uses needs no users, because the grid's own token belongs to the
    administrator 'owner'. A user with the role view may look at everything. With the role submit, a
    user may also submit jobs, and control the user's own jobs. With the role operate, a user may also
    control all jobs, pools, schedules, and notifications. With the role administer, a user may also
    manage users and cost caps, and stop the grid.

    \b
    Example: batchlab user add alice --role submit
    """


@user.command()
def add(
    name: str = NAME,
    role: Role = option("Role of the user: view, submit, operate, or administer.", default=...),
    expires: str | None = option("Time until the token expires, such as 30d. Default: never.", "SPAN"),
    replace: bool = flag("Replace the token and the role of an existing user.", "--replace"),
    home: Path | None = HOME,
    json: bool = JSON,
) -> None:
    """Add a user, and print the user's token. The token is shown only once.

    The user sets BATCHLAB_TOKEN to the token and BATCHLAB_URL to the manager's address, and then
    uses the commands of this tool without the grid's folder. The token also opens the web page.

    \b
    Example: batchlab user add alice --role submit --expires 30d
    """
    expires_s = time.time() + seconds_of("--expires", expires, least_s=1.0) if expires else None
    with connect(home) as client:
        added = client.add_user(name, role.value, expires_s=expires_s, replace=replace)
        url = client.url
    output.answer(json, {**added, "url": url}, added["token"])
    if not json:
        until = f" until {output.moment(expires_s)}" if expires_s else ""
        output.say(f"{name} has the role {role.value}{until}. This token is not shown again:")
        output.say(f"  export BATCHLAB_URL={url} BATCHLAB_TOKEN=TOKEN")


@user.command("list")
def list_(home: Path | None = HOME, json: bool = JSON) -> None:
    """List the users of the grid. A user who is not an administrator sees only the user's own entry.

    \b
    Example: batchlab user list
    """
    with connect(home) as client:
        users = client.users()
    columns = ("name", "role", "state", "added", "by", "expires")
    nothing = "There are no users besides the owner of the grid's token. `batchlab user add NAME` adds one."
    output.listing(json, users, columns, map(_user_row, users), nothing)


def _user_row(view: UserView) -> tuple[object, ...]:
    added, expires = output.moment(view["created_s"]), output.moment(view["expires_s"])
    return view["name"], view["role"], view["state"], added, view["created_by"], expires


@user.command("role")
def role_(
    name: str = NAME,
    role: Role = argument("New role of the user: view, submit, operate, or administer.", "ROLE"),
    home: Path | None = HOME,
    json: bool = JSON,
) -> None:
    """Change the role of a user. The user's token stays valid.

    \b
    Example: batchlab user role alice operate
    """
    with connect(home) as client:
        view = client.set_role(name, role.value)
    output.answer(json, view, f"{view['name']} has the role {view['role']}.")


@user.command()
def revoke(name: str = NAME, home: Path | None = HOME, json: bool = JSON) -> None:
    """Revoke the token of a user, and end the user's sessions of the web page. The user's jobs and
    schedules continue.

    \b
    Example: batchlab user revoke alice
    """
    with connect(home) as client:
        view = client.revoke_user(name)
    output.answer(json, view, f"The token of {view['name']} is revoked.")


class Outcome(StrEnum):
    """Outcomes of requests in the audit log."""

    DONE = "done"
    REFUSED = "refused"
    FAILED = "failed"
    UNKNOWN = "unknown"
    ALLOWED = "allowed"


@app.command()
def audit(
    user: str = option("Show only requests of this user.", "NAME", default=""),
    action: str = option(
        "Show only this action, such as 'job cancel', or this group, such as job.", "NAME", default=""
    ),
    outcome: Outcome | None = option(
        "Show only requests with this outcome: done, refused, failed, unknown, or allowed, which have no answer yet."
    ),
    since: str | None = option("Show only requests within the last SPAN, such as 2h.", "SPAN"),
    until: str | None = option("Show only requests that are older than SPAN, such as 1h.", "SPAN"),
    limit: int = option("Maximum number of shown requests.", default=50, min=1),
    home: Path | None = HOME,
    json: bool = JSON,
) -> None:
    """List the changes that users requested, and the refused requests. The newest request comes first.

    A user who is not an administrator sees only the user's own requests.

    \b
    Example: batchlab audit --user alice --since 24h
    """
    now_s = time.time()
    since_s = max(0.0, now_s - seconds_of("--since", since)) if since else 0.0
    until_s = max(0.0, now_s - seconds_of("--until", until)) if until else None
    if until_s is not None and until_s <= since_s:
        raise UsageError(
            f"No request of the last {since} is older than {until}.",
            remedy="Write a shorter time after --until than after --since.",
        )
    chosen = outcome.value if outcome else ""
    with connect(home) as client:
        records = client.audit(user=user, action=action, outcome=chosen, since_s=since_s, until_s=until_s, limit=limit)
    columns = ("at", "user", "role", "action", "object", "outcome", "reason")
    output.listing(json, records, columns, map(_audit_row, records), "The audit log has no such requests.")


def _audit_row(view: AuditRecordView) -> tuple[object, ...]:
    times = f" ({view['count']} times)" if view["count"] > 1 else ""
    outcome = view["outcome"] + times
    row = (view["user"], view["role"] or "-", view["action"], view["object"] or "-", outcome, view["reason"] or "-")
    return output.moment(view["at_s"]), *row
