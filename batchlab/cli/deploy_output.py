"""Output of `batchlab deploy`: a plan as text, the question before a change, and events.

Invariant: without a terminal, only --yes agrees to a change.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from batchlab.cli import output
from batchlab.cli.progress import StackDisplay
from batchlab.cli.signals import Stopped
from batchlab.core.errors import UsageError

if TYPE_CHECKING:
    from batchlab.deploy.failure_cause import Event
    from batchlab.deploy.plan import Cost, Plan

_PLAN_COLUMNS = ("action", "id", "type", "replacement", "why")
_SHOWN_WHY = 3


# --- The person in front -------------------------------------------------------------------------


@dataclass(slots=True)
class Person:
    """Front of a deployment (see deploy.apply.Front) with or without a terminal."""

    yes: bool = False
    json: bool = False
    typed: str = ""
    """Text that the user must type to agree; "y" if empty."""
    plan: Plan | None = None

    def say(self, text: str) -> None:
        output.say(text)

    def agrees(self, question: str) -> bool:
        if self.yes:
            return True
        if not sys.stdin.isatty():
            raise UsageError(
                "The question needs a terminal.", remedy="Add --yes to agree without a question."
            )
        how = f"type {self.typed} to go on" if self.typed else "y/N"
        print(f"{output.clean(question)} [{how}] ", end="", file=sys.stderr, flush=True)  # noqa: T201
        try:
            answer = input().strip()
        except EOFError:
            answer = ""
        agreed = answer == self.typed if self.typed else answer.lower() in ("y", "yes")
        if not agreed:
            output.say("Nothing is changed.")
        return agreed

    def show(self, plan: Plan) -> None:
        self.plan = plan
        if not self.json:
            output.show(plan_text(plan))

    @contextmanager
    def watching(self, what: str, total: int) -> Iterator[Callable[[Event], None]]:
        try:
            with StackDisplay(what, total) as display:
                yield display.see
        except (Stopped, KeyboardInterrupt):
            output.say(
                "AWS goes on with the stack. `batchlab deploy apply` follows it again and does "
                "what is left; `batchlab deploy status` shows it."
            )
            raise


def plan_text(plan: Plan) -> str:
    """Return a plan as text: account and region, cost, and changes."""
    head = f"Stack {plan.settings.stack} in {plan.region}, account {plan.account}, as {plan.who}."
    parts = [head, "", *cost_lines(plan.cost), ""]
    if not plan.changes:
        return "\n".join([*parts, "No changes: the stack is as it is to be."])
    verb = "Create" if plan.is_new else "Update"
    rows = [
        (
            one.action,
            one.id,
            one.type.removeprefix("AWS::"),
            one.replacement or "-",
            ", ".join(one.why[:_SHOWN_WHY]) + (", …" if len(one.why) > _SHOWN_WHY else "") or "-",
        )
        for one in plan.changes
    ]
    if all(row[-1] == "-" for row in rows):
        table = output.table(_PLAN_COLUMNS[:3], [row[:3] for row in rows])
    else:
        table = output.table(_PLAN_COLUMNS, rows)
    replaced = [one.id for one in plan.changes if one.replacement in ("True", "Conditional")]
    parts += [f"{verb}, {output.count(len(rows), 'change')}:", table]
    if replaced:
        parts.append(f"Replaced, or perhaps: {', '.join(replaced)}.")
    return "\n".join(parts)


def cost_lines(cost: Cost) -> list[str]:
    """Return the lines on the cost."""
    lines = [cost.hourly.text()] if cost.hourly else []
    return [*lines, *([cost.note] if cost.note else [])]
