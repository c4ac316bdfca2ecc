"""Well-formed JSON values that would raise an error wherever they are used."""

from __future__ import annotations

import json
from typing import Any

import pytest

from batchlab.core.errors import TooNew
from batchlab.core.protocol import json_format
from tests.support.server.api import Rig, get, job, post

HANDLERS = ("pickle:../../x", "pickle:grid/x.pkl", "pickle:", "../x:f", "m", "", "m:f:g", ":", 7)


def _posted(**changes: Any) -> dict[str, Any]:
    """Return a submission with these values, as JSON."""
    doc = json.loads(json_format.dumps(json_format.job_to_json(job(tasks=1))))
    for name, value in changes.items():
        (doc["stages"][0] if name == "handler" else doc)[name] = value
    return {"job": doc}


@pytest.mark.parametrize("handler", HANDLERS)
def test_a_handler_that_no_worker_can_load_is_refused(rig: Rig, handler: object) -> None:
    """Before, such a handler ended every worker that received a task of the job."""
    answer = post(rig, "/v1/jobs", _posted(handler=handler))
    assert answer.status_code == 422, answer.text
    with pytest.raises(TooNew):
        json_format.job_from_json(_posted(handler=handler)["job"])
    assert get(rig, "/v1/jobs").json() == {"jobs": []}


def test_an_item_or_a_parameter_that_is_nested_too_deeply_is_refused(rig: Rig) -> None:
    """Before, such a value raised RecursionError wherever it was encoded."""
    deep: Any = 0
    for _ in range(400):
        deep = [deep]
    submissions = ({**_posted(items=1, input=None), "items": [deep]}, _posted(params=[["a", deep]]))
    for body in submissions:
        answer = post(rig, "/v1/jobs", body)
        assert answer.status_code == 422, answer.text
        assert "nested" in answer.json()["error"]
