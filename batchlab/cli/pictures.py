"""A picture on stderr that moves. rich's own thread draws it: its clock goes on while we wait.

rich is imported only where there is somebody to see it.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live


class Moving:
    """A context manager: the picture stands while it is entered, and its last state stays."""

    per_second = 8
    _live: Live | None = None

    @abstractmethod
    def draw(self) -> RenderableType:
        """What there is to see now."""

    def __enter__(self) -> Self:
        from rich.console import Console
        from rich.live import Live

        self._live = Live(
            console=Console(stderr=True),
            get_renderable=self.draw,
            refresh_per_second=self.per_second,
        )
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()
        self._live = None
