"""Reference of the backends' parts and capabilities, from descriptors and the fault table."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from batchlab.core.capabilities import backend_names, read_descriptor
from batchlab.runtime import factory
from batchlab.runtime.factory import Backend
from docs.reference.markdown import head, table

ORDER = tuple(sorted(backend_names(), key=lambda name: (read_descriptor(name)["order"], name)))
"""Order of the backends on the pages."""
_ADAPTERS = {
    "memory": "memory",
    "sqlite": "SQLite",
    "sqs": "SQS",
    "postgres": "PostgreSQL",
    "deployed": "RDS PostgreSQL, SimpleDB, or SQLite, as the stack defines",
    "process": "processes, launched by the manager",
    "autoscaling": "an Auto Scaling group",
    "simulated": "simulated",
}
"""Display names for the adapters of queues, ledgers, and fleets in `backends/*/backend.toml`."""

_WORDS = """\

# Capabilities of the backends

[Backends](backends.md) is the guide to the backends. The backend `aws` was not tested on AWS itself
([what was checked](aws-security.md#what-has-been-checked)).

## Parts of each backend

"""
_FACTS = """
## Differences for users

Job files, commands, promises, reports, and the web page of a running grid are the same on all
backends.

"""
_FAULTS = """
## Real faults of a scenario

`batchlab scenario faults --backend NAME` shows how each fault is injected, or why its injection is
impossible ([faults](replay.md#faults)). A forecast (`scenario simulate`) supports all faults.

"""


def reference() -> str:
    """The page in Markdown."""
    found = [factory.load(name) for name in ORDER]
    columns = ("", *(f"`{one.name}`" for one in found))
    return "".join(
        (
            head("backends/*/backend.toml and batchlab/scenarios/faults/fault_injection.py"),
            _WORDS,
            table(columns, [_row(title, say, found) for title, say in _PARTS]),
            _FACTS,
            table(columns, [_row(title, say, found) for title, say in _TELLS]),
            _FAULTS,
            _faults(),
        )
    )


def _row(title: str, say: Callable[[Backend], str], found: Sequence[Backend]) -> Sequence[str]:
    return (title, *(say(one) for one in found))


_PARTS: tuple[tuple[str, Callable[[Backend], str]], ...] = (
    ("summary", lambda one: one.description),
    ("objects", lambda one: one.objects_name),
    ("queue", lambda one: _ADAPTERS[one.queue]),
    ("ledger", lambda one: _ADAPTERS[one.ledger]),
    ("fleet", lambda one: _ADAPTERS[one.fleet]),
)


def _yes(is_so: bool) -> str:
    return "yes" if is_so else "no"


_TELLS: tuple[tuple[str, Callable[[Backend], str]], ...] = (
    ("manager and workers run as", lambda one: _where(one)),
    ("`--endpoint` selects other S3 and SQS services", lambda one: _yes(one.capabilities.s3_endpoint)),
    ("the grid starts its own emulator", lambda one: one.emulator or _yes(_in_containers(one))),
    ("the grid needs Docker", lambda one: _yes(_in_containers(one))),
    ("the grid costs money at AWS", lambda one: _yes(one.capabilities.billed)),
    ("the AWS CLI can use the bucket and queues", lambda one: _yes(one.queue == "sqs")),
    ("the bucket is readable without a running grid", lambda one: _yes(one.capabilities.local_bucket)),
    ("a grid runs for many jobs (`grid up`)", lambda one: _yes(not one.capabilities.simulated)),
    ("instances have a market (Spot, On-Demand) and a zone", lambda one: _yes(not one.capabilities.one_machine)),
    (
        "functions sent from Python need the workers' Python version",
        lambda one: _yes(not one.capabilities.local_manager),
    ),
    ("default pool", lambda one: "; ".join(_pool(one))),
)


def _in_containers(one: Backend) -> bool:
    return one.capabilities.container_manager


def _where(one: Backend) -> str:
    if one.capabilities.simulated:
        return "in one process, in virtual time"
    if one.capabilities.stack:
        return "instances of EC2"
    return "containers" if _in_containers(one) else "processes"


def _pool(one: Backend) -> list[str]:
    """Return the sizes and slots of each pool, independent of this machine's number of CPUs."""
    said = []
    for pool in one.pools:
        slots = "1 slot" if pool.slots == 1 else f"{pool.slots} slots"
        if one.capabilities.one_machine:
            said.append(f"`{pool.name}`: {pool.min_size} to max(2, CPUs) instances of {slots}")
        else:
            said.append(f"`{pool.name}`: {pool.min_size} to {pool.max_size} instances of {slots}")
    return said


def _faults() -> str:
    from batchlab.scenarios.faults.fault_injection import BACKENDS, TABLE

    rows = [
        (f"`{fault.value}`", fault.meaning, *(_yes(cells[name].possible) for name in BACKENDS))
        for fault, cells in TABLE.items()
    ]
    return table(("fault", "meaning", *(f"`{name}`" for name in BACKENDS)), rows)
