"""`batchlab conform`: checks whether an endpoint behaves like the AWS services batchlab uses.

Invariant: without --aws the command does not use an AWS account. At its end, or on Ctrl-C, it
removes what it created and nothing else.

`batchlab asg`: Auto Scaling groups on this machine for clients of AWS's API.

Invariant: a server that other machines can reach without signatures prints a warning.
"""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from batchlab.cli import output
from batchlab.cli.options import HomeOption, JsonOption, LogFormatOption, home_of, seconds_of
from batchlab.cli.progress import bar
from batchlab.core import installation
from batchlab.core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from batchlab.adapters.aws.endpoint import Endpoint
    from batchlab.adapters.local.access_keys import Keys
    from batchlab.conform.check import Check
    from batchlab.conform.run import Result
    from batchlab.conform.target import Target

_BOTH = (signal.SIGINT, signal.SIGTERM)


def register(root: typer.Typer) -> None:
    """Add the command `conform` and the group `asg` to the root command."""
    root.command()(conform)
    root.add_typer(app, name="asg")


def conform(
    endpoint: Annotated[
        str | None,
        typer.Option(
            "--endpoint",
            metavar="URL",
            help="URL of the services, such as http://127.0.0.1:4566. The keys are those in "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, else test and test.",
            show_default=False,
        ),
    ] = None,
    aws: Annotated[
        bool,
        typer.Option(
            "--aws",
            help="Check AWS itself. This creates and removes a bucket and about 100 queues in your "
            "account, for about one cent.",
        ),
    ] = False,
    service: Annotated[
        str | None,
        typer.Option(
            "--service",
            metavar="NAME",
            help="Check only this service: s3, sqs, or autoscaling. Default: S3 and SQS.",
            show_default=False,
        ),
    ] = None,
    region: Annotated[
        str | None, typer.Option("--region", metavar="REGION", help="AWS region.", show_default=False)
    ] = None,
    bucket: Annotated[
        str | None,
        typer.Option(
            "--bucket",
            metavar="NAME",
            help="Use this bucket and keep it, instead of a temporary one.",
            show_default=False,
        ),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(
            "--template",
            metavar="NAME",
            help="With --service autoscaling: use this existing launch template instead of a temporary one.",
            show_default=False,
        ),
    ] = None,
    only: Annotated[str, typer.Option("--only", metavar="PATTERN", help="Only checks with these names: 's3-*'.")] = "*",
    needed: Annotated[bool, typer.Option("--needed", help="Only checks that batchlab needs.")] = False,
    every: Annotated[bool, typer.Option("--all", help="List passed checks too.")] = False,
    name: Annotated[
        str | None,
        typer.Option(
            "--name",
            metavar="TEXT",
            help="Name of the endpoint in the report, such as 'MiniStack 1.5.33'.",
            show_default=False,
        ),
    ] = None,
    json: JsonOption = False,
    markdown: Annotated[
        Path | None,
        typer.Option(
            "--markdown",
            metavar="FILE",
            help="Write the report into this page. It replaces the section of the same name.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Check that an endpoint behaves like AWS's services.

    Each check tests a rule of AWS: 'needed' if batchlab would break a promise without it, else
    'noted'. Created resources are named batchlab-conform-*, and removed at the end.

    Exit code 0 if all rules hold, 1 if any does not (with --needed: any needed one), 2 for wrong
    usage, 3 if nothing answers.

    \b
    Example: batchlab conform --endpoint http://127.0.0.1:4566
    """
    _check_target(endpoint, aws=aws, service=service)
    installation.need("aws", "`batchlab conform`", "boto3")
    checks = _selected(service, only=only, needed=needed, markdown=markdown)
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
    _show(name, results, took_s, json=json, every=every)
    if markdown:
        _write(markdown, name, results)

    from batchlab.conform.check_table import agrees

    if not agrees(results):
        raise typer.Exit(1)


def _check_target(endpoint: str | None, *, aws: bool, service: str | None) -> None:
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


def _selected(service: str | None, *, only: str, needed: bool, markdown: Path | None) -> Sequence[Check]:
    from batchlab.conform.check import Severity
    from batchlab.conform.check_table import ASG_CHECKS, CHECKS, SERVICES, matching, of_service

    if service is not None and service not in SERVICES:
        raise UsageError(
            f"The service {service!r} has no checks.",
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
            "A page needs the results of all checks of a service.",
            remedy="Leave out --only and --needed, and --service unless it is autoscaling.",
        )
    if markdown and (not markdown.parent.is_dir() or markdown.is_dir()):
        raise UsageError(
            f"{markdown} cannot be written: its folder does not exist, or it is a folder itself.",
            remedy="Name a file in an existing folder.",
        )
    return checks


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM raise Stopped inside the block."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise output.Stopped(output.INTERRUPTED)

    before = {number: signal.getsignal(number) for number in _BOTH}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _target(url: str | None, region: str | None, bucket: str | None, template: str | None) -> Iterator[Target]:
    from batchlab.adapters.aws.endpoint import translated
    from batchlab.adapters.clock import WallClock
    from batchlab.conform.target import Target, endpoint

    run = f"batchlab-conform-{uuid.uuid4().hex[:8]}"
    with translated("AWS"):
        place = endpoint(url, region)
        target = Target(place, run=run, clock=WallClock(), bucket=bucket or "", template=template or "")
    try:
        yield target
    except output.Stopped:
        # The signals stay active until here: Python may drop a raised exception in a finalizer.
        for number in _BOTH:
            signal.signal(number, signal.SIG_IGN)
        output.say("Interrupted. Removing what was made ...")
        raise
    finally:
        for left in target.close():
            output.say(f"Left behind: {output.clean(left)}")


def _run(target: Target, checks: Sequence[Check]) -> Sequence[Result]:
    from batchlab.conform.run import run

    with _progress(len(checks)) as report:
        return run(target, checks, tell=report)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[Result], None]]:
    differing = done = 0
    with bar() as show:

        def count(result: Result) -> None:
            nonlocal differing, done
            done += 1
            differing += result.verdict == "differs"
            show(done, total, f"{done} of {total} checks, {differing} differ")

        yield count


def _show(name: str, results: Sequence[Result], took_s: float, *, json: bool, every: bool) -> None:
    from batchlab.conform import check_table
    from batchlab.conform.check import Severity, Verdict

    if json:
        counts = {verdict.value: check_table.of(results, verdict) for verdict in Verdict}
        output.show_json(
            {
                "name": name,
                "agrees": check_table.agrees(results),
                "needed_agree": check_table.relied_on(results),
                "seconds": round(took_s, 1),
                "counts": counts,
                "checks": [check_table.to_json(result) for result in results],
            }
        )
        return
    rows = [
        (service, severity, *(check_table.of(results, verdict, severity, service) for verdict in Verdict))
        for service in dict.fromkeys(result.check.service for result in results)
        for severity in Severity
        if any((service, severity) == (result.check.service, result.check.severity) for result in results)
    ]
    output.show(output.table(("service", "severity", *Verdict), rows))
    if every:
        held = [
            (result.check.name, result.check.severity, result.check.rule)
            for result in results
            if result.verdict is Verdict.AGREES
        ]
        output.show("\n" + output.table(("agrees", "severity", "AWS's rule"), held))
    for verdict in (Verdict.DIFFERS, Verdict.UNTRIED):
        for result in results:
            if result.verdict is verdict:
                output.show(f"\n{_difference(result)}")
    output.show(f"\n{name}: {check_table.verdict_text(results)} ({output.span(took_s)})")


def _difference(result: Result) -> str:
    check = result.check
    lines = [f"{result.verdict.upper()}  {check.name} ({check.severity})"]
    for title, text in (("AWS", f"{check.rule} [{check.source}]"), ("here", result.observed), ("so", check.follows)):
        lines.append(f"  {title:<5} {output.clean(text)}")
    return "\n".join(lines)


def _write(path: Path, name: str, results: Sequence[Result]) -> None:
    from batchlab.conform.check_table import ALL_CHECKS, list_section, merged, section

    try:
        page = path.read_text(encoding="utf-8") if path.exists() else ""
        page = merged(page, name, section(name, results))
        page = merged(page, ALL_CHECKS, list_section([result.check for result in results]))
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}.", remedy="Name another file.") from error
    output.say(f"The report is in {path}.")


KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
_HERE = ("127.0.0.1", "::1", "localhost")

app = typer.Typer(no_args_is_help=True)


@app.callback()
def asg_() -> None:
    """Serve Auto Scaling groups on this machine with AWS's API.

    \b
    Example: batchlab asg serve --templates templates.toml
    """


@app.command()
def serve(
    templates: Annotated[
        Path,
        typer.Option(
            "--templates",
            metavar="FILE",
            help="Launch templates as TOML. A changed file is read again.",
            show_default=False,
        ),
    ],
    state: Annotated[Path, typer.Option("--state", metavar="DIR", help="Folder for the state of the groups.")] = Path(
        ".batchlab/asg"
    ),
    launcher: Annotated[
        str, typer.Option("--launcher", metavar="NAME", help="Kind of instances: process or docker.")
    ] = "process",
    host: Annotated[str, typer.Option("--host", metavar="ADDRESS", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", metavar="N", min=0, help="Port to listen on; 0 for any free one.")] = 0,
    drain: Annotated[
        str, typer.Option("--drain", metavar="DURATION", help="Time that an instance may take to end.")
    ] = "30s",
    grid: Annotated[str, typer.Option("--grid", metavar="NAME", help="Name of the grid in container labels.")] = "asg",
    label: Annotated[
        list[str] | None,
        typer.Option(
            "--label", metavar="KEY=VALUE", help="Another label for containers. May be repeated.", show_default=False
        ),
    ] = None,
    image: Annotated[
        list[str] | None,
        typer.Option(
            "--image",
            metavar="NAME",
            help="Launch only containers of this image, and none as root. May be repeated.",
            show_default=False,
        ),
    ] = None,
    scale: Annotated[
        float,
        typer.Option(
            "--scale",
            metavar="SHARE",
            min=0.01,
            max=1,
            help="Share of its instance type's CPUs and memory that a container gets.",
        ),
    ] = 1.0,
    metadata_port: Annotated[
        int | None,
        typer.Option(
            "--metadata-port",
            metavar="N",
            min=0,
            help="Port of the containers' instance metadata service. Default: no service.",
            show_default=False,
        ),
    ] = None,
    log_format: LogFormatOption = None,
    signed: Annotated[
        bool,
        typer.Option(
            "--signed", help="Accept only requests signed with the keys in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
        ),
    ] = False,
    keys: Annotated[
        Path | None,
        typer.Option(
            "--keys",
            metavar="FILE",
            help="Accept only requests signed with the keys in this JSON file.",
            show_default=False,
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Serve the API of EC2 Auto Scaling until Ctrl-C. Its instances end with it.

    The first line on stdout is the URL for clients, such as --endpoint-url of the AWS CLI.

    \b
    Example: batchlab asg serve --templates templates.toml --port 4580
             aws --endpoint-url http://127.0.0.1:4580 autoscaling describe-auto-scaling-groups
    """
    from batchlab.core import installation, logs

    # The protocol is read from the service model in botocore.
    installation.need("aws", "`batchlab asg serve`", "botocore")
    if launcher == "docker":
        installation.need("docker", "The launcher docker", "docker")
    from batchlab.server.autoscaling_api.engine_loop import AsgSettings, asg_main

    logs.choose(log_format)

    settings = AsgSettings(
        state=state.absolute(),
        templates=templates,
        launcher=launcher,
        host=host,
        port=port,
        key=_keys_in(keys) if keys else _keys_of_environment() if signed else None,
        drain_s=seconds_of("--drain", drain),
        grid=grid,
        labels=_labels(label or ()),
        images=tuple(image or ()),
        scale=scale,
        metadata_port=metadata_port,
    )
    if host not in _HERE and settings.key is None:
        output.say(f"Every client that reaches {host} can start and end instances: --signed requires keys.")

    def up(url: str) -> None:
        if json:
            output.show_json({"endpoint": url})
        else:
            output.show(url)

    asg_main(settings, up)


def _labels(given: Sequence[str]) -> dict[str, str]:
    found = {}
    for one in given:
        key, equals, value = one.partition("=")
        if not key or not equals:
            raise UsageError(f"The label {one!r} is not KEY=VALUE.", remedy="Say --label KEY=VALUE.")
        found[key] = value
    return found


@app.command()
def interrupt(
    instance: Annotated[str, typer.Argument(metavar="INSTANCE", help="The instance's id.")],
    notice: Annotated[str, typer.Option("--notice", metavar="DURATION", help="Time until the interruption.")] = "2m",
    rebalance: Annotated[bool, typer.Option("--rebalance", help="Send a rebalance recommendation instead.")] = False,
    endpoint: Annotated[
        str | None,
        typer.Option(
            "--endpoint",
            metavar="URL",
            help="URL of the Auto Scaling API. Default: that of the running grid.",
            show_default=False,
        ),
    ] = None,
    home: HomeOption = None,
) -> None:
    """Send an interruption notice to a Spot instance, like EC2 when it needs the capacity.

    \b
    Example: batchlab asg interrupt i-0123456789abcdef0 --notice 30
    """
    from batchlab.server.autoscaling_api.metadata import give

    kind, notice_s = "rebalance" if rebalance else "interruption", seconds_of("--notice", notice)
    at = _named(endpoint) if endpoint else _endpoint_of(home)
    give(at, instance, kind, notice_s)
    output.say(f"{instance} has its notice.")


def _named(endpoint: str) -> Endpoint:
    from batchlab.adapters.aws.endpoint import Endpoint

    access_key, secret_key = (os.environ.get(name) or "test" for name in KEYS)
    return Endpoint(endpoint.rstrip("/"), access_key=access_key, secret_key=secret_key)


def _endpoint_of(home: Path | None) -> Endpoint:
    from batchlab.runtime import compose_deployment

    place = home_of(home)
    if at := compose_deployment.read(place):
        return compose_deployment.autoscaling(place, at)
    raise UsageError(
        f"No grid in containers is up in {place.path}.",
        remedy="Name the endpoint with --endpoint, or the grid's folder with --home.",
    )


def _keys_in(file: Path) -> Keys:
    from batchlab.adapters.local import access_keys

    if keys := access_keys.read(file):
        return keys
    raise UsageError(f"{file} does not exist.", remedy="Name a file with access_key and secret_key as a JSON object.")


def _keys_of_environment() -> Keys:
    from batchlab.adapters.local.access_keys import Keys

    access_key, secret_key = (os.environ.get(name, "") for name in KEYS)
    if not access_key or not secret_key:
        raise UsageError(
            "--signed needs the keys of an account, and they are not set.",
            remedy=f"Set {' and '.join(KEYS)}, or leave out --signed.",
        )
    return Keys(access_key, secret_key)
