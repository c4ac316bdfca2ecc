"""One large unsorted text file, for sorting more than fits into memory.

Written in constant memory, whatever its size.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from batchlab.datagen.seeds import source


@dataclass(frozen=True, slots=True)
class RecordsFacts:
    """The file `write_records` wrote."""

    path: Path
    lines: int
    size_bytes: int


# Where order by bytes differs from what people expect: upper before lower case, accents last,
# tabs before blanks, prefixes before what they begin.
_WORDS = ("Zeta", "alpha", "alpha beta", "alpha\tbeta", "Ärger", "zulu", "", "10", "9", "_")


def write_records(folder: Path, *, seed: int = 1, size_bytes: int = 128 * 2**20) -> RecordsFacts:
    """Write `records.txt` into `folder`: lines of 1 to about 90 bytes in UTF-8, some repeated.

    Stops with the first line that reaches `size_bytes`. Every line ends in a newline.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = source(seed, "records")
    path = folder / "records.txt"
    lines = written = 0
    with path.open("wb") as file:
        while written < size_bytes:
            word = _WORDS[rng.getrandbits(16) % len(_WORDS)]
            if rng.random() < 0.05:
                text = f"{word}{rng.getrandbits(8):x}"  # few enough that lines repeat
            else:
                text = f"{word}{rng.getrandbits(64):x}{'.' * rng.getrandbits(6)}"
            line = f"{text}\n".encode()
            file.write(line)
            written += len(line)
            lines += 1
    return RecordsFacts(path, lines, written)
