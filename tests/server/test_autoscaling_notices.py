"""Spot notices on demand, and the data of an instance's group in its metadata."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from batchlab.adapters.aws.endpoint import Endpoint
from batchlab.adapters.aws.metadata_server import Interruption, Metadata, Signals, iso
from batchlab.core.errors import Unreachable
from batchlab.fleet.api_types import Tag
from batchlab.server.autoscaling_api.app import Fault, Request
from batchlab.server.autoscaling_api.launch_templates import TemplateFile
from batchlab.server.autoscaling_api.metadata import CREDENTIALS_S, InstanceFacts, NoticeService, send_notice
from tests.fleet.test_spot import SPOT
from tests.support.autoscaling_group import World, in_aws


def asked(**what: Any) -> Request:
    return Request("POST", "/", "", [], json.dumps(what).encode())


@in_aws
async def test_an_instance_gets_its_notice(w: World) -> None:
    (name,) = await w.group(1, SPOT)
    calls: list[int] = []
    service = NoticeService(w.asg, lambda: calls.append(1))
    answer = await service.answer(asked(instance=name, notice="interruption", notice_s=30), "id")
    assert (answer.status, len(calls)) == (200, 1)
    assert w.asg.metadata(name).spot_time == w.clock.now_s() + 30
    await service.answer(asked(instance=name, notice="rebalance", notice_s=0), "id")
    assert w.asg.metadata(name).rebalance_time == w.clock.now_s()


WRONG: dict[str, dict[str, Any]] = {
    "no such instance": {"instance": "i-none", "notice": "interruption", "notice_s": 1},
    "another notice": {"instance": "i-none", "notice": "hello", "notice_s": 1},
    "no number": {"instance": "i-none", "notice": "rebalance", "notice_s": "1"},
    "a truth": {"instance": "i-none", "notice": "rebalance", "notice_s": True},
    "below zero": {"instance": "i-none", "notice": "rebalance", "notice_s": -1},
    "nothing": {},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_invalid_notice_is_refused_by_name(wrong: str) -> None:
    @in_aws
    async def refused(w: World) -> None:
        await w.group(1, SPOT)
        service = NoticeService(w.asg, lambda: pytest.fail("nothing has changed"))
        with pytest.raises(Fault) as told:
            await service.answer(asked(**WRONG[wrong]), "id")
        answer = service.refuse(asked(), told.value, "id")
        assert answer.status == 400
        assert json.loads(answer.body)["code"] == "ValidationError"

    run: Callable[[], None] = refused
    run()


@in_aws
async def test_an_on_demand_instance_is_never_interrupted(w: World) -> None:
    (name,) = await w.group(1)
    service = NoticeService(w.asg, lambda: None)
    with pytest.raises(Fault, match=r"[Ss]pot"):
        await service.answer(asked(instance=name, notice="interruption", notice_s=1), "id")


def test_missing_endpoint_is_reported() -> None:
    with pytest.raises(Unreachable, match="No Auto Scaling endpoint answers"):
        send_notice(Endpoint("http://127.0.0.1:9"), "i-1", "interruption", 1)


TEMPLATES = """\
[workers]
[[workers.version]]
role = { name = "worker", access_key = "AKID", secret_key = "secret" }
user_data = "IyEvYmluL3NoCmVjaG8gaGVsbG8K"
"""


def test_metadata_matches_group_and_template(tmp_path: Path) -> None:
    @in_aws
    async def told(w: World) -> None:
        (name,) = await w.group(1, SPOT, tags=[Tag("batchlab:pool", "default", True), Tag("own")])
        facts = InstanceFacts()
        facts.engine = w.asg
        assert facts.signals(name) == Signals("InService")
        assert facts.signals("i-none") == Signals("Terminated")
        w.asg.interrupt(name, notice_s=60)
        assert facts.signals(name).interruption == Interruption(w.clock.now_s() + 60)

        class Launcher:
            async def metadata(self, address: str) -> Metadata | None:
                return Metadata(name, address, tags={"a": "b"}) if address == "10.0.0.7" else None

        file = tmp_path / "templates.toml"
        file.write_text(TEMPLATES)
        templates = TemplateFile(file)
        source = facts.of(Launcher(), templates, w.clock)
        found = await source.metadata("10.0.0.7")
        assert found is not None
        assert dict(found.tags) == {"a": "b", "batchlab:pool": "default"}
        assert found.user_data == "#!/bin/sh\necho hello\n"
        (document,) = found.credentials.values()
        assert (document["AccessKeyId"], document["SecretAccessKey"]) == ("AKID", "secret")
        assert document["Expiration"] == iso(w.clock.now_s() + CREDENTIALS_S)
        assert await source.metadata("10.0.0.8") is None
        assert await facts.of(object(), templates, w.clock).metadata("10.0.0.7") is None

    told()
