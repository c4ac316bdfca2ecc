"""Reading X12: segments with the separators a file declares, and its envelopes checked.

Knows nothing of claims: this is the part that any other X12 transaction could use as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

# Each envelope, outermost first: the segment that closes it, and where its control number stands.
ENVELOPES = {"ISA": ("IEA", 13), "GS": ("GE", 6), "ST": ("SE", 2)}
ORDER = list(ENVELOPES)
OPENER = {closer: opener for opener, (closer, _) in ENVELOPES.items()}


@dataclass
class Segment:
    """One segment. `elements[0]` is its name: `element(2)` of an SE is what X12 calls SE02."""

    elements: list[str]
    component: str
    """The separator within composite elements."""

    @property
    def name(self) -> str:
        return self.elements[0]

    def element(self, number: int) -> str:
        """An element's text, "" where the segment is shorter."""
        return self.elements[number] if number < len(self.elements) else ""

    def composite(self, number: int) -> list[str]:
        """The components of an element."""
        return self.element(number).split(self.component)


def segments(text: str) -> Iterator[Segment]:
    """Every segment of a file. ValueError if it is not X12."""
    text = text.strip()
    if not text.startswith("ISA"):
        raise ValueError(f"not X12: begins with {text[:20]!r}, not with ISA")
    at = 0
    while at < len(text):
        if text.startswith("ISA", at):
            separator, component, terminator = separators(text, at)
        end = text.find(terminator, at)
        end = len(text) if end < 0 else end
        yield Segment(text[at:end].split(separator), component)
        at = end + 1
        while text[at : at + 1].isspace():
            at += 1


def separators(text: str, at: int) -> tuple[str, str, str]:
    """Element separator, component separator and terminator, from the ISA segment at `at`.

    Found by counting elements, not at fixed columns: senders often get the padding wrong.
    """
    separator = text[at + 3]
    after_16 = text[at : at + 200].split(separator, 16)[-1]
    if any(mark.isalnum() for mark in separator + after_16[:2]) or len(after_16) < 2:
        raise ValueError(f"not X12: no separators can be read from {text[at : at + 110]!r}")
    return separator, after_16[0], after_16[1]


@dataclass
class Envelope:
    """An ISA, GS or ST that is open; `holds` counts what its closing segment has to state."""

    opener: str
    control: str
    holds: int = 0

    def __str__(self) -> str:
        return f"{self.opener} {self.control}"


class Envelopes:
    """Checks the envelopes of a file, segment by segment. `findings` lists the errors."""

    def __init__(self) -> None:
        self.findings: list[str] = []
        self._open: list[Envelope] = []

    def feed(self, segment: Segment) -> None:
        """Take in the next segment."""
        if segment.name in ENVELOPES:
            self._begin(segment)
        if self._open and self._open[-1].opener == "ST":
            self._open[-1].holds += 1
        if segment.name in OPENER:
            self._end(segment)

    def close(self, outer: int = 0) -> None:
        """Report envelopes that are still open, except the `outer` outermost."""
        while len(self._open) > outer:
            envelope = self._open.pop()
            closer, _ = ENVELOPES[envelope.opener]
            self.findings.append(f"{envelope}: {closer} is missing")

    def _begin(self, segment: Segment) -> None:
        outer = ORDER.index(segment.name)
        self.close(outer)
        if len(self._open) < outer:
            self.findings.append(f"{segment.name} stands outside of a {ORDER[outer - 1]}")
        elif self._open:
            self._open[-1].holds += 1
        _, control = ENVELOPES[segment.name]
        self._open.append(Envelope(segment.name, segment.element(control).strip()))

    def _end(self, segment: Segment) -> None:
        openers = [envelope.opener for envelope in self._open]
        if OPENER[segment.name] not in openers:
            self.findings.append(f"{segment.name} without {OPENER[segment.name]}")
            return
        self.close(openers.index(OPENER[segment.name]) + 1)
        envelope = self._open.pop()
        stated, control = segment.element(1), segment.element(2).strip()
        if stated.zfill(9) != f"{envelope.holds:09d}":
            self.findings.append(f"{envelope}: {segment.name}01 says {stated}, counted {envelope.holds}")
        if control != envelope.control:
            self.findings.append(f"{envelope}: {segment.name}02 says {control}")
