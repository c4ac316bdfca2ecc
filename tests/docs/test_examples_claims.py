"""The claims example: parser, rules, and totals, compared with the generator's facts and an SQL query."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from batchlab.core.task_context import File
from examples.example_data import ClaimsFacts, write_claims
from tests.support.examples import gathered, handler
from tests.support.examples.claims import expected_totals, split

parse = handler("claims", "parse:parse")
adjudicate = handler("claims", "adjudicate:adjudicate")
totals = handler("claims", "adjudicate:totals")
cents = handler("claims", "parse:cents")

HEAD = (
    "ISA*00*          *00*          *ZZ*S              *ZZ*R              "
    "*240131*2300*^*00501*000000007*0*T*:~GS*HC*S*R*20240131*2300*1*X*005010X222A1~"
    "ST*837*0001*005010X222A1~HL*1**20*1~NM1*85*2*CLINIC*****XX*111~HL*2*1*22*0~"
    "SBR*P*18*******CI~NM1*IL*1*DOE*JO****MI*M1~NM1*PR*2*PAYER*****PI*P1~"
)
CLAIM = "CLM*C1*40***11:B:1*Y*A*Y*Y~HI*ABK:I10~LX*1~SV1*HC:99213*40*UN*1***1~"
TAIL = "SE*12*0001~GE*1*1~IEA*1*000000007~"


def run(folder: Path, *parsed: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Run the job without a grid, and return the totals by payer."""
    results = parsed or [parse(File(path)) for path in sorted(folder.iterdir())]
    groups = gathered([adjudicate(result) for result in results], by="payer")
    return {total["payer"]: total for total in map(totals, groups)}


def parsed(tmp_path: Path, text: str) -> Any:
    path = tmp_path / "one.837"
    path.write_text(text)
    return parse(File(path))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ClaimsFacts]:
    folder = tmp_path_factory.mktemp("claims")
    return folder, write_claims(folder, seed=7, files=12, claims_per_file=150)


def test_totals_match_the_generator(made: tuple[Path, ClaimsFacts]) -> None:
    folder, facts = made
    found = run(folder)
    assert found.keys() == facts.payers.keys()
    for payer, fact in facts.payers.items():
        total = found[payer]
        assert (total["claims"], total["charge_cents"]) == (fact.claims, fact.charge_cents)
        assert total["payer_name"] == fact.name
        expected = {
            "charge differs from its lines": fact.unbalanced,
            "duplicate": fact.duplicates,
            "no charge": fact.zero_charge,
            "no diagnosis": fact.undiagnosed,
        }
        assert total["reasons"] == {reason: n for reason, n in expected.items() if n}
        assert total["paid"] + total["denied"] + total["pended"] == fact.claims


def test_money_agrees_with_the_rules_written_as_sql(made: tuple[Path, ClaimsFacts]) -> None:
    found = run(made[0])
    expected = expected_totals(sorted(made[0].iterdir()))
    assert {p: {k: total[k] for k in expected[p]} for p, total in found.items()} == expected
    assert 0 < found["10001"]["paid_cents"] < found["10001"]["allowed_cents"]


def test_generated_files_have_only_the_intended_findings(made: tuple[Path, ClaimsFacts]) -> None:
    folder, facts = made
    findings = [f for path in folder.iterdir() for f in parse(File(path))["findings"]]
    assert all("occurs" in f or "its lines sum to" in f for f in findings)
    unbalanced = sum(payer.unbalanced for payer in facts.payers.values())
    # A claim that repeats an unbalanced one is unbalanced too.
    assert sum("its lines sum to" in f for f in findings) >= unbalanced > 0


def test_every_claim_and_line_of_the_text_is_read(made: tuple[Path, ClaimsFacts]) -> None:
    for path in made[0].iterdir():
        names = [segment[0] for segment in split(path.read_text())]
        result = parse(File(path))
        assert result["segments"] == len(names)
        assert len(result["claims"]) == names.count("CLM")
        assert sum(len(c["lines"]) for c in result["claims"]) == names.count("SV1")


def test_real_samples_are_read_completely(shared_data: Path) -> None:
    for path in sorted((shared_data / "claims" / "x12").glob("*.837")):
        segments = split(path.read_text())
        claims = parse(File(path))["claims"]
        assert [[c["id"], c["charge_cents"]] for c in claims] == [
            [s[1], cents(s[2])] for s in segments if s[0] == "CLM"
        ]
        charges = [line["charge_cents"] for c in claims for line in c["lines"]]
        assert charges == [cents(s[2]) for s in segments if s[0] == "SV1"]


def test_real_samples_have_the_totals_of_the_sql_rules(shared_data: Path) -> None:
    paths = sorted((shared_data / "claims" / "x12").glob("*.837"))
    found = run(shared_data, *(parse(File(path)) for path in paths))
    expected = expected_totals(paths)
    assert {p: {k: total[k] for k in expected[p]} for p, total in found.items()} == expected
    assert sum(total["claims"] for total in found.values()) == 18


def test_large_faulty_sample_yields_claims_and_findings(shared_data: Path) -> None:
    path = shared_data / "claims" / "x12" / "x12_many_claims.txt"
    result = parse(File(path))
    claims = result["claims"]
    assert len(claims) == sum(len(c["lines"]) for c in claims) == 820
    assert sum(c["charge_cents"] for c in claims) == 410_000_00
    assert "ST 987654: SE01 says 25, counted 11486" in result["findings"]
    assert "claim A37YH556: occurs 410 times" in result["findings"]
    assert "claim A37YH667: charges 500.00, its lines sum to 12.25" in result["findings"]
    assert "claim A37YH556: HI01 is 'BK', without a code" in result["findings"]
    [total] = run(shared_data, result).values()
    assert total["reasons"] == {"charge differs from its lines": 2, "duplicate": 818}
    assert total["payer_name"] == "HEALTH INSURANCE COMPANY / HEALTH INSURANCE COMPANY TWO"


def test_a_remittance_is_x12_but_holds_no_claims(shared_data: Path) -> None:
    for path in (shared_data / "claims" / "x12").glob("*.835"):
        result = parse(File(path))
        assert result["claims"] == []
        assert [f for f in result["findings"] if "a 835, not an 837" in f] == result["findings"]


def test_a_correct_claim_has_no_findings(tmp_path: Path) -> None:
    result = parsed(tmp_path, HEAD + CLAIM + TAIL)
    assert result["findings"] == []
    [claim] = result["claims"]
    assert claim == {
        "id": "C1",
        "charge_cents": 4000,
        "submitter": "",
        "provider": "111",
        "subscriber": "M1",
        "payer": "P1",
        "payer_name": "PAYER",
        "filing": "CI",
        "diagnoses": ["I10"],
        "lines": [{"procedure": "99213", "charge_cents": 4000, "units": "1"}],
    }


@pytest.mark.parametrize(
    ("right", "wrong", "finding"),
    [
        ("SE*12*0001", "SE*99*0001", "ST 0001: SE01 says 99, counted 12"),
        ("SE*12*0001", "SE*12*0002", "ST 0001: SE02 says 0002"),
        ("GE*1*1", "GE*2*1", "GS 1: GE01 says 2, counted 1"),
        ("GE*1*1", "GE*1*5", "GS 1: GE02 says 5"),
        ("IEA*1*000000007", "IEA*0*000000007", "ISA 000000007: IEA01 says 0, counted 1"),
        ("IEA*1*000000007~", "", "ISA 000000007: IEA is missing"),
        ("SE*12*0001~", "", "ST 0001: SE is missing"),
        ("SE*12*0001~", "ST*837*0002~SE*2*0002~", "ST 0001: SE is missing"),
        ("GE*1*1~", "GE*1*1~GE*1*1~", "GE without GS"),
        ("GS*HC*S*R*20240131*2300*1*X*005010X222A1~", "", "ST stands outside of a GS"),
        ("CLM*C1*40*", "CLM*C1*forty*", "claim C1: CLM02 is 'forty', not an amount"),
        ("CLM*C1*40*", "CLM*C1*40.005*", "claim C1: CLM02 is '40.005', with fractions of a cent"),
        ("HC:99213*40*", "HC:99213*30.5*", "claim C1: charges 40.00, its lines sum to 30.50"),
        ("HC:99213", "99213", "claim C1: SV101 is '99213', without a code"),
        ("NM1*PR*2*PAYER*****PI*P1~", "", "claim C1: no payer (NM1*PR) in loop 2010BB"),
    ],
)
def test_mistake_is_a_finding_and_the_claim_is_read(tmp_path: Path, right: str, wrong: str, finding: str) -> None:
    text = HEAD + CLAIM + TAIL
    assert right in text
    result = parsed(tmp_path, text.replace(right, wrong))
    assert finding in result["findings"]
    assert [claim["id"] for claim in result["claims"]] == ["C1"]


def test_names_inside_a_claim_do_not_replace_its_own_payer(tmp_path: Path) -> None:
    other = "SBR*S*01*******MB~NM1*IL*1*ROE*AL****MI*M2~NM1*PR*2*SECOND*****PI*P2~"
    second = CLAIM.replace("C1", "C2")
    text = HEAD + CLAIM.replace("LX*1", other + "LX*1") + second + TAIL
    claims = parsed(tmp_path, text)["claims"]
    assert [(c["id"], c["payer"], c["subscriber"], c["filing"]) for c in claims] == [
        ("C1", "P1", "M1", "CI"),
        ("C2", "P1", "M1", "CI"),
    ]


def test_each_interchange_of_a_file_has_its_own_separators(tmp_path: Path) -> None:
    first = HEAD + CLAIM + TAIL
    second = first.replace("*", "|").replace(":", ">").replace("~", "\n").replace("C1", "C2")
    result = parsed(tmp_path, first + "\r\n" + second)
    assert [(c["id"], c["diagnoses"]) for c in result["claims"]] == [("C1", ["I10"]), ("C2", ["I10"])]
    assert result["findings"] == []


@pytest.mark.parametrize("text", ["", "pickup,dropoff\n1,2\n", "ISAAC NEWTON", "ISA*00*", "ISA*" + "x" * 400])
def test_file_that_is_not_x12_fails_with_its_name(tmp_path: Path, text: str) -> None:
    """The error must name the file, because the input may have thousands of files."""
    with pytest.raises(ValueError, match=r"one\.837 is not X12: "):
        parsed(tmp_path, text)


@pytest.mark.parametrize(("text", "expected"), [("40", 4000), ("40.", 4000), ("40.5", 4050), (".05", 5), ("0", 0)])
def test_amounts_are_exact_cents(text: str, expected: int) -> None:
    assert cents(text) == expected


@pytest.mark.parametrize("text", ["", ".", "-1", "1e3", "NaN", "1_000", "1,00", "٣", "0.001"])
def test_invalid_amount_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"not an amount|fractions"):
        cents(text)


def test_totals_do_not_depend_on_the_order_of_records(made: tuple[Path, ClaimsFacts]) -> None:
    records = [r for path in made[0].iterdir() for r in adjudicate(parse(File(path)))]
    one = [r for r in records if r["payer"] == "10001"]
    assert totals(one) == totals(one[::-1])
