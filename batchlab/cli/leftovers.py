"""`batchlab gc --aws`: what has the tag of a stack, and what of it is left behind."""

from __future__ import annotations

from batchlab.cli import output

_COLUMNS = ("stack", "kind", "name", "is")


def sweep_aws(region: str | None, *, removing: bool, json: bool) -> None:
    """List it, and remove what no stack has any more where that is wanted; BackendError where
    something could not be."""
    from batchlab.deploy.account import Account
    from batchlab.deploy.sweep import remove_left, tagged
    from batchlab.errors import BackendError

    with Account.open(region) as account:
        found = sorted(tagged(account), key=lambda one: (one.thing.stack, one.thing.arn))
        rows, shown, stays = [], [], 0
        for one in found:
            thing = one.thing
            left = not one.is_used
            why = ""
            if left and removing:
                why = remove_left(account, one, output.say)
                stays += bool(why)
            fate = "in use" if one.is_used else "left"
            if left and removing:
                fate = f"left: {why}" if why else "removed"
            rows.append((thing.stack, thing.kind, thing.name, fate))
            shown.append(
                {
                    "stack": thing.stack,
                    "kind": thing.kind,
                    "name": thing.name,
                    "arn": thing.arn,
                    "left": left,
                    "removed": left and removing and not why,
                    "why": why or None,
                }
            )
        where = f"account {account.id}, {account.region}"
    if json:
        output.show_json(shown)
    elif rows:
        output.show(output.table(_COLUMNS, rows))
    else:
        output.say(f"Nothing in {where} has the tag of a stack.")
    left_over = sum(1 for one in found if not one.is_used)
    if left_over and not removing and not json:
        output.say(
            f"{output.count(left_over, 'thing')} left; `batchlab gc --aws --yes` removes it."
        )
    if stays:
        raise BackendError(
            f"{output.count(stays, 'thing')} could not be removed.",
            remedy="The list says why; what is of another kind is removed in the console.",
        )
