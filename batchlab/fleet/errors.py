"""Errors of the Auto Scaling API, with AWS's error codes.

Each `code` is the one in the response. The message is AWS's if it is known.
"""

from __future__ import annotations

from typing import ClassVar

from batchlab.core.errors import Refused


class Fault(Refused):
    """A refused request. All have HTTP status 400, as on AWS."""

    code: ClassVar[str] = "ValidationError"


class ValidationError(Fault):
    """A parameter is wrong, or names an object that does not exist."""


class AlreadyExists(Fault):
    """A group of this name exists."""

    code = "AlreadyExists"


class LimitExceeded(Fault):
    """The group has the maximum number of hooks, policies, or actions."""

    code = "LimitExceeded"


class ResourceInUse(Fault):
    """The group has instances, and ForceDelete was not given."""

    code = "ResourceInUse"


class ScalingActivityInProgress(Fault):
    """A cooldown or an activity in progress prevents the request."""

    code = "ScalingActivityInProgress"


class InstanceRefreshInProgress(Fault):
    """Another instance refresh is in progress."""

    code = "InstanceRefreshInProgress"


class ActiveInstanceRefreshNotFound(Fault):
    """The group does not have an active refresh."""

    code = "ActiveInstanceRefreshNotFound"


class IrreversibleInstanceRefresh(Fault):
    """The instance refresh cannot be rolled back."""

    code = "IrreversibleInstanceRefresh"
