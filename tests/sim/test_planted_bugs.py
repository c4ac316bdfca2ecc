"""The planted bugs, each of which the simulator catches by a promise that the bug breaks."""

from __future__ import annotations

import pytest

from batchlab.worker.loop import Worker
from tests.sim.mutants import MUTANTS
from tests.sim.mutants.calibrate import PAGE, rows, table_in
from tests.sim.mutants.kit import (
    AND_MORE,
    ENOUGH,
    PATIENT,
    Hunt,
    Mutant,
    Plant,
    Unfit,
    hunt,
    known,
    mutated,
    seeds_for,
    unmutated,
)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda one: one.name.replace(" ", "-"))
def test_a_planted_bug_is_caught(mutant: Mutant) -> None:
    """A simulation without failures proves something only if it would find these bugs."""
    found = hunt(mutant, seeds_for(mutant))
    assert found.caught, f"no promise of {set(mutant.shows)} in {ENOUGH} seeds: {found.others}"


# --- The kit -------------------------------------------------------------------------------------


def test_a_mutant_of_something_renamed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unfit, match="no method _gone"):
        Plant(monkeypatch).method(Worker, "_gone")


def test_a_mutant_with_other_parameters_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run(self: Worker, quickly: bool) -> None: ...

    with pytest.raises(Unfit, match="other parameters"):
        Plant(monkeypatch).method(Worker, "run")(run)


def test_own_error_of_a_mutant_is_not_a_catch() -> None:
    """Otherwise, an outdated mutant would count as caught, because it crashes its worker."""

    def plant(plant: Plant) -> None:
        @plant.method(Worker, "run")
        async def run(self: Worker) -> None:
            self.gone()  # type: ignore[attr-defined]

    with pytest.raises(Unfit, match="stale"):
        hunt(Mutant("stale", plant, frozenset({"I7"})), range(10))


def test_a_mutant_that_changes_nothing_is_not_caught() -> None:
    idle = Mutant("idle", lambda _: None, frozenset({"I1", "I7"}))
    assert hunt(idle, [3, 5, 15]) == Hunt(None, ())


def test_catch_by_another_promise_does_not_count() -> None:
    """Otherwise, the test would not notice that the check of the broken promise is missing."""
    name = "scale in forgotten"
    real = next(one for one in MUTANTS if one.name == name)
    found = hunt(Mutant(name, real.plant, frozenset({"I3"})), [known()[name].seed])
    assert found.caught is None
    assert [other.promise for other in found.others] == ["I5"]


def test_endless_world_is_caught_early() -> None:
    """The world is reported as hanging (I7) long before its limit of virtual time."""
    name = "poison without a limit"
    hanging = next(one for one in MUTANTS if one.name == name)
    seed = known()[name].seed
    seen, plain = mutated(hanging, seed), unmutated(seed)
    assert seen.failure is not None
    assert (seen.failure.promise, plain.failure) == ("I7", None)
    assert plain.steps < seen.steps < PATIENT * plain.steps + 2 * AND_MORE


def test_the_product_is_whole_after_a_mutant() -> None:
    before = Worker._process_bundle
    mutated(next(one for one in MUTANTS if one.name == "delete on receive"), 1)
    assert Worker._process_bundle is before


def test_the_page_has_the_table_that_the_calibration_writes() -> None:
    """`python -m tests.sim.mutants.calibrate` writes both the table and known.json."""
    assert table_in(PAGE.read_text()) == rows(known())
