"""A chart in plain characters: the same in a terminal, a pipe and a ticket."""

from __future__ import annotations

from collections.abc import Callable, Sequence

WIDTH, HEIGHT = 64, 10
AREA, LINE = "░", "●"

Label = Callable[[float], str]


class Chart:
    """A field of `width` × `height` characters over [0, most_x] and [0, most_y], or from `least_x`
    and `least_y` on; where a span is empty it counts as 1. What is drawn later covers the former.
    """

    def __init__(
        self,
        most_x: float,
        most_y: float,
        *,
        least_x: float = 0.0,
        least_y: float = 0.0,
        width: int = WIDTH,
        height: int = HEIGHT,
    ) -> None:
        self.width = width
        self._height = height
        self._x = (least_x, most_x if most_x > least_x else least_x + 1.0)
        self._y = (least_y, most_y if most_y > least_y else least_y + 1.0)
        self._rows = [[" "] * width for _ in range(height)]
        """From the top down."""

    def area(self, levels: Sequence[float], mark: str = AREA) -> None:
        """One level for each column, filled down to the axis; what is not 0 is seen."""
        for column, level in enumerate(levels[: self.width]):
            if level > self._y[0]:
                for row in range(self._row(level), self._height):
                    self._rows[row][column] = mark

    def line(self, levels: Sequence[float], mark: str = LINE) -> None:
        """One level for each column."""
        for column, level in enumerate(levels[: self.width]):
            self._rows[self._row(level)][column] = mark

    def dot(self, x: float, y: float, mark: str = LINE) -> None:
        """A point, at the edge where it lies beyond."""
        low, high = self._x
        column = round((x - low) / (high - low) * (self.width - 1))
        self._rows[self._row(y)][min(self.width - 1, max(0, column))] = mark

    def wall(self, x: float, mark: str = "┊") -> None:
        """A line from top to bottom, where nothing is drawn yet; none where it lies beyond."""
        low, high = self._x
        if low <= x <= high:
            column = round((x - low) / (high - low) * (self.width - 1))
            for row in self._rows:
                row[column] = mark if row[column] == " " else row[column]

    def text(self, x: Label, y: Label) -> str:
        """The chart with its axes; `x` and `y` write their numbers."""
        top, bottom = y(self._y[1]), y(self._y[0])
        margin = max(len(top), len(bottom))
        names = [top, *[""] * (self._height - 2), bottom]
        lines = [
            f"{name.rjust(margin)} │{''.join(row)}".rstrip()
            for name, row in zip(names, self._rows, strict=True)
        ]
        first, last = x(self._x[0]), x(self._x[1])
        gap = max(1, self.width - len(first) - len(last))
        lines.append(f"{' ' * margin} └{'─' * self.width}")
        lines.append(f"{' ' * margin}  {first}{' ' * gap}{last}")
        return "\n".join(lines)

    def _row(self, level: float) -> int:
        low, high = self._y
        up = round((level - low) / (high - low) * (self._height - 1))
        return self._height - 1 - min(self._height - 1, max(0, up))
