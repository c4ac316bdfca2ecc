"""The table of faults, which covers every backend, and the pages that describe the faults."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import pytest

from batchlab.client.http import Client
from batchlab.core.api_types import GridView, InstanceView
from batchlab.core.capabilities import backend_names
from batchlab.core.errors import UsageError
from batchlab.runtime import factory
from batchlab.runtime.home import Home
from batchlab.scenarios.faults import aws_stack, processes
from batchlab.scenarios.faults.fault_injection import BACKENDS, TABLE, impossible, injector_for, rows
from batchlab.scenarios.faults.proxy import FaultProxy
from batchlab.scenarios.faults.target_grid import TargetGrid, select_targets
from batchlab.scenarios.model.values import Fault, FaultName
from tests.support import ROOT
from tests.support.grid.backends import command as batchlab


def test_impossible_fault_is_a_part_of_a_sentence() -> None:
    told = impossible("local")
    assert set(told) == {FaultName.PARTITION, FaultName.ZONE_LOSS, FaultName.S3_ERRORS}
    assert not any(why.endswith(".") for why in told.values())


@pytest.mark.parametrize(("page", "title"), [("replay.md", "## Faults"), ("forecast.md", "## Faults in a forecast")])
def test_the_docs_have_details_of_each_fault(page: str, title: str) -> None:
    section = (ROOT / "docs" / page).read_text().partition(f"\n{title}\n")[2].partition("\n## ")[0]
    described = [
        cell for row in re.findall(r"^\| (`[^|]+) \|", section, re.M) for cell in re.findall(r"`([^`]+)`", row)
    ]
    assert described[: len(FaultName)] == list(FaultName)


def test_every_fault_has_one_answer_on_every_backend() -> None:
    assert set(TABLE) == set(FaultName)
    for fault, backend, cell in rows():
        assert bool(cell.how) != bool(cell.why_not), (fault, backend)
    loaded = [factory.load(name) for name in backend_names()]
    others = {one.name for one in loaded if one.bucket_scheme or one.capabilities.simulated}
    assert set(BACKENDS) == set(backend_names()) - others
    for name in others:
        assert set(impossible(name).values()) == {"No fault is implemented for this backend"}


def scene(name: str, tmp_path: Path) -> TargetGrid:
    return TargetGrid(factory.load(name), Home(tmp_path), Client("http://127.0.0.1:1", "t"))


@pytest.mark.parametrize("name", ["local", "ministack"])
def test_faults_in_the_table_exist(name: str, tmp_path: Path) -> None:
    found = processes.actions(scene(name, tmp_path), FaultProxy("http://127.0.0.1:1"))
    assert set(found) == {fault for fault, there, cell in rows((name,)) if cell.possible}


def test_faults_of_containers_and_aws_in_the_table_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from batchlab.scenarios.faults import containers

    for name, module in (("localstack", containers), ("aws", aws_stack)):
        cls = "ContainerFaults" if name == "localstack" else "StackFaults"
        original = getattr(module, cls)
        monkeypatch.setattr(original, "__init__", lambda self, scene: None)
        found = module.actions(scene(name, tmp_path))
        assert set(found) == {fault for fault, _, cell in rows((name,)) if cell.possible}


def test_impossible_fault_is_reported_without_effect(tmp_path: Path) -> None:
    async def inject(name: str, fault: FaultName) -> str:
        there = scene(name, tmp_path)
        injector = injector_for(there.backend, there.home, there.client)
        return (await injector.inject(Fault(fault, 3.0), 3.5)).impossible

    for fault, backend, cell in rows(("local", "ministack")):
        if not cell.possible:
            assert asyncio.run(inject(backend, fault)) == cell.why_not.removesuffix(".")
    for fault in (FaultName.S3_ERRORS, FaultName.PARTITION):
        assert "without a proxy" in asyncio.run(inject("ministack", fault))


def test_nothing_real_runs_in_the_simulator(tmp_path: Path) -> None:
    there = scene("sim", tmp_path)
    with pytest.raises(UsageError, match="Nothing real runs"):
        injector_for(there.backend, there.home, there.client)


def test_the_command_prints_it() -> None:
    shown, _ = batchlab("scenario", "faults", "--json")
    told = json.loads(shown)
    assert [(one["fault"], one["backend"]) for one in told] == [(f, b) for f, b, _ in rows()]
    assert all(one["possible"] == (one["why_not"] == "") for one in told)
    shown, _ = batchlab("scenario", "faults", "--backend", "localstack")
    assert "docker network disconnect" in shown
    shown, _ = batchlab("scenario", "faults")
    assert len(shown.splitlines()) == 1 + len(FaultName)
    _, said = batchlab("scenario", "faults", "--backend", "mars", code=2)
    assert "There are local, ministack, localstack, aws" in said


# --- Targets of a fault --------------------------------------------------------------------------


def instance(name: str, state: str, launched_s: float) -> InstanceView:
    return {
        "id": name,
        "state": state,
        "healthy": True,
        "protected": False,
        "launched_s": launched_s,
        "note": "",
        "worker": None,
        "busy": 0,
        "held": 0,
        "busy_gpus": 0,
        "type": "",
        "zone": "",
        "market": "on-demand",
    }


def grid(**pools: list[InstanceView]) -> GridView:
    return {
        "backend": "local",
        "leader": True,
        "owner": "m",
        "queues": [],
        "unreadable": 0,
        "trouble": "",
        "settings": {},
        "pools": [
            {
                "name": name,
                "min": 0,
                "max": 9,
                "desired": 3,
                "slots": 1,
                "gpus": 0,
                "image": "",
                "backlog_tasks": 0,
                "backlog_s": 0.0,
                "held_by_hand": False,
                "trouble": "",
                "ends_in_s": None,
                "end_trouble": "",
                "instances": instances,
            }
            for name, instances in pools.items()
        ],
    }


def test_a_share_is_of_those_in_service_and_rounded_up() -> None:
    up = [instance(f"w{n}", "InService", 10.0 - n) for n in range(5)]
    there = grid(a=[*up, instance("w9", "Pending", 0.0)], b=[instance("v", "InService", 50.0)])

    def hit(**more: object) -> list[str]:
        return select_targets(there, Fault(FaultName.KILL, 0.0, **more))  # type: ignore[arg-type]

    assert hit(pool="a", share=0.5) == ["w4", "w3", "w2"], "the oldest first"
    assert hit(pool="a", share=0.2) == ["w4"]
    assert hit(pool="a", count=2, share=0.2) == ["w4", "w3"]
    assert hit() == ["w4", "w3", "w2", "w1", "w0", "v"]
    assert hit(pool="b", count=7) == ["v"]
    assert hit(pool="c") == []
    assert select_targets(there, Fault(FaultName.KILL, 0.0), {"w1", "v"}) == ["w1", "v"]
    thirty = grid(a=[instance(f"w{n:02}", "InService", 1.0) for n in range(30)])
    assert len(select_targets(thirty, Fault(FaultName.KILL, 0.0, share=0.1))) == 3
