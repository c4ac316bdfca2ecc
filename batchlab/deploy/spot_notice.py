"""Spot interruption notice for one instance, sent by AWS Fault Injection Service (FIS).

FIS needs a role and an experiment template. Invariant: the role's name and the template's tag contain the stack's name,
so `remove` finds both also after a killed process. A call of `remove` without a role and a template does not have an
effect.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

from batchlab.core.errors import BackendError
from batchlab.deploy.account import Account, Missing, aws_errors
from batchlab.deploy.stack import TAG

NOTICE_S = 120
"""Time in seconds between the notice and the interruption. AWS sends the notices of real interruptions as early."""
ACTION = "aws:ec2:send-spot-instance-interruptions"
POLICY = "send-spot-interruptions"
_POLL_S = 5.0
_ROLE_SETTLE_S = 60.0
"""Time in seconds for which FIS may refuse a new role, because IAM is eventually consistent."""
_ENDED = ("completed", "stopped", "failed", "cancelled")


def role_name(account: Account, stack: str) -> str:
    """Return the name of the role with which FIS sends the notice. The names of roles apply to all regions."""
    return f"{stack}-fis-{account.region}"


def prepare(account: Account, stack: str, instance: str) -> str:
    """Create the role and the experiment template for the notice to `instance`, and return the template's id.

    Raise BackendError if AWS does not allow a call.
    """
    trust = {"Effect": "Allow", "Principal": {"Service": "fis.amazonaws.com"}, "Action": "sts:AssumeRole"}
    allowed = {
        "Effect": "Allow",
        "Action": "ec2:SendSpotInstanceInterruptions",
        "Resource": account.arn.format("ec2") + "instance/*",
        "Condition": {"StringEquals": {f"aws:ResourceTag/{TAG}": stack}},
    }
    listing = {"Effect": "Allow", "Action": "ec2:DescribeInstances", "Resource": "*"}
    iam, name = account.client("iam"), role_name(account, stack)
    with aws_errors(f"Role {name!r}"):
        role = iam.create_role(
            RoleName=name, AssumeRolePolicyDocument=_document(trust), Tags=[{"Key": TAG, "Value": stack}]
        )["Role"]
        iam.put_role_policy(RoleName=name, PolicyName=POLICY, PolicyDocument=_document(allowed, listing))
    with aws_errors("CreateExperimentTemplate"):
        template = account.client("fis").create_experiment_template(
            clientToken=f"{stack}-{instance}",
            description=f"Spot interruption notice for {instance}",
            stopConditions=[{"source": "none"}],
            roleArn=role["Arn"],
            targets={
                "instance": {
                    "resourceType": "aws:ec2:spot-instance",
                    "resourceArns": [account.arn.format("ec2") + f"instance/{instance}"],
                    "selectionMode": "ALL",
                }
            },
            actions={
                "notice": {
                    "actionId": ACTION,
                    "parameters": {"durationBeforeInterruption": f"PT{NOTICE_S // 60}M"},
                    "targets": {"SpotInstances": "instance"},
                }
            },
            tags={TAG: stack},
        )["experimentTemplate"]
    return str(template["id"])


def send(
    account: Account,
    template: str,
    *,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> str:
    """Run the experiment, wait for its end, and return the experiment's state with its reason.

    Raise BackendError if the experiment fails.
    """
    fis, begun_s, tries = account.client("fis"), clock(), 0
    while True:
        tries += 1
        with aws_errors("StartExperiment"):
            request = {"experimentTemplateId": template, "clientToken": f"{template}-{tries}"}
            experiment = fis.start_experiment(**request)["experiment"]
        while experiment["state"]["status"] not in _ENDED:
            sleep(_POLL_S)
            with aws_errors("GetExperiment"):
                experiment = fis.get_experiment(id=experiment["id"])["experiment"]
        state = experiment["state"]
        text = f"FIS reports {state['status']}: {state.get('reason', '').rstrip('.') or 'no reason'}."
        if state["status"] == "completed":
            return text
        if "role" not in state.get("reason", "") or clock() - begun_s > _ROLE_SETTLE_S:
            raise BackendError(f"The experiment {experiment['id']} did not send the notice. {text}")
        sleep(_POLL_S)


def remove(account: Account, stack: str) -> int:
    """Remove the role and the experiment templates of the stack, and return the number of removed templates.

    The role is also removed if AWS does not allow the calls of FIS.
    """
    try:
        return _remove_templates(account, stack)
    finally:
        iam, name = account.client("iam"), role_name(account, stack)
        with suppress(Missing), aws_errors(f"Role {name!r}", _is_missing):
            iam.delete_role_policy(RoleName=name, PolicyName=POLICY)
        with suppress(Missing), aws_errors(f"Role {name!r}", _is_missing):
            iam.delete_role(RoleName=name)


def _remove_templates(account: Account, stack: str) -> int:
    fis, removed = account.client("fis"), 0
    for template in account.pages("fis", "list_experiment_templates", "experimentTemplates"):
        if template.get("tags", {}).get(TAG) == stack:
            with suppress(Missing), aws_errors("DeleteExperimentTemplate", _is_missing):
                fis.delete_experiment_template(id=template["id"])
                removed += 1
    return removed


def _document(*statements: Mapping[str, object]) -> str:
    return json.dumps({"Version": "2012-10-17", "Statement": list(statements)})


def _is_missing(code: str, _message: str) -> bool:
    return code in ("NoSuchEntity", "ResourceNotFound")
