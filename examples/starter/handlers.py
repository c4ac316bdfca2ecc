"""What the job does. A handler gets its task's input and, if it wants one, the context."""

import csv


def summarise(item, ctx):
    """One part of a file: the claims and cents of each state in it."""
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
    """All results of one state."""
    return {
        "state": item[0]["state"],
        "claims": sum(part["claims"] for part in item),
        "cents": sum(part["cents"] for part in item),
    }
