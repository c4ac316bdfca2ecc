"""The launcher that `batchlab asg serve` is told to use."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from batchlab.errors import UsageError
from batchlab.model import Pool
from batchlab.ports import Clock

if TYPE_CHECKING:
    from batchlab.adapters.docker import ContainerLauncher
    from batchlab.adapters.imds_tree import Signals
    from batchlab.adapters.process import ProcessLauncher
    from batchlab.asg.running import AsgSettings
    from batchlab.asg.templates import TemplateFile


def open_asg_launcher(
    settings: AsgSettings,
    templates: TemplateFile,
    clock: Clock,
    signals: Callable[[str], Signals],
) -> ProcessLauncher | ContainerLauncher:
    """The launcher that `asg serve` is told to use, which tells instances their `signals` where it
    can; UsageError where there is none of that name."""
    if settings.launcher == "process":
        from batchlab.adapters.process import ProcessLauncher

        return ProcessLauncher(settings.state, templates.argv, clock, dict(os.environ))
    if settings.launcher != "docker":
        raise UsageError(
            f"There is no launcher {settings.launcher!r}.",
            remedy="Say --launcher process or --launcher docker.",
        )
    from batchlab import catalogue
    from batchlab.adapters.docker import ContainerLauncher
    from batchlab.adapters.docker_container import Template

    def template(pool: Pool) -> Template:
        version = templates.launched(pool)
        return Template(
            version.image,
            tuple(templates.argv(pool, "{instance}")),
            version.network,
            type=version.type,
            user=version.user,
            system=version.system,
        )

    return ContainerLauncher(
        template,
        catalogue.load(),
        clock,
        settings.state,
        grid=settings.grid.removeprefix("batchlab-"),
        labels={**settings.labels, "batchlab.grid": settings.grid},
        scale=settings.scale,
        signals=signals,
    )
