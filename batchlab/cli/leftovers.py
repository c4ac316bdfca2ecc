"""`batchlab gc --aws`: what stacks have had on AWS, and what of it is left behind."""

from __future__ import annotations

from collections.abc import Sequence

from batchlab.cli import output

_COLUMNS = ("stack", "kind", "name", "is")


def sweep_aws(region: str | None, names: Sequence[str], *, removing: bool, json: bool) -> None:
    """List it, and remove what no stack has any more where that is wanted; what is known by its
    name alone only where it is one of `names`. BackendError where something could not be."""
    from batchlab.cli.deploying import tries
    from batchlab.deploy.account import Account
    from batchlab.deploy.leftovers import Leftovers, chosen, remove_left
    from batchlab.errors import BackendError

    with Account.open(region, notes=tries) as account:
        there = Leftovers(account)
        tagged = list(there.tagged())
        named = list(there.named({one.thing.name for one in tagged}, output.say))
        found = sorted([*tagged, *named], key=lambda one: (one.thing.stack, one.thing.arn))
        going = chosen(found, names)
        rows, shown, stays = [], [], 0
        for one in found:
            thing = one.thing
            goes = removing and one in going
            why = remove_left(account, one, output.say) if goes else ""
            stays += bool(why)
            fate = "in use" if one.is_used else "left, by its name" if one.is_guessed else "left"
            if goes:
                fate = f"left: {why}" if why else "removed"
            rows.append((thing.stack, thing.kind, thing.name, fate))
            shown.append(
                {
                    "stack": thing.stack,
                    "kind": thing.kind,
                    "name": thing.name,
                    "arn": thing.arn,
                    "known_by": "name" if one.is_guessed else "tag",
                    "left": not one.is_used,
                    "removed": goes and not why,
                    "why": why or None,
                }
            )
        where = f"account {account.id}, {account.region}"
    if json:
        output.show_json(shown)
    elif rows:
        output.show(output.table(_COLUMNS, rows))
    else:
        output.say(f"Nothing in {where} has the tag of a stack, or a name as a stack gives them.")
    if not json:
        _say_how(
            0 if removing else sum(1 for one in tagged if not one.is_used),
            sum(1 for one in named if not (one.is_used or (removing and one in going))),
        )
    if stays:
        raise BackendError(
            f"{output.count(stays, 'thing')} could not be removed.",
            remedy="The list says why; what is of another kind is removed in the console.",
        )


def _say_how(by_tag: int, by_name: int) -> None:
    """How what is left would be removed."""
    if by_tag:
        output.say(f"{output.count(by_tag, 'thing')} left; `batchlab gc --aws --yes` removes it.")
    if by_name:
        output.say(
            f"{output.count(by_name, 'thing')} left that only the name says to be a stack's: look "
            "whose it is; `batchlab gc --aws --yes --name NAME` removes it."
        )
