"""What an Auto Scaling endpoint refuses, by AWS's own error codes.

Each `code` is the one on the wire; the message is AWS's where AWS's is known.
"""

from __future__ import annotations

from typing import ClassVar

from batchlab.core.errors import Refused


class Fault(Refused):
    """A request that is refused; all are HTTP 400, as on AWS."""

    code: ClassVar[str] = "ValidationError"


class ValidationError(Fault):
    """A parameter is wrong, or names what does not exist."""


class AlreadyExists(Fault):
    """A group of this name exists."""

    code = "AlreadyExists"


class LimitExceeded(Fault):
    """More hooks, policies or actions than a group may have."""

    code = "LimitExceeded"


class ResourceInUse(Fault):
    """The group has instances, and ForceDelete was not given."""

    code = "ResourceInUse"


class ScalingActivityInProgress(Fault):
    """A cooldown or an activity that is under way forbids it."""

    code = "ScalingActivityInProgress"


class InstanceRefreshInProgress(Fault):
    """One refresh at a time."""

    code = "InstanceRefreshInProgress"


class ActiveInstanceRefreshNotFound(Fault):
    """There is no refresh to cancel."""

    code = "ActiveInstanceRefreshNotFound"


class IrreversibleInstanceRefresh(Fault):
    """The refresh moves the group to nothing that could be taken back."""

    code = "IrreversibleInstanceRefresh"
