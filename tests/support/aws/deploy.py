"""An account on an emulator, a release, and a small stack, for the tests of `batchlab deploy`."""

from __future__ import annotations

import hashlib
import io
import itertools
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from batchlab.adapters.aws.endpoint import session
from batchlab.deploy import template
from batchlab.deploy.plan import Plan
from batchlab.deploy.release import DATABASE_CA, ENDS_FLEET
from batchlab.deploy.stack_records import Event
from tests.support.certificates import Authority

REGION = "us-east-1"
SMALL = Path(__file__).with_name("deploy_stack.yaml")
"""A small template with only the resources that `batchlab deploy` inspects."""

_ACCOUNTS = itertools.count(100_000_000_001)
"""Account ids for tests. MiniStack creates a separate account for each access key of twelve digits."""


def use(monkeypatch: pytest.MonkeyPatch, url: str, source: Path = SMALL) -> str:
    """Point `batchlab deploy` at a fresh account at `url` and at the template in `source`, and return the account
    id."""
    account = str(next(_ACCOUNTS))
    for name in ("AWS_PROFILE", "AWS_REGION", "AWS_SESSION_TOKEN", "BATCHLAB_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", account)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setattr(template, "shipped_template", lambda: source)
    return account


def client(service: str) -> Any:
    """Return a boto3 client in the account of the current test."""
    # boto3's default session would keep the credentials of the first test.
    make: Any = session(None).client
    return make(service)


def release(folder: Path, text: str = "one", database_ca: bytes = b"", *, ends_fleet: bool = True) -> Path:
    """Write a release archive with only the files that `deploy apply` reads. Without `ends_fleet`, it is older than the
    end of a fleet without a manager."""
    lines = [f"VERSION={text}", "PYTHON=3.12", "ARCHITECTURE=x86_64", *([ENDS_FLEET] if ends_fleet else [])]
    files = {"version": "".join(f"{line}\n" for line in lines).encode(), DATABASE_CA: database_ca}
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, body in files.items():
            if body:
                entry = tarfile.TarInfo(name)
                entry.size = len(body)
                archive.addfile(entry, io.BytesIO(body))
    whole = packed.getvalue()
    path = folder / f"{hashlib.sha256(whole).hexdigest()}.tar.gz"
    path.write_bytes(whole)
    return path


def rds_bundle(folder: Path, region: str = REGION) -> Path:
    """Write a bundle with a certificate that is named as RDS's certificates in the region."""
    return Authority(folder, f"Amazon RDS {region} Root CA RSA2048 G1").bundle


def stacks() -> dict[str, str]:
    """Return the status of each existing stack, by name."""
    told = client("cloudformation").describe_stacks()["Stacks"]
    return {one["StackName"]: one["StackStatus"] for one in told}


def queues() -> list[str]:
    urls = client("sqs").list_queues().get("QueueUrls", [])
    return sorted(url.rpartition("/")[2] for url in urls)


def group(name: str) -> dict[str, Any]:
    told = client("autoscaling").describe_auto_scaling_groups(AutoScalingGroupNames=[name])
    (found,) = told["AutoScalingGroups"]
    return dict(found)


@dataclass
class Front:
    """An apply.Front for tests, which records its calls. `agreed` is the answer to every question. `seeing` is called
    with each event."""

    agreed: bool = True
    said: list[str] = field(default_factory=list)
    questions: list[str] = field(default_factory=list)
    plans: list[Plan] = field(default_factory=list)
    seen: list[Event] = field(default_factory=list)
    seeing: Callable[[Event], None] = lambda _: None

    def say(self, text: str) -> None:
        self.said.append(text)

    def agrees(self, question: str) -> bool:
        self.questions.append(question)
        return self.agreed

    def show(self, plan: Plan) -> None:
        self.plans.append(plan)

    @contextmanager
    def watching(self, what: str, total: int) -> Iterator[Callable[[Event], None]]:
        def see(event: Event) -> None:
            self.seen.append(event)
            self.seeing(event)

        yield see
