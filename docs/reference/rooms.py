"""Picture of the rooms of the package and their floors, made from the import contract."""

from __future__ import annotations

import ast
import textwrap
import tomllib
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WIDTH, LINE, GAP, PAD = 980, 17, 10, 10
_STYLE = """\
<style>text{font:12px system-ui,sans-serif;fill:#333}.n{font-weight:600;font-size:14px}
rect{fill:#0969da14;stroke:#0969da}.f{fill:#888}
@media(prefers-color-scheme:dark){text{fill:#ddd}rect{fill:#58a6ff22;stroke:#58a6ff}.f{fill:#999}}
</style>
"""


def floors() -> list[list[str]]:
    """The rooms of each floor, the top floor first, from the layers contract in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (layers,) = (
        contract["layers"] for contract in project["tool"]["importlinter"]["contracts"] if contract["type"] == "layers"
    )
    return [[room.strip() for room in layer.split("|")] for layer in layers]


def content(room: str) -> str:
    """First sentence of a room's docstring."""
    path = ROOT / "batchlab" / room / "__init__.py"
    if not path.exists():
        path = path.parent.with_suffix(".py")
    words = ast.get_docstring(ast.parse(path.read_text())) or ""
    return " ".join(words.partition("\n\n")[0].split()).rstrip(".").replace("`", "")


def picture() -> str:
    """The picture as SVG. Each room may import rooms of lower floors, and nothing else."""
    parts, top = [], GAP
    levels = floors()
    for number, rooms in zip(range(len(levels) - 1, -1, -1), levels, strict=True):
        width = (WIDTH - 40 - GAP * len(rooms)) / len(rooms)
        texts = [textwrap.wrap(content(room), int((width - 2 * PAD) / 6.6)) for room in rooms]
        height = 2 * PAD + LINE * (1 + max(map(len, texts)))
        parts.append(f'<text class="f" x="{GAP}" y="{top + height / 2 + 4:g}">{number}</text>')
        for place, (room, lines) in enumerate(zip(rooms, texts, strict=True)):
            left = 40 + place * (width + GAP)
            parts.append(
                f'<rect x="{left:g}" y="{top}" width="{width:g}" height="{height}" rx="6"/>'
                f'<text class="n" x="{left + PAD:g}" y="{top + PAD + 12}">{room}</text>'
            )
            parts += [
                f'<text x="{left + PAD:g}" y="{top + PAD + 12 + LINE * row}">{escape(line)}</text>'
                for row, line in enumerate(lines, 1)
            ]
        top += height + GAP
    label = "Rooms of the package by floor. A room imports only rooms on lower floors."
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" width="{WIDTH}" '
        f'height="{top}" role="img" aria-label="{label}">\n' + _STYLE + "\n".join(parts) + "\n</svg>\n"
    )
