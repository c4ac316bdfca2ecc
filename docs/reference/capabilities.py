"""What each backend is made of and can do, from the descriptors and from the table of faults."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from batchlab.runtime import factory
from batchlab.runtime.factory import Backend
from docs.reference.markdown import head, table

ORDER = ("local", "ministack", "localstack", "aws", "gcs", "sim")
"""The backends as the pages have them."""
_ADAPTERS = {
    "batchlab.adapters.local.objects": "a folder",
    "batchlab.adapters.aws.objects": "S3",
    "batchlab.adapters.gcs": "Google Cloud Storage",
    "batchlab.adapters.memory.objects": "memory",
    "memory": "memory",
    "sqlite": "SQLite",
    "sqs": "SQS",
    "postgres": "PostgreSQL",
    "deployed": "RDS PostgreSQL, SimpleDB or SQLite, as the stack has it",
    "process": "processes, launched by the manager",
    "autoscaling": "an Auto Scaling group",
    "simulated": "simulated",
}
"""The words of `backends/*/backend.toml` in a reader's."""

_WORDS = """\

# What each backend can do

What `backends/<name>/backend.toml` and the code say of each backend. [Backends](backends.md) is the
guide to them. What is said of `aws` has been tried on emulated control planes, and not on AWS
itself ([what was checked](aws-security.md#what-has-been-checked)).

## What it is made of

"""
_FACTS = """
## What differs for its user

What is not in this table is the same on all of them: job files, commands, the promises, reports,
the web page of a grid that stays up.

"""
_FAULTS = """
## What a scenario can break for real

`batchlab scenario faults` says how each comes about, or why it cannot be; so does [the page on
faults](faults.md). A forecast (`scenario simulate`) knows all of them.

"""


def reference() -> str:
    """The page in Markdown."""
    found = [factory.load(name) for name in ORDER]
    columns = ("", *(f"`{one.name}`" for one in found))
    return "".join(
        (
            head("backends/*/backend.toml and batchlab/scenarios/faults/fault_table.py"),
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
    ("in a sentence", lambda one: one.description),
    ("objects", lambda one: _ADAPTERS[one.objects]),
    ("queue", lambda one: _ADAPTERS[one.queue]),
    ("ledger", lambda one: _ADAPTERS[one.ledger]),
    ("fleet", lambda one: _ADAPTERS[one.fleet]),
    ("clock", lambda one: "virtual" if one.capabilities.simulated else "wall"),
)


def _yes(is_so: bool) -> str:
    return "yes" if is_so else "no"


_TELLS: tuple[tuple[str, Callable[[Backend], str]], ...] = (
    ("manager and workers are", lambda one: _where(one)),
    ("`--endpoint` names another S3 and SQS", lambda one: _yes(one.capabilities.takes_endpoint)),
    ("starts an emulator for itself", lambda one: one.emulator or _yes(_in_containers(one))),
    ("needs Docker", lambda one: _yes(_in_containers(one))),
    ("needs an account, and costs money", lambda one: _yes(one.capabilities.billed)),
    ("the AWS CLI and others see its bucket and queues", lambda one: _yes(one.queue == "sqs")),
    (
        "the bucket can be read while no grid is up, by anybody with its folder",
        lambda one: _yes(one.capabilities.local_bucket),
    ),
    (
        "a grid stays up for many jobs (`grid up`), and survives its manager",
        lambda one: _yes(not one.capabilities.simulated),
    ),
    (
        "instances are of a market and a zone: Spot, on demand",
        lambda one: _yes(not one.capabilities.one_machine),
    ),
    (
        "functions sent from Python need the same Python there",
        lambda one: _yes(not one.capabilities.local_manager),
    ),
    ("its pool unless said", lambda one: "; ".join(_pool(one))),
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
    """Of each pool its sizes and slots. How many CPUs this machine has is no part of the page."""
    said = []
    for pool in one.pools:
        most = "as many as CPUs, at least 2" if one.capabilities.one_machine else str(pool.max_size)
        slots = "1 slot" if pool.slots == 1 else f"{pool.slots} slots"
        said.append(f"`{pool.name}`: {pool.min_size} to {most}, {slots} each")
    return said


def _faults() -> str:
    from batchlab.scenarios.faults.fault_table import BACKENDS, TABLE

    rows = [
        (
            f"`{fault.value}`",
            fault.meaning,
            *(_yes(cells[name].possible) for name in BACKENDS),
        )
        for fault, cells in TABLE.items()
    ]
    return table(("fault", "meaning", *(f"`{name}`" for name in BACKENDS)), rows)
