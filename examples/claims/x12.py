"""Reader of X12 files: split a file into segments by the file's own separators, and check the file's envelopes.

The module does not contain code for claims, so programs can use it for any other X12 transaction.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

# Each envelope, with its closing segment and the element with its control number. The outermost envelope is first.
ENVELOPES = {"ISA": ("IEA", 13), "GS": ("GE", 6), "ST": ("SE", 2)}
ORDER = list(ENVELOPES)
OPENER = {closer: opener for opener, (closer, _) in ENVELOPES.items()}


@dataclass
class Segment:
    """X12 segment. `elements[0]` is the segment's name, so `element(2)` of an SE segment is the X12 element SE02."""

    elements: list[str]
    component: str
    """Separator between the components of a composite element."""

    @property
    def name(self) -> str:
        return self.elements[0]

    def element(self, number: int) -> str:
        """Return the text of the element with this number, or "" if the segment has fewer elements."""
        return self.elements[number] if number < len(self.elements) else ""

    def composite(self, number: int) -> list[str]:
        """Return the components of the element with this number."""
        return self.element(number).split(self.component)


def segments(text: str) -> Iterator[Segment]:
    """Yield every segment of a file. Raise ValueError if the text is not in X12 format."""
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
    """Return the element separator, component separator, and terminator of the ISA segment at position `at`.

    The function counts elements and does not use fixed columns, because senders often pad elements incorrectly.
    """
    separator = text[at + 3]
    after_16 = text[at : at + 200].split(separator, 16)[-1]
    if any(mark.isalnum() for mark in separator + after_16[:2]) or len(after_16) < 2:
        raise ValueError(f"not X12: no separators can be read from {text[at : at + 110]!r}")
    return separator, after_16[0], after_16[1]


@dataclass
class Envelope:
    """Open X12 envelope (ISA, GS, or ST). `holds` is the count that the closing segment must state."""

    opener: str
    control: str
    holds: int = 0

    def __str__(self) -> str:
        return f"{self.opener} {self.control}"


class Envelopes:
    """Checker of the envelopes of a file, segment by segment. `findings` contains the errors."""

    def __init__(self) -> None:
        self.findings: list[str] = []
        self._open: list[Envelope] = []

    def feed(self, segment: Segment) -> None:
        """Check the next segment of the file."""
        if segment.name in ENVELOPES:
            self._begin(segment)
        if self._open and self._open[-1].opener == "ST":
            self._open[-1].holds += 1
        if segment.name in OPENER:
            self._end(segment)

    def close(self, outer: int = 0) -> None:
        """Add a finding for each open envelope, except the `outer` outermost envelopes."""
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
