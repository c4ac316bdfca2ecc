"""Job templates as a scenario file writes them: as in a job file, with times in place of code.

Invariant: as in schema.py; the values of model.py follow from these alone.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from batchlab.scenario.schema_draws import JobTimes, Numbers, Share, Times
from batchlab.spec import forms
from batchlab.spec.schema import (
    After,
    Bundle,
    Keys,
    Memory,
    Pool,
    Priority,
    Retry,
    Slots,
    StageName,
)


def _gather(value: Any) -> Any:
    if isinstance(value, str) and value != "all":
        remedy = "Write 'all', or {by: key, groups: 12}."
        raise forms.refusal(f"gather cannot be '{value}'.", remedy)
    return {"by": "*"} if value == "all" else value


class GroupsSpec(Keys):
    """Fan-in: `gather: all` makes one task of all results; this makes one for each group."""

    by: str = Field(
        min_length=1, description="Name of what the results are grouped by.", examples=["region"]
    )
    groups: int = Field(
        default=1, ge=1, le=1_000_000, description="How many groups there are.", examples=[12]
    )


class StageSpec(Keys):
    """A step of a job."""

    name: StageName
    task: Times = Field(
        description="How long a task takes: a duration, or a distribution of durations.",
        examples=["4s"],
    )
    after: After = None
    gather: Annotated[
        GroupsSpec | None,
        BeforeValidator(_gather, json_schema_input_type=Literal["all"] | GroupsSpec),
    ] = Field(
        default=None,
        description="Wait for every task before: `all` makes one task of all their results, "
        "`{by: NAME, groups: N}` one for each group. Without it each result becomes a task of "
        "this stage as soon as it is there.",
        examples=["all"],
    )
    kind: Literal["sleep", "cpu", "memory", "io"] = Field(
        default="sleep",
        description="What a stand-in does in a replay while its time passes.",
        examples=["cpu"],
    )
    slots: Slots = 1
    memory: Memory = None
    bundle: Bundle = None
    pool: Pool = "default"
    retry: Retry
    fails: Share = Field(
        default=0.0,
        description="Share of all attempts that end in an exception.",
        examples=[0.01],
    )
    poison: int = Field(
        default=0,
        ge=0,
        le=9999,
        description="So many tasks, the first ones of each job, kill their worker whenever they "
        "run.",
        examples=[2],
    )


class JobSpec(Keys):
    """A job template, what is submitted again and again. `task`, `stages` or `file` says what its
    work is."""

    tasks: Numbers | None = Field(
        default=None,
        description="How many tasks a job begins with: a number, or a distribution of numbers, "
        "which are rounded. 1 unless said; a trace may say it for each job.",
        examples=[200],
    )
    task: JobTimes | None = Field(
        default=None,
        description="How long a task takes, where the job is a single stage (which is then named "
        "`work`). With `file`, a mapping of the job file's stages to how long their tasks take, or "
        "one duration for all of them.",
        examples=["4s"],
    )
    stages: list[StageSpec] | None = Field(
        default=None,
        min_length=1,
        description="The steps, in order.",
        examples=[[{"name": "parse", "task": "4s"}]],
    )
    file: str | None = Field(
        default=None,
        min_length=1,
        description="A job file, relative to the scenario, whose real work a replay does. A "
        "forecast takes the times in `task`.",
        examples=["../examples/claims/job.yaml"],
    )
    groups: dict[str, Annotated[int, Field(ge=1, le=1_000_000)]] = Field(
        default_factory=dict,
        description="With `file`: how many groups its stages that gather by a field come to, by "
        "the stage's name; 1 unless said.",
        examples=[{"total": 12}],
    )
    deadline: forms.Timeout | None = Field(
        default=None,
        description="By when a job must have ended, from its arrival on. None unless said.",
        examples=["6h"],
    )
    tenant: str = Field(default="", description="Whose job it is.", examples=["payer-a"])
    priority: Priority = 0
    max_failures: int = Field(
        default=0,
        ge=0,
        le=10**12,
        description="Failed tasks that a job survives. With `file`, 0 leaves it at what that says.",
        examples=[5],
    )

    @model_validator(mode="before")
    @classmethod
    def _by_stage(cls, data: Any) -> Any:
        """With a job file, a mapping of `task` names its stages: no distributions."""
        if isinstance(data, dict) and "file" in data and isinstance(data.get("task"), dict):
            return {**data, "task": {"by_stage": data["task"]}}
        return data
