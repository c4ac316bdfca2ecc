"""A proxy for endpoints of AWS's query protocol. The proxy throttles some requests, and returns some outdated
descriptions."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from urllib.parse import parse_qs

from tests.support.http_proxy import Answer, Request, forward

_THROTTLED = Answer(
    400,
    [("Content-Type", "text/xml")],
    b'<ErrorResponse xmlns="http://autoscaling.amazonaws.com/doc/2011-01-01/"><Error>'
    b"<Type>Sender</Type><Code>Throttling</Code><Message>Rate exceeded</Message></Error>"
    b"<RequestId>0</RequestId></ErrorResponse>",
)


@dataclass
class FaultyFront:
    """A proxy that rejects the share `throttled` of all requests. The proxy may answer a Describe request with a stored
    answer that is less than `lag_s` old. `asked` counts the requests that were not throttled, by action."""

    target: str = ""
    throttled: float = 0.0
    lag_s: float = 0.0
    asked: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    stale: int = 0
    _random: random.Random = field(default_factory=lambda: random.Random(7))
    _said: dict[bytes, tuple[float, Answer]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, request: Request) -> Answer:
        action = parse_qs(request.body.decode())["Action"][0]
        describes = action.startswith("Describe")
        now_s = time.monotonic()
        with self._lock:
            if self._random.random() < self.throttled:
                self.refused += 1
                return _THROTTLED
            self.asked[action] += 1
            said = self._said.get(request.body)
            if describes and said and now_s - said[0] < self.lag_s:
                self.stale += 1
                return said[1]
        answer = forward(self.target, request)
        if describes:
            with self._lock:
                self._said[request.body] = (now_s, answer)
        return answer
