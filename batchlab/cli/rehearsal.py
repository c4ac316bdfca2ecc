"""Acceptance run of batchlab in an AWS account, for `batchlab deploy rehearse`.

Invariants: the run has its own folder, so it never changes the settings of a grid. A signal cannot prevent the removal
of the stack and the report. The report is written after each step.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

from batchlab import __version__
from batchlab.adapters.aws.endpoint import session
from batchlab.cli import output, rehearsal_jobs
from batchlab.cli.deploy_options import retry_notes
from batchlab.cli.output import Stopped
from batchlab.cli.rehearsal_jobs import EXAMPLES, POOL, Expected, Job, expect
from batchlab.cli.rehearsal_steps import CRASH, KILL, NOTICE, STACK, Site
from batchlab.client import aws_connection
from batchlab.core.atomic_write import write_whole
from batchlab.core.errors import UsageError
from batchlab.core.pricing.price_book import NAME as PRICES
from batchlab.core.pricing.price_book import range_json, shown, total
from batchlab.core.text import span
from batchlab.deploy import rehearsal_report, settings, template
from batchlab.deploy.account import Account, aws_errors
from batchlab.deploy.rehearsal import Budget, Rehearsal, StepResult, count_outcomes
from batchlab.deploy.stack import Stack
from batchlab.runtime import stack_connections
from batchlab.runtime.home import Home

if TYPE_CHECKING:
    from batchlab.deploy.settings import Settings

REMOVAL_S = 1200.0
"""Time in seconds that the budget reserves for the removal of the stack."""
MIN_SECRET = 16
"""Minimum number of characters of a secret that a report hides."""
_AGAIN_S = 120.0
"""Interval in seconds after which a step that ignores its time limit is interrupted again."""
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Signals:
    """Context manager for a whole rehearsal, in which Ctrl-C, SIGTERM, and the end of the terminal raise Stopped only
    inside a step.

    A signal outside of a step takes effect at the beginning of the next step, so that the report is always written.
    """

    def __init__(self) -> None:
        self._is_in_step = self._is_pending = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        # `nohup` ignores SIGHUP, and the signal stays ignored.
        numbers = [one for one in _STOPPING if signal.getsignal(one) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._on_signal) for number in (*numbers, signal.SIGALRM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def limited(self, limit_s: float) -> Iterator[None]:
        """Raise Stopped in the `with` block after a signal of the user, or after `limit_s` seconds."""
        self._is_in_step = True
        signal.setitimer(signal.ITIMER_REAL, limit_s, _AGAIN_S)
        try:
            if self._is_pending:
                self._is_pending = False
                raise Stopped(output.INTERRUPTED)
            yield
        finally:
            self._is_in_step = False
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            # The terminal no longer exists. Output to it would fail, and would stop the removal of the stack.
            sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - open until the end of the process
        if self._is_in_step:
            raise Stopped(output.INTERRUPTED)
        self._is_pending |= number != signal.SIGALRM


# --- The whole run -------------------------------------------------------------------------------


@contextmanager
def opened(wanted: Settings, home: Home, archive: Callable[[], Path]) -> Iterator[Site]:
    """Yield the site of a rehearsal, without a change in the account. `home` is the folder of the user's grid.

    Raise UsageError if the settings are invalid, or if the cost or a needed program is missing.
    """
    source = template.load(template.shipped_template())
    if POOL not in (pool.name for pool in wanted.pools):
        raise UsageError(f"The jobs of a rehearsal need a pool {POOL!r}.", remedy=f"Add --pool {POOL}:0-2x2@m7i.large.")
    if not os.environ.get(aws_connection.VARIABLE):
        stack_connections.find_plugin()
    with (
        Account.open(wanted.region or None, notes=retry_notes) as account,
        tempfile.TemporaryDirectory(prefix="batchlab-rehearsal-") as folder,
    ):
        wanted, work, place = replace(wanted, region=account.region), Path(folder), _prepare_home(home)
        settings.parameters(wanted, source)
        jobs = _make_jobs(work, wanted)
        expected = expect(wanted, source, place, jobs)
        yield Site(Stack(account, STACK), wanted, source, place, work, archive, jobs, expected)


def _make_jobs(work: Path, wanted: Settings) -> list[Job]:
    """Write the job files of a rehearsal below `work`."""
    image = dict(wanted.parameters).get("WorkerImage", "")
    has_ffmpeg = bool(image) and "amazon-linux" not in image
    examples = [rehearsal_jobs.example(name, work, has_ffmpeg=has_ffmpeg) for name in EXAMPLES]
    return [*examples, *(rehearsal_jobs.sleeping(name, work) for name in (KILL, CRASH, NOTICE))]


def _prepare_home(home: Home) -> Home:
    """Create the folder of rehearsals in the folder of a grid, with the grid's price book."""
    folder = Home(home.backend_folder("aws") / "rehearsal")
    folder.make()
    if (home.path / PRICES).exists():
        shutil.copyfile(home.path / PRICES, folder.path / PRICES)
    else:
        (folder.path / PRICES).unlink(missing_ok=True)
    return folder


def check_cost(expected: Expected, budget_usd: float) -> None:
    """Raise UsageError if the rehearsal may cost more than the budget."""
    if expected.highest_usd > budget_usd:
        raise UsageError(
            f"The rehearsal may cost {shown(expected.highest_usd)}, and the budget is {shown(budget_usd)}.",
            remedy="Add a higher --budget, or a smaller --pool.",
        )


def question(site: Site) -> str:
    """Return the question to the user before the rehearsal."""
    state = site.stack.state()
    first = (
        f"Destroy the stack {STACK} of an earlier rehearsal ({state.status}) with its data, and then c"
        if state
        else "C"
    )
    where = f"in {site.region}, account {site.account.id}"
    return f"{first}reate the stack {STACK} {where}, rehearse, and destroy it?"


@dataclass(slots=True)
class Report:
    """Report of a rehearsal, which is written after each step."""

    site: Site
    budget: Budget
    rehearsal: Rehearsal
    credentials: tuple[str, ...]
    """Secret parts of the user's AWS credentials, which a report must not contain."""
    began: str = field(default_factory=lambda: output.moment(time.time()))
    document: dict[str, Any] = field(default_factory=dict, init=False)
    """JSON document of the report, as of the last call of `write`."""

    @property
    def page(self) -> Path:
        return self.site.home.path / "report.md"

    def _document(self) -> dict[str, Any]:
        site, results = self.site, self.rehearsal.results
        is_over = len(results) == len(self.rehearsal.steps)
        passed = "passed" if self.rehearsal.has_succeeded else "failed"
        pools = [f"{p.name}:{p.min_size}-{p.max_size}x{p.slots}@{','.join(p.types)}" for p in site.wanted.pools]
        about = {
            "batchlab": __version__,
            "begin": self.began,
            "duration": span(self.rehearsal.elapsed_s),
            "place": f"AWS in {site.region}" if site.account.is_real else f"an emulator, region {site.region}",
            "account": site.account.id,
            "stack": site.stack.name,
            "ledger": dict(site.wanted.parameters).get("Ledger", "sqlite"),
            "workers": ", ".join(pools),
            "budget": shown(self.budget.usd),
            "cost, at most": shown(self.budget.spent_usd(self.rehearsal.elapsed_s)),
        }
        items = [
            {"what": i.what, "text": str(i.usd), "how": i.how, "usd": range_json(i.usd)} for i in site.expected.items
        ]
        document = {
            "verdict": f"The rehearsal {passed if is_over else 'has not ended'}: {count_outcomes(results)}",
            "succeeded": is_over and self.rehearsal.has_succeeded,
            "about": about,
            "expected": {"text": site.expected.text(), "usd": range_json(total(site.expected.items)), "items": items},
            "steps": [result.to_json() for result in results],
            "left": site.left,
        }
        redacted: dict[str, Any] = rehearsal_report.Redaction(site.account.id, self._secrets()).apply(document)
        return redacted

    def _secrets(self) -> tuple[str, ...]:
        """Return the texts that a report must not contain: the token of the manager, and the user's AWS credentials."""
        token = self.site.home.path / "token"
        found = (*self.credentials, token.read_text().strip() if token.exists() else "")
        # A short text is not a credential of AWS, and may be a part of a word.
        return tuple(secret for secret in found if len(secret) >= MIN_SECRET)

    def write(self) -> None:
        self.document = self._document()
        write_whole(self.page.with_suffix(".json"), json.dumps(self.document, indent=1))
        write_whole(self.page, rehearsal_report.markdown(self.document))


def rehearse(site: Site, budget_usd: float, limited: Callable[[float], AbstractContextManager[None]]) -> Report:
    """Run all steps of the rehearsal, and return the written report."""
    expected = site.expected
    budget = Budget(budget_usd, expected.usd_per_h, expected.fixed_usd, REMOVAL_S)
    steps = site.steps()
    numbers = {step.name: number for number, step in enumerate(steps, start=1)}
    rehearsal = Rehearsal(steps, budget, limited, say=output.say)
    report = Report(site, budget, rehearsal, _credentials(site.region))

    def label(name: str) -> str:
        return f"[{numbers[name]}/{len(steps)}] {name}"

    def on_end(result: StepResult) -> None:
        reason = f": {result.reason}" if result.reason else ""
        output.say(f"{label(result.name)}: {result.outcome} after {span(result.seconds)}{reason}")
        report.write()

    rehearsal.on_begin = lambda step, limit_s: output.say(f"{label(step.name)}: {step.what}, at most {span(limit_s)}")
    rehearsal.on_end = on_end
    rehearsal.run()
    return report


def _credentials(region: str) -> tuple[str, ...]:
    """Return the secret parts of the AWS credentials of this process."""
    with aws_errors("AWS"):
        found = session(region).get_credentials()
        return (found.secret_key, found.token or "") if found else ()


def summary(report: Report) -> str:
    """Return the result of a rehearsal as text, with everything that is left behind."""
    document = report.document
    rows = [(step["name"], step["outcome"], span(step["seconds"]), step["reason"] or "-") for step in document["steps"]]
    lines = [output.table(("step", "result", "time", "reason"), rows), "", document["verdict"]]
    for one in report.site.left:
        lines += [f"Left: {one['resource']}", f"  Remove it with: {one['command']}"]
    return "\n".join([*lines, f"Report: {report.page}"])
