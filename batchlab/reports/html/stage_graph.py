"""Progress of a job's stages, and the layout of their graph, for the report and the web page.

Invariants: the layer of a stage is the length of its longest path from a stage without upstream stages, so every arrow
leads to the right. An arrow over several layers has a place of its own in each layer between, so it crosses no stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from batchlab.core.text import count, join_list

WIDTH, HEIGHT = 176, 76
"""Size of a stage in pixels."""
GAP_X, GAP_Y = 56, 16
MARGIN = 4
PASSING = 14
"""Height in pixels of the place of an arrow that passes a layer."""
NAME_CHARS = 17
"""Number of characters of a stage's name that fit into the stage."""
SWEEPS = 4
"""Number of passes over the layers that reduce crossings of arrows."""

_Place = tuple[str, int]
"""A stage with the number 0, or the place in a layer of an arrow from this stage, with the number of the arrow."""


@dataclass(frozen=True, slots=True)
class Part:
    """Part of a progress bar. `start` and `width` are percentages of the bar."""

    kind: str
    start: float
    width: float


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of tasks. `planned` is None if the number of planned tasks is not known yet."""

    planned: int | None
    succeeded: int
    failed: int
    cancelled: int
    running: int
    is_open: bool = False
    """Whether more tasks may be planned."""

    @property
    def ended(self) -> int:
        return self.succeeded + self.failed + self.cancelled

    def of(self, state: str) -> int:
        """Return the number of tasks in a state, or of all tasks for "". Tasks that are not planned do not count."""
        known = max(self.planned or 0, self.ended + self.running)
        if state == "waiting":
            return known - self.ended - self.running
        count: int = getattr(self, state) if state else known
        return count

    @property
    def percent(self) -> int:
        """Return the percentage of planned tasks that have ended. The percentage of ended tasks is rounded down."""
        planned = max(self.planned or 0, self.ended)
        return self.ended * 100 // planned if planned else 0

    @property
    def parts(self) -> list[Part]:
        """Return the parts of the progress bar. Each part of the bar is wide enough to be visible."""
        whole = max(self.planned or 0, self.ended + self.running, 1)
        parts: list[Part] = []
        at = 0.0
        for kind in ("succeeded", "failed", "cancelled", "running"):
            tasks: int = getattr(self, kind)
            if tasks:
                width = min(max(tasks * 100 / whole, 0.6), 100 - at)
                parts.append(Part(kind, round(at, 3), round(width, 3)))
                at += width
        return parts

    @property
    def description(self) -> str:
        """Return the progress as text, for screen readers."""
        of = "?" if self.planned is None else str(self.planned)
        return (
            f"{self.ended} of {of}{'+' if self.is_open else ''} tasks ended: "
            f"{self.succeeded} succeeded, {self.failed} failed, "
            f"{self.cancelled} canceled, {self.running} running"
        )


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage, with the names of its upstream stages."""

    name: str
    after: Sequence[str]
    progress: Progress


@dataclass(frozen=True, slots=True)
class Node:
    """A stage in the graph, with the position of its upper left corner."""

    stage: Stage
    x: float
    y: float

    @property
    def name(self) -> str:
        """Return the name of the stage, shortened to the width of the stage."""
        name = self.stage.name
        return name if len(name) <= NAME_CHARS else f"{name[: NAME_CHARS - 1]}…"

    @property
    def progress(self) -> Progress:
        return self.stage.progress

    @property
    def counts(self) -> str:
        planned = self.progress.planned
        if planned == 0:
            return "no tasks"
        return f"{self.progress.ended:,} of {'?' if planned is None else f'{planned:,}'}"

    @property
    def note(self) -> str:
        """Return the numbers of failed and running tasks as text."""
        parts = [(self.progress.failed, "failed"), (self.progress.running, "running")]
        return ", ".join(f"{number:,} {state}" for number, state in parts if number)

    @property
    def description(self) -> str:
        """Return the stage as text, for screen readers."""
        after = f", after {join_list(self.stage.after)}" if self.stage.after else ""
        return f"Stage {self.stage.name}{after}: {self.progress.description}"


@dataclass(frozen=True, slots=True)
class Graph:
    """Stages and arrows of a job. The paths of `arrows` are in pixels."""

    nodes: tuple[Node, ...]
    arrows: tuple[str, ...]
    width: float
    height: float

    @property
    def description(self) -> str:
        """Return the graph as text, for screen readers."""
        steps = [f"{node.stage.name} after {join_list(node.stage.after)}" for node in self.nodes if node.stage.after]
        return f"Graph of {count(len(self.nodes), 'stage')}" + (f": {'; '.join(steps)}" if steps else "")


def graph(stages: Sequence[Stage]) -> Graph:
    """Return the graph of a job's stages, which are in an order in which each stage follows its upstream stages."""
    stages = _in_order(stages)
    depth: dict[str, int] = {}
    for stage in stages:
        depth[stage.name] = max((depth[name] + 1 for name in stage.after), default=0)
    layers: list[list[_Place]] = [[] for _ in range(max(depth.values(), default=0) + 1)]
    for stage in stages:
        layers[depth[stage.name]].append((stage.name, 0))
    routes: list[list[_Place]] = []
    for stage in stages:
        for name in stage.after:
            passed = [(name, len(routes) + 1)] * (depth[stage.name] - depth[name] - 1)
            route: list[_Place] = [(name, 0), *passed, (stage.name, 0)]
            for layer, place in enumerate(passed, start=depth[name] + 1):
                layers[layer].append(place)
            routes.append(route)
    links: list[dict[_Place, list[_Place]]] = [{} for _ in layers]
    for route in routes:
        first = depth[route[0][0]]
        for step, (left, right) in enumerate(pairwise(route)):
            links[first + step].setdefault(left, []).append(right)
    _untangle(layers, links)
    return _drawn(stages, layers, routes, depth, _tops(layers))


def _in_order(stages: Sequence[Stage]) -> list[Stage]:
    """Leave out repeated names, and upstream stages that do not come before. A report may contain both."""
    found: dict[str, Stage] = {}
    for stage in stages:
        found.setdefault(stage.name, replace(stage, after=[name for name in stage.after if name in found]))
    return list(found.values())


def _untangle(layers: list[list[_Place]], links: Sequence[Mapping[_Place, Sequence[_Place]]]) -> None:
    """Sort each layer by the mean position of the linked places in the layer before, and then in the layer after."""
    for _ in range(SWEEPS):
        for number in range(1, len(layers)):
            order = {place: n for n, place in enumerate(layers[number - 1])}
            sources: dict[_Place, list[int]] = {}
            for left, rights in links[number - 1].items():
                for right in rights:
                    sources.setdefault(right, []).append(order[left])
            _sort(layers[number], sources)
        for number in range(len(layers) - 2, -1, -1):
            order = {place: n for n, place in enumerate(layers[number + 1])}
            _sort(layers[number], {left: [order[r] for r in rights] for left, rights in links[number].items()})


def _sort(layer: list[_Place], linked: Mapping[_Place, Sequence[int]]) -> None:
    at = {place: number for number, place in enumerate(layer)}
    layer.sort(key=lambda place: sum(linked[place]) / len(linked[place]) if linked.get(place) else at[place])


def _tall(place: _Place) -> float:
    return PASSING if place[1] else HEIGHT


def _tops(layers: Sequence[Sequence[_Place]]) -> list[dict[_Place, float]]:
    """Return the upper edge of each place. Every layer is centered in the graph's height."""
    heights = [sum(map(_tall, layer)) + GAP_Y * (len(layer) - 1) for layer in layers]
    whole = max(heights, default=0.0)
    tops: list[dict[_Place, float]] = []
    for layer, height in zip(layers, heights, strict=True):
        y = MARGIN + (whole - height) / 2
        tops.append({})
        for place in layer:
            tops[-1][place] = round(y, 1)
            y += _tall(place) + GAP_Y
    return tops


def _drawn(
    stages: Sequence[Stage],
    layers: Sequence[Sequence[_Place]],
    routes: Sequence[Sequence[_Place]],
    depth: Mapping[str, int],
    tops: Sequence[Mapping[_Place, float]],
) -> Graph:
    nodes = []
    for stage in stages:
        layer = depth[stage.name]
        nodes.append(Node(stage, _left(layer), tops[layer][stage.name, 0]))
    arrows = []
    for route in routes:
        layer = depth[route[0][0]]
        middles = [tops[layer + n][place] + _tall(place) / 2 for n, place in enumerate(route)]
        path = f"M{_left(layer) + WIDTH} {middles[0]:g}"
        for n in range(1, len(route)):
            # The arrow ends before the stage, where its head is.
            x, at = _left(layer + n), _left(layer + n - 1) + WIDTH
            x -= 5 if n == len(route) - 1 else 0
            half = (x - at) / 2
            path += f"C{at + half:g} {middles[n - 1]:g} {x - half:g} {middles[n]:g} {x:g} {middles[n]:g}"
            if n < len(route) - 1:
                path += f"H{x + WIDTH}"
        arrows.append(path)
    width = 2 * MARGIN + len(layers) * WIDTH + (len(layers) - 1) * GAP_X
    bottom = max((y + _tall(place) for layer in tops for place, y in layer.items()), default=0.0)
    return Graph(tuple(nodes), tuple(arrows), width, round(bottom + MARGIN, 1))


def _left(layer: int) -> float:
    return MARGIN + layer * (WIDTH + GAP_X)
