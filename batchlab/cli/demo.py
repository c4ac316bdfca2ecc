"""Commands `batchlab demo`, which runs an example job and checks its totals, and `batchlab init`, which writes example
files.

Invariant: the generator of the demo's insurance claims counts the expected totals before the job's code reads the
claims. `batchlab demo` reuses an earlier folder of generated claims only if the folder is complete. `batchlab init`
does not replace existing files.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import typer

from batchlab.cli import output
from batchlab.cli.groups import Commands
from batchlab.cli.option_values import home_of, resume_command
from batchlab.cli.options import BACKEND, ENDPOINT, HOME, JSON, OUT, RESUME, argument, examples, option
from batchlab.core import installation
from batchlab.core.errors import UsageError

if TYPE_CHECKING:
    from batchlab.cli.run_job import Summary
    from batchlab.runtime.home import Home

app = Commands()
DATA = "data"
DATA_MODULE = "example_data"
_LEFT_OUT = {DATA, "out", "__pycache__"}
_RECORDS_BYTES = 32 * 2**20
"""Input size in bytes of the example `sort`, chosen so that the example runs for a few seconds.

The README of the example uses a larger input.
"""
_VIDEO_S = 20


def starter_files() -> dict[str, bytes]:
    """Return the contents of the files that `batchlab init` writes by default, by file name."""
    from batchlab.core.installation import starter

    return {name: text.encode() for name, text in starter().items()}


def example_files(name: str) -> dict[str, bytes]:
    """Return the contents of a shipped example's files by name, without data and results.

    Raise UsageError if the example does not exist.
    """
    root = installation.folder("examples")
    names = sorted(path.parent.name for path in root.glob("*/job.yaml") if path.parent.name != "starter")
    if name not in names:
        raise UsageError(f"The example {name!r} does not exist.", remedy=f"Name one of {', '.join(names)}.")
    return {
        path.relative_to(root / name).as_posix(): path.read_bytes()
        for path in sorted((root / name).rglob("*"))
        if path.is_file() and not _LEFT_OUT.intersection(path.relative_to(root / name).parts)
    }


def make_data(name: str, folder: Path) -> str:
    """Generate the input of an example in `folder`, and return a description of the input.

    Raise UsageError if the input cannot be generated or written.
    """
    try:
        match name:
            case "claims":
                return f"{example_data().write_claims(folder).files} files of insurance claims"
            case "transform":
                example_data().write_rides(folder)
                return "a CSV of taxi rides"
            case "sort":
                return f"{example_data().write_records(folder, size_bytes=_RECORDS_BYTES).lines:,} lines to sort"
        return _make_video(folder)
    except OSError as error:
        raise UsageError(f"{folder} cannot be written: {error.strerror}.", remedy="Name another folder.") from error


def example_data() -> ModuleType:
    """Return the module that generates the input of the shipped examples."""
    spec = spec_from_file_location(DATA_MODULE, installation.folder("examples") / f"{DATA_MODULE}.py")
    assert spec
    assert spec.loader
    module = sys.modules[DATA_MODULE] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _make_video(folder: Path) -> str:
    program = shutil.which("ffmpeg")
    if program is None:
        raise UsageError(
            "The media job needs ffmpeg, which is not installed.",
            remedy="Install it (on Debian: apt-get install ffmpeg), and call this again.",
        )
    folder.mkdir(parents=True)
    target = folder / "test.mp4"
    picture = f"testsrc2=duration={_VIDEO_S}:size=640x360:rate=25"
    result = subprocess.run(
        [
            program,
            "-v",
            "error",
            "-f",
            "lavfi",
            "-i",
            picture,
            "-f",
            "lavfi",
            "-i",
            f"sine=duration={_VIDEO_S}",
            "-pix_fmt",
            "yuv420p",
            target,
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no error text"])[-1].rstrip(".")
        raise UsageError(f"ffmpeg cannot make a video: {reason}.", remedy=f"Put an .mp4 of your own into {folder}.")
    return f"a video of {_VIDEO_S} s"


def check_free(folder: Path, names: Iterable[str]) -> None:
    """Raise UsageError if the folder contains a file with one of the names."""
    existing = [name for name in names if (folder / name).exists()]
    if existing:
        raise UsageError(f"{folder / existing[0]} already exists.", remedy="Name another folder, or remove it.")


def write(folder: Path, files: Mapping[str, bytes]) -> list[str]:
    """Write `files` into `folder`. Raise UsageError without writing a file if one of the files exists."""
    check_free(folder, files)
    try:
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with (folder / name).open("xb") as file:
                file.write(content)
    except OSError as error:
        raise UsageError(f"{folder} cannot be written: {error.strerror}.", remedy="Name another folder.") from error
    return list(files)


EXAMPLE = "claims"
STAGE = "totals"


@dataclass(frozen=True, slots=True)
class Prepared:
    """Job file of a demo, and the facts about the generated claims by payer, from which the expected totals are
    computed.
    """

    job_file: Path
    facts: Mapping[str, Mapping[str, Any]]


def prepare(home: Home, *, seed: int, files: int, claims_per_file: int) -> Prepared:
    """Write the example job and its generated claims into the grid's folder.

    Equal arguments create equal files, so that --resume finds the run of an earlier demo.
    """
    home.make()
    folder = home.path / "demo" / f"{EXAMPLE}-seed{seed}-{files}x{claims_per_file}"
    facts_file = folder.with_suffix(".json")
    try:
        for name, content in example_files(EXAMPLE).items():
            _write_changed(folder / name, content)
        if not facts_file.exists():
            claims_facts = example_data().write_claims(
                folder / "data", seed=seed, files=files, claims_per_file=claims_per_file
            )
            facts = {payer: asdict(payer_facts) for payer, payer_facts in claims_facts.payers.items()}
            staged = facts_file.with_suffix(".part")
            staged.write_text(json.dumps(facts))
            staged.replace(facts_file)
    except OSError as error:
        raise UsageError(
            f"The demo's claims cannot be written to {folder}: {error.strerror}.",
            remedy="Name another folder with --home.",
        ) from error
    return Prepared(folder / "job.yaml", json.loads(facts_file.read_text()))


def _write_changed(path: Path, content: bytes) -> None:
    if not path.exists() or path.read_bytes() != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


@dataclass(frozen=True, slots=True)
class TotalsCheck:
    """Totals by payer from the results of a demo job, and their differences from the expected totals."""

    totals: list[dict[str, Any]]
    differences: list[str]

    @property
    def agrees(self) -> bool:
        return not self.differences

    def to_json(self) -> dict[str, Any]:
        return {"agrees": self.agrees, "differences": self.differences, "payers": self.totals}

    def text(self) -> str:
        rows = [
            (
                total["payer_name"],
                total["claims"],
                _money(total["charge_cents"]),
                _money(total["paid_cents"]),
                total["paid"],
                total["denied"],
                total["pended"],
            )
            for total in self.totals
        ]
        columns = ("payer", "claims", "charged", "to pay", "paid", "denied", "pended")
        answer = f"totals agree with the generator: {'yes' if self.agrees else 'no'}"
        return "\n".join([output.table(columns, rows), "", answer, *self.differences])


def check(prepared: Prepared, summary: Summary) -> TotalsCheck:
    """Compare the fetched totals of the demo job with the totals that the generator of the claims expects."""
    assert summary.fetched is not None
    with (summary.fetched.folder / f"{STAGE}.jsonl").open(encoding="utf-8") as file:
        totals = [json.loads(line)["value"] for line in file]
    totals_by_payer = {total["payer"]: total for total in totals}
    differences = []
    for payer in sorted(totals_by_payer.keys() | prepared.facts.keys()):
        payer_total, fact = totals_by_payer.get(payer), prepared.facts.get(payer)
        if payer_total is None or fact is None:
            differences.append(f"payer {payer} is in {'the facts' if payer_total is None else 'the totals'} only")
            continue
        differences += [
            f"payer {payer}: {key} is {payer_total[key]}, the generator says {value}"
            for key, value in expected_totals(fact).items()
            if payer_total[key] != value
        ]
    return TotalsCheck(totals, differences)


def expected_totals(fact: Mapping[str, Any]) -> dict[str, int]:
    """Return the expected totals of a payer, computed from the generator's counts of the payer's claims."""
    denied = fact["duplicates"] + fact["zero_charge"] + fact["undiagnosed"]
    return {
        "claims": fact["claims"],
        "charge_cents": fact["charge_cents"],
        "denied": denied,
        "pended": fact["unbalanced"],
        "paid": fact["claims"] - denied - fact["unbalanced"],
    }


def _money(amount_cents: int) -> str:
    return f"{amount_cents // 100:,}.{amount_cents % 100:02d}"


@app.command()
def demo(
    out: Path | None = OUT,
    seed: int = option("Seed of the generated claims.", default=1),
    files: int = option("Number of files of claims.", default=100, min=1),
    claims_per_file: int = option("Number of claims in each file.", default=40, min=1),
    resume: bool = RESUME,
    home: Path | None = HOME,
    backend: str = BACKEND,
    endpoint: str | None = ENDPOINT,
    json: bool = JSON,
) -> None:
    """Run a demo job on generated insurance claims.

    The command writes a month-end of claims and the job's code into the grid's folder, runs the job
    like `run`, and compares the totals with the totals that the generator of the claims has
    counted.

    \b
    Example: batchlab demo --files 400
    """
    from batchlab.cli import run_job

    phases = run_job.Phases.of_process()
    with phases.phase("data"):
        prepared = prepare(home_of(home), seed=seed, files=files, claims_per_file=claims_per_file)
    request = run_job.RunRequest(
        file=prepared.job_file,
        home=home_of(home),
        backend=backend,
        endpoint=endpoint,
        again=resume_command(sys.argv[1:]),
        out=out,
        resume=resume,
    )
    summary = run_job.run(request, phases)
    verdict = check(prepared, summary)
    output.answer(json, {**summary.to_json(), "totals": verdict.to_json()}, f"{summary.text()}\n\n{verdict.text()}")
    if not verdict.agrees:
        raise typer.Exit(1)
    output.say(
        "Next: `batchlab report html last` writes a report, and `batchlab init myjob` creates a job of your own."
    )


@app.command()
def init(
    folder: Path = argument(
        "Folder in which the command writes the files.", "DIR", default=Path(), show_default="here"
    ),
    example: str | None = option(
        "Shipped example instead of the starter job: claims (three stages), transform (CSV to Parquet), media "
        "(video), or sort (more data than memory).",
        "NAME",
        autocompletion=examples,
    ),
) -> None:
    """Write a job file, its code, and its input data as an example.

    The files are a job file, the job's code, and the job's input data. The command does not replace
    existing files.

    \b
    Example: batchlab init first && batchlab run first/job.yaml
    """
    if example is None:
        output.say(f"Wrote {', '.join(write(folder, starter_files()))}.")
    else:
        files = example_files(example)
        check_free(folder, [*files, DATA])
        # The input data is generated before the files are written, so that a failed generation leaves no job file
        # behind.
        data = make_data(example, folder / DATA)
        output.say(f"Wrote {', '.join(write(folder, files))}, and {data} into {DATA}.")
    output.say(f"Now run it: batchlab run {shlex.quote(str(folder / 'job.yaml'))}")
