"""Files of ours that are there whole or not at all.

Invariant: whoever dies while writing, and on a full disk, a file holds what it held before, or all
that it is to hold. A power failure may still empty it: what has to outlive that waits for the disk
(adapters/state_file.py).
"""

from __future__ import annotations

from pathlib import Path


def write_whole(path: Path, text: str, *, mode: int | None = None) -> None:
    """Have the file hold the text, with those permissions where some are named, which is no way to
    keep a secret: until then it has the usual ones. Its folder is there; OSError where it cannot be
    written."""
    staged = path.with_name(f"{path.name}.new")
    staged.unlink(missing_ok=True)  # one that was left half-way may be for reading only
    staged.write_text(text)
    if mode is not None:
        staged.chmod(mode)
    staged.replace(path)
