"""Concurrent execution of conformance checks. Checks run at the same time, because most checks mostly wait.

Invariant: a check cannot block the run or make another check fail. Each check has its own thread. If a check takes too
long, `run` continues without waiting for the check's thread. A check that receives a 5xx response runs a second time.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from botocore.exceptions import BotoCoreError, ClientError, FlexibleChecksumError, IncompleteReadError
from botocore.parsers import ResponseParserError

from batchlab.conform.check import MIN_SERVER_ERROR, TIMEOUT_S, Check, CheckVerdict, Differs, Failed, Untried
from batchlab.conform.site import Site
from batchlab.conform.target import Target
from batchlab.core.errors import BatchlabError, Throttled, Unreachable

MAX_RUNNING_CHECKS = 32

_THROTTLING = ("SlowDown", "RequestThrottled", "ThrottlingException", "Throttling")


@dataclass(frozen=True, slots=True)
class Result:
    """Result of a check. `observed` is a clause about the observed behavior, or "" if the endpoint follows the rule."""

    check: Check
    verdict: CheckVerdict
    observed: str
    seconds: float


def run(
    target: Target,
    checks: Sequence[Check],
    *,
    on_result: Callable[[Result], None] = lambda _: None,
    at_once: int = MAX_RUNNING_CHECKS,
    limit_s: float | None = None,
) -> list[Result]:
    """Run the checks, with at most `at_once` checks at the same time. Return the results in the order of `checks`.

    `on_result` is called with the result of each check. A check that takes longer than `limit_s` seconds gets the
    verdict UNTRIED.
    """
    limit_s = TIMEOUT_S + 2 * target.settles_s if limit_s is None else limit_s
    # Start the checks of SQS first, because the checks of SQS mostly wait. The checks of S3 run during the waits.
    waiting = deque(sorted(checks, key=lambda check: check.service, reverse=True))
    running: dict[str, tuple[Check, float]] = {}
    ended: queue.SimpleQueue[Result] = queue.SimpleQueue()
    results: dict[str, Result] = {}
    while waiting or running:
        while waiting and len(running) < at_once:
            check = waiting.popleft()
            running[check.name] = (check, time.monotonic())
            # Each check has a daemon thread, because an exiting process does not wait for daemon threads.
            threading.Thread(
                target=lambda check=check: ended.put(_try(target, check)), name=f"conform-{check.name}", daemon=True
            ).start()
        now_s = time.monotonic()
        overdue = [
            Result(check, CheckVerdict.UNTRIED, f"the check takes longer than {limit_s:.0f} s", now_s - begun_s)
            for check, begun_s in running.values()
            if now_s - begun_s > limit_s
        ]
        for result in (*_next(ended), *overdue):
            # If a check ends after its time limit, the later result is ignored.
            if running.pop(result.check.name, None) is not None:
                results[result.check.name] = result
                on_result(result)
    return [results[check.name] for check in checks]


def _next(ended: queue.SimpleQueue[Result]) -> Iterator[Result]:
    try:
        yield ended.get(timeout=0.2)
    except queue.Empty:
        return


def _try(target: Target, check: Check) -> Result:
    begun_s = time.monotonic()
    try:
        verdict, observed = _verdict(target, check, Site(target, check.name))
    except Failed:
        try:
            verdict, observed = _verdict(target, check, Site(target, check.name, again=True))
        except Failed as failed:
            verdict, observed = CheckVerdict.DIFFERS, str(failed)
    return Result(check, verdict, observed, time.monotonic() - begun_s)


def _verdict(target: Target, check: Check, site: Site) -> tuple[CheckVerdict, str]:
    """Run a check, and return the verdict and the observed behavior. Raise Failed for a 5xx response."""
    try:
        with target.creating() if check.service == "s3" else nullcontext():
            coroutine = check.run(site)
            if coroutine is not None:
                asyncio.run(coroutine)
    except Failed:
        raise
    except Differs as difference:
        return CheckVerdict.DIFFERS, str(difference)
    except Untried as reason:
        return CheckVerdict.UNTRIED, str(reason)
    except ClientError as error:
        return _refusal(error)
    except (FlexibleChecksumError, IncompleteReadError):
        return CheckVerdict.DIFFERS, "an object arrives damaged"
    except ResponseParserError:
        return CheckVerdict.DIFFERS, "boto3 cannot parse the response"
    except (BotoCoreError, Throttled, Unreachable) as error:
        return CheckVerdict.UNTRIED, f"the endpoint does not respond: {type(error).__name__}"
    except BatchlabError as error:
        return CheckVerdict.DIFFERS, str(error)
    except (LookupError, TypeError, ValueError) as error:
        return CheckVerdict.DIFFERS, f"a response is malformed: {type(error).__name__}: {error}"
    except Exception as error:  # noqa: BLE001 - the verdict contains the error
        return CheckVerdict.UNTRIED, f"the check itself fails: {type(error).__name__}: {error}"
    return CheckVerdict.AGREES, ""


def _refusal(error: ClientError) -> tuple[CheckVerdict, str]:
    status = error.response["ResponseMetadata"]["HTTPStatusCode"]
    code = error.response["Error"]["Code"]
    observed = f"{error.operation_name} returns {status} {code}"
    if code in _THROTTLING:
        return CheckVerdict.UNTRIED, observed
    if status >= MIN_SERVER_ERROR:
        raise Failed(observed) from error
    return CheckVerdict.DIFFERS, observed
