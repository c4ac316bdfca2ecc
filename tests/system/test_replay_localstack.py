"""A scenario replayed with all components: containers, PostgreSQL, and LocalStack."""

from __future__ import annotations

from pathlib import Path

from batchlab.runtime import compose_deployment
from batchlab.runtime.home import Home
from batchlab.scenarios import record
from tests.support.docker.grid import need_containers
from tests.support.grid.backends import command
from tests.system.test_replay_cli import write


def test_a_scenario_with_its_policy_and_a_kill_on_localstack(tmp_path: Path) -> None:
    need_containers(tmp_path)
    home, out = tmp_path / "home", tmp_path / "record.json"
    path = write(
        tmp_path,
        compress=2,
        policy={"drain_target": "30s", "cooldown_in": "12s", "idle": "8s"},
        faults=[{"at": "25s", "fault": "kill", "count": 1}],
        expect={"lost": 0, "duplicates": 0, "failed_jobs": 0},
    )
    command("scenario", "replay", path, "--backend", "localstack", "--home", home, "--out", out, within_s=580)
    run = record.read(out)
    assert run.cut == ""
    # The manager in its container uses the scenario's policy instead of the backend's.
    assert (run.settings["drain_target_s"], run.settings["idle_s"]) == (15.0, 4.0)
    assert run.faults[0].evidence
    assert all(instance.type for instance in run.instances)
    assert {instance.zone for instance in run.instances} - {""}, "a group chooses zones"
    assert compose_deployment.read(Home(home)) is None, "something is still there"
    assert not Home(home).settings_file.exists()
