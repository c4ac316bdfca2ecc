"""`batchlab conform`, which checks an endpoint against AWS's services, and `batchlab asg`, a server of Auto Scaling
groups.

Invariant: without --aws, `conform` does not use an AWS account. At the end, or on Ctrl-C, `conform` removes only the
resources that the run created. `asg serve` prints a warning if other machines can send unsigned requests to the server.
"""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import typer

from batchlab.cli import output
from batchlab.cli.groups import Commands, command_group
from batchlab.cli.option_values import assignments, home_of, seconds_of
from batchlab.cli.options import HOME, JSON, LOG_FORMAT, argument, flag, option
from batchlab.cli.progress import bar
from batchlab.core import installation
from batchlab.core.errors import UsageError

if TYPE_CHECKING:
    from batchlab.adapters.aws.endpoint import Endpoint
    from batchlab.adapters.local.state_files import Keys
    from batchlab.conform.check import Check
    from batchlab.conform.run import Result
    from batchlab.conform.target import Target

_BOTH = (signal.SIGINT, signal.SIGTERM)


app = Commands()


@app.command()
def conform(
    endpoint: str | None = option(
        "URL of the services. The keys are in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or else 'test'.", "URL"
    ),
    aws: bool = flag("Check AWS itself, with a bucket and 100 queues in your account, for about one cent.", "--aws"),
    service: str | None = option(
        "Name of the service that is checked: s3, sqs, or autoscaling. Default: S3 and SQS.", "NAME"
    ),
    region: str | None = option("AWS region of the checked services.", "REGION"),
    bucket: str | None = option("Existing bucket that the checks use instead of a temporary bucket.", "NAME"),
    template: str | None = option("With --service autoscaling: existing launch template that the checks use.", "NAME"),
    only: str = option("Run only the checks whose names match this pattern, such as 's3-*'.", "PATTERN", default="*"),
    needed: bool = flag("Run only the checks of rules that batchlab needs.", "--needed"),
    every: bool = flag("Also list the checks that passed.", "--all"),
    name: str | None = option("Name of the endpoint in the report, such as 'MiniStack 1.5.33'.", "TEXT"),
    json: bool = JSON,
    markdown: Path | None = option("Markdown page in which the report replaces the section of the same name.", "FILE"),
) -> None:
    """Check that an endpoint follows the rules of AWS's services.

    batchlab needs the rules that are 'needed'. The command creates resources with names that
    begin with batchlab-conform-, and removes them.

    The exit code is 1 if the endpoint breaks a checked rule, and 3 if it does not respond.

    \b
    Example: batchlab conform --endpoint http://127.0.0.1:4566
    """
    _check_target(endpoint, aws=aws, service=service)
    installation.need("aws", "`batchlab conform`", "boto3")
    from batchlab.conform.check_table import agrees
    from batchlab.conform.run import run

    checks = _select_checks(service, only=only, needed=needed, markdown=markdown)
    if template and service != "autoscaling":
        raise UsageError("--template is for --service autoscaling.", remedy="Leave it out.")
    with _interruptible(), _target(endpoint, region, bucket, template) as target:
        if aws:
            output.say(f"The checks create resources named {target.run}* in {target.place} and remove them.")
        begun_s = time.monotonic()
        target.open({check.service for check in checks})
        with _progress(len(checks)) as report:
            results = run(target, checks, on_result=report)
        took_s = time.monotonic() - begun_s
        name = name or target.place
    _show(name, results, took_s, json=json, every=every)
    if markdown:
        _write(markdown, name, results)
    if not agrees(results):
        raise typer.Exit(1)


def _check_target(endpoint: str | None, *, aws: bool, service: str | None) -> None:
    if endpoint is None and not aws:
        raise UsageError(
            "Without --endpoint, the checks would create a bucket and about 100 queues in an AWS account.",
            remedy="Name an endpoint with --endpoint URL, or add --aws to check AWS itself.",
        )
    if endpoint is not None and aws:
        raise UsageError("--endpoint and --aws exclude each other.", remedy="Leave one of them out.")
    if aws and service == "autoscaling":
        raise UsageError(
            "The checks of Auto Scaling launch instances, so they do not run on AWS itself.",
            remedy="Name an endpoint with --endpoint URL.",
        )


def _select_checks(service: str | None, *, only: str, needed: bool, markdown: Path | None) -> Sequence[Check]:
    from batchlab.conform.check import Severity
    from batchlab.conform.check_table import ASG_CHECKS, CHECKS, SERVICES, matching, of_service

    if service is not None and service not in SERVICES:
        raise UsageError(
            f"batchlab does not have checks for the service {service!r}.",
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
            f"{markdown} cannot be written: the path is a folder, or its parent folder does not exist.",
            remedy="Name a file in an existing folder.",
        )
    return checks


@contextmanager
def _interruptible() -> Iterator[None]:
    """Make Ctrl-C and SIGTERM raise Stopped inside the `with` block."""

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
    from batchlab.adapters.aws.endpoint import translate_errors
    from batchlab.adapters.clock import WallClock
    from batchlab.conform.target import Target, endpoint

    run = f"batchlab-conform-{uuid.uuid4().hex[:8]}"
    with translate_errors("AWS"):
        place = endpoint(url, region)
        target = Target(place, run=run, clock=WallClock(), bucket=bucket or "", template=template or "")
    try:
        yield target
    except output.Stopped:
        # Ignore further signals, so that they do not interrupt the removal. The signal handlers stay active until
        # Stopped is caught, because Python drops a Stopped that is raised in a finalizer, and a signal is then sent
        # again.
        for number in _BOTH:
            signal.signal(number, signal.SIG_IGN)
        output.say("Interrupted. Removing the created resources.")
        raise
    finally:
        for leftover in target.close():
            output.say(f"Left behind: {output.clean(leftover)}")


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
    from batchlab.conform.check import CheckVerdict, Severity

    if json:
        counts = {verdict.value: check_table.count_results(results, verdict) for verdict in CheckVerdict}
        output.show_json(
            {
                "name": name,
                "agrees": check_table.agrees(results),
                "needed_agree": check_table.needed_rules_hold(results),
                "seconds": round(took_s, 1),
                "counts": counts,
                "checks": [check_table.to_json(result) for result in results],
            }
        )
        return
    rows = [
        (
            service,
            severity,
            *(check_table.count_results(results, verdict, severity, service) for verdict in CheckVerdict),
        )
        for service in dict.fromkeys(result.check.service for result in results)
        for severity in Severity
        if any((service, severity) == (result.check.service, result.check.severity) for result in results)
    ]
    output.show(output.table(("service", "severity", *CheckVerdict), rows))
    if every:
        passed = [
            (result.check.name, result.check.severity, result.check.rule)
            for result in results
            if result.verdict is CheckVerdict.AGREES
        ]
        output.show("\n" + output.table(("agrees", "severity", "AWS's rule"), passed))
    for verdict in (CheckVerdict.DIFFERS, CheckVerdict.UNTRIED):
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
    from batchlab.conform.check_table import ALL_CHECKS, list_section, merge, section

    try:
        page = path.read_text(encoding="utf-8") if path.exists() else ""
        page = merge(page, name, section(name, results))
        page = merge(page, ALL_CHECKS, list_section([result.check for result in results]))
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}.", remedy="Name another file.") from error
    output.say(f"The report is in {path}.")


KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
_HERE = ("127.0.0.1", "::1", "localhost")

asg = command_group("asg")
app.add_typer(asg)


@asg.callback()
def asg_() -> None:
    """Serve the API of AWS's Auto Scaling groups on this machine.

    \b
    Example: batchlab asg serve --templates templates.toml
    """


@asg.command()
def serve(
    templates: Path = option(
        "TOML file with launch templates. The server reads the file again after a change.", "FILE", default=...
    ),
    state: Path = option(
        "Folder in which the server stores the state of the Auto Scaling groups.", "DIR", default=Path(".batchlab/asg")
    ),
    launcher: str = option(
        "Kind of the instances: process (a process) or docker (a container).", "NAME", default="process"
    ),
    host: str = option("IP address or host name on which the server listens.", "ADDRESS", default="127.0.0.1"),
    port: int = option("Port on which the server listens. With 0, the server uses a free port.", "N", default=0, min=0),
    drain: str = option(
        "Longest time that an instance may take to end before the server kills the instance.", "DURATION", default="30s"
    ),
    grid: str = option("Name of the grid in the labels of containers.", "NAME", default="asg"),
    label: list[str] | None = option("Additional label of the containers. Repeatable.", "KEY=VALUE"),
    image: list[str] | None = option(
        "Launch only containers of these images, and never run a container as root. Repeatable.", "NAME,NAME"
    ),
    scale: float = option(
        "Share of the CPUs and the memory of its instance type that a container gets.",
        "SHARE",
        default=1.0,
        min=0.01,
        max=1,
    ),
    metadata_port: int | None = option(
        "Port of the instance metadata service for the containers. Default: the server does not run an instance "
        "metadata service.",
        "N",
        min=0,
    ),
    log_format: str | None = LOG_FORMAT,
    signed: bool = flag(
        "Accept only requests signed with the keys in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.", "--signed"
    ),
    keys: Path | None = option("Accept only requests signed with the keys in this JSON file.", "FILE"),
    json: bool = JSON,
) -> None:
    """Serve the API of EC2 Auto Scaling until Ctrl-C. The instances of the groups end with the server.

    The first line on stdout is the URL of the API. Pass the URL to clients, for example as
    --endpoint-url to the AWS CLI.

    \b
    Example: batchlab asg serve --templates templates.toml --port 4580
             aws --endpoint-url http://127.0.0.1:4580 autoscaling describe-auto-scaling-groups
    """
    from batchlab.core import installation, logs, operating_system

    # `asg serve` needs botocore, because botocore's service model defines the protocol.
    installation.need("aws", "`batchlab asg serve`", "botocore")
    if launcher == "docker":
        installation.need("docker", "The launcher docker", "docker")
    from batchlab.server.autoscaling_api.engine_loop import AsgSettings, asg_main

    logs.set_format(log_format)
    operating_system.raise_file_limit()
    settings = AsgSettings(
        state=state.absolute(),
        templates=templates,
        launcher=launcher,
        host=host,
        port=port,
        key=_keys_in(keys) if keys else _keys_of_environment() if signed else None,
        drain_s=seconds_of("--drain", drain),
        grid=grid,
        labels=assignments(label or (), "--label team=data"),
        images=tuple(name for names in image or () for name in names.split(",")),
        scale=scale,
        metadata_port=metadata_port,
    )
    if host not in _HERE and settings.key is None:
        output.say(f"Every client that reaches {host} can start and end instances. Add --signed to require keys.")

    asg_main(settings, lambda url: output.answer(json, {"endpoint": url}, url))


@asg.command()
def interrupt(
    instance: str = argument("Id of the instance.", "INSTANCE"),
    notice: str = option("Time from the notice to the interruption of the instance.", "DURATION", default="2m"),
    rebalance: bool = flag("Send a rebalance recommendation instead of an interruption notice.", "--rebalance"),
    endpoint: str | None = option("URL of the Auto Scaling API. Default: the URL of the running grid.", "URL"),
    home: Path | None = HOME,
) -> None:
    """Send an interruption notice to a Spot Instance, as EC2 does when EC2 needs the capacity.

    \b
    Example: batchlab asg interrupt i-0123456789abcdef0 --notice 30
    """
    from batchlab.server.autoscaling_api.metadata import send_notice

    kind, notice_s = "rebalance" if rebalance else "interruption", seconds_of("--notice", notice)
    at = _find_endpoint(endpoint) if endpoint else _endpoint_of(home)
    send_notice(at, instance, kind, notice_s)
    output.say(f"The notice was sent to {instance}.")


def _find_endpoint(endpoint: str) -> Endpoint:
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
    from batchlab.adapters.local import state_files

    if keys := state_files.read_keys(file):
        return keys
    raise UsageError(f"{file} does not exist.", remedy="Name a file with access_key and secret_key as a JSON object.")


def _keys_of_environment() -> Keys:
    from batchlab.adapters.local.state_files import Keys

    access_key, secret_key = (os.environ.get(name, "") for name in KEYS)
    if not access_key or not secret_key:
        raise UsageError(
            "--signed needs the keys of an account, and they are not set.",
            remedy=f"Set {' and '.join(KEYS)}, or leave out --signed.",
        )
    return Keys(access_key, secret_key)
