"""`notify` of a job file as a pydantic model: whom to tell of the job, and of which moments.

Invariant: as in schema. No command can be written here: who submits a job must not run commands
where the manager runs.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from batchlab.notification import MOST_TARGETS
from batchlab.spec import forms

Moment = Literal["ended", "succeeded", "failed", "cancelled", "failures", "stuck", "capped"]


def _ended() -> list[Moment]:
    return ["ended"]


class NotifySpec(BaseModel):
    """Somebody to tell of the job: exactly one of `webhook`, `sns` and `target` says how."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    webhook: str | None = Field(
        default=None,
        description="Address that gets a POST, by https. The manager's own machine only where the "
        "grid's operator lets jobs; by http too then.",
        examples=["https://hooks.example.org/batch"],
    )
    sns: str | None = Field(
        default=None,
        description="ARN of an SNS topic.",
        examples=["arn:aws:sns:eu-central-1:123456789012:batch"],
    )
    target: str | None = Field(
        default=None,
        description="Name of one of the grid's own targets that jobs may name: its address and "
        "secret are then in no job file.",
        examples=["chat"],
    )
    on: Annotated[
        list[Moment],
        BeforeValidator(forms.one_or_many, json_schema_input_type=Moment | list[Moment]),
    ] = Field(
        default_factory=_ended,
        description="Moments: `ended` (unless said), or one of `succeeded`, `failed`, `cancelled`; "
        "`failures` "
        "(so many tasks have failed), `stuck` (nothing has moved for so long), `capped` (a cap on "
        "cost holds the job back).",
        examples=[["failed", "stuck"]],
    )
    secret: str | None = Field(
        default=None,
        description="Where the key is that signs what a webhook gets: `env:BATCHLAB_NOTIFY_…`, a "
        "variable of the manager's environment that the grid's operator lets sign what goes "
        "there. The key itself is written nowhere.",
        examples=["env:BATCHLAB_NOTIFY_SECRET"],
    )
    failures: int = Field(
        default=1,
        ge=1,
        le=forms.MOST_TASKS,
        description="Failed tasks from which `failures` is told, once.",
        examples=[10],
    )
    stuck_after: forms.Timeout = Field(
        default=600.0,
        description="How long nothing moves before `stuck` is told, seconds or text with a unit.",
        examples=["10m"],
    )


Notify = Annotated[
    list[NotifySpec],
    Field(
        max_length=MOST_TARGETS,
        description="Whom to tell of the job, beside whom the grid tells. A list.",
        examples=[[{"webhook": "https://hooks.example.org/batch", "on": "failed"}]],
    ),
]
