"""Two users with different roles on the command line of one real grid, without the grid's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from batchlab.core.model import Pool
from batchlab.core.users import OWNER
from tests.support.cli import Run
from tests.support.grid.fixtures import Bring
from tests.support.grid.tour import job_in


def test_two_users_on_the_command_line(
    bring_up: Bring, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = bring_up((Pool("default", 1, 1, 1),))
    file = job_in(tmp_path / "job")

    def asked(*words: object) -> Any:
        code, out, err = run(*words, "--json")
        assert code == 0, err
        return json.loads(out)

    def refused(*words: object) -> str:
        code, out, err = run(*words)
        assert (code, out) == (2, ""), (words, code, out, err)
        return err

    tokens = {
        name: asked("user", "add", name, "--role", role, "--expires", "30d", "--home", grid.home.path)
        for name, role in (("sam", "submit"), ("vera", "view"))
    }
    theirs = asked("job", "submit", file, "--home", grid.home.path)["id"]
    monkeypatch.chdir(tmp_path)

    def become(name: str) -> None:
        monkeypatch.setenv("BATCHLAB_URL", tokens[name]["url"])
        monkeypatch.setenv("BATCHLAB_TOKEN", tokens[name]["token"])

    become("sam")
    own = asked("job", "submit", file, "--set", "nap_s=0.1")
    assert own["owner"] == "sam"
    assert "SHARE" not in run("job", "list")[1].splitlines()[0]
    later = asked("job", "submit", file, "--after", f"{own['id']}:ended", "--share", "research")
    assert (later["owner"], later["id"] != own["id"], later["share"]) == ("sam", True, "research")
    assert [one["share"] for one in asked("job", "list")] == ["research", "", ""]
    head, *rows = (line.split() for line in run("job", "list")[1].splitlines())
    assert (head[:3], [row[1] for row in rows]) == (["ID", "SHARE", "OWNER"], ["research", "default", "default"])
    for share, ids in (("research", [later["id"]]), ("default", [own["id"], theirs])):
        assert [one["id"] for one in asked("job", "list", "--share", share)] == ids
    code, out, _ = run("job", "watch", own["id"])
    assert (code, out.split(":")[0]) == (0, f"{own['id']} SUCCEEDED")
    assert [one["id"] for one in asked("job", "list", "--owner", "sam")] == [later["id"], own["id"]]
    assert run("job", "watch", later["id"])[0] == 0
    assert [one["owner"] for one in asked("job", "list", "--owner", OWNER)] == [OWNER]
    fetched = asked("job", "results", own["id"], "--out", tmp_path / "out")
    assert sum(fetched["results"].values()) > 0
    assert all((tmp_path / "out" / f"{stage}.jsonl").read_text() for stage in fetched["results"])
    assert "`job delete`" in refused("job", "delete", theirs, "--yes")
    assert asked("job", "delete", own["id"], "--yes")["objects"] > 0
    in_folder: list[tuple[str, ...]] = [("grid", "down"), ("grid", "up"), ("grid", "env"), ("doctor",)]
    for words in (*in_folder, ("job", "show", theirs, "look/0")):
        assert "needs the grid's folder" in refused(*words), words

    become("vera")
    forbidden: list[tuple[object, ...]] = [
        ("job", "submit", file),
        ("job", "cancel", theirs),
        ("job", "pause", theirs),
        ("job", "retry", theirs),
        ("job", "cap", theirs, "5USD"),
        ("grid", "drain"),
        ("grid", "scale", "default", "--max", "9"),
        ("user", "add", "mallory", "--role", "administer"),
        ("user", "revoke", "sam"),
    ]
    for request in forbidden:
        assert "The user vera with the role view may not do" in refused(*request), request
    assert {one["user"] for one in asked("audit")} == {"vera"}
    assert asked("user", "list")[0]["name"] == "vera"

    for name in ("BATCHLAB_URL", "BATCHLAB_TOKEN"):
        monkeypatch.delenv(name)
    records = asked("audit", "--user", "vera", "--outcome", "refused", "--since", "1h", "--home", grid.home.path)
    assert len(records) == len(forbidden)
    assert asked("audit", "--user", "vera", "--until", "1h", "--home", grid.home.path) == []
    assert {one["action"] for one in asked("audit", "--user", "sam", "--action", "job", "--home", grid.home.path)} == {
        "job submit",
        "job delete",
    }
    assert asked("user", "revoke", "sam", "--home", grid.home.path)["state"] == "revoked"
    become("sam")
    assert "The token of the user sam is revoked." in refused("job", "list")
