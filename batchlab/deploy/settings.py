"""Settings of a stack, which are its pools and the values of its template parameters.

Invariant: this module raises UsageError for settings that AWS would refuse, except for errors that only AWS can detect.
The file `aws/settings.json` in the grid's folder stores the settings for the next plan. Without `aws/settings.json`,
the plan reads the settings from the stack.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from batchlab.core import instance_types
from batchlab.core.atomic_write import write_whole
from batchlab.core.errors import BackendError, UsageError
from batchlab.deploy.template import BASE, READABLE_FILE, Template, name_for_pool, parameters_of
from batchlab.runtime import descriptor
from batchlab.runtime.home import Home

STACK = "batchlab"
RELEASE = "Release"
"""Template parameter for the SHA-256 of the release archive. Users cannot set the template parameter `Release`."""
BUSY = "BusyWorkers"
"""Template parameter for the replacement of busy workers in an upgrade (see `plan.BUSY_WORKERS`)."""

# A stack name has at most 28 characters, so that the name of a pool's dead-letter queue has at most the 80 characters
# that SQS allows. A stack name does not contain two hyphens in a row, because RDS does not allow two hyphens in a row
# in the name of the stack's database.
_STACK_NAME = re.compile(r"(?=.{1,28}$)[a-z](-?[a-z0-9])*")
_SHADOWED_NAME = re.compile(r".+-(tasks|pool)(-.*)?")
"""Pattern of stack names that are not allowed, because another stack could use the queues or groups of such a stack.

The IAM roles of a stack `x` have access to all queues `x-tasks-*` and all Auto Scaling groups `x-pool-*`.
"""
_POOL_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")
_TYPE = re.compile(r"[a-z][a-z0-9-]*\.(nano|micro|small|medium|large|\d*xlarge|metal(-\d+xl)?)")
"""Pattern of instance types. AWS has more families than the catalog of instance types, but no other sizes."""
_IS_NAME = re.compile(r"Pool(\w*)Name")
_MACHINES = {"x86_64": "x86_64", "arm64": "aarch64"}
"""Architecture names in the output of `uname -m`, by EC2's architecture names. The instance catalog and the names of
Amazon's images use EC2's names.
"""
_AMAZONS = "resolve:ssm:/aws/service/ami-amazon-linux-latest/"
_MANAGERS = {"x86_64": "t3.small", "arm64": "t4g.small"}


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """Settings of a pool of workers. If `types` is empty, the template's default instance types apply.

    `parameters` contains the values of further template parameters of the pool. The names of the parameters are the
    names in the template file, which begin with "Pool".
    """

    name: str
    min_size: int = 0
    max_size: int = 10
    slots: int = 2
    types: tuple[str, ...] = ()
    parameters: tuple[tuple[str, str], ...] = ()

    def template_parameters(self) -> dict[str, str]:
        """Return the values of the pool's template parameters, with the parameter names in the template file."""
        sizes = {"PoolMin": str(self.min_size), "PoolMax": str(self.max_size), "PoolSlots": str(self.slots)}
        types = {"PoolInstanceTypes": ",".join(self.types)} if self.types else {}
        return {"PoolName": self.name, **sizes, **types, **dict(self.parameters)}


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of a stack. A template parameter that is missing in the settings has the template's default value.

    `parameters` contains the values of the template parameters that do not belong to a single pool. The release of the
    stack contains `packages` from PyPI for users' tasks, `database_ca` (a file of certificates for the database), and
    `environment` (environment variables of the manager and the workers).
    """

    stack: str = STACK
    region: str = ""
    pools: tuple[PoolSettings, ...] = (PoolSettings("default"),)
    parameters: tuple[tuple[str, str], ...] = ()
    packages: tuple[str, ...] = ()
    database_ca: str = ""
    environment: tuple[tuple[str, str], ...] = ()

    @property
    def architecture(self) -> str:
        """Return the architecture of the first instance type in the settings, or x86_64 if the settings do not name
        instance types.
        """
        return next((processor_of(type_) for pool in self.pools for type_ in pool.types), "x86_64")

    @property
    def machine(self) -> str:
        """Return the name of the instances' architecture in the output of `uname -m`."""
        return _MACHINES[self.architecture]

    def with_parameters(self, parameters: Mapping[str, str]) -> Settings:
        """Return the settings with the values of `parameters` added or replaced."""
        return replace(self, parameters=tuple(sorted({**dict(self.parameters), **parameters}.items())))


def processor_of(instance_type: str) -> str:
    """Return the architecture of an instance type, x86_64 or arm64.

    If the catalog of instance types lacks the type, a "g" after the generation number in the type's name means arm64
    (see https://docs.aws.amazon.com/ec2/latest/instancetypes).
    """
    if catalog_entry := instance_types.load().types.get(instance_type):
        return catalog_entry.architecture
    return "arm64" if re.match(r"[a-z]+[0-9]+g|a1\.", instance_type) else "x86_64"


def path_in(home: Home) -> Path:
    return home.backend_folder("aws") / "settings.json"


def read(home: Home) -> Settings | None:
    """Return the settings that the grid's folder stores, or None if the grid's folder does not store settings.

    Raise UsageError for invalid settings.
    """
    path = path_in(home)
    try:
        return parse(json.loads(path.read_text()), str(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise BackendError(f"{path} cannot be read: {error.strerror}.", remedy=READABLE_FILE) from error
    except ValueError as error:
        remedy = "Delete the file. The stack has the same settings."
        raise UsageError(f"{path} is not JSON: {error}.", remedy=remedy) from error


def write(home: Home, settings: Settings) -> None:
    home.make()
    path = path_in(home)
    path.parent.mkdir(exist_ok=True)
    write_whole(path, json.dumps(document(settings), indent=1))


def load(path: Path) -> Settings:
    """Return the settings from a user's YAML file. Raise UsageError for invalid settings.

    The path of the certificates becomes absolute, so that later commands find the file from any folder.
    """
    try:
        settings = parse(yaml.safe_load(path.read_text()), str(path))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.", remedy=READABLE_FILE) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not YAML: {error}.", remedy="Correct this line.") from error
    certificates = str(Path(settings.database_ca).absolute()) if settings.database_ca else ""
    return replace(settings, database_ca=certificates)


def document(settings: Settings) -> dict[str, Any]:
    """Return the settings as a JSON document that `parse` accepts."""
    document = asdict(settings)
    for part in (document, *document["pools"]):
        part["parameters"] = dict(part["parameters"])
    return {**document, "environment": dict(settings.environment)}


def parse(document: Any, where: str) -> Settings:
    """Return the settings from a parsed YAML or JSON document. If a key is unknown or its value is invalid, raise
    UsageError with the key.
    """
    values = _values(document, Settings, where)
    pools = []
    for pool in values.pop("pools", None) or []:
        pool_values = _values(pool, PoolSettings, f"{where}: pools")
        if "name" not in pool_values:
            raise UsageError(f"{where}: a pool lacks a name.", remedy="Write `name:` in each pool.")
        pools.append(PoolSettings(**pool_values))
    descriptor.check(dict(values.get("environment", ())), f"{where}: environment")
    if pools:
        values["pools"] = tuple(pools)
    return Settings(**values)


def _values(document: Any, kind: type[Settings | PoolSettings], where: str) -> dict[str, Any]:
    """Return the checked values of a parsed JSON object, by field of the class `kind`."""
    names = sorted(field.name for field in fields(kind))
    if not isinstance(document, dict):
        raise UsageError(f"{where} is not an object with {', '.join(names)}.", remedy="Write `name: value` lines.")
    if unknown := sorted(map(str, set(document) - set(names))):
        raise UsageError(
            f"{where} has {', '.join(map(repr, unknown))}, which is not a setting.",
            remedy=f"The settings are {', '.join(names)}.",
        )
    return {name: _value(name, value, f"{where}: {name}") for name, value in document.items()}


def _value(name: str, value: Any, where: str) -> Any:
    if name in ("min_size", "max_size", "slots"):
        # `isinstance` would accept the value True, because bool is a subclass of int.
        if type(value) is not int:
            raise UsageError(f"{where} is {value!r}, not a whole number.", remedy="Write a whole number.")
    elif name in ("pools", "types", "packages"):
        if not isinstance(value or [], list):
            raise UsageError(f"{where} is {value!r}, not a list.", remedy="Write a list such as [a, b].")
        return value if name == "pools" else tuple(map(str, value or []))
    elif name in ("parameters", "environment"):
        if not isinstance(value or {}, dict):
            raise UsageError(f"{where} is {value!r}, not names with values.", remedy="Write `Name: value` lines.")
        return tuple(sorted((str(key), text_of(text)) for key, text in (value or {}).items()))
    else:
        return str(value)
    return value


def text_of(value: Any) -> str:
    """Return a parameter's value as text for CloudFormation. Commas separate the elements of a list."""
    if isinstance(value, list):
        return ",".join(map(text_of, value))
    return str(value).lower() if isinstance(value, bool) else "" if value is None else str(value)


def from_stack(name: str, region: str, deployed: Mapping[str, str]) -> tuple[Settings, str]:
    """Return the settings of a deployed stack, computed from the stack's template parameters, and the name of the base
    pool.

    The base pool is the pool whose logical ids in the template do not contain the pool's name.
    """
    names = {key: pool for key, pool in deployed.items() if _IS_NAME.fullmatch(key)}
    base = names.get("PoolName", BASE)
    rest = {key: value for key, value in deployed.items() if key != RELEASE}
    pools = []
    # The loop begins with the longest parameter name, because "PoolBigName" of the pool "big" also begins with "Pool".
    for key in sorted(names, key=len, reverse=True):
        begin = key.removesuffix("Name")
        own_keys = [name for name in rest if name.startswith(begin) and name != begin]
        pools.append(_pool({f"Pool{name.removeprefix(begin)}": rest.pop(name) for name in own_keys}))
    settings = Settings(name, region, tuple(reversed(pools)), tuple(sorted(rest.items())))
    return settings, base


def _pool(own: dict[str, str]) -> PoolSettings:
    smallest, largest, slots = (int(own.pop(key, 0)) for key in ("PoolMin", "PoolMax", "PoolSlots"))
    types = tuple(filter(None, own.pop("PoolInstanceTypes", "").split(",")))
    name = own.pop("PoolName")
    return PoolSettings(name, smallest, largest, slots, types, tuple(sorted(own.items())))


def parameters(settings: Settings, template: Template, base: str = BASE) -> dict[str, str]:
    """Return the values of the template parameters in the settings, by parameter name in the expanded template.

    Raise UsageError if a required parameter is missing, or if the template does not accept a parameter or its value.
    """
    parameter_values, declared = values(settings, template, base), template.get("Parameters", {})
    for name, form in declared.items():
        if "Default" not in form and name not in (*parameter_values, *parameters_of(template), RELEASE):
            raise UsageError(f"The stack needs the parameter {name}.", remedy=f"Set it with --set {name}=VALUE.")
    _check_machines(settings, parameter_values, declared)
    return parameter_values


def values(settings: Settings, template: Template, base: str = BASE) -> dict[str, str]:
    """Return the values of the template parameters in the settings, by parameter name. Required parameters may be
    missing.

    `values` checks each value alone, and does not compare values.
    """
    check(settings)
    per_pool = parameters_of(template)
    declared = template.get("Parameters", {})
    parameter_values = {}
    for name, value in settings.parameters:
        if name not in declared or name in per_pool or name == RELEASE:
            raise _no_parameter(name, [n for n in declared if n not in (*per_pool, RELEASE)])
        parameter_values[name] = _accept(name, value, declared[name])
    for pool in settings.pools:
        for name, value in pool.template_parameters().items():
            if name not in per_pool:
                raise _no_parameter(name, per_pool)
            parameter_values[name_for_pool(name, pool.name, base)] = _accept(name, value, declared[name])
    return parameter_values


def _check_machines(
    settings: Settings, parameter_values: Mapping[str, str], declared: Mapping[str, Mapping[str, Any]]
) -> None:
    """Raise UsageError if the architecture of an image or of the manager differs from the pools' instance types.

    An instance cannot launch or boot with an image for another architecture. The function does not check an image that
    is named by an AMI id.
    """
    if not any(pool.types for pool in settings.pools):
        return
    wanted, wrong = settings.architecture, {}
    for name in ("WorkerImage", "ManagerImage", "ManagerInstanceType"):
        value = parameter_values.get(name, text_of(declared.get(name, {}).get("Default")))
        if name == "ManagerInstanceType" and _TYPE.fullmatch(value):
            if processor_of(value) != wanted:
                wrong[name] = _MANAGERS[wanted]
        elif value.startswith(_AMAZONS):
            kind = value.rpartition("-")[2]
            if kind in _MACHINES and kind != wanted:
                wrong[name] = value.replace(kind, wanted)
    if wrong:
        raise UsageError(
            f"The pools' instance types are {wanted}, but "
            f"{' and '.join(wrong)} {'is' if len(wrong) == 1 else 'are'} not.",
            remedy=f"Add {' '.join(f'--set {name}={value}' for name, value in wrong.items())}.",
        )


def _no_parameter(name: str, names: Sequence[str]) -> UsageError:
    near = difflib.get_close_matches(name, names, n=3) or sorted(names)
    return UsageError(f"The stack has no parameter {name!r}.", remedy=f"Similar parameters: {', '.join(near)}.")


def _accept(name: str, value: str, form: Mapping[str, Any]) -> str:
    """Return the value of a parameter unchanged. Raise UsageError if CloudFormation would refuse the value."""
    allowed = [text_of(choice) for choice in form.get("AllowedValues", ())]
    wrong = f"{name} cannot be {value!r}"
    if allowed and value not in allowed:
        raise UsageError(f"{wrong}.", remedy=f"Use one of {', '.join(map(repr, allowed))}.")
    if form.get("Type") == "Number":
        try:
            number = float(value)
        except ValueError:
            raise UsageError(f"{wrong}: it is not a number.", remedy="Write a number.") from None
        if not form.get("MinValue", number) <= number <= form.get("MaxValue", number):
            smallest, largest = form.get("MinValue", "-∞"), form.get("MaxValue", "∞")
            raise UsageError(f"{wrong}.", remedy=f"Use a number from {smallest} to {largest}.")
    pattern = form.get("AllowedPattern")
    if pattern and not re.fullmatch(pattern, value):
        constraint = form.get("ConstraintDescription") or f"A text that matches {pattern}"
        raise UsageError(f"{wrong}.", remedy=f"Allowed: {str(constraint).rstrip('.')}.")
    return value


def check(settings: Settings) -> None:
    """Raise UsageError if AWS would refuse a name or a number in the settings."""
    if not _STACK_NAME.fullmatch(settings.stack):
        raise UsageError(
            f"The stack cannot be called {settings.stack!r}.",
            remedy="Use up to 28 lowercase letters, digits, and single hyphens. Begin with a letter, and end without a "
            "hyphen. The names of its bucket, queues, groups, and database begin with this name.",
        )
    if match := _SHADOWED_NAME.fullmatch(settings.stack):
        word = match[1]
        other = settings.stack.rpartition(f"-{word}")[0]
        raise UsageError(
            f"The stack cannot be called {settings.stack!r}: a stack called {other!r} could use its queues and groups.",
            remedy=f"Use a name without -{word}.",
        )
    names = [pool.name for pool in settings.pools]
    for pool in settings.pools:
        if not _POOL_NAME.fullmatch(pool.name):
            raise UsageError(
                f"A pool cannot be called {pool.name!r}.",
                remedy="Use up to 40 lowercase letters, digits, '-', and '_'.",
            )
        if pool.name.endswith("-dead"):
            raise UsageError(
                f"A pool cannot be called {pool.name!r}: another pool's dead-letter queue could have this name.",
                remedy="Use a name that does not end in -dead.",
            )
        if names.count(pool.name) > 1:
            raise UsageError(f"The pool {pool.name!r} is given twice.", remedy="Give each pool a name of its own.")
        if not 0 <= pool.min_size <= pool.max_size or pool.max_size < 1 or pool.slots < 1:
            raise UsageError(
                f"The pool {pool.name!r} cannot have {pool.min_size} to {pool.max_size} instances "
                f"with {pool.slots} slots.",
                remedy="An example is default:0-10x2.",
            )
    manager = [value for name, value in settings.parameters if name == "ManagerInstanceType"]
    for type_ in (*(type_ for pool in settings.pools for type_ in pool.types), *manager):
        if not _TYPE.fullmatch(type_):
            near = difflib.get_close_matches(type_, instance_types.load().types, n=1)
            remedy = f"Did you mean {near[0]}?" if near else "An example is m7i.large."
            raise UsageError(f"{type_!r} is not an instance type.", remedy=remedy)
    kinds = {processor_of(type_): type_ for pool in settings.pools for type_ in pool.types}
    if len(kinds) > 1:
        raise UsageError(
            f"{' and '.join(kinds.values())} have different processors ({' and '.join(kinds)}), but a stack has one "
            "release and one image.",
            remedy="Use types with one kind of processor, or a second stack for the other kind.",
        )
