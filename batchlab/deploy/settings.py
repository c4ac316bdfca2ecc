"""Settings of a stack: its pools, and the parameters of its template.

Invariant: settings that load can be deployed, as far as that can be checked without AWS. The home stores them in
`aws/settings.json`, and the next plan begins with them. Without this file, they are read from the stack itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from batchlab.core import instance_types
from batchlab.core.atomic_write import write_whole
from batchlab.core.errors import BackendError, UsageError
from batchlab.deploy.template import BASE, Template, parameters_of, renamed
from batchlab.runtime import descriptor
from batchlab.runtime.home import Home

STACK = "batchlab"
RELEASE = "Release"
"""The parameter that is not a setting: the release, by its archive's SHA-256."""

# With the longest stack and pool names, the name of a pool's dead-letter queue has the 80
# characters that SQS allows. RDS does not allow two hyphens in a row, and the database is named
# after the stack.
_STACK_NAME = re.compile(r"(?=.{1,28}$)[a-z](-?[a-z0-9])*")
_TAKEN = re.compile(r".+-(tasks|pool)(-.*)?")
"""Names of stacks whose queues or groups match the patterns in another stack's rights: the stack
`x` may use the queues `x-tasks-*` and the groups `x-pool-*`."""
_POOL_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")
_TYPE = re.compile(r"[a-z][a-z0-9-]*\.[a-z0-9-]+")
_POOL = {"name", "min_size", "max_size", "slots", "types", "parameters"}
_IS_NAME = re.compile(r"Pool(\w*)Name")
_MACHINES = {"x86_64": "x86_64", "arm64": "aarch64"}
"""Processor names by EC2, used in the instance catalog and in Amazon's images, with those of `uname
-m`, used in releases."""
_AMAZONS = "resolve:ssm:/aws/service/ami-amazon-linux-latest/"
_MANAGERS = {"x86_64": "t3.small", "arm64": "t4g.small"}


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """A pool of workers. Without `types`, the template's default types apply. `parameters` are
    other template parameters that begin with "Pool", by their names in the file."""

    name: str
    min_size: int = 0
    max_size: int = 10
    slots: int = 2
    types: tuple[str, ...] = ()
    parameters: tuple[tuple[str, str], ...] = ()

    def given(self) -> dict[str, str]:
        """Return its parameters, by their names in a template with one pool."""
        given = {
            "PoolName": self.name,
            "PoolMin": str(self.min_size),
            "PoolMax": str(self.max_size),
            "PoolSlots": str(self.slots),
        }
        if self.types:
            given["PoolInstanceTypes"] = ",".join(self.types)
        return {**given, **dict(self.parameters)}


@dataclass(frozen=True, slots=True)
class Settings:
    """A stack.

    `parameters` are those that are not a pool's. Others have their defaults. The release contains
    `packages` (from PyPI, for users' tasks), `database_ca` (a file of certificates to verify the
    database's), and `environment` (variables of manager and workers).
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
        """Return the architecture of the release, from the pools' types. Without types it is x86_64."""
        return next((processor_of(one) for pool in self.pools for one in pool.types), "x86_64")

    @property
    def machine(self) -> str:
        """Return the architecture as `uname -m` prints it on an instance."""
        return _MACHINES[self.architecture]

    def with_parameters(self, given: Mapping[str, str]) -> Settings:
        """Return the settings with these parameters added or replaced."""
        return replace(self, parameters=tuple(sorted({**dict(self.parameters), **given}.items())))


def processor_of(instance_type: str) -> str:
    """Return x86_64 or arm64. For a type outside the catalog, the name decides: a g right after the
    generation means Graviton (https://docs.aws.amazon.com/ec2/latest/instancetypes)."""
    known = instance_types.load().types.get(instance_type)
    if known:
        return known.architecture
    return "arm64" if re.match(r"[a-z]+[0-9]+g|a1\.", instance_type) else "x86_64"


def path_in(home: Home) -> Path:
    return home.backend_folder("aws") / "settings.json"


def read(home: Home) -> Settings | None:
    """Return the settings stored in this home, or None. Raises UsageError."""
    path = path_in(home)
    try:
        return parse(json.loads(path.read_text()), str(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise BackendError(
            f"{path} cannot be read: {error.strerror}.", remedy="Name a file that is there and can be read."
        ) from error
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}.", remedy="Delete it: the stack itself has the same.") from error


def write(home: Home, settings: Settings) -> None:
    """Write the settings atomically."""
    home.make()
    path = path_in(home)
    path.parent.mkdir(exist_ok=True)
    write_whole(path, json.dumps(document(settings), indent=1))


def load(path: Path) -> Settings:
    """Return the settings in a user's YAML file. Raises UsageError for invalid ones."""
    try:
        found = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read: {error.strerror}.", remedy="Name a file that is there and can be read."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not YAML: {error}.", remedy="Put that line right.") from error
    return parse(found, str(path))


def document(settings: Settings) -> dict[str, Any]:
    """Return the settings in the form that `parse` accepts."""
    made = asdict(settings)
    made["parameters"] = dict(settings.parameters)
    made["packages"] = list(settings.packages)
    made["environment"] = dict(settings.environment)
    for pool, pool_settings in zip(made["pools"], settings.pools, strict=True):
        pool["parameters"] = dict(pool_settings.parameters)
        pool["types"] = list(pool_settings.types)
    return made


def parse(found: Any, where: str) -> Settings:
    """Return the settings of a YAML or JSON object. Raises UsageError with the invalid key."""
    known = {"stack", "region", "pools", "parameters", "packages", "database_ca", "environment"}
    fields = _object(found, known, where)
    pools = []
    for one in fields.pop("pools", None) or []:
        pool = _object(one, _POOL, f"{where}: pools")
        for figure in ("min_size", "max_size", "slots"):
            # In Python, True is an int.
            if figure in pool and type(pool[figure]) is not int:
                raise UsageError(
                    f"{where}: {figure} is {pool[figure]!r}, not a whole number.", remedy="Write a whole number."
                )
        pool["types"] = _texts(pool.pop("types", None), f"{where}: types")
        pool["parameters"] = _parameters(pool.pop("parameters", None), where)
        if "name" not in pool:
            raise UsageError(f"{where}: a pool lacks a name.", remedy="Say name: in each of the pools.")
        pools.append(PoolSettings(**{**pool, "name": str(pool["name"])}))
    fields["parameters"] = _parameters(fields.pop("parameters", None), where)
    variables = fields.pop("environment", None)
    fields["environment"] = _parameters(variables, f"{where}: environment")
    descriptor.check(dict(fields["environment"]), f"{where}: environment")
    fields["packages"] = _texts(fields.pop("packages", None), f"{where}: packages")
    for name in ("stack", "region", "database_ca"):
        if name in fields:
            fields[name] = str(fields[name])
    if pools:
        fields["pools"] = tuple(pools)
    return Settings(**fields)


def _texts(found: Any, where: str) -> tuple[str, ...]:
    if not isinstance(found or [], list):
        raise UsageError(f"{where} is {found!r}, not a list.", remedy="Write it as [one, another].")
    return tuple(map(str, found or []))


def _object(found: Any, known: set[str], where: str) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise UsageError(
            f"{where} is not an object with {', '.join(sorted(known))}.", remedy="Write `name: value` lines."
        )
    if unknown := set(found) - known:
        raise UsageError(
            f"{where} has {', '.join(map(repr, sorted(map(str, unknown))))}, which is not a setting.",
            remedy=f"There are {', '.join(sorted(known))}.",
        )
    return dict(found)


def _parameters(found: Any, where: str) -> tuple[tuple[str, str], ...]:
    if not isinstance(found or {}, dict):
        raise UsageError(
            f"{where}: parameters is {found!r}, not names with values.", remedy="Write `Name: value` lines."
        )
    return tuple(sorted((str(name), text_of(value)) for name, value in (found or {}).items()))


def text_of(value: Any) -> str:
    """Return a parameter's value as CloudFormation's text, with commas in lists."""
    if isinstance(value, list):
        return ",".join(map(text_of, value))
    return str(value).lower() if isinstance(value, bool) else "" if value is None else str(value)


def from_stack(name: str, region: str, deployed: Mapping[str, str]) -> tuple[Settings, str]:
    """Return the settings of an existing stack from its parameters, and its base pool, whose ids do
    not contain its name."""
    names = {key: pool for key, pool in deployed.items() if _IS_NAME.fullmatch(key)}
    base = names.get("PoolName", BASE)
    rest = {key: value for key, value in deployed.items() if key != RELEASE}
    pools = []
    # The longest comes first, because "PoolBig…" also begins with "Pool".
    for key in sorted(names, key=len, reverse=True):
        begin = key.removesuffix("Name")
        own = {f"Pool{k.removeprefix(begin)}": rest.pop(k) for k in list(rest) if _is(k, begin)}
        pools.append(_pool(own))
    settings = Settings(name, region, tuple(reversed(pools)), tuple(sorted(rest.items())))
    return settings, base


def _is(key: str, begin: str) -> bool:
    return key.startswith(begin) and key != begin


def _pool(own: dict[str, str]) -> PoolSettings:
    smallest, largest, slots = (int(own.pop(key, 0)) for key in ("PoolMin", "PoolMax", "PoolSlots"))
    types = tuple(filter(None, own.pop("PoolInstanceTypes", "").split(",")))
    name = own.pop("PoolName")
    return PoolSettings(name, smallest, largest, slots, types, tuple(sorted(own.items())))


def parameters(settings: Settings, template: Template, base: str = BASE) -> dict[str, str]:
    """Return all parameters that the settings give a value, by their names in the expanded
    template. Raises UsageError for one that is missing, or that the file `template` does not have
    or accept."""
    given, declared = values(settings, template, base), template.get("Parameters", {})
    for name, form in declared.items():
        if "Default" not in form and name not in (*given, *parameters_of(template), RELEASE):
            raise UsageError(f"The stack needs {name}.", remedy=f"Say --set {name}=VALUE.")
    _check_machines(settings, given, declared)
    return given


def values(settings: Settings, template: Template, base: str = BASE) -> dict[str, str]:
    """Return the parameters of settings that may be incomplete. Each is checked by itself."""
    check(settings)
    per_pool = parameters_of(template)
    declared = template.get("Parameters", {})
    given = {}
    for name, value in settings.parameters:
        if name not in declared or name in per_pool or name == RELEASE:
            raise _no_parameter(name, [n for n in declared if n not in (*per_pool, RELEASE)])
        given[name] = _accepted(name, value, declared[name])
    for pool in settings.pools:
        for name, value in pool.given().items():
            if name not in per_pool:
                raise _no_parameter(name, per_pool)
            given[renamed(name, pool.name, base)] = _accepted(name, value, declared[name])
    return given


def _check_machines(settings: Settings, given: Mapping[str, str], declared: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise UsageError if the images or the manager have another processor than the pools' types.
    Such an instance could not launch, or not boot the release. An AMI given by its id is not
    checked."""
    if not any(pool.types for pool in settings.pools):
        return
    wanted, wrong = settings.architecture, {}
    for name in ("WorkerImage", "ManagerImage", "ManagerInstanceType"):
        value = given.get(name, text_of(declared.get(name, {}).get("Default")))
        if name == "ManagerInstanceType" and _TYPE.fullmatch(value):
            if processor_of(value) != wanted:
                wrong[name] = _MANAGERS[wanted]
        elif value.startswith(_AMAZONS):
            kind = value.rpartition("-")[2]
            if kind in _MACHINES and kind != wanted:
                wrong[name] = value.replace(kind, wanted)
    if wrong:
        raise UsageError(
            f"The pools' instance types are {wanted}, and {' and '.join(wrong)} "
            f"{'is' if len(wrong) == 1 else 'are'} not.",
            remedy=f"Say {' '.join(f'--set {name}={value}' for name, value in wrong.items())}.",
        )


def _no_parameter(name: str, known: Sequence[str]) -> UsageError:
    import difflib

    near = difflib.get_close_matches(name, known, n=3) or sorted(known)
    return UsageError(f"The stack has no parameter {name!r}.", remedy=f"There are {', '.join(near)}.")


def _accepted(name: str, value: str, form: Mapping[str, Any]) -> str:
    """Return the value if CloudFormation accepts it. Raises UsageError."""
    allowed = [text_of(one) for one in form.get("AllowedValues", ())]
    wrong = f"{name} cannot be {value!r}"
    if allowed and value not in allowed:
        raise UsageError(f"{wrong}.", remedy=f"It is one of {', '.join(map(repr, allowed))}.")
    if form.get("Type") == "Number":
        try:
            number = float(value)
        except ValueError:
            raise UsageError(f"{wrong}: it is not a number.", remedy="Write a number.") from None
        if not form.get("MinValue", number) <= number <= form.get("MaxValue", number):
            least, most = form.get("MinValue", "-∞"), form.get("MaxValue", "∞")
            raise UsageError(f"{wrong}.", remedy=f"It is from {least} to {most}.")
    pattern = form.get("AllowedPattern")
    if pattern and not re.fullmatch(pattern, value):
        meant = form.get("ConstraintDescription") or f"what matches {pattern}"
        raise UsageError(f"{wrong}.", remedy=f"It is {str(meant).rstrip('.')}.")
    return value


def check(settings: Settings) -> None:
    """Raise UsageError unless AWS accepts the names and numbers."""
    if not _STACK_NAME.fullmatch(settings.stack):
        raise UsageError(
            f"The stack cannot be called {settings.stack!r}.",
            remedy="Use up to 28 small letters, digits and single hyphens, a letter first and no "
            "hyphen last: its bucket, queues, groups and database begin with it.",
        )
    if match := _TAKEN.fullmatch(settings.stack):
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
                f"A pool cannot be called {pool.name!r}.", remedy="Use up to 40 small letters, digits, '-' and '_'."
            )
        if pool.name.endswith("-dead"):
            raise UsageError(
                f"A pool cannot be called {pool.name!r}: another pool's dead letters could have the same queue.",
                remedy="Use a name that does not end in -dead.",
            )
        if names.count(pool.name) > 1:
            raise UsageError(f"The pool {pool.name!r} is given twice.", remedy="Give each pool a name of its own.")
        if not 0 <= pool.min_size <= pool.max_size or pool.max_size < 1 or pool.slots < 1:
            raise UsageError(
                f"The pool {pool.name!r} cannot have {pool.min_size} to {pool.max_size} instances "
                f"with {pool.slots} slots.",
                remedy="Write for example default:0-10x2.",
            )
        for one in pool.types:
            if not _TYPE.fullmatch(one):
                raise UsageError(f"{one!r} is not an instance type.", remedy="Write for example m7i.large.")
    _check_architectures(settings)


def _check_architectures(settings: Settings) -> None:
    """Check that all types have one processor architecture, because one release and one image have one."""
    kinds = {processor_of(one): one for pool in settings.pools for one in pool.types}
    if len(kinds) > 1:
        raise UsageError(
            f"{' and '.join(kinds.values())} have different processors "
            f"({' and '.join(kinds)}), and one stack's release is for one.",
            remedy="Use types of one kind, or another stack for the other.",
        )
