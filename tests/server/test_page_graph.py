"""The graph of a job's stages: layers, arrows, and texts."""

from __future__ import annotations

import random
import re

import pytest

from batchlab.reports.html.stage_graph import HEIGHT, NAME_CHARS, WIDTH, Graph, Node, Progress, Stage, graph


def stage(name: str, *after: str, planned: int | None = 10, succeeded: int = 5) -> Stage:
    return Stage(name, after, Progress(planned, succeeded, failed=0, cancelled=0, running=2))


def at(found: Graph, name: str) -> Node:
    return next(node for node in found.nodes if node.stage.name == name)


def test_a_stage_is_to_the_right_of_its_longest_path() -> None:
    found = graph([stage("a"), stage("b", "a"), stage("c", "a", "b"), stage("d")])
    assert at(found, "a").x == at(found, "d").x < at(found, "b").x < at(found, "c").x
    assert len(found.arrows) == 3
    assert found.description == "Graph of 4 stages: b after a; c after a and b"
    assert at(found, "c").description.startswith("Stage c, after a and b: 5 of 10 tasks ended")


def test_names_and_counts_fit() -> None:
    (node,) = graph([stage("x" * 80, planned=None, succeeded=0)]).nodes
    assert len(node.name) == NAME_CHARS
    assert node.counts == "0 of ?"
    assert "x" * 80 in node.description


@pytest.mark.parametrize("seed", range(10))
def test_no_two_stages_and_no_arrow_and_stage_overlap(seed: int) -> None:
    draw = random.Random(seed)
    names = [f"s{n}" for n in range(draw.randint(1, 50))]
    stages = [stage(name, *draw.sample(names[:n], min(n, draw.randint(0, 3)))) for n, name in enumerate(names)]
    found = graph(stages)
    assert len(found.nodes) == len(names)
    for n, one in enumerate(found.nodes):
        assert one.x + WIDTH <= found.width
        assert one.y + HEIGHT <= found.height
        for other in found.nodes[n + 1 :]:
            assert one.x != other.x or abs(one.y - other.y) >= HEIGHT
    # A straight part of an arrow passes the layers between its ends.
    for arrow in found.arrows:
        for begin, y, end in re.findall(r" ([\d.]+) ([\d.]+)H([\d.]+)", arrow):
            crossed = [one for one in found.nodes if float(begin) <= one.x < float(end)]
            assert all(not one.y <= float(y) <= one.y + HEIGHT for one in crossed)
