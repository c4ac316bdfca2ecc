"""A template as its conditions leave it, for what stands in AWS's place.

Invariant: it makes the same as the template it is made from, with these parameters. Emulators
refuse a template for a type that they lack, whatever conditions say, and know fewer functions in
conditions than AWS does; for AWS itself nothing is rendered.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from batchlab.deploy.template import Template
from batchlab.errors import BatchlabError

_NAMED = re.compile(r"\$\{([^!}][^}]*)\}")


def rendered(template: Template, values: Mapping[str, str]) -> Template:
    """The template without conditions, and without what they exclude; `values` are those of all
    parameters and of AWS's own that conditions may ask for, such as AWS::Region."""
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
        """The node with every Fn::If decided."""
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
        raise BatchlabError(f"The stack's template is flawed: {name} is no condition.")

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
