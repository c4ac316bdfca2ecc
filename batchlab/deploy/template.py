"""Functions that read a CloudFormation template as YAML, expand the template to several pools, and write the template
as JSON.

Invariants: the written template has the same meaning as the template file. The written template is compact JSON,
because a request to CloudFormation may contain at most 51,200 bytes of template. Comments and indentation are more than
a third of the template file. The logical ids of a pool depend neither on other pools nor on their order, so a new or
removed pool never replaces another pool's resources.

An emulator refuses a template with an unknown resource type, even if the condition of the resource is false. Emulators
also support fewer functions in conditions than AWS. A template for an emulator is therefore rendered without
conditions. A rendered template creates the same resources as the original template with the same parameters.

In the template file, a resource that exists once per pool has `Metadata: {batchlab: {per: pool}}` and a logical id that
begins with "Pool". The logical ids of a pool's parameters, conditions, and rules also begin with "Pool". The base pool
keeps the logical ids of the template file. For a pool "big", the logical id "PoolQueue" becomes "PoolBigQueue". If a
part of the template that all pools share refers to a resource of a pool, the innermost list element with the reference
is repeated for each pool.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from batchlab.core import installation
from batchlab.core.errors import BatchlabError, UsageError

Template = dict[str, Any]

READABLE_FILE = "Name an existing file that can be read."
"""Remedy for a file that cannot be read."""

MAX_INLINE_BYTES = 51_200
"""Maximum size in bytes of the parameter TemplateBody of CreateChangeSet."""
MAX_STORED_BYTES = 1_048_576
"""Maximum size in bytes of a template to which the parameter TemplateURL of CreateChangeSet refers."""
LIMITS = {"Resources": 500, "Parameters": 200, "Outputs": 200, "Mappings": 200}
"""CloudFormation's maximum number of entries in a section of a template, by the name of the section."""


class _Loader(yaml.SafeLoader):
    """YAML loader for CloudFormation's short forms such as !Ref.

    Like AWS, the loader reads a date, such as the Version of an IAM policy, as text.
    """


def _short_form(loader: _Loader, suffix: str, node: yaml.Node) -> Any:
    value: Any
    if isinstance(node, yaml.ScalarNode):
        value = loader.construct_scalar(node)
    elif isinstance(node, yaml.SequenceNode):
        value = loader.construct_sequence(node, deep=True)
    else:
        assert isinstance(node, yaml.MappingNode)
        value = loader.construct_mapping(node, deep=True)
    if suffix in ("Ref", "Condition"):
        return {suffix: value}
    if suffix == "GetAtt" and isinstance(value, str):
        value = value.split(".", 1)
    return {f"Fn::{suffix}": value}


_Loader.add_multi_constructor("!", _short_form)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def shipped_template() -> Path:
    """Return the path of the template file in this installation of batchlab."""
    return installation.folder("backends") / "aws" / "stack.yaml"


def load(path: Path) -> Template:
    """Return the template from a YAML or JSON file. Raise UsageError if the file is not a template."""
    try:
        return parse(path.read_text(), str(path))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.", remedy=READABLE_FILE) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not YAML: {error}.", remedy="Correct this line.") from error


def parse(text: str, where: str) -> Template:
    """Return the template from a YAML or JSON text. Raise UsageError if the text is not a template."""
    try:
        document = yaml.load(text, Loader=_Loader)  # noqa: S506 - `_Loader` is a SafeLoader
    except yaml.YAMLError as error:
        raise UsageError(f"{where} is not YAML: {error}.", remedy="Correct this line.") from error
    if not isinstance(document, dict) or not isinstance(document.get("Resources"), dict):
        raise UsageError(
            f"{where} is not a CloudFormation template: it lacks Resources.",
            remedy="An example is backends/aws/stack.yaml.",
        )
    return document


def body(template: Template) -> str:
    """Return a template as compact JSON. Raise UsageError if the template exceeds a limit of CloudFormation."""
    for section, most in LIMITS.items():
        if (count := len(template.get(section, ()))) > most:
            raise UsageError(
                f"The stack would have {count} {section}, but CloudFormation takes {most}.",
                remedy="Use fewer pools in one stack.",
            )
    text = json.dumps(template, separators=(",", ":"), ensure_ascii=False)
    if (size := len(text.encode())) > MAX_STORED_BYTES:
        raise UsageError(
            f"The stack's template would have {size:,} bytes, but CloudFormation takes {MAX_STORED_BYTES:,}.",
            remedy="Use fewer pools in one stack.",
        )
    return text


_NAMED = re.compile(r"\$\{([^!}][^}]*)\}")


def render(template: Template, values: Mapping[str, str]) -> Template:
    """Return a copy of the template without conditions. The copy lacks the resources and outputs whose conditions are
    false.

    `values` contains the values of all parameters, and of the pseudo parameters that conditions may use, such as
    AWS::Region.
    """
    return _Rendering(template, values, template.get("Conditions", {})).result()


SIMPLEDB = "UsesSimpleDb"
"""Condition of the template's parts for a ledger in SimpleDB."""


def without_simpledb(template: Template) -> Template:
    """Return a copy of the template that cannot create a ledger in SimpleDB.

    CloudFormation refuses a template with a resource type that the region lacks, even if the condition of the resource
    is false. Most regions lack SimpleDB.
    """
    if SIMPLEDB not in template.get("Conditions", {}):
        return template
    rendered = _Rendering(template, {"Ledger": ""}, {SIMPLEDB}).result()
    ledger = template["Parameters"]["Ledger"]
    allowed = [kind for kind in ledger["AllowedValues"] if kind != "simpledb"]
    return {**rendered, "Parameters": {**template["Parameters"], "Ledger": {**ledger, "AllowedValues": allowed}}}


_NO_VALUE = {"Ref": "AWS::NoValue"}


class _Rendering:
    """Rendering of the conditions `chosen` of a template."""

    def __init__(self, template: Template, values: Mapping[str, str], chosen: Collection[str]) -> None:
        self._template = template
        self._values = values
        self._chosen = chosen

    def result(self) -> Template:
        rendered = {name: content for name, content in self._template.items() if name != "Conditions"}
        conditions = self._template.get("Conditions", {})
        if open_conditions := {name: test for name, test in conditions.items() if name not in self._chosen}:
            rendered["Conditions"] = open_conditions
        for section in ("Resources", "Outputs"):
            rendered[section] = {
                name: self._choose({k: v for k, v in part.items() if k != "Condition" or v not in self._chosen})
                for name, part in self._template.get(section, {}).items()
                if part.get("Condition") not in self._chosen or self._holds(part["Condition"])
            }
        for part in rendered["Resources"].values():
            if depends := part.pop("DependsOn", None):
                names = [depends] if isinstance(depends, str) else depends
                if remaining := [name for name in names if name in rendered["Resources"]]:
                    part["DependsOn"] = remaining
        return rendered

    def _holds(self, name: str) -> bool:
        return self._test(self._template["Conditions"][name])

    def _choose(self, node: Any) -> Any:
        """Return a copy of a template node in which each Fn::If with a chosen condition is replaced by its value."""
        if isinstance(node, list):
            return [value for part in node if (value := self._choose(part)) != _NO_VALUE]
        if not isinstance(node, dict):
            return node
        if "Fn::If" in node:
            condition, then, otherwise = node["Fn::If"]
            if condition in self._chosen:
                return self._choose(then if self._holds(condition) else otherwise)
            return {"Fn::If": [condition, self._choose(then), self._choose(otherwise)]}
        return {key: chosen for key, value in node.items() if (chosen := self._choose(value)) != _NO_VALUE}

    def _test(self, node: dict[str, Any]) -> bool:
        ((name, value),) = node.items()
        if name == "Condition":
            return self._holds(value)
        if name == "Fn::Equals":
            first, second = map(self._text, value)
            return first == second
        tests = map(self._test, value)
        if name == "Fn::Not":
            return not next(tests)
        if name in ("Fn::And", "Fn::Or"):
            return all(tests) if name == "Fn::And" else any(tests)
        raise _flaw(f"{name} is not a condition.")

    def _text(self, node: Any) -> str:
        if isinstance(node, str):
            return node
        if not isinstance(node, dict):
            return str(node).lower() if isinstance(node, bool) else str(node)
        ((name, value),) = node.items()
        if name == "Ref":
            return self._value(value)
        if name == "Fn::Sub" and isinstance(value, str):
            return _NAMED.sub(lambda match: self._value(match[1]), value)
        if name == "Fn::Join":
            return str(value[0]).join(map(self._text, value[1]))
        if name == "Fn::Select":
            return self._list(value[1])[int(value[0])]
        raise _flaw(f"a condition uses {name}.")

    def _list(self, node: Any) -> list[str]:
        if isinstance(node, dict) and "Fn::Split" in node:
            separator, text = node["Fn::Split"]
            return self._text(text).split(separator)
        return [self._text(part) for part in node]

    def _value(self, name: str) -> str:
        if name in self._values:
            return self._values[name]
        raise _flaw(f"a condition uses {name}.")


BASE = "default"
PREFIX = "Pool"

_Rename = Callable[[str], str]

_INTERFACE = "AWS::CloudFormation::Interface"
_NAMED_TEMPLATES = re.compile(r"\$\{(?!!)\s*([A-Za-z0-9:]+)([^}]*)\}")


def id_part(pool: str) -> str:
    """Return the form of a pool's name in logical ids, such as "GpuLarge" for the pool "gpu-large"."""
    return "".join(part[:1].upper() + part[1:] for part in re.split(r"[^a-z0-9]+", pool))


def name_for_pool(name: str, pool: str, base: str = BASE) -> str:
    """Return the logical id or the parameter name for the pool `pool`. `name` is the name in the template file, which
    begins with "Pool".
    """
    return name if pool == base else f"{PREFIX}{id_part(pool)}{name.removeprefix(PREFIX)}"


def parameters_of(template: Template) -> list[str]:
    """Return the names of the template parameters that exist once per pool."""
    return [name for name in template.get("Parameters", {}) if name.startswith(PREFIX)]


def expand(template: Template, pools: Sequence[str], base: str = BASE, *, for_scanners: bool = False) -> Template:
    """Return a copy of the template with the pools `pools`. Raise UsageError if two pools would have the same logical
    ids.

    `base` is the pool whose logical ids do not contain the pool's name. Only with `for_scanners`, the copy has the
    metadata for scanners such as checkov: the rules that a resource is excepted from, with the reasons.
    """
    if not pools:
        raise UsageError("A stack needs a pool.", remedy="Add --pool default:0-10x2.")
    return _Expansion(template, list(pools), base, for_scanners=for_scanners).result()


class _Expansion:
    def __init__(self, template: Template, pools: list[str], base: str, *, for_scanners: bool) -> None:
        self._template = template
        self._pools = pools
        self._base = base
        self._for_scanners = for_scanners
        self._resources = {name for name, resource in template["Resources"].items() if _is_per_pool(name, resource)}
        self._per_pool = self._resources | {
            name
            for section in ("Parameters", "Conditions", "Rules")
            for name in template.get(section, {})
            if name.startswith(PREFIX)
        }

    def result(self) -> Template:
        expanded: Template = {}
        for section, content in self._template.items():
            if section == "Metadata":
                if _INTERFACE in content:
                    expanded[section] = {_INTERFACE: self._interface(content[_INTERFACE])}
            elif section in ("Parameters", "Conditions", "Rules", "Resources", "Outputs"):
                expanded[section] = self._section(section, content)
            else:
                expanded[section] = content
        for pool in self._pools:
            expanded["Parameters"][name_for_pool("PoolName", pool, self._base)]["Default"] = pool
        return expanded

    def _section(self, section: str, content: dict[str, Any]) -> dict[str, Any]:
        section_parts: dict[str, Any] = {}
        for name, part in content.items():
            if section == "Resources":
                part = _without_notes(part, for_scanners=self._for_scanners)
            shared, is_open = self._spread(part)
            if name in self._per_pool or (is_open and section == "Outputs" and name.startswith(PREFIX)):
                copies = [(name_for_pool(name, p, self._base), _map(part, self._for(p))) for p in self._pools]
            elif is_open:
                raise _flaw(f"{section} {name} mentions a pool's part outside of a list.")
            else:
                copies = [(name, shared)]
            for key, value in copies:
                if key in section_parts or (key != name and key in content):
                    raise UsageError(
                        f"The pools {', '.join(self._pools)} cannot be in one stack: two things would be called {key}.",
                        remedy="Give a pool another name.",
                    )
                section_parts[key] = value
        return section_parts

    def _for(self, pool: str) -> _Rename:
        def rename(name: str) -> str:
            return name_for_pool(name, pool, self._base) if name in self._per_pool else name

        return rename

    def _spread(self, node: Any) -> tuple[Any, bool]:
        """Return a copy of a template node in which list elements that refer to a pool are repeated for each pool. Also
        return whether the copy still refers to a pool outside of a list.
        """
        if isinstance(node, dict):
            spread, is_open = {}, False
            for key, value in node.items():
                if key == "DependsOn" and isinstance(value, str):
                    value = [value] if value in self._per_pool else value
                spread[key], opened = self._spread_in(key, value)
                is_open |= opened
            return spread, is_open or self._mentioned(node)
        if isinstance(node, list):
            repeated: list[Any] = []
            for element in node:
                element_spread, is_open = self._spread(element)
                if is_open or (isinstance(element, str) and element in self._resources):
                    # A list element that is a text is a logical id in DependsOn.
                    renames = [self._for(pool) for pool in self._pools]
                    repeated += [
                        rename(element) if isinstance(element, str) else _map(element, rename) for rename in renames
                    ]
                else:
                    repeated.append(element_spread)
            return repeated, False
        return node, False

    def _spread_in(self, key: str, value: Any) -> tuple[Any, bool]:
        if key.startswith("Fn::") and isinstance(value, list):
            # The arguments of a CloudFormation function have fixed positions, so an argument must not be repeated.
            parts = [self._spread(part) for part in value]
            return [part_spread for part_spread, _ in parts], any(is_open for _, is_open in parts)
        return self._spread(value)

    def _mentioned(self, node: dict[str, Any]) -> bool:
        """Return whether a template node refers to a part of a pool. References in child nodes do not count."""
        is_mentioned = False

        def record(name: str) -> str:
            nonlocal is_mentioned
            is_mentioned |= name in self._per_pool
            return name

        for key, value in node.items():
            if key != "DependsOn":
                _mentions(key, value, record)
        return is_mentioned

    def _interface(self, original: dict[str, Any]) -> dict[str, Any]:
        """Return the parameter groups and labels for CloudFormation's console, with the parameters of all pools."""
        interface = copy.deepcopy(original)
        for group in interface.get("ParameterGroups", ()):
            group["Parameters"] = [new for name in group.get("Parameters", ()) for new in self._names(name)]
        if labels := interface.get("ParameterLabels"):
            interface["ParameterLabels"] = {new: label for name, label in labels.items() for new in self._names(name)}
        return interface

    def _names(self, name: str) -> list[str]:
        """Return the names of a parameter for all pools. If the parameter does not belong to a pool, return only the
        unchanged name.
        """
        return [name_for_pool(name, pool, self._base) for pool in self._pools] if name in self._per_pool else [name]


def _is_per_pool(name: str, resource: dict[str, Any]) -> bool:
    is_marked: bool = resource.get("Metadata", {}).get("batchlab", {}).get("per") == "pool"
    if is_marked and not name.startswith(PREFIX):
        raise _flaw(f"{name} is one per pool, so its name must begin with {PREFIX}.")
    return is_marked


def _without_notes(resource: dict[str, Any], *, for_scanners: bool) -> dict[str, Any]:
    """Return a copy of a resource without the metadata for batchlab, and without the metadata for scanners unless
    `for_scanners`.
    """
    metadata = {
        name: content
        for name, content in resource.get("Metadata", {}).items()
        if name.startswith("AWS::") or (for_scanners and name != "batchlab")
    }
    stripped = {key: value for key, value in resource.items() if key != "Metadata"}
    return {**stripped, "Metadata": metadata} if metadata else stripped


def _mentions(key: str, value: Any, rename: _Rename) -> Any:
    """Return `value`, the value of `key` in a template node. Logical ids that `value` itself contains are renamed with
    `rename`.

    Child nodes of the template node stay unchanged.
    """
    if key in ("Ref", "Condition") and isinstance(value, str):
        return rename(value)
    if key == "DependsOn":
        return rename(value) if isinstance(value, str) else [rename(dependency) for dependency in value]
    if key == "Fn::GetAtt" and isinstance(value, str):
        name, dot, attribute = value.partition(".")
        return f"{rename(name)}{dot}{attribute}"
    if key in ("Fn::GetAtt", "Fn::If") and isinstance(value[0], str):
        return [rename(value[0]), *value[1:]]
    if key == "Fn::Sub":
        text, own = (value, {}) if isinstance(value, str) else value

        def replace(match: re.Match[str]) -> str:
            name = match[1] if match[1] in own else rename(match[1])
            return f"${{{name}{match[2]}}}"

        text = _NAMED_TEMPLATES.sub(replace, text)
        return text if isinstance(value, str) else [text, own]
    return value


def _map(node: Any, rename: _Rename) -> Any:
    """Return a copy of a template node in which all logical ids are renamed with `rename`."""
    if isinstance(node, dict):
        return {key: _map(_mentions(key, value, rename), rename) for key, value in node.items()}
    if isinstance(node, list):
        return [_map(part, rename) for part in node]
    return node


def _flaw(why: str) -> BatchlabError:
    return BatchlabError(f"The stack's template is flawed: {why}")
