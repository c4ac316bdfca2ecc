"""`batchlab manager`, `worker` and `connect`: a grid's processes, and the way to one on AWS.

Invariant: nothing is imported here that the process does not need, so that it is up soon. Hence
argparse, which takes a tenth of the time that Typer does. Whoever started it reads the last line
of its log, so an error is one line.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from batchlab.core import gc_control, logs
from batchlab.core.errors import BatchlabError


def serve(arguments: Sequence[str]) -> None:
    """Run the service named by the first argument until it ends; exits with its code."""
    asked = parsers()[0].parse_args(arguments)
    gc_control.begins()  # until the service says that it is there
    try:
        logs.choose(asked.log_format)
        if asked.service == "manager":
            _manager(asked)
        elif asked.service == "connect":
            _connection(asked)
        else:
            _worker(asked)
    except BatchlabError as error:
        # The last line of the log is what the command shows that started this process.
        logs.last_words(" ".join(str(error).split()))
        sys.exit(error.exit_code)
    finally:
        gc_control.ended()


def _manager(asked: argparse.Namespace) -> None:
    from batchlab.cli.grid_page import parse_all
    from batchlab.runtime import factory, settings
    from batchlab.runtime.home import find_home
    from batchlab.server.manager_service import manager_main

    home = find_home(asked.home)
    backend = factory.load(asked.backend, asked.endpoint)
    backend = settings.applied(factory.with_pools(backend, parse_all(asked.pool)), home)
    manager_main(
        home,
        backend,
        host=asked.host,
        port=asked.port,
        parent=asked.parent,
        hosts=asked.page_host,
    )


def _connection(asked: argparse.Namespace) -> None:
    from batchlab.client.aws_connection import connection_main
    from batchlab.runtime import factory
    from batchlab.runtime.home import find_home

    backend = factory.load(asked.backend)
    connection_main(find_home(asked.home), backend, parent=asked.parent)


def _worker(asked: argparse.Namespace) -> None:
    from batchlab.runtime import factory
    from batchlab.runtime.home import find_home
    from batchlab.server.worker_service import worker_main

    worker_main(
        find_home(asked.home),
        factory.load(asked.backend),
        pool=asked.pool,
        slots=asked.slots,
        instance=asked.instance,
    )


def parsers() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """What reads the arguments, and by the name of each service what reads those behind it."""
    parser = argparse.ArgumentParser(prog="batchlab")
    services = parser.add_subparsers(dest="service", required=True)
    manager = _service(services, "manager", "Run a manager in the foreground, until SIGTERM.")
    manager.add_argument(
        "--pool",
        action="append",
        default=[],
        metavar="NAME:MIN-MAXxSLOTS",
        help="a pool of workers, in place of the backend's own; may be repeated",
    )
    manager.add_argument(
        "--endpoint", metavar="URL", help="where S3 and SQS are, or which bucket to use"
    )
    manager.add_argument("--host", default="127.0.0.1", help="address to listen on")
    manager.add_argument("--port", type=int, default=0, help="port to listen on; 0: any free one")
    manager.add_argument(
        "--page-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name that the web page answers to, besides this machine's own; may be repeated",
    )
    connection = _service(
        services, "connect", "Hold a connection to a manager on AWS, until SIGTERM."
    )
    for one in (manager, connection):
        one.add_argument(
            "--parent", type=int, default=0, metavar="PID", help="end when this process does"
        )
    worker = _service(services, "worker", "Run one instance's worker, until SIGTERM.")
    known = "; the instance's metadata says where this does not"
    worker.add_argument("--pool", default="", help=f"the pool it belongs to{known}")
    worker.add_argument(
        "--slots", type=int, default=0, help=f"tasks it runs at the same time{known}"
    )
    worker.add_argument("--instance", default="", help=f"the instance it runs on{known}")
    return parser, services.choices


def _service(
    services: argparse._SubParsersAction[argparse.ArgumentParser], name: str, about: str
) -> argparse.ArgumentParser:
    parser = services.add_parser(name, description=about)
    parser.add_argument(
        "--home", type=Path, help="the grid's folder; without it BATCHLAB_HOME, or .batchlab here"
    )
    parser.add_argument("--backend", default="local", help="where the grid lives")
    parser.add_argument(
        "--log-format",
        choices=logs.FORMATS,
        help=f"lines for a person or for a program; without it {logs.FORMAT_VARIABLE}, or text",
    )
    return parser
