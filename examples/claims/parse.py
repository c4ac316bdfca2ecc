"""Stage 1: a file of X12 837 professional claims becomes a list of claims and a list of findings.

A file that breaks the rules still gives its claims: what is wrong with it is a finding. Only a
file that is not X12 at all is an error. Money is whole cents throughout.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from x12 import Envelopes, Segment, segments

if TYPE_CHECKING:
    from batchlab import File


def parse(item: File) -> dict[str, Any]:
    """Claims and findings of one file. ValueError if the file is not X12."""
    try:
        found = list(segments(item.read_bytes().decode("utf-8-sig", errors="replace")))
    except ValueError as error:
        raise ValueError(f"{item.name} is {error}") from error
    envelopes, reader = Envelopes(), ClaimReader()
    for segment in found:
        envelopes.feed(segment)
        reader.feed(segment)
    envelopes.close()
    findings = envelopes.findings + reader.findings + compare(reader.claims)
    print(f"{item.name}: {len(reader.claims)} claims, {len(findings)} findings", *findings[:5], sep="\n  ")
    return {
        "file": item.name,
        "segments": len(found),
        "claims": [asdict(claim) for claim in reader.claims],
        "findings": findings,
    }


@dataclass
class Line:
    """One service line (SV1)."""

    procedure: str
    charge_cents: int
    units: str


@dataclass
class Claim:
    """One claim (CLM) with its submitter, provider, and subscriber."""

    id: str
    charge_cents: int
    submitter: str
    provider: str
    subscriber: str
    payer: str
    payer_name: str
    filing: str
    """Kind of coverage (SBR09): CI commercial, MB Medicare part B, MC Medicaid, ..."""
    diagnoses: list[str] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)


class ClaimReader:
    """Collects `claims` and `findings`, segment by segment.

    A claim takes its parties from the loops it stands in, so these are remembered until the next
    HL replaces them.
    """

    def __init__(self) -> None:
        self.claims: list[Claim] = []
        self.findings: list[str] = []
        self._parties = {"41": ("", ""), "85": ("", ""), "IL": ("", ""), "PR": ("", "")}
        self._filing = ""
        self._claim: Claim | None = None

    def feed(self, segment: Segment) -> None:
        """Take in the next segment."""
        match segment.name:
            case "ST":
                self._transaction(segment)
            case "HL":
                self._level(segment)
            case "CLM":
                self._begin(segment)
            case "SV1":
                self._line(segment)
            case "HI" if self._claim:
                self._diagnoses(segment, self._claim)
            # Within a claim these name other providers and other payers (loops 2310 to 2330).
            case "NM1" if not self._claim and segment.element(1) in self._parties:
                identifier, name = segment.element(9), segment.element(3)
                self._parties[segment.element(1)] = (identifier or name, name)
            case "SBR" if not self._claim:
                self._filing = segment.element(9)

    def _transaction(self, segment: Segment) -> None:
        self._claim = None
        self._parties = dict.fromkeys(self._parties, ("", ""))
        if segment.element(1) != "837":
            self.findings.append(f"ST {segment.element(2)}: a {segment.element(1)}, not an 837")

    def _level(self, segment: Segment) -> None:
        """A billing provider (20), subscriber (22) or patient (23) begins."""
        self._claim = None
        new = {"20": ("85", "IL", "PR"), "22": ("IL", "PR")}.get(segment.element(3), ())
        self._parties |= dict.fromkeys(new, ("", ""))
        if new:
            self._filing = ""

    def _begin(self, segment: Segment) -> None:
        payer, payer_name = self._parties["PR"]
        self._claim = Claim(
            id=segment.element(1),
            charge_cents=self._cents(segment.element(1), segment),
            submitter=self._parties["41"][0],
            provider=self._parties["85"][0],
            subscriber=self._parties["IL"][0],
            payer=payer or "UNKNOWN",
            payer_name=payer_name,
            filing=self._filing,
        )
        self.claims.append(self._claim)
        if not payer:
            self._find(self._claim.id, "no payer (NM1*PR) in loop 2010BB")

    def _diagnoses(self, segment: Segment, claim: Claim) -> None:
        for number in range(1, len(segment.elements)):
            qualifier, *code = segment.composite(number)
            if not code:
                self._find(claim.id, f"HI{number:02d} is {qualifier!r}, without a code")
            elif qualifier in ("BK", "BF", "ABK", "ABF"):
                claim.diagnoses.append(code[0])

    def _line(self, segment: Segment) -> None:
        if not self._claim:
            self.findings.append("SV1 outside of a claim")
            return
        qualifier, *code = segment.composite(1)
        if not code:
            self._find(self._claim.id, f"SV101 is {qualifier!r}, without a code")
        charge_cents = self._cents(self._claim.id, segment)
        self._claim.lines.append(Line(code[0] if code else "", charge_cents, segment.element(4)))

    def _cents(self, claim: str, segment: Segment) -> int:
        """The charge, which is element 2 of both CLM and SV1; 0 with a finding if unreadable."""
        try:
            return cents(segment.element(2))
        except ValueError as error:
            self._find(claim, f"{segment.name}02 is {error}")
            return 0

    def _find(self, claim: str, finding: str) -> None:
        self.findings.append(f"claim {claim}: {finding}")


def compare(claims: list[Claim]) -> list[str]:
    """Findings that need a whole claim, or all claims of the file."""
    findings = []
    for (_, claim_id), times in Counter((c.provider, c.id) for c in claims).items():
        if times > 1:
            findings.append(f"claim {claim_id}: occurs {times} times")
    for claim in claims:
        total = sum(line.charge_cents for line in claim.lines)
        if total != claim.charge_cents:
            charge = money(claim.charge_cents)
            findings.append(f"claim {claim.id}: charges {charge}, its lines sum to {money(total)}")
    return findings


def cents(amount: str) -> int:
    """A charge ("40", "40.5", ".50") in cents. ValueError if it is not one, or not whole cents."""
    if not re.fullmatch(r"([0-9]{1,18}\.?[0-9]*|\.[0-9]+)", amount):
        raise ValueError(f"{amount!r}, not an amount")
    exact = Decimal(amount) * 100
    if exact != int(exact):
        raise ValueError(f"{amount!r}, with fractions of a cent")
    return int(exact)


def money(amount_cents: int) -> str:
    """Cents as a person writes them: 12.25."""
    return f"{Decimal(amount_cents) / 100:.2f}"
