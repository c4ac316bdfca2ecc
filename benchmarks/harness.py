"""Option for the harness's folder, and a check of the folder. The harness measures batchlab and other schedulers.

Invariant: a benchmark reports a missing harness before the benchmark installs or measures anything. The module uses
only the standard library.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

BESIDE = Path(__file__).resolve().parents[2] / "shared" / "bench"
NEEDED = ("run.py", "adapters/__init__.py", "adapters/base.py")
WHAT = (
    "The harness starts batchlab and other schedulers one after another, gives all of them the "
    "same work, and is no part of this repository."
)


def add_to(parser: argparse.ArgumentParser) -> None:
    """Add the command-line option that names the harness's folder."""
    parser.add_argument(
        "--harness",
        type=Path,
        default=BESIDE,
        metavar="FOLDER",
        help=f"the harness's folder, which has its {', '.join(NEEDED)}; without this option "
        f"shared/bench beside the clone, where there is one. {WHAT}",
    )
    parser.epilog = "docs/benchmarks.md says what a harness has to have, and what runs without one."


def there(folder: Path) -> Path:
    """Return `folder`. Exit with an error message if `folder` does not contain a harness."""
    missing = [name for name in NEEDED if not (folder / name).is_file()]
    if missing:
        sys.exit(
            f"There is no harness in {folder}: it has no {' and no '.join(missing)}. {WHAT} "
            "Name the folder of yours with --harness FOLDER; docs/benchmarks.md says what it has "
            "to have, and what can be measured without one."
        )
    return folder
