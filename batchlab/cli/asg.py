"""`batchlab asg`: Auto Scaling groups on this machine for clients of AWS's API.

Invariant: a server that other machines can reach without signatures prints a warning.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from batchlab.cli import output
from batchlab.cli.options import HomeOption, JsonOption, LogFormatOption, home_of, seconds_of
from batchlab.core.errors import UsageError

if TYPE_CHECKING:
    from batchlab.adapters.aws.endpoint import Endpoint
    from batchlab.adapters.local.access_keys import Keys

KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
_HERE = ("127.0.0.1", "::1", "localhost")

app = typer.Typer(no_args_is_help=True)


def register(root: typer.Typer) -> None:
    """Add the group `asg` to the root command."""
    root.add_typer(app, name="asg")


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
    state: Annotated[
        Path, typer.Option("--state", metavar="DIR", help="Folder for the state of the groups.")
    ] = Path(".batchlab/asg"),
    launcher: Annotated[
        str,
        typer.Option("--launcher", metavar="NAME", help="Kind of instances: process or docker."),
    ] = "process",
    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", help="Address to listen on.")
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option("--port", metavar="N", min=0, help="Port to listen on; 0 for any free one."),
    ] = 0,
    drain: Annotated[
        str,
        typer.Option("--drain", metavar="DURATION", help="Time that an instance may take to end."),
    ] = "30s",
    grid: Annotated[
        str, typer.Option("--grid", metavar="NAME", help="Name of the grid in container labels.")
    ] = "asg",
    label: Annotated[
        list[str] | None,
        typer.Option(
            "--label",
            metavar="KEY=VALUE",
            help="Another label for containers. May be repeated.",
            show_default=False,
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
            "--signed",
            help="Accept only requests signed with the keys in AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY.",
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
    from batchlab.core import logs, optional_dependencies

    # The protocol is read from the service model in botocore.
    optional_dependencies.need("aws", "`batchlab asg serve`", "botocore")
    if launcher == "docker":
        optional_dependencies.need("docker", "The launcher docker", "docker")
    from batchlab.server.autoscaling_api.engine_loop import AsgSettings
    from batchlab.server.autoscaling_service import asg_main

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
        output.say(
            f"Every client that reaches {host} can start and end instances: --signed requires keys."
        )

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
            raise UsageError(
                f"The label {one!r} is not KEY=VALUE.", remedy="Say --label KEY=VALUE."
            )
        found[key] = value
    return found


@app.command()
def interrupt(
    instance: Annotated[str, typer.Argument(metavar="INSTANCE", help="The instance's id.")],
    notice: Annotated[
        str,
        typer.Option("--notice", metavar="DURATION", help="Time until the interruption."),
    ] = "2m",
    rebalance: Annotated[
        bool,
        typer.Option("--rebalance", help="Send a rebalance recommendation instead."),
    ] = False,
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
    from batchlab.runtime.compose import deployment

    place = home_of(home)
    if at := deployment.read(place):
        return deployment.autoscaling(place, at)
    raise UsageError(
        f"No grid in containers is up in {place.path}.",
        remedy="Name the endpoint with --endpoint, or the grid's folder with --home.",
    )


def _keys_in(file: Path) -> Keys:
    from batchlab.adapters.local import access_keys

    if found := access_keys.read(file):
        return found
    raise UsageError(
        f"{file} does not exist.",
        remedy="Name a file with access_key and secret_key as a JSON object.",
    )


def _keys_of_environment() -> Keys:
    from batchlab.adapters.local.access_keys import Keys

    access_key, secret_key = (os.environ.get(name, "") for name in KEYS)
    if not access_key or not secret_key:
        raise UsageError(
            "--signed needs the keys of an account, and they are not set.",
            remedy=f"Set {' and '.join(KEYS)}, or leave out --signed.",
        )
    return Keys(access_key, secret_key)
