"""Handlers of the job. A handler gets its task's input and, as an optional second argument, the context."""

import csv


def summarise(item, ctx):
    """Return the claims and cents of each state in one part of a file."""
    states = {}
    with item.open("r", encoding="utf-8") as part:
        for row in csv.DictReader(part):
            cents = round(float(row["paid"]) * 100)
            if cents >= ctx.params["min_cents"]:
                known = states.setdefault(row["state"], {"claims": 0, "cents": 0})
                known["claims"] += 1
                known["cents"] += cents
    print(f"{item.name}: {len(states)} states")  # goes to the task's log
    return [{"state": state, **sums} for state, sums in sorted(states.items())]


def total(item):
    """Return the sums of all results of one state."""
    return {
        "state": item[0]["state"],
        "claims": sum(part["claims"] for part in item),
        "cents": sum(part["cents"] for part in item),
    }
