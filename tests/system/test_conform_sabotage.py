"""Tests that the conformance checks can fail. Each sabotage breaks one rule and must be noticed.

The endpoint is moto behind a proxy. A run through a proxy without sabotage shows that the sabotage causes the findings,
not the proxy.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import unquote

from batchlab.adapters.aws.endpoint import Endpoint
from batchlab.adapters.clock import WallClock
from batchlab.conform.check import CheckVerdict, Severity
from batchlab.conform.check_table import CHECKS
from batchlab.conform.run import Result, run
from batchlab.conform.target import Target
from tests.support.conform.proxy import Request, Response, Sabotage, Send, proxy
from tests.support.conform.sabotages_s3 import S3_SABOTAGES
from tests.support.conform.sabotages_sqs import SQS_SABOTAGES

SABOTAGES = {**S3_SABOTAGES, **SQS_SABOTAGES}

AT_ONCE = 10
"""The number is small, because waiting receives of moto use much CPU time."""
LIMIT_S = 300.0


def _layers() -> list[dict[str, str]]:
    """Return layers of sabotages by check, so that each check has one sabotage per layer. Some thirty sabotages then
    need only a few runs, because a run costs more than a check."""
    layers: list[dict[str, str]] = [{}]
    for what, (_, names) in SABOTAGES.items():
        for name in names:
            if all(name in layer for layer in layers):
                layers.append({})
            next(layer for layer in layers if name not in layer)[name] = what
    return layers


def _only_for(run: str, layer: Mapping[str, str]) -> Sabotage:
    """Return a sabotage that changes the requests of each check in its own way. The keys and queue names identify the
    check."""

    def spoil(request: Request, send: Send) -> Response:
        text = unquote(request.path) + request.body.decode(errors="replace")
        named = [one for one in layer if f"{run}/{one}/" in text or f"{run}-{one}-" in text]
        if not named:
            return send(request)
        # The name of a check may be a prefix of another name.
        return SABOTAGES[layer[max(named, key=len)]][0](request, send)

    return spoil


def _tried(moto: Endpoint, name: str, layer: Mapping[str, str], names: Set[str]) -> list[Result]:
    assert moto.url is not None
    checks = [check for check in CHECKS if check.name in names]
    assert {check.name for check in checks} == names
    with proxy(moto.url, _only_for(name, layer)) as address:
        target = Target(Endpoint(address), run=name, clock=WallClock())
        # Without sabotage, the messages arrive, but later on a busy machine.
        target.arrives_s = target.settles_s = 2.0 if layer else 20.0
        try:
            target.open({check.service for check in checks})
            return run(target, checks, at_once=AT_ONCE, limit_s=LIMIT_S)
        finally:
            target.close()


def _unexpected(moto: Endpoint, number: int, layer: Mapping[str, str], names: Set[str]) -> dict[str, str]:
    """Return the unexpected results by the names of the checks."""
    expected = CheckVerdict.DIFFERS if layer else CheckVerdict.AGREES
    found: dict[str, str] = {}
    # A slow service looks like a waiting one. On a busy machine, a few checks may need a second try on their own.
    for again in ("", "-again"):
        results = _tried(moto, f"sabotage-{number}{again}", layer, names)
        assert all(result.observed for result in results if result.verdict is CheckVerdict.DIFFERS)
        found = {
            result.check.name: f"{layer.get(result.check.name)}: {result.verdict.value} {result.observed}"
            for result in results
            if result.verdict is not expected
        }
        names = found.keys()
        if not 0 < len(names) <= 3:
            break
    return found


def test_every_check_that_is_needed_is_spoiled() -> None:
    spoiled = set().union(*(names for _, names in SABOTAGES.values()))
    needed = {check.name for check in CHECKS if check.severity is Severity.NEEDED}
    assert needed - spoiled == set()


def test_sabotage_is_detected_by_the_right_check(moto: Endpoint) -> None:
    layers = _layers()
    every = set().union(*layers)
    assert every == set().union(*(names for _, names in SABOTAGES.values()))
    tried = [(every, {}), *((layer.keys(), layer) for layer in layers)]
    with ThreadPoolExecutor(len(tried)) as threads:
        runs = [threads.submit(_unexpected, moto, number, layer, names) for number, (names, layer) in enumerate(tried)]
    unspoiled, *spoiled = [run.result() for run in runs]
    assert unspoiled == {}
    assert spoiled == [{} for _ in layers]
