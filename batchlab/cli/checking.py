"""`job check`: a job file looked at, and nothing of it run."""

from __future__ import annotations

from batchlab.cli import output
from batchlab.cli.options import FileArgument, JsonOption, SetOption


def check(file: FileArgument, set_: SetOption = None, json: JsonOption = False) -> None:
    """Check a job file and what it names, without running any of it.

    \b
    Example: batchlab job check job.yaml
    """
    from batchlab.cli.submitting import overrides
    from batchlab.spec import load
    from batchlab.submission import check_input, code_digest

    jobfile = load(file, overrides(set_ or ()))
    check_input(jobfile)
    data, _ = code_digest(jobfile)
    stages = [stage.name for stage in jobfile.job.stages]
    if json:
        output.show_json(
            {
                "name": jobfile.job.name,
                "stages": stages,
                "inputs": len(jobfile.files),
                "code": str(jobfile.code),
                "code_bytes": len(data),
                "params": dict(jobfile.params),
            }
        )
        return
    output.show(
        f"{file} is fine: job {jobfile.job.name}, {output.count(len(jobfile.files), 'input')}, "
        f"{output.count(len(stages), 'stage')} ({', '.join(stages)}), "
        f"{output.size(len(data))} of code"
    )
