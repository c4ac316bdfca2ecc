"""One request on its way to the engine, as the rows of the table of actions see it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from botocore import xform_name
from botocore.model import OperationModel, StructureShape

from batchlab.asg import convert
from batchlab.asg.convert import Asked
from batchlab.asg.fault import invalid
from batchlab.asg.paging import MOST, page
from batchlab.fleet.autoscaling import AutoScaling

T = TypeVar("T")
Answer = dict[str, Any]
Action = Callable[["Call"], Answer]


@dataclass(frozen=True, slots=True)
class Call:
    """What is asked of which engine, and of what shape the answer is."""

    engine: AutoScaling
    operation: OperationModel
    asked: Asked

    @property
    def group(self) -> str:
        """The group's name, which the model requires."""
        return str(self.asked["AutoScalingGroupName"])

    def some(self, *names: str) -> dict[str, Any]:
        """Those of these parameters that were given, by the engine's names."""
        return {xform_name(name): self.asked[name] for name in names if name in self.asked}

    def told(self, member: str, value: Any) -> Answer:
        """An answer whose only member is this one."""
        return {member: convert.told(self._shape(member), value)}

    def paged(
        self,
        member: str,
        items: Sequence[T],
        key: Callable[[T], str],
        *,
        most: int = MOST,
        tell: Callable[[StructureShape, T], Answer] = convert.told,
    ) -> Answer:
        """An answer that is one page of these, each as `tell` says for the shape of an entry."""
        found, following = page(items, self.asked, key, most=most)
        entry = self._shape(member).member
        return {member: [tell(entry, one) for one in found], **following}

    def _shape(self, member: str) -> Any:
        shape = self.operation.output_shape
        if not isinstance(shape, StructureShape):
            raise ValueError(f"{self.operation.name} has no answer")
        return shape.members[member]


def matching(
    call: Call, items: Sequence[T], names: Mapping[str, Callable[[T], Sequence[str]]]
) -> Sequence[T]:
    """The items that satisfy all of the request's filters: one of a filter's values is among those
    that `names` finds for its name. A name like `tag:KEY` is found under "tag:", as `KEY=value`."""
    for one in call.asked.get("Filters", ()):
        name, wanted = one.get("Name", ""), set(one.get("Values", ()))
        if name.startswith("tag:"):
            name, wanted = "tag:", {f"{name.removeprefix('tag:')}={value}" for value in wanted}
        if name not in names:
            allowed = " ".join(sorted(known.replace("tag:", "tag:<key>") for known in names))
            raise invalid(f"Filter type {name} is not correct. Allowed Filter types are: {allowed}")
        found = names[name]
        items = [item for item in items if wanted & set(found(item))]
    return items
