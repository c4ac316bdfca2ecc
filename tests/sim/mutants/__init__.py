"""Planted bugs: broken variants of the product, each of which the simulator must catch.

Invariant: a mutant changes the product only in the test's process, and only while a test runs it. Each real bug that is
found later becomes a mutant, as docs/contributing/planted-bugs.md describes.
"""

from tests.sim.mutants import (
    audit,
    copies,
    dependencies,
    fleet,
    gpus,
    ids,
    leaders,
    lies,
    manager,
    mended,
    orphans,
    shares,
    storage,
    waste,
    words,
    worker,
)
from tests.sim.mutants.kit import MUTANTS

__all__ = [
    "MUTANTS",
    "audit",
    "copies",
    "dependencies",
    "fleet",
    "gpus",
    "ids",
    "leaders",
    "lies",
    "manager",
    "mended",
    "orphans",
    "shares",
    "storage",
    "waste",
    "words",
    "worker",
]
