"""The table of what each action of Auto Scaling does, and `act`, which looks it up.

Invariant: a row holds no rule of Auto Scaling's. It names a method of the engine, and says where
AWS's parameters are built otherwise than the engine's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from botocore.model import OperationModel

from batchlab.asg import groups, plans
from batchlab.asg.call import Action, Answer, Call
from batchlab.asg.convert import Asked
from batchlab.asg.fault import Fault
from batchlab.asg.service import Act
from batchlab.fleet.api import LAUNCHING, TERMINATING, Process
from batchlab.fleet.autoscaling import AutoScaling
from batchlab.fleet.faults import Fault as EngineFault
from batchlab.fleet.requests.policies import ADJUSTMENTS
from batchlab.fleet.termination import PLAIN, POLICIES

_LIMITS = {"MaxNumberOfAutoScalingGroups": 500, "MaxNumberOfLaunchConfigurations": 200}
"""AWS's defaults for an account; the engine has none of its own."""


def _limits(call: Call) -> Answer:
    number = len(call.engine.describe_auto_scaling_groups())
    return {
        **_LIMITS,
        "NumberOfAutoScalingGroups": number,
        "NumberOfLaunchConfigurations": 0,
    }


def _always(answer: Answer) -> Action:
    return lambda _: answer


ACTIONS: Mapping[str, Action] = {
    **groups.ACTIONS,
    **plans.ACTIONS,
    "DescribeAccountLimits": _limits,
    "DescribeAdjustmentTypes": _always(
        {"AdjustmentTypes": [{"AdjustmentType": name} for name in ADJUSTMENTS]}
    ),
    "DescribeLifecycleHookTypes": _always({"LifecycleHookTypes": [LAUNCHING, TERMINATING]}),
    # No group metrics are collected, so there are none to choose from.
    "DescribeMetricCollectionTypes": _always({"Metrics": [], "Granularities": []}),
    "DescribeScalingProcessTypes": _always(
        {"Processes": [{"ProcessName": str(process)} for process in Process]}
    ),
    "DescribeTerminationPolicyTypes": _always(
        {"TerminationPolicyTypes": sorted(POLICIES.keys() - {PLAIN})}
    ),
}


def act(engine: AutoScaling, changed: Callable[[], None]) -> Act:
    """What a service over this engine does; `changed` is called after each action that may have
    changed something, and should have the engine tick soon."""

    async def do(operation: OperationModel, asked: Asked) -> Answer:
        action = ACTIONS.get(operation.name)
        if action is None:
            raise Fault("NotImplemented", f"{operation.name} is not served here.")
        try:
            return action(Call(engine, operation, asked))
        except EngineFault as fault:
            raise Fault(fault.code, fault.message) from fault
        finally:
            if not operation.name.startswith("Describe"):
                changed()

    return do
