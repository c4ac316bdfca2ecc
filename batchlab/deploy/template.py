"""CloudFormation templates as values: read from YAML, written as compact JSON, or rendered for
emulators.

Invariant: the written template has the same meaning as the file. It is JSON without blanks, because
a request holds 51,200 bytes of template, and comments and indentation take more than a third of the
file.

A rendered template creates the same resources as its source with the same parameters. Emulators
refuse a template with a type that they lack, whatever its conditions are, and support fewer
functions in conditions than AWS. Templates for AWS itself are not rendered.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from batchlab.core import package_data
from batchlab.core.errors import BatchlabError, UsageError

Template = dict[str, Any]

INLINE_BYTES = 51_200
"""Maximum size of TemplateBody in CreateChangeSet."""
STORED_BYTES = 1_048_576
"""Maximum size of a template behind TemplateURL."""
LIMITS = {"Resources": 500, "Parameters": 200, "Outputs": 200, "Mappings": 200}
"""Maximum numbers of entries in the sections of a template."""


class _Loader(yaml.SafeLoader):
    """YAML loader that supports CloudFormation's short forms such as !Ref. It reads dates as text,
    as AWS does: the Version of a policy is one."""


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
    first: [(tag, form) for tag, form in known if tag != "tag:yaml.org,2002:timestamp"]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def shipped() -> Path:
    """Return the stack's template in this installation."""
    return package_data.folder("backends") / "aws" / "stack.yaml"


def load(path: Path) -> Template:
    """Return the template in a YAML or JSON file. Raises UsageError if it is not a template."""
    try:
        return parse(path.read_text(), str(path))
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read: {error.strerror}.",
            remedy="Name a file that is there and can be read.",
        ) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not YAML: {error}.", remedy="Put that line right.") from error


def parse(text: str, where: str) -> Template:
    """Return the template in a YAML or JSON text. Raises UsageError if it is not a template."""
    try:
        found = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise UsageError(f"{where} is not YAML: {error}.", remedy="Put that line right.") from error
    if not isinstance(found, dict) or not isinstance(found.get("Resources"), dict):
        raise UsageError(
            f"{where} is not a CloudFormation template: it lacks Resources.",
            remedy="backends/aws/stack.yaml is one.",
        )
    return found


def body(template: Template) -> str:
    """Return the template as compact JSON. Raises UsageError if CloudFormation would refuse it."""
    for section, most in LIMITS.items():
        if (count := len(template.get(section, ()))) > most:
            raise UsageError(
                f"The stack would have {count} {section}; CloudFormation takes {most}.",
                remedy="Have fewer pools in one stack.",
            )
    text = json.dumps(template, separators=(",", ":"), ensure_ascii=False)
    if (size := len(text.encode())) > STORED_BYTES:
        raise UsageError(
            f"The stack's template would have {size:,} bytes; CloudFormation takes "
            f"{STORED_BYTES:,}.",
            remedy="Have fewer pools in one stack.",
        )
    return text


_NAMED = re.compile(r"\$\{([^!}][^}]*)\}")


def rendered(template: Template, values: Mapping[str, str]) -> Template:
    """Return the template without conditions and the parts that they exclude. `values` has all
    parameters and the pseudo parameters that conditions may use, such as AWS::Region."""
    return _Rendering(template, values).made()


class _Rendering:
    def __init__(self, template: Template, values: Mapping[str, str]) -> None:
        self._template = template
        self._values = values

    def made(self) -> Template:
        made = {name: held for name, held in self._template.items() if name != "Conditions"}
        for section in ("Resources", "Outputs"):
            made[section] = {
                name: self._chosen({k: v for k, v in one.items() if k != "Condition"})
                for name, one in self._template.get(section, {}).items()
                if "Condition" not in one or self._holds(one["Condition"])
            }
        for one in made["Resources"].values():
            if depends := one.pop("DependsOn", None):
                names = [depends] if isinstance(depends, str) else depends
                if kept := [name for name in names if name in made["Resources"]]:
                    one["DependsOn"] = kept
        return made

    def _holds(self, name: str) -> bool:
        return self._test(self._template["Conditions"][name])

    def _chosen(self, node: Any) -> Any:
        """Return the node with every Fn::If evaluated."""
        if isinstance(node, list):
            return [self._chosen(one) for one in node]
        if not isinstance(node, dict):
            return node
        if "Fn::If" in node:
            condition, then, otherwise = node["Fn::If"]
            return self._chosen(then if self._holds(condition) else otherwise)
        return {key: self._chosen(value) for key, value in node.items()}

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
        raise BatchlabError(f"The stack's template is flawed: {name} is not a condition.")

    def _text(self, node: Any) -> str:
        if isinstance(node, str):
            return node
        if not isinstance(node, dict):
            return str(node).lower() if isinstance(node, bool) else str(node)
        ((name, value),) = node.items()
        if name == "Ref":
            return self._value(value)
        if name == "Fn::Sub" and isinstance(value, str):
            return _NAMED.sub(lambda found: self._value(found[1]), value)
        if name == "Fn::Join":
            return str(value[0]).join(map(self._text, value[1]))
        if name == "Fn::Select":
            return self._list(value[1])[int(value[0])]
        raise BatchlabError(f"The stack's template is flawed: a condition asks for {name}.")

    def _list(self, node: Any) -> list[str]:
        if isinstance(node, dict) and "Fn::Split" in node:
            separator, text = node["Fn::Split"]
            return self._text(text).split(separator)
        return [self._text(one) for one in node]

    def _value(self, name: str) -> str:
        if name in self._values:
            return self._values[name]
        raise BatchlabError(f"The stack's template is flawed: a condition asks for {name}.")
