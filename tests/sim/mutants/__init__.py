"""Planted bugs: broken variants of the product, each of which the simulator must catch.

Invariant: a mutant changes the product in the test's process only, and only while it is looked at.
Add every real bug that is found later; docs/planted-bugs.md says how.
"""

from tests.sim.mutants import fleet, ids, leaders, lies, manager, storage, waste, words, worker
from tests.sim.mutants.kit import MUTANTS

__all__ = ["MUTANTS", "fleet", "ids", "leaders", "lies", "manager", "storage", "waste", "words", "worker"]
