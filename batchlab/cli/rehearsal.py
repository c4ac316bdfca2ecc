"""Acceptance run of batchlab in an AWS account, for `batchlab deploy rehearse`.

Invariants: the run has its own folder, so it never changes the settings of a grid. Only one rehearsal runs in a folder.
A signal, or the end of the terminal, cannot prevent the removal of the stack and the report. The report is written
after each step.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Self, TextIO, cast

from batchlab import __version__
from batchlab.adapters.aws.endpoint import session
from batchlab.cli import output, rehearsal_jobs
from batchlab.cli.deploy_options import retry_notes
from batchlab.cli.output import Stopped
from batchlab.cli.rehearsal_jobs import EXAMPLES, POOL, Expected, Job, expect
from batchlab.cli.rehearsal_steps import CRASH, KILL, NOTICE, STACK, Site
from batchlab.client import aws_connection
from batchlab.core.atomic_write import write_whole
from batchlab.core.errors import Refused, UsageError
from batchlab.core.operating_system import since_boot_s
from batchlab.core.pricing.price_book import NAME as PRICES
from batchlab.core.pricing.price_book import range_json, shown, total
from batchlab.core.text import span
from batchlab.deploy import rehearsal_report, settings, template
from batchlab.deploy.account import Account, aws_errors
from batchlab.deploy.rehearsal import Budget, Limits, Rehearsal, StepResult, TimeLimit, count_outcomes
from batchlab.deploy.stack import Stack
from batchlab.runtime import stack_connections
from batchlab.runtime.home import Home

if TYPE_CHECKING:
    from batchlab.deploy.settings import Settings

REMOVAL_S = 1200.0
"""Time in seconds that the budget reserves for the removal of a stack without a database."""
MIN_SECRET = 16
"""Minimum number of characters of a secret that a report hides."""
_AGAIN_S = 120.0
"""Interval in seconds after which a step that ignores its time limit is interrupted again."""
_CHECK_S = 5.0
"""Interval in seconds of the checks whether a step has reached its time limit."""
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class LastingStream:
    """Stream that discards its output after the terminal or the pipe behind it has closed.

    Ctrl-C also ends a program such as `tee` behind a pipe. Without this class, each message would then be an error that
    stops the removal of the stack.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.is_closed = False

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError:
            self.discard()
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            self.discard()

    def discard(self) -> None:
        """Discard all further output."""
        if not self.is_closed:
            self.is_closed, self.stream = True, Path(os.devnull).open("w")  # noqa: SIM115 - open until the process ends

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class Signals:
    """Context manager for a whole rehearsal, in which Ctrl-C, SIGTERM, and the end of the terminal raise Stopped only
    inside a step.

    A signal outside of a step takes effect at the beginning of the next step, so that the report is always written.
    """

    def __init__(self) -> None:
        self.interruptions = 0
        self._is_in_step = self._is_pending = False
        self._deadline_s = 0.0
        self._before: dict[int, Any] = {}
        self._streams: tuple[LastingStream, ...] = ()

    def __enter__(self) -> Self:
        # `nohup` ignores SIGHUP, and the signal stays ignored.
        numbers = [one for one in _STOPPING if signal.getsignal(one) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._on_signal) for number in numbers}
        self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._on_alarm)
        self._streams = LastingStream(sys.stdout), LastingStream(sys.stderr)
        sys.stdout, sys.stderr = cast("tuple[TextIO, TextIO]", self._streams)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        # A closed terminal or pipe stays replaced, because the end of the command prints the result.
        sys.stdout, sys.stderr = (stream.stream for stream in self._streams)

    @contextmanager
    def limited(self, limit_s: float) -> Iterator[None]:
        """Raise Stopped in the `with` block after a signal of the user, or TimeLimit after `limit_s` seconds."""
        try:
            try:
                self._is_in_step = True
                # The timer of a suspended machine stops, so each alarm compares the time with the deadline.
                self._deadline_s = since_boot_s() + limit_s
                signal.setitimer(signal.ITIMER_REAL, min(limit_s, _CHECK_S), _CHECK_S)
                if self._is_pending:
                    self._is_pending = False
                    raise Stopped(output.INTERRUPTED)
                yield
            finally:
                self._is_in_step = False
        finally:
            # A signal may arrive in the inner `finally`.
            self._is_in_step = False
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.interruptions += 1
        if number == signal.SIGHUP:
            # The terminal no longer exists.
            for stream in self._streams:
                stream.discard()
        if self._is_in_step:
            raise Stopped(output.INTERRUPTED)
        self._is_pending = True

    def _on_alarm(self, _number: int, _frame: FrameType | None) -> None:
        if self._is_in_step and since_boot_s() >= self._deadline_s:
            self._deadline_s += _AGAIN_S
            raise TimeLimit(output.INTERRUPTED)


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
    with ExitStack() as stack:
        account = stack.enter_context(Account.open(wanted.region or None, notes=retry_notes))
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="batchlab-rehearsal-"))
        place = _prepare_home(home)
        stack.enter_context(_alone(place))
        wanted, work = replace(wanted, region=account.region), Path(folder)
        settings.parameters(wanted, source)
        jobs = _make_jobs(work, wanted)
        expected = expect(wanted, source, place, jobs)
        site = Site(Stack(account, STACK), wanted, source, place, work, archive, jobs, expected)
        site.check_place()
        yield site


@contextmanager
def _alone(home: Home) -> Iterator[None]:
    """Hold the lock of the rehearsals in a folder. Raise Refused if a rehearsal is running, whose stack this rehearsal
    would destroy.
    """
    with (home.path / "rehearsal.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Refused(
                f"A rehearsal is running in {home.path}.", remedy="Wait for its end, or stop it with Ctrl-C."
            ) from error
        yield


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
        spent_usd = self.budget.spent_usd(self.rehearsal.elapsed_s)
        excess = f" The cost may have exceeded {shown(self.budget.usd)}." if spent_usd > self.budget.usd else ""
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
            "cost, at most": shown(spent_usd),
        }
        items = [
            {"what": i.what, "text": str(i.usd), "how": i.how, "usd": range_json(i.usd)} for i in site.expected.items
        ]
        document = {
            "verdict": f"The rehearsal {passed if is_over else 'has not ended'}: {count_outcomes(results)}{excess}",
            "succeeded": is_over and self.rehearsal.has_succeeded,
            "about": about,
            "expected": {"text": site.expected.text(), "usd": range_json(total(site.expected.items)), "items": items},
            "steps": [result.to_json() for result in results],
            "left": site.left,
        }
        redacted: dict[str, Any] = rehearsal_report.Redaction(site.account.id, self._secrets()).apply(document)
        return redacted

    def without_secrets(self, text: str) -> str:
        """Return a text for the user's terminal, which may contain the number of the account."""
        return str(rehearsal_report.Redaction("", self._secrets()).apply(text))

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


def rehearse(site: Site, budget_usd: float, limits: Limits) -> Report:
    """Run all steps of the rehearsal, and return the written report."""
    expected = site.expected
    budget = Budget(budget_usd, expected.usd_per_h, expected.fixed_usd, REMOVAL_S + expected.database_s)
    steps = site.steps()
    numbers = {step.name: number for number, step in enumerate(steps, start=1)}
    rehearsal = Rehearsal(steps, budget, limits, say=output.say)
    report = Report(site, budget, rehearsal, _credentials(site.region))

    def label(name: str) -> str:
        return f"[{numbers[name]}/{len(steps)}] {name}"

    def on_end(result: StepResult) -> None:
        reason = f": {report.without_secrets(result.reason)}" if result.reason else ""
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
