"""`python -m docs.reference docs`: the pages made from the code, made again."""

from __future__ import annotations

import sys
from pathlib import Path

from docs.reference import write


def main(arguments: list[str]) -> int:
    """The exit code: 2 where no folder of docs is named."""
    if len(arguments) != 1 or not (Path(arguments[0]) / "contributing" / "decisions").is_dir():
        sys.stderr.write("Name the folder of the docs: python -m docs.reference docs\n")
        return 2
    for path in write(Path(arguments[0])):
        sys.stdout.write(f"{path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
