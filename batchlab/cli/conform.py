"""`conform`: does an endpoint behave as AWS's services do, where batchlab relies on it?

Invariant: a real account is touched only where --aws says so, and what was made is removed, and
nothing else, however the command ends.
"""

from __future__ import annotations

import signal
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from batchlab.cli import output, signals
from batchlab.cli.options import JsonOption
from batchlab.core import optional_dependencies
from batchlab.core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from batchlab.conform.check import Check
    from batchlab.conform.run import Result
    from batchlab.conform.target import Target

_BOTH = (signal.SIGINT, signal.SIGTERM)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(conform)


def conform(
    endpoint: Annotated[
        str | None,
        typer.Option(
            "--endpoint",
            metavar="URL",
            help="Where the services answer, such as http://127.0.0.1:4566. It is spoken to "
            "with the keys in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, else with test and "
            "test.",
            show_default=False,
        ),
    ] = None,
    aws: Annotated[
        bool,
        typer.Option(
            "--aws",
            help="Try AWS itself: makes and removes a bucket and some 100 queues in your account, "
            "for about a cent.",
        ),
    ] = False,
    service: Annotated[
        str | None,
        typer.Option(
            "--service",
            metavar="NAME",
            help="Try this service alone: s3, sqs or autoscaling. Without it S3 and SQS are tried.",
            show_default=False,
        ),
    ] = None,
    region: Annotated[
        str | None,
        typer.Option("--region", metavar="REGION", help="AWS region.", show_default=False),
    ] = None,
    bucket: Annotated[
        str | None,
        typer.Option(
            "--bucket",
            metavar="NAME",
            help="Use this bucket and keep it, in place of one that is made and removed.",
            show_default=False,
        ),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(
            "--template",
            metavar="NAME",
            help="With --service autoscaling: launch from this template, which is there, in place "
            "of one that is made by way of EC2 and removed.",
            show_default=False,
        ),
    ] = None,
    only: Annotated[
        str,
        typer.Option("--only", metavar="PATTERN", help="Only checks of such names: 's3-*'."),
    ] = "*",
    needed: Annotated[
        bool, typer.Option("--needed", help="Only checks that batchlab needs.")
    ] = False,
    every: Annotated[bool, typer.Option("--all", help="List the rules that hold, too.")] = False,
    name: Annotated[
        str | None,
        typer.Option(
            "--name",
            metavar="TEXT",
            help="What the report calls it, such as 'MiniStack 1.5.33'.",
            show_default=False,
        ),
    ] = None,
    json: JsonOption = False,
    markdown: Annotated[
        Path | None,
        typer.Option(
            "--markdown",
            metavar="FILE",
            help="Write the report into this page, in place of its section of that name.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Check that an endpoint behaves as AWS's services do.

    Each check stands for a rule of AWS's: 'needed' where batchlab would break a promise without
    it, else 'noted'. What it makes there is named batchlab-conform-*, and removed at the end.

    Exit code 0 where all rules hold, 1 where any does not (with --needed: any needed one), 2 for
    wrong usage, 3 where nothing answers.

    \b
    Example: batchlab conform --endpoint http://127.0.0.1:4566
    """
    _see_where(endpoint, aws=aws, service=service)
    optional_dependencies.need("aws", "`batchlab conform`", "boto3")
    checks = _wanted(service, only=only, needed=needed, markdown=markdown)
    if template and service != "autoscaling":
        raise UsageError("--template is for --service autoscaling.", remedy="Leave it out.")
    with _interruptible(), _target(endpoint, region, bucket, template) as target:
        if aws:
            output.say(f"What this makes in {target.place} is named {target.run}*, and removed.")
        begun_s = time.monotonic()
        target.open({check.service for check in checks})
        results = _run(target, checks)
        took_s = time.monotonic() - begun_s
        name = name or target.place
    _tell(name, results, took_s, json=json, every=every)
    if markdown:
        _write(markdown, name, results)

    from batchlab.conform.report import agrees

    if not agrees(results):
        raise typer.Exit(1)


def _see_where(endpoint: str | None, *, aws: bool, service: str | None) -> None:
    if endpoint is None and not aws:
        raise UsageError(
            "Without --endpoint this would make a bucket and some 100 queues in an AWS account.",
            remedy="Name an endpoint with --endpoint URL, or say --aws if that is meant.",
        )
    if endpoint is not None and aws:
        raise UsageError("--endpoint and --aws exclude each other.", remedy="Say one of them.")
    if aws and service == "autoscaling":
        raise UsageError(
            "These checks would launch instances in an AWS account, which is not offered.",
            remedy="Name an endpoint with --endpoint URL.",
        )


def _wanted(
    service: str | None, *, only: str, needed: bool, markdown: Path | None
) -> Sequence[Check]:
    from batchlab.conform.check import Severity
    from batchlab.conform.check_table import ASG_CHECKS, CHECKS, SERVICES, matching, of_service

    if service is not None and service not in SERVICES:
        raise UsageError(
            f"There are no checks of a service {service}.",
            remedy=f"Write one of {', '.join(SERVICES)}, or leave --service out for S3 and SQS.",
        )
    checks = matching(only, of_service(service))
    if needed:
        checks = [check for check in checks if check.severity is Severity.NEEDED]
    if not checks:
        raise UsageError(
            f"No check {'that batchlab needs ' if needed else ''}has a name like {only}.",
            remedy="Names begin with s3- or sqs-, with --service autoscaling with autoscaling-; "
            "quote the pattern: --only 'sqs-delay*'.",
        )
    if markdown and tuple(checks) not in (CHECKS, ASG_CHECKS):
        raise UsageError(
            "A page on some of the checks would say too little.",
            remedy="Leave out --only and --needed, and --service unless it is autoscaling.",
        )
    if markdown and (not markdown.parent.is_dir() or markdown.is_dir()):
        raise UsageError(
            f"{markdown} cannot be written: there is no such folder, or it is one.",
            remedy="Name a file in a folder that is there.",
        )
    return checks


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C and SIGTERM raise Stopped, until whoever catches it ignores them."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise signals.Stopped(signals.INTERRUPTED)

    before = {number: signal.getsignal(number) for number in _BOTH}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _target(
    url: str | None, region: str | None, bucket: str | None, template: str | None
) -> Iterator[Target]:
    from batchlab.adapters.aws.endpoint import translated
    from batchlab.adapters.clock import WallClock
    from batchlab.conform.target import Target, endpoint

    run = f"batchlab-conform-{uuid.uuid4().hex[:8]}"
    with translated("AWS"):
        place = endpoint(url, region)
        target = Target(
            place, run=run, clock=WallClock(), bucket=bucket or "", template=template or ""
        )
    try:
        yield target
    except signals.Stopped:
        # Not before: Python may drop one that was raised, and the next must still be heard.
        for number in _BOTH:
            signal.signal(number, signal.SIG_IGN)
        output.say("Interrupted. Removing what was made ...")
        raise
    finally:
        for left in target.close():
            output.say(f"Left behind: {output.clean(left)}")


def _run(target: Target, checks: Sequence[Check]) -> Sequence[Result]:
    from batchlab.conform.run import run

    with _progress(len(checks)) as tell:
        return run(target, checks, tell=tell)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[Result], None]]:
    """A bar where stderr is a terminal, else a line now and then."""
    differing = done = 0

    def count(result: Result) -> str:
        nonlocal differing, done
        done += 1
        differing += result.verdict == "differs"
        return f"{done} of {total} checks, {differing} differ"

    if not sys.stderr.isatty():
        sometimes = output.Sometimes()
        yield lambda result: sometimes.say(count(result))
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"0 of {total} checks", total=total)
        yield lambda result: bar.update(task, advance=1, description=count(result))


def _tell(name: str, results: Sequence[Result], took_s: float, *, json: bool, every: bool) -> None:
    from batchlab.conform import report
    from batchlab.conform.check import Severity, Verdict

    if json:
        counts = {verdict.value: report.of(results, verdict) for verdict in Verdict}
        output.show_json(
            {
                "name": name,
                "agrees": report.agrees(results),
                "needed_agree": report.relied_on(results),
                "seconds": round(took_s, 1),
                "counts": counts,
                "checks": [report.to_json(one) for one in results],
            }
        )
        return
    rows = [
        (
            service,
            severity,
            *(report.of(results, verdict, severity, service) for verdict in Verdict),
        )
        for service in dict.fromkeys(one.check.service for one in results)
        for severity in Severity
        if any((service, severity) == (one.check.service, one.check.severity) for one in results)
    ]
    output.show(output.table(("service", "severity", *Verdict), rows))
    if every:
        held = [
            (one.check.name, one.check.severity, one.check.rule)
            for one in results
            if one.verdict is Verdict.AGREES
        ]
        output.show("\n" + output.table(("agrees", "severity", "AWS's rule"), held))
    for verdict in (Verdict.DIFFERS, Verdict.UNTRIED):
        for one in results:
            if one.verdict is verdict:
                output.show(f"\n{_difference(one)}")
    output.show(f"\n{name}: {report.verdict_text(results)} ({output.span(took_s)})")


def _difference(result: Result) -> str:
    check = result.check
    lines = [f"{result.verdict.upper()}  {check.name} ({check.severity})"]
    for title, text in (
        ("AWS", f"{check.rule} [{check.source}]"),
        ("here", result.observed),
        ("so", check.follows),
    ):
        lines.append(f"  {title:<5} {output.clean(text)}")
    return "\n".join(lines)


def _write(path: Path, name: str, results: Sequence[Result]) -> None:
    from batchlab.conform.report import ALL_CHECKS, list_section, merged, section

    try:
        page = path.read_text(encoding="utf-8") if path.exists() else ""
        page = merged(page, name, section(name, results))
        page = merged(page, ALL_CHECKS, list_section([one.check for one in results]))
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written: {error.strerror}.", remedy="Name another file."
        ) from error
    output.say(f"The report is in {path}.")
