"""EC2's TerminateInstances and DescribeInstances for the process instances of `asg serve`.

The EC2 of an emulator does not have these instances. A termination kills all processes of an
instance with SIGKILL.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qsl

from batchlab.adapters.local.processes import living
from batchlab.core.operating_system.processes import family
from tests.support.http_proxy import Answer, Request

_NAMESPACE = 'xmlns="http://ec2.amazonaws.com/doc/2016-11-15/"'


@dataclass
class Machines:
    """The EC2 stub for the instances of the endpoint that stores its state in `folder`. `asked` are the received
    requests. The end of the manager's instance deletes the file `disk`. `manager` is the name of this instance's group.
    """

    folder: Path
    manager: str
    disk: Path
    asked: list[dict[str, str]] = field(default_factory=list)

    def answer(self, request: Request) -> Answer:
        asked = dict(parse_qsl(request.body.decode()))
        self.asked.append(asked)
        names = [value for key, value in asked.items() if key.startswith("InstanceId.")]
        assert names, asked
        if asked["Action"] == "TerminateInstances":
            there = living(self.folder)
            for name in names:
                self._kill(there.get(name, 0))
                if f'"pool": "{self.manager}"' in self._record(name):
                    for file in self.disk.parent.glob(f"{self.disk.name}*"):
                        file.unlink()
            items = "".join(
                f"<item><instanceId>{name}</instanceId>{_state('currentState', 'shutting-down')}</item>"
                for name in names
            )
            return _answer("TerminateInstances", f"<instancesSet>{items}</instancesSet>")
        assert asked["Action"] == "DescribeInstances", asked
        there = living(self.folder)
        items = "".join(
            f"<item><instanceId>{name}</instanceId>"
            f"{_state('instanceState', 'running' if name in there else 'terminated')}</item>"
            for name in names
        )
        reservation = f"<item><instancesSet>{items}</instancesSet></item>"
        return _answer("DescribeInstances", f"<reservationSet>{reservation}</reservationSet>")

    def _record(self, name: str) -> str:
        return (self.folder / "instances" / f"{name}.json").read_text()

    def _kill(self, pid: int) -> None:
        if pid:
            for one in (pid, *family(pid)):
                with suppress(ProcessLookupError):
                    os.kill(one, signal.SIGKILL)


def _state(tag: str, name: str) -> str:
    return f"<{tag}><code>0</code><name>{name}</name></{tag}>"


def _answer(action: str, content: str) -> Answer:
    body = f"<{action}Response {_NAMESPACE}><requestId>0</requestId>{content}</{action}Response>"
    return Answer(200, [("Content-Type", "text/xml")], body.encode())
