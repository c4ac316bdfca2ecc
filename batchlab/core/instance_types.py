"""EC2 instance types (`backends/instance-types.toml`), and scaled-down shares for containers.

Invariant: in a loaded catalog, every field of every instance type has a valid value.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchlab.core import installation
from batchlab.core.errors import UsageError

ARCHITECTURES = ("x86_64", "arm64")
MIN_MEMORY_MIB = 128
"""Minimum memory in MiB of a container. A worker needs at least MIN_MEMORY_MIB even before it runs a task."""

_FIGURES = {"vcpu", "memory_mib", "architecture"}


@dataclass(frozen=True, slots=True)
class InstanceType:
    """An instance type in the catalog."""

    name: str
    vcpu: int
    memory_mib: int
    architecture: str
    gpus: int = 0
    """Number of NVIDIA GPUs."""


@dataclass(frozen=True, slots=True)
class Share:
    """CPUs and memory that a container may use when it takes the place of an instance."""

    cpus: float
    memory_mib: int


@dataclass(frozen=True, slots=True)
class Catalog:
    """Instance types by name, in the order of their file."""

    types: Mapping[str, InstanceType]

    def of(self, name: str) -> InstanceType:
        """Return the instance type `name`. Raise UsageError if the type does not exist."""
        if instance_type := self.types.get(name):
            return instance_type
        near = difflib.get_close_matches(name, self.types, n=3)
        raise UsageError(
            f"The catalog does not contain the instance type {name!r}.",
            remedy=f"Did you mean {' or '.join(near)}?"
            if near
            else "backends/instance-types.toml lists the known types.",
        )

    def gpus(self, names: Iterable[str]) -> int:
        """Return the smallest number of GPUs of the instance types. A type that is not in the catalog counts as a type
        without GPUs."""
        return min((self.types[name].gpus if name in self.types else 0 for name in names), default=0)

    def share(self, name: str, scale: float = 1.0) -> Share:
        """Return the CPUs and the memory of an instance type, multiplied by `scale`, so that a laptop can run a whole
        group.

        The memory of a share is at least MIN_MEMORY_MIB. Raise UsageError unless 0 < scale ≤ 1.
        """
        if not 0.0 < scale <= 1.0:
            raise UsageError(f"Instances cannot be scaled by {scale:g}.", remedy="Give a number above 0 and up to 1.")
        kind = self.of(name)
        memory_mib = max(MIN_MEMORY_MIB, round(kind.memory_mib * scale))
        return Share(kind.vcpu * scale, memory_mib)


def load(path: Path | None = None) -> Catalog:
    """Return the catalog in the file `path`, by default the file that ships with batchlab.

    Raise UsageError if the catalog is not valid.
    """
    path = path or installation.folder("backends") / "instance-types.toml"
    doc = installation.read_toml(path)
    rows = doc.get("types")
    if set(doc) != {"types"} or not isinstance(rows, dict) or not rows:
        raise UsageError(
            f"{path} must have a table [types] with a line for each instance type.",
            remedy="backends/instance-types.toml has one.",
        )
    return Catalog({name: _type(path, name, row) for name, row in rows.items()})


def _type(path: Path, name: str, row: Any) -> InstanceType:
    if not isinstance(row, dict) or set(row) - {"gpus"} != _FIGURES:
        raise UsageError(
            f"{path}: the type {name!r} must have {', '.join(sorted(_FIGURES))}.",
            remedy="Write exactly these figures, and `gpus` for a type with GPUs.",
        )
    numbers = {key: row[key] for key in ("vcpu", "memory_mib", "gpus") if key in row}
    for key, number in numbers.items():
        # Compare the exact type, because bool is a subclass of int in Python.
        if type(number) is not int or number < 1:
            raise UsageError(
                f"{path}: {key} of {name!r} is {number!r}, not a whole number above 0.",
                remedy="Write the figure from AWS's description of the type.",
            )
    if row["architecture"] not in ARCHITECTURES:
        raise UsageError(
            f"{path}: architecture of {name!r} is {row['architecture']!r}, not {' or '.join(ARCHITECTURES)}.",
            remedy="Write one of these.",
        )
    return InstanceType(name, **row)
