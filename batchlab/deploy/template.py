"""CloudFormation's templates as values: read from YAML, written as JSON.

Invariant: what is written means to CloudFormation what the file does, as JSON without blanks: a
request holds 51,200 bytes of template, and comments and indents are a good third of the file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from batchlab import package_data
from batchlab.errors import UsageError

Template = dict[str, Any]

INLINE_BYTES = 51_200
"""CreateChangeSet's limit for TemplateBody."""
STORED_BYTES = 1_048_576
"""Its limit for TemplateURL."""
LIMITS = {"Resources": 500, "Parameters": 200, "Outputs": 200, "Mappings": 200}
"""How many of each a template may have."""


class _Loader(yaml.SafeLoader):
    """Knows CloudFormation's short forms, !Ref and the others, and takes dates for text as AWS
    does: a policy's Version is one."""


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
    """The stack's template in this installation."""
    return package_data.folder("backends") / "aws" / "stack.yaml"


def load(path: Path) -> Template:
    """The template in a file, YAML or JSON; UsageError where it is none."""
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
    """The template in a text, YAML or JSON; UsageError where it is none."""
    try:
        found = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise UsageError(f"{where} is not YAML: {error}.", remedy="Put that line right.") from error
    if not isinstance(found, dict) or not isinstance(found.get("Resources"), dict):
        raise UsageError(
            f"{where} is no CloudFormation template: it has no Resources.",
            remedy="backends/aws/stack.yaml is one.",
        )
    return found


def body(template: Template) -> str:
    """The template as short as it can be; UsageError where CloudFormation would refuse it."""
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
