"""CloudFormation templates as values.

The functions load a template, send it, and resolve its parameters and conditions, so that a test sees the resources
that AWS would create. The functions do not use `batchlab.deploy`, because the tests of `batchlab.deploy` use the
functions.
"""

from __future__ import annotations

import base64
import copy
import ipaddress
import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml

from batchlab.core import installation

Template = dict[str, Any]
T = TypeVar("T")

PSEUDO = {
    "AWS::StackName": "batchlab",
    "AWS::Region": "us-east-1",
    "AWS::AccountId": "123456789012",
    "AWS::Partition": "aws",
}
_NOTHING = {"Ref": "AWS::NoValue"}
_VARIABLE = re.compile(r"\$\{([^!}][^}]*)\}")


class _Loader(yaml.CSafeLoader):
    pass


def _short(loader: _Loader, suffix: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.ScalarNode):
        value: Any = loader.construct_scalar(node)
    elif isinstance(node, yaml.SequenceNode):
        value = loader.construct_sequence(node, deep=True)
    else:
        assert isinstance(node, yaml.MappingNode)
        value = loader.construct_mapping(node, deep=True)
    if suffix == "GetAtt":
        value = value.split(".", 1)
    return {suffix if suffix in ("Ref", "Condition") else f"Fn::{suffix}": value}


_Loader.add_multi_constructor("!", _short)
# YAML would read a policy's Version as a date, but it must stay text.
_Loader.yaml_implicit_resolvers = {
    key: [one for one in found if one[0] != "tag:yaml.org,2002:timestamp"]
    for key, found in yaml.CSafeLoader.yaml_implicit_resolvers.items()
}


def stack_file() -> Path:
    return installation.folder("backends") / "aws" / "stack.yaml"


def load(text: str | None = None) -> Template:
    """Parse the template in `text`, or the grid's template if `text` is None."""
    return copy.deepcopy(_read(text or stack_file().read_text()))


@cache
def _read(text: str) -> Template:
    found: Template = yaml.load(text, Loader=_Loader)
    return found


def body(template: Template) -> str:
    """Return the template as the JSON body of a request. Descriptions and metadata are removed to stay below the size
    limit of a request."""
    short = copy.deepcopy(template)
    short.pop("Metadata", None)
    for section in ("Parameters", "Outputs"):
        for one in short.get(section, {}).values():
            one.pop("Description", None)
    for one in short["Resources"].values():
        one.pop("Metadata", None)
    return json.dumps(short, separators=(",", ":"))


def without(template: Template, resources: set[str]) -> Template:
    """Return the template without these resources and without the outputs that refer to them."""
    assert resources <= template["Resources"].keys(), resources - template["Resources"].keys()
    made = copy.deepcopy(template)
    for name in resources:
        del made["Resources"][name]
    for name, output in list(made["Outputs"].items()):
        if resources & set(re.findall(r'"(\w+)"', json.dumps(output["Value"]))):
            del made["Outputs"][name]
    return made


class Rendered:
    """A template rendered with parameters. Only the resources whose conditions hold are in the rendered template, with
    every known reference replaced. A reference to a value that AWS generates becomes "<Logical>" or
    "<Logical.Attribute>". With `open_ends`, the reference stays as it is, for tools that read templates. `stack` is the
    name of the stack."""

    def __init__(
        self, template: Template, *, open_ends: bool | int | str = False, stack: str = "batchlab", **parameters: Any
    ) -> None:
        self._template = template
        self._pseudo = {**PSEUDO, "AWS::StackName": stack}
        self._open_ends = open_ends
        self._parameters = {
            name: str(parameters.pop(name, one.get("Default", ""))) for name, one in template["Parameters"].items()
        }
        assert not parameters, f"no such parameters: {sorted(parameters)}"
        self.resources: dict[str, dict[str, Any]] = {
            name: {**one, "Properties": self._value(one.get("Properties", {}))}
            for name, one in template["Resources"].items()
            if "Condition" not in one or self.holds(one["Condition"])
        }
        self.outputs: dict[str, Any] = {
            name: self._value(one["Value"])
            for name, one in template["Outputs"].items()
            if "Condition" not in one or self.holds(one["Condition"])
        }

    def of_type(self, kind: str) -> dict[str, dict[str, Any]]:
        """Return the properties of the resources of a type, by logical id."""
        return {n: one["Properties"] for n, one in self.resources.items() if one["Type"] == kind}

    def parameter(self, name: str) -> str:
        return self._parameters[name]

    def properties(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.resources[name]["Properties"]
        return found

    def template(self) -> Template:
        """Return the rendered resources as a template, for tools that read templates."""
        return {"AWSTemplateFormatVersion": "2010-09-09", "Resources": self.resources}

    def broken_rules(self) -> list[str]:
        """Return the descriptions of the failed assertions in the template's Rules."""
        return [
            one["AssertDescription"]
            for rule in self._template.get("Rules", {}).values()
            if "RuleCondition" not in rule or self._test(rule["RuleCondition"])
            for one in rule["Assertions"]
            if not self._test(one["Assert"])
        ]

    def holds(self, condition: str) -> bool:
        return self._test(self._template["Conditions"][condition])

    def _test(self, node: Any) -> bool:
        ((name, value),) = node.items()
        if name == "Condition":
            return self.holds(value)
        if name == "Fn::Equals":
            first, second = map(self._value, value)
            return str(first) == str(second)
        tests = map(self._test, value)
        return {"Fn::Not": lambda: not next(tests), "Fn::And": lambda: all(tests),
                "Fn::Or": lambda: any(tests)}[name]()  # fmt: skip

    def _value(self, node: Any) -> Any:
        if isinstance(node, list):
            return [v for v in map(self._value, node) if v != _NOTHING]
        if not isinstance(node, dict):
            return node
        if len(node) == 1:
            ((name, value),) = node.items()
            if name == "Ref":
                return self._ref(value)
            if name.startswith("Fn::"):
                return getattr(self, f"_{name[4:].lower()}")(value)
        values = {name: self._value(value) for name, value in node.items()}
        return {name: value for name, value in values.items() if value != _NOTHING}

    def _ref(self, name: str) -> Any:
        if name == "AWS::NoValue":
            return _NOTHING
        if name not in self._parameters:
            return self._pseudo.get(name) or ({"Ref": name} if self._open_ends else f"<{name}>")
        value = self._parameters[name]
        return int(value) if self._template["Parameters"][name]["Type"] == "Number" else value

    def _getatt(self, path: list[str]) -> Any:
        return {"Fn::GetAtt": path} if self._open_ends else f"<{'.'.join(path)}>"

    def _if(self, value: list[Any]) -> Any:
        return self._value(value[1 if self.holds(value[0]) else 2])

    def _sub(self, value: Any) -> Any:
        text, own = value if isinstance(value, list) else (value, {})
        known = self._parameters | self._pseudo | {k: self._value(v) for k, v in own.items()}

        def put(found: re.Match[str]) -> str:
            unknown = found[0] if self._open_ends else f"<{found[1]}>"
            return str(known.get(found[1], unknown))

        made = _VARIABLE.sub(put, text)
        return {"Fn::Sub": made} if _VARIABLE.search(made) else made.replace("${!", "${")

    def _join(self, value: list[Any]) -> str:
        return str(value[0]).join(map(str, self._value(value[1])))

    def _split(self, value: list[Any]) -> list[str]:
        return str(self._value(value[1])).split(value[0])

    def _select(self, value: list[Any]) -> Any:
        return self._value(value[1])[int(value[0])]

    def _base64(self, value: Any) -> Any:
        made = self._value(value)
        if isinstance(made, dict):
            return {"Fn::Base64": made}
        return base64.b64encode(made.encode()).decode()

    def _getazs(self, value: Any) -> list[str]:
        return [f"{PSEUDO['AWS::Region']}{zone}" for zone in "abcdef"]

    def _cidr(self, value: list[Any]) -> list[str]:
        network, count, bits = map(self._value, value)
        subnets = ipaddress.ip_network(network).subnets(new_prefix=32 - int(bits))
        return [str(subnet) for subnet, _ in zip(subnets, range(int(count)), strict=False)]


def as_list(value: T | list[T]) -> list[T]:
    """Return a policy element as a list. A policy may contain a single value instead of a list."""
    return value if isinstance(value, list) else [value]


def statements(role: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the statements of all inline policies in a role's properties."""
    return [statement for policy in role.get("Policies", []) for statement in policy["PolicyDocument"]["Statement"]]


MINISTACK_LACKS = {
    "NatAddress": "AWS::EC2::EIP",
    "NatGateway": "AWS::EC2::NatGateway",
    "DatabaseFromManager": "AWS::EC2::SecurityGroupIngress",
    "LedgerDomain": "AWS::SDB::Domain",
    "Budget": "AWS::Budgets::Budget",
}
"""Resources of types that MiniStack rejects even if the condition of a resource is false."""


_MASTER_SECRET = {"Fn::GetAtt": ["Database", "MasterUserSecret.SecretArn"]}
NO_SECRET = "arn:aws:secretsmanager:us-east-1:000000000000:secret:rds-makes-none-here"
"""Replacement for the ARN of the secret that RDS creates for its master user."""


_BATCHED = ("sqs:SendMessage", "sqs:DeleteMessage", "sqs:ChangeMessageVisibility")


def for_ministack(template: Template, **parameters: Any) -> Template:
    """Return the template without the resources that MiniStack does not support, and without the route that needs one
    of these resources. MiniStack does not evaluate Fn::Split in conditions, so the values of these conditions are
    inserted. MiniStack's RDS does not create a secret. MiniStack's IAM checks an action of its own for an SQS batch
    call, so the batch actions are added."""
    text = json.dumps(without(template, {*MINISTACK_LACKS, "PrivateRouteOut"}))
    made: Template = json.loads(text.replace(json.dumps(_MASTER_SECRET), json.dumps(NO_SECRET)))
    rendered = Rendered(template, **parameters)
    for name, condition in made["Conditions"].items():
        if "Fn::Split" in json.dumps(condition):
            made["Conditions"][name] = {"Fn::Equals": [str(rendered.holds(name)), "True"]}
    for one in made["Resources"].values():
        if one["Type"] == "AWS::IAM::Role":
            for statement in statements(one["Properties"]):
                if isinstance(actions := statement.get("Action"), list):
                    actions += [f"{action}Batch" for action in actions if action in _BATCHED]
    return made
