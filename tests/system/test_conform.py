"""`batchlab conform` on the emulators.

The findings match docs/contributing/emulators.md, and no resource is left behind.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from batchlab.adapters.aws import endpoint as aws
from batchlab.adapters.aws.endpoint import Endpoint
from batchlab.adapters.local.ministack import VERSION
from batchlab.conform.target import Cleaner
from tests.support import ROOT
from tests.support.aws.emulators import EMULATORS
from tests.support.cli import Run, runner
from tests.support.conform.proxy import Request, Response, Send, proxy

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_sqs import SQSClient

PAGE = ROOT / "docs" / "contributing" / "emulators.md"

NAMES = {"ministack": f"MiniStack {VERSION}", "localstack": "LocalStack 4.14.0", "moto": f"moto {version('moto')}"}
"""The names of the sections on the page, by fixture."""

WAIT_S = 60.0


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a runner of command lines in this process, with keys that every emulator accepts."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    return runner(monkeypatch, capsys)


@cache
def _s3(endpoint: Endpoint) -> S3Client:
    return aws.client(endpoint, "s3", connections=1)


@cache
def _sqs(endpoint: Endpoint) -> SQSClient:
    return aws.client(endpoint, "sqs", connections=1)


def _made(endpoint: Endpoint) -> list[str]:
    """Return the existing buckets and queues of conformance runs."""
    buckets = [bucket["Name"] for bucket in _s3(endpoint).list_buckets()["Buckets"]]
    queues = _sqs(endpoint).list_queues(QueueNamePrefix="batchlab-conform-").get("QueueUrls", [])
    return [one for one in (*buckets, *queues) if "batchlab-conform-" in one]


def _clear(endpoint: Endpoint) -> list[str]:
    """Remove the resources that a run could not remove because of the test, and return their names."""
    names = [one.rpartition("/")[2] for one in _made(endpoint)]
    cleaner = Cleaner(endpoint)
    assert cleaner.queues(dict.fromkeys(names, "")) == []
    assert cleaner.objects(names[0], "", with_bucket=True) == []
    return names


@pytest.mark.parametrize("emulator", EMULATORS)
def test_page_matches_the_emulator(emulator: str, request: pytest.FixtureRequest, run: Run, tmp_path: Path) -> None:
    """The text of the page must equal the output of the command, which makes the page the record of all differences."""
    endpoint: Endpoint = request.getfixturevalue(emulator)
    page = tmp_path / "emulators.md"
    page.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    code, out, err = run("conform", "--endpoint", endpoint.url, "--name", NAMES[emulator], "--markdown", page, "--json")
    assert "Left behind" not in err
    told = json.loads(out)
    differing = [one["check"] for one in told["checks"] if one["verdict"] == "differs"]
    assert code == (1 if differing else 0)
    assert page.read_text(encoding="utf-8") == PAGE.read_text(encoding="utf-8"), differing
    assert _made(endpoint) == []


def test_existing_bucket_is_used_and_its_objects_are_unchanged(ministack: Endpoint, run: Run) -> None:
    s3 = _s3(ministack)
    s3.create_bucket(Bucket="of-ours")
    s3.put_object(Bucket="of-ours", Key="batchlab-conform-keep", Body=b"precious")
    code, out, err = run(
        "conform", "--endpoint", ministack.url, "--bucket", "of-ours", "--only", "s3-create-[ft]*", "--needed", "--json"
    )
    assert (code, err) == (0, "")
    assert json.loads(out)["needed_agree"]
    left = [one["Key"] for one in s3.list_objects_v2(Bucket="of-ours")["Contents"]]
    assert left == ["batchlab-conform-keep"]
    s3.put_bucket_versioning(Bucket="of-ours", VersioningConfiguration={"Status": "Enabled"})
    code, out, err = run("conform", "--endpoint", ministack.url, "--bucket", "of-ours")
    assert (code, out) == (2, "")
    assert "has versioning" in err
    code, _, err = run("conform", "--endpoint", ministack.url, "--bucket", "of-nobody")
    assert code == 2
    assert "The bucket of-nobody does not exist" in err


@pytest.fixture
def process(ministack: Endpoint) -> Iterator[subprocess.Popen[str]]:
    """Start a run of all checks in its own process."""
    assert ministack.url is not None
    started = subprocess.Popen(
        [sys.executable, "-m", "batchlab", "conform", "--endpoint", ministack.url],
        env={name: value for name, value in os.environ.items() if not name.startswith("AWS_")},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    yield started
    started.kill()
    started.communicate()


def test_ctrl_c_leaves_nothing_behind_even_twice(ministack: Endpoint, process: subprocess.Popen[str]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not _made(ministack):
        assert process.poll() is None
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    assert process.stderr.readline() == "Interrupted. Removing the created resources.\n"
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=WAIT_S)
    assert (process.returncode, out, err) == (130, "", "")
    assert _made(ministack) == []


def test_undeletable_resources_are_named(moto: Endpoint, run: Run) -> None:
    def keeps_everything(request: Request, send: Send) -> Response:
        if request.action == "DeleteQueue":
            return Response(403, b'{"__type": "AccessDenied"}')
        if request.method == "DELETE" and not request.is_object:
            return Response(403, b"<Error><Code>AccessDenied</Code></Error>")
        return send(request)

    assert moto.url is not None
    with proxy(moto.url, keeps_everything) as address:
        code, _, err = run("conform", "--endpoint", address, "--only", "*-create-[fs]*")
    bucket, *queues = _clear(moto)
    assert code == 0
    assert f"Left behind: bucket {bucket}: DeleteBucket returns AccessDenied" in err
    assert f"Left behind: queue {bucket}: DeleteQueue returns AccessDenied" in err
    assert len(err.splitlines()) == len(queues) + 1


def test_breakdown_of_the_endpoint_is_not_a_difference(moto: Endpoint, run: Run) -> None:
    seen: list[Request] = []

    def breaks_down(request: Request, send: Send) -> Response:
        seen.append(request)
        if len(seen) > 5:
            raise ConnectionAbortedError
        return send(request)

    assert moto.url is not None
    with proxy(moto.url, breaks_down) as address:
        code, out, err = run("conform", "--endpoint", address, "--only", "s3-range*", "--json")
    told: list[dict[str, Any]] = json.loads(out)["checks"]
    untried = {one["observed"].partition(":")[0] for one in told if one["verdict"] == "untried"}
    assert code == 1
    assert untried == {"the endpoint does not respond"}
    assert not [one for one in told if one["verdict"] == "differs"]
    (bucket,) = _clear(moto)
    assert f"Left behind: bucket {bucket}: the endpoint does not respond" in err
