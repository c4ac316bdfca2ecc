"""The demo's claims, and whether its totals agree with what the generator says of them.

Invariant: the facts are counted while the claims are drawn, before any of the job's code sees
them; a folder of claims is used again only if it was finished.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from batchlab.cli import output
from batchlab.cli.summary import Summary
from batchlab.cli.templates import example_files
from batchlab.errors import UsageError
from batchlab.home import Home

EXAMPLE = "claims"
STAGE = "totals"


@dataclass(frozen=True, slots=True)
class Prepared:
    """A demo ready to run; `facts` by payer."""

    job_file: Path
    facts: Mapping[str, Mapping[str, Any]]


def prepare(home: Home, *, seed: int, files: int, claims_per_file: int) -> Prepared:
    """The example with its claims, in a folder of the grid's. The same again is the same files,
    so that --resume finds the run of an earlier demo."""
    home.make()
    folder = home.path / "demo" / f"{EXAMPLE}-seed{seed}-{files}x{claims_per_file}"
    noted = folder.with_suffix(".json")
    try:
        for name, content in example_files(EXAMPLE).items():
            _write_changed(folder / name, content)
        if not noted.exists():
            from batchlab.datagen import write_claims

            made = write_claims(
                folder / "data", seed=seed, files=files, claims_per_file=claims_per_file
            )
            facts = {payer: asdict(one) for payer, one in made.payers.items()}
            staged = noted.with_suffix(".part")
            staged.write_text(json.dumps(facts))
            staged.replace(noted)
    except OSError as error:
        raise UsageError(
            f"The demo's claims cannot be written to {folder}: {error.strerror}.",
            remedy="Name another folder with --home.",
        ) from error
    return Prepared(folder / "job.yaml", json.loads(noted.read_text()))


def _write_changed(path: Path, content: bytes) -> None:
    if not path.exists() or path.read_bytes() != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The totals per payer, and where they differ from the facts."""

    totals: list[dict[str, Any]]
    differences: list[str]

    @property
    def agrees(self) -> bool:
        return not self.differences

    def to_json(self) -> dict[str, Any]:
        return {"agrees": self.agrees, "differences": self.differences, "payers": self.totals}

    def text(self) -> str:
        rows = [
            (
                one["payer_name"],
                one["claims"],
                _money(one["charge_cents"]),
                _money(one["paid_cents"]),
                one["paid"],
                one["denied"],
                one["pended"],
            )
            for one in self.totals
        ]
        columns = ("payer", "claims", "charged", "to pay", "paid", "denied", "pended")
        answer = f"totals agree with the generator: {'yes' if self.agrees else 'no'}"
        return "\n".join([output.table(columns, rows), "", answer, *self.differences])


def check(prepared: Prepared, summary: Summary) -> Verdict:
    """Compare the totals that were fetched with the facts."""
    assert summary.fetched is not None
    with (summary.fetched.folder / f"{STAGE}.jsonl").open(encoding="utf-8") as file:
        totals = [json.loads(line)["value"] for line in file]
    found = {one["payer"]: one for one in totals}
    differences = []
    for payer in sorted(found.keys() | prepared.facts.keys()):
        one, fact = found.get(payer), prepared.facts.get(payer)
        if one is None or fact is None:
            differences.append(
                f"payer {payer} is in {'the facts' if one is None else 'the totals'} only"
            )
            continue
        differences += [
            f"payer {payer}: {key} is {one[key]}, the generator says {value}"
            for key, value in expected(fact).items()
            if one[key] != value
        ]
    return Verdict(totals, differences)


def expected(fact: Mapping[str, Any]) -> dict[str, int]:
    """What a payer's totals must say, as far as the generator knows."""
    denied = fact["duplicates"] + fact["zero_charge"] + fact["undiagnosed"]
    return {
        "claims": fact["claims"],
        "charge_cents": fact["charge_cents"],
        "denied": denied,
        "pended": fact["unbalanced"],
        "paid": fact["claims"] - denied - fact["unbalanced"],
    }


def _money(amount_cents: int) -> str:
    return f"{amount_cents // 100:,}.{amount_cents % 100:02d}"
