"""Small job that runs immediately. `batchlab init` writes it into an empty folder.

Invariant: the job passes `load` unchanged, and its handlers need only Python.
"""

from __future__ import annotations

JOB = """\
# A first job: sum insurance claims per state. Run it with `batchlab run job.yaml`.
name: first-claims

input:
  files: data/*.csv   # relative to this file
  split: lines        # one task gets some lines of a file
  size: 5             # lines per task; a real job would take thousands
  header: true        # each part begins with the file's first line

params:
  min_cents: 1000     # smaller claims are left out; try --set min_cents=0

stages:
  # Runs for each part as soon as a worker is free.
  - name: summarise
    python: handlers:summarise
    timeout: 1m
    retry: 3          # tries in all

  # Waits for all parts, then runs once for each state.
  - name: total
    python: handlers:total
    gather: {by: state}
    timeout: 1m

failure:
  max_failures: 0     # or a number of tasks, or a share such as 5%
  then: carry_on      # or stop
"""

HANDLERS = '''\
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
'''

CLAIMS = """\
claim,state,paid
C-0001,NY,1250.00
C-0002,CA,310.40
C-0003,NY,75.25
C-0004,TX,9.99
C-0005,CA,2200.00
C-0006,TX,480.10
C-0007,NY,61.00
C-0008,CA,5.00
C-0009,TX,1999.95
C-0010,NY,820.30
C-0011,CA,47.80
C-0012,TX,133.00
"""


def starter() -> dict[str, str]:
    """Return the files of the starter job: relative name with "/", and text."""
    return {"job.yaml": JOB, "handlers.py": HANDLERS, "data/claims.csv": CLAIMS}
