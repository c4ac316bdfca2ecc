"""Commands `batchlab manager`, `worker`, and `connect`, which run a process of a grid or a connection to AWS.

Invariant: a service imports only the modules that the service needs, so that the service starts fast. Services use
argparse, because the import of argparse takes 10% of the time of Typer's import. A service logs an error in one line,
because the process that started the service shows the last line of the log.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from batchlab.core import gc_control, logs
from batchlab.core.errors import BatchlabError
from batchlab.core.operating_system import raise_file_limit


def serve(arguments: Sequence[str]) -> None:
    """Run the service that the first argument names until the end of the service.

    Exit with the exit code of the service.
    """
    options = parsers()[0].parse_args(arguments)
    gc_control.pause()  # Garbage collection during the start would slow down the service.
    raise_file_limit()
    try:
        logs.set_format(options.log_format)
        if options.service == "manager":
            _manager(options)
        elif options.service == "connect":
            _connection(options)
        else:
            _worker(options)
    except BatchlabError as error:
        # The command that started the service shows the last line of the service's log.
        logs.print_last_line(" ".join(str(error).split()))
        sys.exit(error.exit_code)
    finally:
        gc_control.resume()


def _manager(options: argparse.Namespace) -> None:
    from batchlab.cli.option_values import parse_pools
    from batchlab.runtime import factory, settings
    from batchlab.runtime.home import find_home
    from batchlab.server.manager_service import ManagerOptions, manager_main

    home = find_home(options.home)
    backend = factory.load(options.backend, options.endpoint)
    backend = settings.with_home_settings(factory.with_pools(backend, parse_pools(options.pool)), home)
    manager_main(ManagerOptions(home, backend, options.host, options.port, options.parent, options.page_host))


def _connection(options: argparse.Namespace) -> None:
    from batchlab.client.aws_connection import connection_main
    from batchlab.runtime import factory
    from batchlab.runtime.home import find_home

    backend = factory.load(options.backend)
    connection_main(find_home(options.home), backend, parent=options.parent)


def _worker(options: argparse.Namespace) -> None:
    from batchlab.runtime import factory
    from batchlab.runtime.home import find_home
    from batchlab.server.worker_service import worker_main

    worker_main(
        find_home(options.home),
        factory.load(options.backend),
        pool=options.pool,
        slots=options.slots,
        gpus=options.gpus,
        instance=options.instance,
    )


def parsers() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """Return the parser of all arguments, and the parsers of the services by name."""
    parser = argparse.ArgumentParser(prog="batchlab")
    services = parser.add_subparsers(dest="service", required=True)
    manager = _service(services, "manager", "Run a manager in the foreground, until SIGTERM.")
    manager.add_argument(
        "--pool",
        action="append",
        default=[],
        metavar="NAME:MIN-MAXxSLOTS[,gpus=N][,image=IMAGE]",
        help="pool of workers, such as default:0-4x1; the named pools replace the backend's default pools; the "
        "option may be repeated",
    )
    manager.add_argument("--endpoint", metavar="URL", help="URL of S3 and SQS, or address of the bucket")
    manager.add_argument("--host", default="127.0.0.1", help="IP address or host name on which the manager listens")
    manager.add_argument(
        "--port", type=int, default=0, help="port on which the manager listens; with 0, the manager uses a free port"
    )
    manager.add_argument(
        "--page-host",
        action="append",
        default=[],
        metavar="NAME",
        help="additional host name of the manager's web page; the option may be repeated",
    )
    connection = _service(services, "connect", "Hold a connection to a manager on AWS, until SIGTERM.")
    for service_parser in (manager, connection):
        service_parser.add_argument(
            "--parent",
            type=int,
            default=0,
            metavar="PID",
            help="id of a process; the service stops when the process ends",
        )
    worker = _service(services, "worker", "Run one instance's worker, until SIGTERM.")
    default = "; default: the value in the instance metadata"
    worker.add_argument("--pool", default="", help=f"name of the worker's pool{default}")
    worker.add_argument(
        "--slots", type=int, default=0, help=f"number of tasks that the worker runs in parallel{default}"
    )
    worker.add_argument("--gpus", type=int, help=f"number of GPUs that the worker gives to tasks{default}, or 0")
    worker.add_argument("--instance", default="", help=f"id of the worker's instance{default}")
    return parser, services.choices


def _service(
    services: argparse._SubParsersAction[argparse.ArgumentParser], name: str, about: str
) -> argparse.ArgumentParser:
    parser = services.add_parser(name, description=about)
    parser.add_argument(
        "--home", type=Path, help="folder of the grid; default: $BATCHLAB_HOME, or else .batchlab in the current folder"
    )
    parser.add_argument("--backend", default="local", help="name of the grid's backend")
    parser.add_argument(
        "--log-format", choices=logs.FORMATS, help=f"format of the logs; default: ${logs.FORMAT_VARIABLE}, or else text"
    )
    return parser
