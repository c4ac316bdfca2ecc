"""Handler of stage 1: convert a file of X12 837 professional claims to a list of claims and a list of findings.

An error in a file is a finding, and the claims of the file are still returned. The task fails only if the file is not
in X12 format. All amounts are whole cents.
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
    """Return the claims and findings of one file. Raise ValueError if the file is not in X12 format."""
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
    """Service line of a claim (X12 segment SV1)."""

    procedure: str
    charge_cents: int
    units: str


@dataclass
class Claim:
    """Claim (X12 segment CLM) with its submitter, provider, and subscriber."""

    id: str
    charge_cents: int
    submitter: str
    provider: str
    subscriber: str
    payer: str
    payer_name: str
    filing: str
    """Kind of coverage (X12 element SBR09), for example CI (commercial), MB (Medicare part B), or MC (Medicaid)."""
    diagnoses: list[str] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)


class ClaimReader:
    """Reader that collects `claims` and `findings`, segment by segment.

    The parties of a claim come from the X12 loops around the claim, so the reader stores the parties until the next HL
    segment replaces them.
    """

    def __init__(self) -> None:
        self.claims: list[Claim] = []
        self.findings: list[str] = []
        self._parties = {"41": ("", ""), "85": ("", ""), "IL": ("", ""), "PR": ("", "")}
        self._filing = ""
        self._claim: Claim | None = None

    def feed(self, segment: Segment) -> None:
        """Read the next segment of the file."""
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
            # Within a claim, NM1 and SBR segments name other providers and payers (loops 2310 to 2330).
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
        """Read an HL segment, which begins a billing provider (20), a subscriber (22), or a patient (23)."""
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
        """Return the charge of a CLM or SV1 segment. If the charge cannot be read, add a finding and return 0."""
        try:
            return cents(segment.element(2))
        except ValueError as error:
            self._find(claim, f"{segment.name}02 is {error}")
            return 0

    def _find(self, claim: str, finding: str) -> None:
        self.findings.append(f"claim {claim}: {finding}")


def compare(claims: list[Claim]) -> list[str]:
    """Return the findings that need a whole claim or all claims of the file."""
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
    """Convert a charge ("40", "40.5", ".50") to cents. Raise ValueError if `amount` is not a number of whole cents."""
    if not re.fullmatch(r"([0-9]{1,18}\.?[0-9]*|\.[0-9]+)", amount):
        raise ValueError(f"{amount!r}, not an amount")
    exact = Decimal(amount) * 100
    if exact != int(exact):
        raise ValueError(f"{amount!r}, with fractions of a cent")
    return int(exact)


def money(amount_cents: int) -> str:
    """Format an amount in cents as text, such as 12.25."""
    return f"{Decimal(amount_cents) / 100:.2f}"
