"""MiniStack with the S3 condition keys of conditional writes, which its IAM does not know.

AWS documents them in "Enforce conditional writes on Amazon S3 buckets": `s3:if-none-match` and `s3:if-match` are in a
request with that header, and `s3:ObjectCreationOperation` is true for a request that creates an object and false for a
request that uploads a part of one.

For a session of a role, AWS's `aws:PrincipalArn` is the ARN of the role. MiniStack's is the ARN of the session.

MiniStack's own Python runs this file, so the file does not import batchlab.
"""

from __future__ import annotations

import importlib
import runpy
from collections.abc import Callable, Mapping
from typing import Any

Context = Callable[..., dict[str, Any]]


def with_conditional_writes(known: Context) -> Context:
    """Wrap MiniStack's function that returns a request's condition keys, and add three keys."""

    def context(
        action: str, query: Mapping[str, Any] | None, path: str = "", headers: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        found = known(action, query, path, headers)
        if action == "s3:PutObject":
            is_part = bool({"partNumber", "uploads"} & (query or {}).keys())
            found["s3:ObjectCreationOperation"] = str(not is_part).lower()
            for header in ("if-none-match", "if-match"):
                if condition := (headers or {}).get(header):
                    found[f"s3:{header}"] = condition
        return found

    return context


def with_role_arns(known: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    """Wrap MiniStack's function that returns the value of a condition key."""

    def resolve(key: str, request: Any) -> Any:
        found = known(key, request)
        if key.lower() == "aws:principalarn" and ":assumed-role/" in found:
            account, role = found.split(":")[4], found.split("/")[1]
            return f"arn:aws:iam::{account}:role/{role}"
        return found

    return resolve


if __name__ == "__main__":
    evaluator: Any = importlib.import_module("ministack.core.iam_evaluator")
    evaluator._resolve_condition_key = with_role_arns(evaluator._resolve_condition_key)
    actions: Any = importlib.import_module("ministack.core.iam_actions")
    actions.s3_service_context = with_conditional_writes(actions.s3_service_context)
    runpy.run_module("ministack", run_name="__main__")
