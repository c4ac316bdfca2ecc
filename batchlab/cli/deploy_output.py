"""The front of `batchlab deploy`: settings from options, a plan as text, events as they come.

Invariant: nothing is agreed to that nobody has said: without a terminal only --yes agrees.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from batchlab.cli import output
from batchlab.cli.signals import Stopped
from batchlab.core.errors import UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from batchlab.deploy.failure_cause import Event
    from batchlab.deploy.plan import Cost, Plan
    from batchlab.deploy.settings import PoolSettings, Settings
    from batchlab.deploy.stack import Stack
    from batchlab.deploy.template import Template
    from batchlab.runtime.home import Home

_PLAN_COLUMNS = ("action", "id", "type", "replacement", "why")
_SHOWN_WHY = 3


# --- Settings ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Given:
    """What the command line says of the stack; None and empty where it says nothing."""

    pools: Sequence[str] = ()
    file: Path | None = None
    stack: str | None = None
    region: str | None = None
    parameters: Mapping[str, str] = field(default_factory=dict)
    pool_parameters: Mapping[str, str] = field(default_factory=dict)
    packages: Sequence[str] = ()
    database_ca: Path | None = None


def assignments(given: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE, as often as said; UsageError."""
    found = {}
    for one in given:
        name, equals, value = one.partition("=")
        if not name or not equals:
            raise UsageError(f"{one!r} is not NAME=VALUE.", remedy="Say --set AttemptDays=14.")
        found[name] = value
    return found


def place(given: Given, home: Home) -> tuple[str, str | None]:
    """The stack's name, and the region that is named somewhere."""
    from batchlab.deploy import settings
    from batchlab.runtime.aws import deployment

    said = settings.load(given.file) if given.file else None
    kept = settings.read(home)
    name = given.stack or (said.stack if said else None) or (kept.stack if kept else None)
    region = given.region or (said.region if said else None)
    if not region and kept and kept.stack == (name or kept.stack):
        region = kept.region
    there = deployment.read(home) if name is None else None
    if there:
        return there.stack, region or there.region
    return name or settings.STACK, region or None


def chosen(given: Given, home: Home, stack: Stack) -> Settings:
    """What the stack is to be: the file that is named, or what this home keeps, or what the stack
    itself has; and over that the options."""
    from batchlab.deploy import settings

    kept = settings.read(home)
    if given.file:
        found = settings.load(given.file)
    elif kept and kept.stack == stack.name:
        found = kept
    elif (state := stack.state()) and state.parameters:
        found = settings.from_stack(stack.name, stack.account.region, state.parameters)[0]
    else:
        found = settings.Settings()
    return _over(replace(found, stack=stack.name, region=stack.account.region), given)


def on_paper(given: Given, home: Home) -> Settings:
    """The same as far as AWS need not be asked: the file that is named, or what this home keeps of
    that stack, or the template's own; and over that the options. The region may be empty."""
    from batchlab.deploy import settings

    name, region = place(given, home)
    kept = settings.read(home)
    found = settings.Settings()
    if given.file:
        found = settings.load(given.file)
    elif kept and kept.stack == name:
        found = kept
    return _over(replace(found, stack=name, region=region or ""), given)


def check(given: Given, home: Home, source: Template) -> None:
    """UsageError for what is wrong whatever there is on AWS, which is not asked."""
    from batchlab.deploy import settings

    wanted = on_paper(given, home)
    kept = settings.read(home)
    if given.file or (kept and kept.stack == wanted.stack):
        settings.parameters(wanted, source)
    else:
        # The rest may be what the stack itself has.
        settings.values(wanted, source)


def _over(found: Settings, given: Given) -> Settings:
    """The settings with what the command line says in place of theirs."""
    if given.pools:
        found = replace(found, pools=_pools(given.pools, found))
    if given.pool_parameters:
        found = replace(
            found,
            pools=tuple(
                replace(
                    one,
                    parameters=tuple(
                        sorted({**dict(one.parameters), **given.pool_parameters}.items())
                    ),
                )
                for one in found.pools
            ),
        )
    if given.packages:
        found = replace(found, packages=tuple(given.packages))
    if given.database_ca:
        found = replace(found, database_ca=str(given.database_ca.absolute()))
    return found.with_parameters(given.parameters)


def _pools(texts: Sequence[str], before: Settings) -> tuple[PoolSettings, ...]:
    from batchlab.cli.grid_page import parse_typed
    from batchlab.deploy.settings import PoolSettings

    known = {one.name: one for one in before.pools}
    found = []
    for text in texts:
        pool, types = parse_typed(text)
        old = known.get(pool.name, PoolSettings(pool.name))
        found.append(
            replace(
                old,
                min_size=pool.min_size,
                max_size=pool.max_size,
                slots=pool.slots,
                types=types or old.types,
            )
        )
    return tuple(found)


def release_for(wanted: Settings, given: Path | None, home: Home) -> Path:
    """The release's archive: the one that is given, or one made now; UsageError, BackendError."""
    import hashlib

    from batchlab.deploy import release

    if given is None:
        certificates = Path(wanted.database_ca) if wanted.database_ca else None
        return release.build_release(
            home.of("aws") / "releases",
            architecture=wanted.machine,
            packages=wanted.packages,
            database_ca=certificates,
            variables=dict(wanted.environment),
            say=output.say,
        )
    try:
        content = given.read_bytes()
    except OSError as error:
        raise UsageError(
            f"{given} cannot be read: {error.strerror}.",
            remedy="Name a file that is there and can be read.",
        ) from error
    if hashlib.sha256(content).hexdigest() != release.release_of(given):
        raise UsageError(
            f"{given} is not called by the SHA-256 of what is in it, as a release is.",
            remedy="It is damaged, or was renamed: leave out --release, and one is made.",
        )
    return given


def tries() -> output.Sometimes:
    """Notes on one call that nothing answers: the pauses between its tries grow, and it is told
    before the long ones."""
    return output.Sometimes(1.0)


# --- The person in front -------------------------------------------------------------------------


@dataclass(slots=True)
class Person:
    """apply.Front on a terminal or without one."""

    yes: bool = False
    json: bool = False
    typed: str = ""
    """What has to be typed to agree; "y" where it is empty."""
    plan: Plan | None = None

    def say(self, text: str) -> None:
        output.say(text)

    def agrees(self, question: str) -> bool:
        if self.yes:
            return True
        if not sys.stdin.isatty():
            raise UsageError(
                "There is no terminal to ask on.", remedy="Say --yes where you agree to it."
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
        watch = Picture(what, total) if sys.stderr.isatty() else Lines()
        try:
            with watch.shown():
                yield watch.see
        except (Stopped, KeyboardInterrupt):
            output.say(
                "AWS goes on with the stack. `batchlab deploy apply` follows it again and does "
                "what is left; `batchlab deploy status` shows it."
            )
            raise


def plan_text(plan: Plan) -> str:
    """A plan for a person: where, what it costs, what changes."""
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
    """What it costs, one thing a line."""
    lines = [cost.hourly.text()] if cost.hourly else []
    return [*lines, *([cost.note] if cost.note else [])]


# --- An operation as it goes ---------------------------------------------------------------------


class Lines:
    """A line for each event that ends or fails something."""

    def __init__(self) -> None:
        self._begun_s = time.monotonic()

    @contextmanager
    def shown(self) -> Iterator[None]:
        yield

    def see(self, event: Event) -> None:
        if event.status.endswith("_IN_PROGRESS") and not event.is_of_stack:
            return
        output.say(f"[{output.span(time.monotonic() - self._begun_s):>7}] {_event_text(event)}")


def _event_text(event: Event) -> str:
    reason = f": {event.reason}" if event.reason else ""
    return output.clean(f"{event.status} {event.resource} ({event.type}){reason}")


class Picture:
    """What is being made now, a bar, and what has failed, as lines above that stay."""

    def __init__(self, what: str, total: int) -> None:
        self._what = what
        self._total = total
        self._begun_s = time.monotonic()
        self._current: dict[str, str] = {}
        self._ended: set[str] = set()
        self._say: Callable[[str], None] = output.say

    @contextmanager
    def shown(self) -> Iterator[None]:
        from rich.console import Console
        from rich.live import Live

        console = Console(stderr=True)
        with Live(console=console, get_renderable=self.draw, refresh_per_second=8):
            self._say = lambda text: console.print(
                output.visible(text), markup=False, highlight=False
            )
            yield
        self._say = output.say

    def see(self, event: Event) -> None:
        if event.is_of_stack:
            self._say(_event_text(event))
            return
        if event.status.endswith("_IN_PROGRESS"):
            self._current[event.resource] = event.status
            return
        self._current.pop(event.resource, None)
        self._ended.add(event.resource)
        if event.has_failed:
            self._say(_event_text(event))

    def draw(self) -> RenderableType:
        """What there is to see now."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        since = output.span(time.monotonic() - self._begun_s)
        head = Table.grid(padding=(0, 2))
        # What an update leaves as it is may be told of too.
        total = max(self._total, len(self._ended))
        count = f"{len(self._ended)}/{total}" if self._total else str(len(self._ended))
        bar = ProgressBar(total=max(total, 1), completed=len(self._ended), width=24)
        head.add_row(Text(self._what), bar, count, since)
        names = [f"  {status.lower()} {name}" for name, status in list(self._current.items())[:8]]
        return Group(head, *(Text(one, "dim") for one in names))
