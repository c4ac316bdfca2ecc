"""Changes of the behavior of Auto Scaling, one rule each, and the checks that must notice each
change.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from urllib.parse import parse_qsl, urlencode

from tests.support.conform.proxy import Request, Response, Sabotage, Send

Form = dict[str, str]

_DONE = "<{0}Response><{0}Result></{0}Result></{0}Response>"


def _form(request: Request) -> Form:
    return dict(parse_qsl(request.body.decode(), keep_blank_values=True))


def _accepted(action: str) -> Response:
    return Response(200, _DONE.format(action).encode(), {"Content-Type": "text/xml"})


def _refused(code: str, message: str = "") -> Response:
    error = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
    body = f"<ErrorResponse>{error}</ErrorResponse>".encode()
    return Response(400, body, {"Content-Type": "text/xml"})


def _swallowed(action: str) -> Sabotage:
    """Accept the action without an effect."""

    def spoil(request: Request, send: Send) -> Response:
        return _accepted(action) if _form(request).get("Action") == action else send(request)

    return spoil


def _asked(action: str, change: Callable[[Form], Form]) -> Sabotage:
    """Replace the parameters of an action before the request is forwarded."""

    def spoil(request: Request, send: Send) -> Response:
        if (form := _form(request)).get("Action") == action:
            request.body = urlencode(change(form)).encode()
        return send(request)

    return spoil


def _told(action: str, pattern: str, text: str) -> Sabotage:
    """Replace a pattern in the endpoint's answer to an action."""

    def spoil(request: Request, send: Send) -> Response:
        response = send(request)
        if _form(request).get("Action") == action:
            response.body = re.sub(pattern, text, response.body.decode(), flags=re.DOTALL).encode()
        return response

    return spoil


def _without(prefix: str) -> Callable[[Form], Form]:
    return lambda form: {name: v for name, v in form.items() if not name.startswith(prefix)}


def _flipped(form: Form) -> Form:
    name = "ShouldDecrementDesiredCapacity"
    return {**form, name: "false" if form[name] == "true" else "true"}


def _a_name_is_taken_over(request: Request, send: Send) -> Response:
    """Replace an existing group of that name and its instances, as moto does."""
    response = send(request)
    if b"AlreadyExists" in response.body:
        return _accepted("CreateAutoScalingGroup")
    return response


def _a_missing_group_is_an_error(request: Request, send: Send) -> Response:
    response = send(request)
    described = _form(request).get("Action") == "DescribeAutoScalingGroups"
    if described and b"<member>" not in response.body and b"MaxRecords" not in request.body:
        return _refused("ValidationError")
    return response


def _a_late_completion_has_another_text(request: Request, send: Send) -> Response:
    response = send(request)
    if b"No active Lifecycle Action" in response.body:
        return _refused("ValidationError", "Too late.")
    return response


def _only_one_activity(request: Request, send: Send) -> Response:
    spoil = _asked("DescribeScalingActivities", lambda form: {**form, "MaxRecords": "1"})
    return spoil(request, send)


ASG_SABOTAGES: Mapping[str, tuple[Sabotage, set[str]]] = {
    "hooks are lost": (
        _asked("CreateAutoScalingGroup", _without("LifecycleHookSpecificationList")),
        {"autoscaling-launch-hook", "autoscaling-drain-hook"},
    ),
    "tags are lost": (_asked("CreateAutoScalingGroup", _without("Tags")), {"autoscaling-create"}),
    "completions are swallowed": (
        _swallowed("CompleteLifecycleAction"),
        {"autoscaling-launch-hook", "autoscaling-drain-hook", "autoscaling-hook-gone", "autoscaling-port"},
    ),
    "a late completion has another text": (_a_late_completion_has_another_text, {"autoscaling-hook-gone"}),
    "a name is taken over": (_a_name_is_taken_over, {"autoscaling-create-taken"}),
    "a missing group is an error": (_a_missing_group_is_an_error, {"autoscaling-missing"}),
    "the size of a page is ignored": (
        _asked("DescribeAutoScalingGroups", _without("MaxRecords")),
        {"autoscaling-pages"},
    ),
    "the second page is the first": (
        _asked("DescribeAutoScalingGroups", _without("NextToken")),
        {"autoscaling-pages", "autoscaling-token"},
    ),
    "the desired capacity is only noted": (
        _swallowed("SetDesiredCapacity"),
        {
            "autoscaling-desired",
            "autoscaling-desired-outside",
            "autoscaling-cooldown-ignored",
            "autoscaling-suspend",
            "autoscaling-activities",
            "autoscaling-drain-hook",
        },
    ),
    "a cooldown holds for all": (
        _asked("SetDesiredCapacity", lambda form: {**form, "HonorCooldown": "true"}),
        {"autoscaling-cooldown-ignored"},
    ),
    "a cooldown holds for nobody": (
        _asked("SetDesiredCapacity", lambda form: {**form, "HonorCooldown": "false"}),
        {"autoscaling-cooldown-honoured"},
    ),
    "new limits are ignored": (_swallowed("UpdateAutoScalingGroup"), {"autoscaling-limits-move-desired"}),
    "nothing is suspended": (_swallowed("SuspendProcesses"), {"autoscaling-suspend"}),
    "activities have no cause": (
        _told("DescribeScalingActivities", "<Cause>.*?</Cause>", ""),
        {"autoscaling-activities"},
    ),
    "only the newest activity is kept": (_only_one_activity, {"autoscaling-activities"}),
    "force is always used": (
        _asked("DeleteAutoScalingGroup", lambda form: {**form, "ForceDelete": "true"}),
        {"autoscaling-delete-in-use"},
    ),
    "force is ignored": (_asked("DeleteAutoScalingGroup", _without("ForceDelete")), {"autoscaling-delete-force"}),
    "a hook is put once": (_swallowed("PutLifecycleHook"), {"autoscaling-hook-put-again"}),
    "decrement means the opposite": (
        _asked("TerminateInstanceInAutoScalingGroup", _flipped),
        {"autoscaling-terminate-decrement", "autoscaling-terminate-replace", "autoscaling-port"},
    ),
    "a named instance stays": (
        _swallowed("TerminateInstanceInAutoScalingGroup"),
        {
            "autoscaling-terminate-decrement",
            "autoscaling-terminate-replace",
            "autoscaling-terminate-unknown",
            "autoscaling-port",
        },
    ),
    "health is only noted": (_swallowed("SetInstanceHealth"), {"autoscaling-unhealthy"}),
    "nothing is protected": (
        _swallowed("SetInstanceProtection"),
        {"autoscaling-protect", "autoscaling-protect-all", "autoscaling-protect-waiting", "autoscaling-protect-51"},
    ),
}
"""The sabotages by name, each with the checks that must notice it."""
