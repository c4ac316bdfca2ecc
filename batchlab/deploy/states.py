"""What can be done with a stack in each of CloudFormation's states, by AWS's documentation:
docs.aws.amazon.com/AWSCloudFormation/latest/UserGuide/view-stack-events.html (status codes), and
the API reference's pages of ContinueUpdateRollback, RollbackStack and DeleteStack."""

from __future__ import annotations

from batchlab.deploy.records import State
from batchlab.errors import Refused

NEXT = {
    "ROLLBACK_COMPLETE": "What had been made is gone again; the next `batchlab deploy apply` "
    "deletes the empty stack and begins anew.",
    "UPDATE_ROLLBACK_COMPLETE": "The stack is as it was before.",
    "UPDATE_ROLLBACK_FAILED": "The next `batchlab deploy apply` has the rollback go on; what can "
    "never be put back `aws cloudformation continue-update-rollback --stack-name {stack} "
    "--resources-to-skip ID` leaves out.",
    "UPDATE_FAILED": "Somebody has made that change without a rollback: `aws cloudformation "
    "rollback-stack --stack-name {stack}` puts it back, then apply again.",
    "IMPORT_ROLLBACK_FAILED": "Somebody has imported something into it: put that right in "
    "CloudFormation's console, then apply again.",
    "ROLLBACK_FAILED": "`batchlab deploy destroy` removes what is left; then apply again.",
    "CREATE_FAILED": "`batchlab deploy destroy` removes what is left; then apply again.",
    "DELETE_FAILED": "Put right what the reason names, then `batchlab deploy destroy` again; what "
    "can never be deleted `aws cloudformation delete-stack --stack-name {stack} "
    "--retain-resources ID` leaves to you.",
}
"""What to do next, by the state in which an operation has left the stack."""

_TO_GO = ("ROLLBACK_COMPLETE", "ROLLBACK_FAILED", "CREATE_FAILED", "DELETE_FAILED")
_BROKEN = ("UPDATE_ROLLBACK_FAILED", "UPDATE_FAILED", "IMPORT_ROLLBACK_FAILED")


def next_step(state: State) -> str:
    """What to do; "" where there is nothing to be put right."""
    return NEXT.get(state.status, "").replace("{stack}", state.name)


def must_go(state: State) -> bool:
    """Whether nothing can be done with it any more but to delete it."""
    return state.status in _TO_GO


def refuse_unchangeable(state: State) -> None:
    """Refused unless CloudFormation would take an update now."""
    if state.is_moving:
        raise Refused(
            f"The stack {state.name} is {state.status}.",
            remedy="`batchlab deploy apply` follows it to its end and goes on from there.",
        )
    if state.status in (*_TO_GO, *_BROKEN):
        raise Refused(
            f"The stack {state.name} is {state.status}: nothing can be changed in it.",
            remedy=f"{next_step(state)} `batchlab deploy status` says why it is so.",
        )
