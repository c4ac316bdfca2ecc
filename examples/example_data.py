"""Seeded example data and expected facts about the data: claims, taxi rides, and records to sort.

Each function writes the same bytes for the same arguments. A function counts the facts while it generates the data and
does not read a file, so tests can compare the result of an example with the facts. Each file has a random source of its
own, so the bytes of a file do not depend on the number of files.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path


def source(seed: int, name: str) -> random.Random:
    """Return a random source that produces the same numbers for `name` on every machine."""
    return random.Random(f"{seed}/{name}")


@dataclass(frozen=True, slots=True)
class RecordsFacts:
    """Facts about the file that `write_records` writes."""

    path: Path
    lines: int
    size_bytes: int


# Sorted by bytes, upper case comes before lower case, letters with accents come last, a tab comes before a blank, and a
# prefix comes before a longer word.
_WORDS = ("Zeta", "alpha", "alpha beta", "alpha\tbeta", "Ärger", "zulu", "", "10", "9", "_")


def write_records(folder: Path, *, seed: int = 1, size_bytes: int = 128 * 2**20) -> RecordsFacts:
    """Write `records.txt` into `folder`: lines of 1 to about 90 bytes in UTF-8, some repeated.

    The file ends with the first line that reaches `size_bytes`. The function writes the file in constant memory.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = source(seed, "records")
    path = folder / "records.txt"
    lines = written = 0
    with path.open("wb") as file:
        while written < size_bytes:
            word = _WORDS[rng.getrandbits(16) % len(_WORDS)]
            if rng.random() < 0.05:
                text = f"{word}{rng.getrandbits(8):x}"  # only 256 numbers, so that lines repeat
            else:
                text = f"{word}{rng.getrandbits(64):x}{'.' * rng.getrandbits(6)}"
            line = f"{text}\n".encode()
            file.write(line)
            written += len(line)
            lines += 1
    return RecordsFacts(path, lines, written)


@dataclass(slots=True)
class MonthFacts:
    """Facts about the rides whose pickup was in one month."""

    rides: int = 0
    total_cents: int = 0
    without_payment: int = 0
    """Number of rides whose column `payment` is empty."""


@dataclass(slots=True)
class RidesFacts:
    """Facts about the file that `write_rides` writes. A key of `months` is a month such as "2024-01"."""

    path: Path
    months: dict[str, MonthFacts] = field(default_factory=dict)


_COLUMNS = (
    "pickup", "dropoff", "passengers", "distance", "fare", "tip", "tolls", "total", "color",
    "payment", "pickup_zone", "dropoff_zone", "pickup_borough", "dropoff_borough",
)  # fmt: skip
_ZONES = (
    ("Astoria", "Queens"), ("Bushwick South", "Brooklyn"), ("East Harlem North", "Manhattan"),
    ("JFK Airport", "Queens"), ("Mott Haven/Port Morris", "Bronx"), ("Midtown East", "Manhattan"),
    ("Upper West Side South", "Manhattan"), ("", ""),
)  # fmt: skip


def write_rides(folder: Path, *, seed: int = 1, rows: int = 20_000) -> RidesFacts:
    """Write `rides.csv` into `folder`: `rows` unsorted rides of the first quarter of 2024.

    The file has the columns of the public samples of New York taxi rides.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = source(seed, "rides")
    facts = RidesFacts(folder / "rides.csv")
    with facts.path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_COLUMNS)
        for _ in range(rows):
            pickup = datetime(2024, 1, 1) + timedelta(seconds=rng.randrange(91 * 86_400))  # noqa: DTZ001  local time, as taximeters print it
            distance = rng.randrange(30, 2_000)
            fare = 250 + 50 * (distance // 20)
            tip = rng.randrange(0, fare // 3)
            tolls = 576 if rng.random() < 0.05 else 0
            total = fare + tip + tolls + 80
            start, end = rng.choice(_ZONES), rng.choice(_ZONES)
            payment = rng.choices(("credit card", "cash", ""), weights=(70, 29, 1))[0]
            writer.writerow((
                pickup, pickup + timedelta(seconds=distance * 3), rng.randint(0, 6),
                *(f"{number // 100}.{number % 100:02d}" for number in
                  (distance, fare, tip, tolls, total)),
                rng.choice(("yellow", "green")), payment, start[0], end[0], start[1], end[1],
            ))  # fmt: skip
            month = facts.months.setdefault(f"{pickup:%Y-%m}", MonthFacts())
            month.rides += 1
            month.total_cents += total
            month.without_payment += not payment
    return facts


@dataclass(slots=True)
class PayerFacts:
    """Facts about the claims of one payer. Each of the last four fields counts a claim at most once."""

    payer: str
    name: str
    claims: int = 0
    lines: int = 0
    charge_cents: int = 0
    """Sum of the stated charges (CLM02), including duplicates."""
    duplicates: int = 0
    zero_charge: int = 0
    undiagnosed: int = 0
    unbalanced: int = 0
    """Number of claims whose stated charge differs from the sum of the claim's lines."""


@dataclass(slots=True)
class ClaimsFacts:
    """Facts about the files that `write_claims` writes. The keys of `payers` are payer ids."""

    files: int = 0
    payers: dict[str, PayerFacts] = field(default_factory=dict)

    @property
    def claims(self) -> int:
        return sum(payer.claims for payer in self.payers.values())

    @property
    def charge_cents(self) -> int:
        return sum(payer.charge_cents for payer in self.payers.values())


@dataclass(frozen=True, slots=True)
class _Payer:
    id: str
    name: str
    filing: str
    """Claim filing (SBR09): CI commercial, MB Medicare B, MC Medicaid, HM HMO, BL Blues."""


@dataclass(frozen=True, slots=True)
class _Provider:
    npi: str
    name: str
    taxonomy: str
    street: str
    city: tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class _Claim:
    id: str
    payer: _Payer
    group: str
    family: str
    given: str
    member: str
    dependent: str | None
    born: str
    sex: str
    serviced: str
    diagnoses: tuple[str, ...]
    lines: tuple[tuple[str, int, int], ...]
    """(procedure code, charge in cents, units)"""
    charge_cents: int


_PAYERS = (
    _Payer("10001", "HARBOR MUTUAL HEALTH", "CI"),
    _Payer("10002", "NORTHFIELD INSURANCE", "CI"),
    _Payer("20010", "MEDICARE PART B EAST", "MB"),
    _Payer("30020", "STATE MEDICAID PLAN", "MC"),
    _Payer("40030", "CEDAR VALLEY HMO", "HM"),
    _Payer("50040", "BLUE PLAINS HEALTH PLAN", "BL"),
)
_SHARES = (30, 20, 22, 12, 9, 7)
_PROVIDERS = (
    _Provider("1093700011", "LAKESIDE FAMILY MEDICINE", "207Q00000X", "12 SHORE RD",
              ("MADISON", "WI", "53703")),
    _Provider("1194800022", "PINE STREET PEDIATRICS", "208000000X", "480 PINE ST",
              ("PORTLAND", "ME", "04101")),
    _Provider("1295900033", "MESA HEART ASSOCIATES", "207RC0000X", "7 CANYON BLVD",
              ("MESA", "AZ", "85201")),
    _Provider("1396000044", "RIVERBEND ORTHOPEDICS", "207X00000X", "1550 MILL AVE",
              ("SALEM", "OR", "97301")),
    _Provider("1497100055", "OAK HILL INTERNAL MEDICINE", "207R00000X", "33 OAK HILL DR",
              ("NASHVILLE", "TN", "37203")),
)  # fmt: skip
_PROCEDURES = (
    ("99213", 12500), ("99214", 18450), ("99203", 16800), ("99396", 21000), ("93000", 4875),
    ("36415", 1500), ("80053", 3640), ("85025", 2215), ("87070", 4105), ("71046", 9600),
    ("73562", 11325), ("20610", 17250), ("11102", 14490), ("90471", 3000), ("97110", 5235),
    ("J3301", 2104), ("G0438", 17500),
)  # fmt: skip
_DIAGNOSES = (
    "I10", "E119", "E785", "J069", "M545", "Z0000", "M1711", "J449", "F411", "R0789",
    "N390", "K219", "L570", "Z23", "S8391XA", "I2510",
)  # fmt: skip
_FAMILIES = (
    "ADLER", "BROOKS", "CASTILLO", "DUNN", "ELLIS", "FISCHER", "GARCIA", "HOLT", "IVERSEN",
    "JAIN", "KOWALSKI", "LOPEZ", "MORENO", "NGUYEN", "O'BRIEN", "PATEL", "QUINN", "ROSSI",
)  # fmt: skip
_GIVENS = (
    "ANNA", "BEN", "CARLA", "DEV", "ELENA", "FRANK", "GRACE", "HUGO", "IRIS", "JON",
    "KIM", "LEO", "MARTA", "NOAH", "OLGA", "PAUL",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Style:
    """The three separators that an X12 interchange declares in its ISA segment."""

    element: str
    component: str
    terminator: str


_STYLES = (_Style("*", ":", "~\n"), _Style("*", ":", "~"), _Style("|", ">", "\n"))


class _Text:
    """Text of X12 segments. `since(mark)` returns the number of segments after `mark`, for the element SE01."""

    def __init__(self, style: _Style) -> None:
        self._style = style
        self._segments: list[str] = []

    def add(self, *elements: str | tuple[str, ...]) -> None:
        """Add a segment of `elements`, without the empty elements at its end. A tuple is a composite element."""
        texts = [e if isinstance(e, str) else self._style.component.join(e) for e in elements]
        while not texts[-1]:
            texts.pop()
        self._segments.append(self._style.element.join(texts))

    def mark(self) -> int:
        return len(self._segments)

    def since(self, mark: int) -> int:
        return len(self._segments) - mark

    def encode(self) -> bytes:
        end = self._style.terminator
        return "".join(segment + end for segment in self._segments).encode("ascii")


def write_claims(folder: Path, *, seed: int = 1, files: int = 200, claims_per_file: int = 40) -> ClaimsFacts:
    """Write month-end claims in X12 837P (005010X222A1) into `folder` and return their facts.

    The files `claims-0000.837`, `claims-0001.837`, and so on replace existing files. About 1 in 12 claims has an error:
    the claim is a duplicate, has a charge of zero, lacks a diagnosis, or has a charge that is not the sum of its lines.
    All X12 envelopes are correct.
    """
    folder.mkdir(parents=True, exist_ok=True)
    facts = ClaimsFacts(files=files)
    facts.payers = {payer.id: PayerFacts(payer.id, payer.name) for payer in _PAYERS}
    for index in range(files):
        rng = source(seed, f"claims-{index:04d}")
        batches = _draw_batches(rng, facts, index, claims_per_file)
        (folder / f"claims-{index:04d}.837").write_bytes(_interchange(batches, index))
    facts.payers = {key: payer for key, payer in facts.payers.items() if payer.claims}
    return facts


def _draw_batches(
    rng: random.Random, facts: ClaimsFacts, file: int, claims: int
) -> list[tuple[_Provider, list[_Claim]]]:
    """Draw a batch of claims for each billing provider, and count each claim in `facts`."""
    providers = rng.sample(_PROVIDERS, k=min(claims, rng.randint(1, 3)))
    batches: list[tuple[_Provider, list[_Claim]]] = [(provider, []) for provider in providers]
    for number in range(claims):
        batch = batches[number * len(batches) // claims][1]
        if batch and rng.random() < 0.02:
            claim = rng.choice(batch)
            facts.payers[claim.payer.id].duplicates += 1
        else:
            claim = _draw_claim(rng, facts, f"B{file:04d}-{number:04d}")
        batch.append(claim)
        payer = facts.payers[claim.payer.id]
        payer.claims += 1
        payer.lines += len(claim.lines)
        payer.charge_cents += claim.charge_cents
    return batches


def _draw_claim(rng: random.Random, facts: ClaimsFacts, claim_id: str) -> _Claim:
    payer = rng.choices(_PAYERS, weights=_SHARES)[0]
    lines = tuple(_draw_line(rng) for _ in range(rng.randint(1, 4)))
    diagnoses = tuple(rng.sample(_DIAGNOSES, k=rng.randint(1, 4)))
    total = sum(cents for _, cents, _ in lines)
    chance = rng.random()
    if chance < 0.02:
        lines, total = tuple((code, 0, units) for code, _, units in lines), 0
        facts.payers[payer.id].zero_charge += 1
    elif chance < 0.05:
        diagnoses = ()
        facts.payers[payer.id].undiagnosed += 1
    elif chance < 0.065:
        total += rng.choice((-500, 1000, 2500))
        facts.payers[payer.id].unbalanced += 1
    return _Claim(
        id=claim_id,
        payer=payer,
        group=f"GRP{rng.randint(100, 999)}",
        family=rng.choice(_FAMILIES),
        given=rng.choice(_GIVENS),
        member=f"M{rng.randint(10**8, 10**9 - 1)}",
        dependent=rng.choice(_GIVENS) if rng.random() < 0.2 else None,
        born=f"{rng.randint(1935, 2015)}{rng.randint(1, 12):02d}{rng.randint(1, 28):02d}",
        sex=rng.choice("FM"),
        serviced=f"202401{rng.randint(2, 30):02d}",
        diagnoses=diagnoses,
        lines=lines,
        charge_cents=total,
    )


def _draw_line(rng: random.Random) -> tuple[str, int, int]:
    code, price_cents = rng.choice(_PROCEDURES)
    units = rng.choice((1, 1, 1, 2, 3))
    return code, units * (price_cents + 5 * rng.randint(-100, 200)), units


def _interchange(batches: Sequence[tuple[_Provider, list[_Claim]]], file: int) -> bytes:
    """Return an X12 interchange with one transaction set per billing provider.

    The number `file` determines the separators of the interchange.
    """
    style = _STYLES[file % len(_STYLES)]
    control = f"{file + 1:09d}"
    text = _Text(style)
    text.add("ISA", "00", " " * 10, "00", " " * 10, "ZZ", "MIDSTATE".ljust(15), "ZZ",
             "CLRHOUSE".ljust(15), "240131", "2300", "^", "00501", control, "0", "T",
             style.component)  # fmt: skip
    text.add("GS", "HC", "MIDSTATE", "CLRHOUSE", "20240131", "2300", "1", "X", "005010X222A1")
    for number, (provider, claims) in enumerate(batches, start=1):
        _transaction(text, f"{number:04d}", control, provider, claims)
    text.add("GE", str(len(batches)), "1")
    text.add("IEA", "1", control)
    return text.encode()


def _transaction(text: _Text, number: str, control: str, provider: _Provider, claims: Sequence[_Claim]) -> None:
    start = text.mark()
    text.add("ST", "837", number, "005010X222A1")
    text.add("BHT", "0019", "00", f"{control}{number}", "20240131", "2300", "CH")
    text.add("NM1", "41", "2", "MIDSTATE BILLING SERVICE", "", "", "", "", "46", "MIDSTATE")
    text.add("PER", "IC", "EDI DESK", "TE", "8005550100")
    text.add("NM1", "40", "2", "CLEARING HOUSE", "", "", "", "", "46", "CLRHOUSE")
    text.add("HL", "1", "", "20", "1")
    text.add("PRV", "BI", "PXC", provider.taxonomy)
    text.add("NM1", "85", "2", provider.name, "", "", "", "", "XX", provider.npi)
    text.add("N3", provider.street)
    text.add("N4", *provider.city)
    text.add("REF", "EI", f"{provider.npi[:9]}")
    level = 1
    for claim in claims:
        level = _subscriber(text, claim, level + 1)
        _claim(text, claim)
    text.add("SE", str(text.since(start) + 1), number)


def _subscriber(text: _Text, claim: _Claim, level: int) -> int:
    """Add the X12 loop 2000B and, if the patient is a dependent, the loop 2000C. Return the number of the last HL."""
    text.add("HL", str(level), "1", "22", "1" if claim.dependent else "0")
    relation = "" if claim.dependent else "18"
    text.add("SBR", "P", relation, claim.group, "", "", "", "", "", claim.payer.filing)
    text.add("NM1", "IL", "1", claim.family, claim.given, "", "", "", "MI", claim.member)
    text.add("N3", "1 MAIN ST")
    text.add("N4", "SPRINGFIELD", "IL", "62701")
    text.add("DMG", "D8", claim.born, claim.sex)
    text.add("NM1", "PR", "2", claim.payer.name, "", "", "", "", "PI", claim.payer.id)
    if claim.dependent:
        text.add("HL", str(level + 1), str(level), "23", "0")
        text.add("PAT", "19")
        text.add("NM1", "QC", "1", claim.family, claim.dependent)
        text.add("N3", "1 MAIN ST")
        text.add("N4", "SPRINGFIELD", "IL", "62701")
        text.add("DMG", "D8", "20120101", "F")
        return level + 1
    return level


def _claim(text: _Text, claim: _Claim) -> None:
    place = ("11", "B", "1")
    text.add("CLM", claim.id, _amount(claim.charge_cents), "", "", place, "Y", "A", "Y", "Y")
    if claim.diagnoses:
        first, *others = claim.diagnoses
        text.add("HI", ("ABK", first), *(("ABF", code) for code in others))
    for number, (code, cents, units) in enumerate(claim.lines, start=1):
        text.add("LX", str(number))
        text.add("SV1", ("HC", code), _amount(cents), "UN", str(units), "", "", "1")
        text.add("DTP", "472", "D8", claim.serviced)


def _amount(cents: int) -> str:
    """Return an amount as X12 writes it, without a decimal point for whole amounts."""
    whole, rest = divmod(cents, 100)
    return f"{whole}.{rest:02d}" if rest else str(whole)


__all__ = [
    "ClaimsFacts",
    "MonthFacts",
    "PayerFacts",
    "RecordsFacts",
    "RidesFacts",
    "write_claims",
    "write_records",
    "write_rides",
]
