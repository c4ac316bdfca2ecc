"""A chart in plain characters: the same in a terminal, a pipe and a ticket."""

from __future__ import annotations

from collections.abc import Callable, Sequence

WIDTH, HEIGHT = 64, 10
AREA, LINE = "░", "●"

Label = Callable[[float], str]


class Chart:
    """A field of `width` × `height` characters over [0, most_x] and [0, most_y]; where a span is
    empty it counts as 1. What is drawn later covers the former.
    """

    def __init__(
        self, most_x: float, most_y: float, *, width: int = WIDTH, height: int = HEIGHT
    ) -> None:
        self.width = width
        self._height = height
        self._most_x = most_x if most_x > 0.0 else 1.0
        self._most_y = most_y if most_y > 0.0 else 1.0
        self._rows = [[" "] * width for _ in range(height)]
        """From the top down."""

    def area(self, levels: Sequence[float], mark: str = AREA) -> None:
        """One level for each column, filled down to the axis; what is not 0 is seen."""
        for column, level in enumerate(levels[: self.width]):
            if level > 0.0:
                for row in range(self._row(level), self._height):
                    self._rows[row][column] = mark

    def line(self, levels: Sequence[float], mark: str = LINE) -> None:
        """One level for each column."""
        for column, level in enumerate(levels[: self.width]):
            self._rows[self._row(level)][column] = mark

    def dot(self, x: float, y: float, mark: str = LINE) -> None:
        """A point, at the edge where it lies beyond."""
        column = round(x / self._most_x * (self.width - 1))
        self._rows[self._row(y)][min(self.width - 1, max(0, column))] = mark

    def wall(self, x: float, mark: str = "┊") -> None:
        """A line from top to bottom, where nothing is drawn yet; none where it lies beyond."""
        if 0.0 <= x <= self._most_x:
            column = round(x / self._most_x * (self.width - 1))
            for row in self._rows:
                row[column] = mark if row[column] == " " else row[column]

    def text(self, x: Label, y: Label) -> str:
        """The chart with its axes; `x` and `y` write their numbers."""
        top, bottom = y(self._most_y), y(0.0)
        margin = max(len(top), len(bottom))
        names = [top, *[""] * (self._height - 2), bottom]
        lines = [
            f"{name.rjust(margin)} │{''.join(row)}".rstrip()
            for name, row in zip(names, self._rows, strict=True)
        ]
        first, last = x(0.0), x(self._most_x)
        gap = max(1, self.width - len(first) - len(last))
        lines.append(f"{' ' * margin} └{'─' * self.width}")
        lines.append(f"{' ' * margin}  {first}{' ' * gap}{last}")
        return "\n".join(lines)

    def _row(self, level: float) -> int:
        up = round(level / self._most_y * (self._height - 1))
        return self._height - 1 - min(self._height - 1, max(0, up))
