"""Attacks through the name of a stack or a pool, in an account that several teams share."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from typing import Any

import pytest

from batchlab.core.errors import UsageError
from batchlab.deploy import settings
from batchlab.deploy.settings import PoolSettings, Settings
from tests.deploy.test_settings import source
from tests.support.aws import cfn

COLLIDING = ("batchlab-tasks-x", "batchlab-tasks", "a-pool-b", "a-pool", "x-tasks-y-pool")
DISTINCT = ("batchlab", "tasks", "tasks-x", "pool-party", "batchlab-task-x", "batchlab-pools")


def patterns(stack: str) -> set[str]:
    """Return the name patterns that the roles of this stack may use, from the template."""
    found = re.findall(r"\$\{AWS::StackName\}(-[\w*-]*\*[\w*-]*)", cfn.stack_file().read_text())
    assert {"-tasks-*", "-pool-*"} <= set(found)
    return {f"{stack}{one}" for one in found}


def names(stack: str) -> set[str]:
    """Return the names of the queues and groups of this stack with one pool."""
    return {f"{stack}-{one}" for one in ("events", "tasks-p", "tasks-p-dead", "pool-p", "manager")}


@pytest.mark.parametrize("name", COLLIDING)
def test_stack_name_whose_resources_another_stack_could_use_is_refused(name: str) -> None:
    """Before, the workers of stack `batchlab` could read the queues of stack `batchlab-tasks-x`."""
    with pytest.raises(UsageError, match="could use its queues and groups") as caught:
        settings.parameters(Settings(name), source())
    assert caught.value.remedy
    others = {name[:end] for end in range(1, len(name)) if name[end] == "-"}
    assert any(fnmatchcase(part, pattern) for part in names(name) for other in others for pattern in patterns(other))


@pytest.mark.parametrize("name", DISTINCT)
def test_other_names_share_nothing(name: str) -> None:
    """An accepted name does not match a pattern of a stack with a shorter name."""
    settings.parameters(Settings(name), source())
    others = {name[:end] for end in range(1, len(name)) if name[end] == "-"}
    matched = [
        (part, pattern)
        for part in names(name)
        for other in others
        for pattern in patterns(other)
        if fnmatchcase(part, pattern)
    ]
    assert not matched


def test_a_pool_that_is_called_as_dead_letters_is_refused() -> None:
    """The tasks of pool `x-dead` and the dead letters of pool `x` would use the same queue."""
    pools: Any = (PoolSettings("x"), PoolSettings("x-dead"))
    with pytest.raises(UsageError, match="dead-letter queue"):
        settings.parameters(Settings("batchlab", pools=pools), source())
