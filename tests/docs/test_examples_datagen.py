"""The data generators: the same bytes for the same seed, and facts that match a count of the text."""

from __future__ import annotations

import csv
from decimal import Decimal
from hashlib import sha256
from pathlib import Path

import pytest

from examples.example_data import write_claims, write_records, write_rides
from tests.support.examples.claims import split


def digest(folder: Path) -> str:
    return sha256(b"".join(path.read_bytes() for path in sorted(folder.iterdir()))).hexdigest()


def write_all(folder: Path, seed: int) -> None:
    write_claims(folder, seed=seed, files=3, claims_per_file=20)
    write_records(folder, seed=seed, size_bytes=5_000)
    write_rides(folder, seed=seed, rows=50)


def test_bytes_are_the_same_on_every_machine_and_version(tmp_path: Path) -> None:
    write_all(tmp_path, seed=1)
    assert digest(tmp_path) == "99d99d9f424694170f6d5c6210265ec352d69e93a5a69a600000a7e59b07847e"


def test_other_seed_gives_other_data(tmp_path: Path) -> None:
    for seed in (1, 2):
        write_all(tmp_path / str(seed), seed=seed)
    assert digest(tmp_path / "1") != digest(tmp_path / "2")


def test_a_file_is_the_same_however_many_are_written(tmp_path: Path) -> None:
    write_claims(tmp_path / "few", seed=3, files=2)
    write_claims(tmp_path / "many", seed=3, files=5)
    for path in (tmp_path / "few").iterdir():
        assert path.read_bytes() == (tmp_path / "many" / path.name).read_bytes()


def test_claims_match_the_described_facts(tmp_path: Path) -> None:
    facts = write_claims(tmp_path, seed=4, files=6, claims_per_file=50)
    segments = [s for path in tmp_path.iterdir() for s in split(path.read_text())]
    charges = [Decimal(s[2]) for s in segments if s[0] == "CLM"]
    assert len(charges) == facts.claims == 300
    assert sum(charges) * 100 == facts.charge_cents
    assert sum(payer.lines for payer in facts.payers.values()) == sum(s[0] == "SV1" for s in segments)
    assert sum(payer.zero_charge for payer in facts.payers.values()) > 0
    assert len(list(tmp_path.iterdir())) == facts.files


def test_every_claims_file_has_correct_counts_in_its_envelopes(tmp_path: Path) -> None:
    write_claims(tmp_path, seed=5, files=6)
    for path in tmp_path.iterdir():
        segments = split(path.read_text())
        names = [s[0] for s in segments]
        starts = [i for i, name in enumerate(names) if name == "ST"]
        ends = [i for i, name in enumerate(names) if name == "SE"]
        assert [int(segments[e][1]) for e in ends] == [e - s + 1 for s, e in zip(starts, ends, strict=True)]
        assert names[-2:] == ["GE", "IEA"]
        assert int(segments[-2][1]) == len(starts)


def test_the_first_segment_has_the_106_characters_of_the_standard(tmp_path: Path) -> None:
    write_claims(tmp_path, seed=6, files=3, claims_per_file=1)
    for path in tmp_path.iterdir():
        text = path.read_text()
        assert text[:105].count(text[3]) == 16
        assert text[106:].lstrip().startswith("GS")


@pytest.mark.parametrize("claims", [1, 2, 3])
def test_small_files_have_the_requested_number_of_claims(tmp_path: Path, claims: int) -> None:
    assert write_claims(tmp_path, files=4, claims_per_file=claims).claims == 4 * claims


def test_records_facts_are_what_the_file_holds(tmp_path: Path) -> None:
    facts = write_records(tmp_path, seed=2, size_bytes=100_000)
    data = facts.path.read_bytes()
    assert len(data) == facts.size_bytes
    assert 100_000 <= len(data) < 100_200
    assert data.count(b"\n") == facts.lines
    assert data.endswith(b"\n")
    assert len(set(data.split(b"\n"))) < facts.lines, "some lines repeat"


def test_rides_facts_are_what_the_file_holds(tmp_path: Path) -> None:
    facts = write_rides(tmp_path, seed=2, rows=2_000)
    with facts.path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2_000
    assert sorted(facts.months) == ["2024-01", "2024-02", "2024-03"]
    for name, month in facts.months.items():
        own = [row for row in rows if row["pickup"].startswith(name)]
        assert len(own) == month.rides
        assert sum(Decimal(row["total"]) for row in own) * 100 == month.total_cents
        assert sum(row["payment"] == "" for row in own) == month.without_payment > 0
