"""`batchlab asg serve`: Auto Scaling groups on this machine, for whoever speaks AWS's protocol.

Invariant: what listens beyond this machine without checking signatures says so.
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


@app.callback()
def asg_() -> None:
    """Auto Scaling groups here, by AWS's own API.

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
            help="Launch templates, as TOML; read again when it changes.",
            show_default=False,
        ),
    ],
    state: Annotated[
        Path, typer.Option("--state", metavar="DIR", help="Folder that the groups are kept in.")
    ] = Path(".batchlab/asg"),
    launcher: Annotated[
        str,
        typer.Option("--launcher", metavar="NAME", help="What an instance is: process, docker."),
    ] = "process",
    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", help="Address to listen on.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", metavar="N", min=0, help="Port to listen on; 0: any free one.")
    ] = 0,
    drain: Annotated[
        str,
        typer.Option("--drain", metavar="DURATION", help="How long an instance may take to end."),
    ] = "30s",
    grid: Annotated[
        str, typer.Option("--grid", metavar="NAME", help="What containers are labelled with.")
    ] = "asg",
    label: Annotated[
        list[str] | None,
        typer.Option(
            "--label",
            metavar="KEY=VALUE",
            help="One more label for containers; may be repeated.",
            show_default=False,
        ),
    ] = None,
    image: Annotated[
        list[str] | None,
        typer.Option(
            "--image",
            metavar="NAME",
            help="Launch only containers of this image, and none as root; may be repeated.",
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
            help="A container's share of its instance type's processors and memory.",
        ),
    ] = 1.0,
    metadata_port: Annotated[
        int | None,
        typer.Option(
            "--metadata-port",
            metavar="N",
            min=0,
            help="Port of the containers' instance metadata service; none unless said.",
            show_default=False,
        ),
    ] = None,
    log_format: LogFormatOption = None,
    signed: Annotated[
        bool,
        typer.Option(
            "--signed",
            help="Answer only what is signed with the keys in AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY.",
        ),
    ] = False,
    keys: Annotated[
        Path | None,
        typer.Option(
            "--keys",
            metavar="FILE",
            help="Answer only what is signed with the keys in this file, in JSON.",
            show_default=False,
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Serve EC2 Auto Scaling's own API until Ctrl-C; instances end with it.

    The first line on stdout is the URL to give to a client, such as --endpoint-url of the AWS CLI.

    \b
    Example: batchlab asg serve --templates templates.toml --port 4580
             aws --endpoint-url http://127.0.0.1:4580 autoscaling describe-auto-scaling-groups
    """
    from batchlab.core import logs, optional_dependencies

    # Its protocol is read from what botocore knows of it.
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
        key=_in(keys) if keys else _key() if signed else None,
        drain_s=seconds_of("--drain", drain),
        grid=grid,
        labels=_labels(label or ()),
        images=tuple(image or ()),
        scale=scale,
        metadata_port=metadata_port,
    )
    if host not in _HERE and settings.key is None:
        output.say(f"Whoever reaches {host} can start and end instances: --signed asks for keys.")

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
        typer.Option("--notice", metavar="DURATION", help="How long it has to leave."),
    ] = "2m",
    rebalance: Annotated[
        bool,
        typer.Option(
            "--rebalance", help="Only recommend to rebalance: an interruption has become likelier."
        ),
    ] = False,
    endpoint: Annotated[
        str | None,
        typer.Option(
            "--endpoint",
            metavar="URL",
            help="Where Auto Scaling is served; that of the grid that is up unless said.",
            show_default=False,
        ),
    ] = None,
    home: HomeOption = None,
) -> None:
    """Give a Spot instance its interruption notice, as EC2 does when it needs the capacity.

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


def _in(file: Path) -> Keys:
    from batchlab.adapters.local import access_keys

    if found := access_keys.read(file):
        return found
    raise UsageError(
        f"{file} does not exist.",
        remedy="Name a file with access_key and secret_key as a JSON object.",
    )


def _key() -> Keys:
    from batchlab.adapters.local.access_keys import Keys

    access_key, secret_key = (os.environ.get(name, "") for name in KEYS)
    if not access_key or not secret_key:
        raise UsageError(
            "There are no keys that requests could be signed with.",
            remedy=f"Set {' and '.join(KEYS)}, or leave out --signed.",
        )
    return Keys(access_key, secret_key)
