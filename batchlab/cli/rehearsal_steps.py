"""Steps of `batchlab deploy rehearse` in an AWS account, in terms of the commands that a user of a grid has.

Invariants: the steps use a stack of their own, so they never change the stack of a grid. The name of the stack is
fixed, and a file records the account, the region, and the name of the conformance run before their use. The next
rehearsal therefore finds and removes the resources of a killed rehearsal.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchlab.adapters.local.state_files import read_record
from batchlab.cli import output, rehearsal_jobs
from batchlab.cli.bills import bill_of
from batchlab.cli.progress import StackDisplay, bar
from batchlab.cli.rehearsal_jobs import EXAMPLES, POOL, Expected, Injection, Job
from batchlab.cli.session import Session
from batchlab.core.api_usage_types import account_of
from batchlab.core.atomic_write import write_whole
from batchlab.core.errors import BackendError, UsageError
from batchlab.core.pricing import price_book, request_costs
from batchlab.core.pricing.bill import spent_usd
from batchlab.core.pricing.price_book import NOTHING, Usd
from batchlab.core.pricing.request_costs import Requests
from batchlab.core.text import count, span
from batchlab.deploy import spot_notice, status
from batchlab.deploy.account import Account
from batchlab.deploy.apply import Apply
from batchlab.deploy.destroy import SNAPSHOT, Destroy
from batchlab.deploy.leftovers import AwsResource, Leftover, Leftovers, is_removable, remove, remove_left
from batchlab.deploy.rehearsal import NotTried, Step, StepNotes
from batchlab.deploy.stack import Stack
from batchlab.runtime import aws_deployment, factory
from batchlab.runtime.home import Home
from batchlab.scenarios.model.values import Fault, FaultName

if TYPE_CHECKING:
    from batchlab.client.http import Client
    from batchlab.conform.run import Result
    from batchlab.deploy.plan import Plan
    from batchlab.deploy.settings import Settings
    from batchlab.deploy.stack_records import Event
    from batchlab.deploy.template import Template


STACK = "batchlab-rehearsal"
KILL, CRASH, NOTICE = "worker-kill", "manager-kill", "spot-notice"
"""Names of the jobs during which a fault occurs."""
TAGS_SETTLE_S = 300.0
"""Time in seconds for which AWS may still list the tags of a deleted resource."""
_TAGS_POLL_S = 15.0
_MINUTE = 60.0
_RUN = re.compile(r"batchlab-conform-[0-9a-f]{8}")


class Voice:
    """User interface of the operations on the stack. The user has agreed to the whole rehearsal before its start."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        """Notes of the plans about possible problems of the account."""

    def say(self, text: str) -> None:
        output.say(text)

    def agrees(self, question: str) -> bool:  # noqa: ARG002 - a method of `deploy.apply.Interface`
        return True

    def show(self, plan: Plan) -> None:
        """Print only the notes of the plan, because a rehearsal always creates all resources."""
        for note in plan.notes:
            if note not in self.notes:
                self.notes.append(note)
                output.say(f"Note: {note}")

    @contextmanager
    def watching(self, what: str, total: int) -> Iterator[Callable[[Event], None]]:
        with StackDisplay(what, total) as display:
            yield display.show_event


@dataclass(slots=True)
class Site:
    """Account, stack, and folders of a rehearsal. `work` is a temporary folder for the jobs and their results."""

    stack: Stack
    wanted: Settings
    source: Template
    home: Home
    work: Path
    archive: Callable[[], Path]
    jobs: Sequence[Job]
    expected: Expected
    voice: Voice = field(default_factory=Voice)
    billed_jobs: dict[str, str] = field(default_factory=dict)
    """Ids of the jobs that ran on AWS, by name."""
    stack_begun_s: float = 0.0
    stack_ready_s: float = 0.0
    has_experiment: bool = False
    """Whether a role or an experiment template of AWS FIS may exist."""
    kept: set[str] = field(default_factory=set)
    """Names of the resources that the deletion of the stack keeps by design, such as a database's last snapshot."""
    left: list[dict[str, str]] = field(default_factory=list)

    @property
    def account(self) -> Account:
        return self.stack.account

    @property
    def region(self) -> str:
        return self.stack.account.region

    @property
    def record(self) -> Path:
        """File with the place of a rehearsal whose resources may exist, and with its conformance run. The resources of
        the conformance run lack the stack's tag.
        """
        return self.home.path / "rehearsal.json"

    @property
    def place(self) -> dict[str, str]:
        return {"account": self.account.id, "region": self.region}

    def check_place(self) -> None:
        """Raise UsageError if a killed rehearsal of this folder may have left resources in another account or region,
        where the removal would not find them.
        """
        recorded = self._recorded()
        if recorded is None or {name: recorded[name] for name in self.place} == self.place:
            return
        raise UsageError(
            f"A rehearsal in {recorded['region']}, account {recorded['account']}, may have left resources.",
            remedy=f"Rehearse there again to remove them. If nothing is left there, delete {self.record}.",
        )

    def _recorded(self) -> dict[str, str] | None:
        remedy = f"Look for resources of the stack {STACK}, and delete this file."
        return read_record(self.record, _recorded_place, "a record of a rehearsal", remedy=remedy)

    def _write_record(self, run: str) -> None:
        write_whole(self.record, json.dumps({**self.place, "run": run}))

    def steps(self) -> list[Step]:
        """Return the steps of the rehearsal in order."""
        jobs = {job.name: job for job in self.jobs}
        kill, crash, spot = (jobs[name] for name in (KILL, CRASH, NOTICE))
        needs = ("manager",)
        return [
            Step("earlier", "remove the resources of an earlier rehearsal", self.remove_earlier, 60 * _MINUTE),
            Step("conform", "check the rules of S3 and SQS", self.conform, 20 * _MINUTE, ("earlier",)),
            Step("stack", "create the stack", self.create, 45 * _MINUTE, ("earlier",)),
            Step("manager", "connect to the manager", self.connect, 15 * _MINUTE, ("stack",)),
            *(
                Step(
                    f"job {name}", f"run the example {name}", partial(self.run_example, jobs[name]), 30 * _MINUTE, needs
                )
                for name in EXAMPLES
            ),
            Step("worker kill", "terminate a worker's instance", partial(self.kill_worker, kill), 30 * _MINUTE, needs),
            Step(
                "manager kill",
                "terminate the manager's instance",
                partial(self.kill_manager, crash),
                30 * _MINUTE,
                needs,
            ),
            Step("spot notice", "interrupt a Spot Instance", partial(self.notify_spot, spot), 30 * _MINUTE, needs),
            Step("bill", "compare the bill with the estimate", self.compare_bill, 5 * _MINUTE, needs),
            Step("destroy", "destroy the stack", self.destroy, 60 * _MINUTE, removes=True),
            Step("leftovers", "look for resources that are left", self.find_leftovers, 15 * _MINUTE, removes=True),
        ]

    # --- Creation --------------------------------------------------------------------------------

    def remove_earlier(self, notes: StepNotes) -> None:
        if left := self._remove_conform():
            raise BackendError(f"The resources of an earlier conformance run cannot be removed: {', '.join(left)}.")
        with suppress(NotTried):
            self.destroy(notes)
        self._remove_experiment(notes)
        removed, remaining = self._remove_tagged()
        if remaining:
            reasons = ", ".join(f"{one.resource.kind} {one.resource.name}: {why}" for one, why in remaining)
            raise BackendError(f"Resources of an earlier rehearsal cannot be removed: {reasons}")
        notes.done += [f"{one.resource.kind} {one.resource.name} was left, and is removed." for one in removed]
        if not notes.done:
            notes.done.append("An earlier rehearsal did not leave resources.")
        self._write_record("")

    def conform(self, notes: StepNotes) -> None:
        from batchlab.adapters.clock import WallClock
        from batchlab.conform import check_table
        from batchlab.conform.check import CheckVerdict
        from batchlab.conform.run import run
        from batchlab.conform.target import Target, endpoint

        name = f"batchlab-conform-{uuid.uuid4().hex[:8]}"
        self._write_record(name)
        target = Target(endpoint(self._url, self.region), run=name, clock=WallClock())
        try:
            target.open({check.service for check in check_table.CHECKS})
            with _checks_shown(len(check_table.CHECKS)) as on_result:
                results = run(target, check_table.CHECKS, on_result=on_result)
        finally:
            left = target.close()
        notes.done.append(check_table.verdict_text(results))
        for result in results:
            if result.verdict is CheckVerdict.DIFFERS:
                notes.compare(
                    result.check.name, result.check.rule, f"{result.observed}. Effect: {result.check.follows}"
                )
            elif result.verdict is CheckVerdict.UNTRIED:
                notes.compare(result.check.name, result.check.rule, f"not tried: {result.observed}")
        if left:
            raise BackendError(f"Resources of the checks are left: {', '.join(left)}.")
        self._write_record("")
        if not check_table.needed_rules_hold(results):
            raise BackendError("A rule that batchlab needs does not hold. docs/conform.md explains the rules.")

    @property
    def _url(self) -> str | None:
        """URL of the emulator, or None for AWS itself."""
        return None if self.account.is_real else str(self.account.client("sqs").meta.endpoint_url)

    def create(self, notes: StepNotes) -> None:
        self.archive()  # The first call builds the release, which is not a part of the stack's creation.
        self.stack_begun_s = time.monotonic()
        Apply(self.stack, self.wanted, self.source, self.home, self.voice, self.archive).run()
        self.stack_ready_s = time.monotonic()
        notes.figures["stack_s"] = self.stack_ready_s - self.stack_begun_s
        notes.done += [f"Note of the plan: {note}" for note in self.voice.notes]
        state = self.stack.state()
        assert state
        found = status.read_status(self.stack, state, self.home)
        if found.drift:
            raise BackendError(f"The recorded deployment differs from the stack: {', '.join(found.drift)}.")
        notes.done.append(f"The stack {self.stack.name} has {count(len(self.stack.resources()), 'resource')}.")
        usual = "some minutes, or 15 minutes with RDS"
        notes.compare("creation of the stack", usual, span(notes.figures["stack_s"]))

    def connect(self, notes: StepNotes) -> None:
        backend = factory.load("aws")
        with Session(self.home, backend) as session:
            session.start()
            grid = session.call(lambda client: client.grid())
        notes.figures["manager_s"] = time.monotonic() - self.stack_ready_s
        notes.done.append(f"The manager {grid['owner']} leads, and has {count(len(grid['pools']), 'pool')}.")
        usual = f"{span(backend.usual.manager_s)} (assumed in backends/aws/backend.toml)"
        notes.compare("first start of the manager", usual, span(notes.figures["manager_s"]))

    # --- Jobs and faults -------------------------------------------------------------------------

    def run_example(self, job: Job, notes: StepNotes) -> None:
        if job.obstacle:
            raise NotTried(job.obstacle)
        is_first = not self.billed_jobs
        self.billed_jobs[job.name] = rehearsal_jobs.run_example(self.home, job, self.work, notes)
        figures = notes.figures
        notes.compare(
            "duration of the whole run", f"{span(figures['local_s'])} on this machine", span(figures["aws_s"])
        )
        if is_first and "first_task_s" in figures:
            boot_s = {pool.name: pool for pool in factory.load("aws").pools}[POOL].boot_s
            usual = f"{span(boot_s)} (assumed in backends/aws/backend.toml)"
            notes.compare("start of the first instance, until its first task", usual, span(figures["first_task_s"]))

    def kill_worker(self, job: Job, notes: StepNotes) -> None:
        self._run_with_fault(job, partial(self._inject, FaultName.KILL), notes)
        self._compare_recovery(notes)

    def kill_manager(self, job: Job, notes: StepNotes) -> None:
        self._run_with_fault(job, partial(self._crash_manager, notes), notes)
        usual = f"{span(factory.load('aws').usual.manager_s)} (assumed in backends/aws/backend.toml)"
        notes.compare("time until another manager led", usual, span(notes.figures["leader_s"]))

    def notify_spot(self, job: Job, notes: StepNotes) -> None:
        if not self.account.is_real:
            raise NotTried("An emulator does not have AWS Fault Injection Service, and does not have Spot Instances.")
        self._run_with_fault(job, self._send_notice, notes)
        self._compare_recovery(notes)

    def _run_with_fault(self, job: Job, inject: Injection, notes: StepNotes) -> None:
        self.billed_jobs[job.name] = rehearsal_jobs.run_with_fault(self.home, job, self.work, inject, notes)

    def _compare_recovery(self, notes: StepNotes) -> None:
        visibility_s = factory.load("aws").worker.visibility_s
        usual = f"the visibility timeout is {span(visibility_s)}"
        for figure, subject in (
            ("gone_s", "time until the instance was out of service"),
            ("replaced_s", "time until a replacement was in service"),
        ):
            seen = span(notes.figures[figure]) if figure in notes.figures else "not before the end of the job"
            notes.compare(subject, "-", seen)
        notes.compare("duration of the job with the lost instance", usual, span(notes.figures["job_s"]))

    def _inject(self, name: FaultName, client: Client) -> tuple[Sequence[str], str]:
        """Inject a fault of scenarios into one instance. Raise BackendError if the injection fails."""
        from batchlab.scenarios.faults.fault_injection import injector_for

        async def inject() -> Any:
            injector = injector_for(factory.load("aws"), self.home, client)
            try:
                return await injector.inject(Fault(name, 0.0, pool=POOL, count=1), 0.0)
            finally:
                await injector.close()

        injected = asyncio.run(inject())
        if trouble := injected.trouble or injected.impossible:
            raise BackendError(f"The fault {name} was not injected: {trouble.rstrip('.')}.")
        return injected.targets, f"Fault {name}: {injected.evidence}."

    def _crash_manager(self, notes: StepNotes, client: Client) -> tuple[Sequence[str], str]:
        """Terminate the manager's instance, and restore the ledger as docs/runbook.md says."""
        begun_s = time.monotonic()
        targets, evidence = self._inject(FaultName.MANAGER_CRASH, client)
        notes.figures["leader_s"] = time.monotonic() - begun_s
        listed, restored = len(client.jobs()), client.rebuild()
        notes.done.append(
            f"The next manager listed {listed} of {count(restored, 'job')}, because SQLite is lost with its "
            "instance. `batchlab grid rebuild-ledger` restored all jobs from the bucket."
            if listed < restored
            else f"The next manager listed all of {count(restored, 'job')}."
        )
        return targets, evidence

    def _send_notice(self, client: Client) -> tuple[Sequence[str], str]:
        """Interrupt one Spot Instance through AWS FIS. Raise NotTried if the account does not allow FIS."""
        instances = [one for pool in client.grid()["pools"] for one in pool["instances"] if one["state"] == "InService"]
        spot = [one["id"] for one in instances if one["market"] == "spot"]
        if not spot:
            raise NotTried("No Spot Instance is in service.")
        self.has_experiment = True
        try:
            template = spot_notice.prepare(self.account, self.stack.name, spot[0])
        except BackendError as error:
            raise NotTried(f"The account does not allow an experiment of AWS FIS: {error}") from error
        return spot[:1], f"Spot notice for {spot[0]}: {spot_notice.send(self.account, template)}"

    # --- Bill ------------------------------------------------------------------------------------

    def compare_bill(self, notes: StepNotes) -> None:
        """Compare the estimate with the usage that the manager has metered, by service and by job."""
        book = price_book.load(self.home.path)
        hours = (time.monotonic() - self.stack_begun_s) / 3600
        with Session(self.home, factory.load("aws")) as session:
            session.start()
            used = account_of(session.call(lambda client: client.use())["total"])
            bills = {name: bill_of(self.home, job, {})[1].usd for name, job in self.billed_jobs.items()}
        sqs, s3 = request_costs.usd_of(used.requests, book)
        metered = {item.what: item.usd.times(hours) for item in self.expected.hourly.idle}
        metered["EC2 workers"] = spent_usd(replace(used, requests=Requests()), {}, book)
        metered |= {"SQS": Usd.exactly(sqs), "S3": Usd.exactly(s3)}
        estimated = {item.what: item.usd for item in self.expected.items}
        for what, usd in metered.items():
            notes.compare(what, estimated.get(what, NOTHING), usd)
        both = _sum(estimated[what] for what in metered if what in estimated), _sum(metered.values())
        notes.compare("all of these services", *both)
        for name, usd in bills.items():
            notes.compare(f"job {name}", self.expected.jobs[name].usd, usd)
        notes.figures |= {
            "estimated_usd": _sum(estimated.values()).typical,
            "metered_usd": _sum(metered.values()).typical,
        }
        notes.figures["stack_h"] = hours
        notes.done.append(
            "The observed costs are AWS's list prices for the usage that the manager has metered until now."
        )
        notes.done.append(_aws_bill_hint(self.account.is_real))
        check_bill(*both)

    # --- Removal ---------------------------------------------------------------------------------

    def destroy(self, notes: StepNotes) -> None:
        if self.stack.state() is None:
            raise NotTried("The stack does not exist.")
        begun_s = time.monotonic()
        kept = Destroy(self.stack, self.voice, delete_data=True).run() or []
        self.kept |= {resource.physical for resource in kept}
        aws_deployment.forget(self.home)
        notes.figures["destroy_s"] = time.monotonic() - begun_s
        notes.done.append(f"The stack {self.stack.name} was deleted with its data.")
        for resource in kept:
            # AWS's list of tags may lack the last snapshot of a database for some minutes.
            if resource.type == SNAPSHOT:
                name = resource.physical
                remove(self.account, AwsResource(name, "rds:snapshot", name, self.stack.name), output.say)

    def find_leftovers(self, notes: StepNotes) -> None:
        """Remove the leftovers of the rehearsal, and record all resources that remain.

        Raise BackendError if the destruction of the stack has left a resource, even if the resource is now removed.
        """
        destroy = f"batchlab deploy destroy --stack {self.stack.name} --region {self.region} --delete-data --yes"
        gc = f"batchlab gc --aws --yes --region {self.region}"
        # If a request of this step fails, its part of the state is unknown.
        unknown = [{"resource": f"resources with the tag of the stack {self.stack.name}, perhaps", "command": gc}]
        if self._conform_run():
            again = f"batchlab deploy rehearse --budget 5USD --region {self.region}"
            unknown.append({"resource": "queues and a bucket of the step conform, perhaps", "command": again})
        self.left = [{"resource": f"stack {self.stack.name}, perhaps", "command": destroy}, *unknown]
        state = self.stack.state()
        resources = self.stack.resources() if state else []
        texts = [f"stack {state.name} ({state.status})"] if state else []
        texts += [f"{resource.type} {resource.physical}" for resource in resources]
        found = [{"resource": text, "command": destroy} for text in texts]
        self.left = [*found, *unknown]
        texts = [*self._remove_conform(), *self._remove_experiment(notes)]
        found += [{"resource": text, "command": _command(text, self.region)} for text in texts]
        self.left = [*found, unknown[0]]
        removed, remaining = self._remove_tagged()
        self.left = found
        for leftover, why in remaining:
            name = f" --name {leftover.resource.name}" if leftover.is_guessed else ""
            command = f"{gc}{name}"
            if not is_removable(leftover.resource):
                command = "none, use AWS's console"
            self.left.append(
                {"resource": f"{leftover.resource.kind} {leftover.resource.name}: {why}", "command": command}
            )
        surprising = [one for one in removed if one.resource.name not in self.kept]
        notes.done += [f"{one.resource.kind} {one.resource.name} was left, and is removed." for one in removed]
        if self.left:
            raise BackendError(f"{count(len(self.left), 'resource')} could not be removed.")
        self.record.unlink(missing_ok=True)
        if surprising:
            raise BackendError(f"The destruction of the stack left {count(len(surprising), 'resource')}.")
        notes.done.append(f"No resource with the tag of the stack {self.stack.name} is left.")

    def _remove_experiment(self, notes: StepNotes) -> list[str]:
        """Remove the role and the templates for AWS FIS. Return a text for a role that may remain."""
        if not self.account.is_real:
            return []
        try:
            if removed := spot_notice.remove(self.account, self.stack.name):
                notes.done.append(f"{count(removed, 'experiment template')} of AWS FIS removed.")
        except BackendError as error:
            notes.done.append(f"The experiments of AWS FIS were not searched: {error}")
            role = spot_notice.role_name(self.account, self.stack.name)
            return [f"role {role}: {error.message}"] if self.has_experiment else []
        return []

    def _remove_tagged(self) -> tuple[list[Leftover], list[tuple[Leftover, str]]]:
        """Remove the leftovers of the stack. Return the removed leftovers, and the remaining leftovers with reasons."""
        deadline_s = time.monotonic() + (TAGS_SETTLE_S if self.account.is_real else 0.0)
        # A deleted resource may still have an entry in AWS's list of tags, and the removal of some kinds of resources
        # succeeds twice. So a leftover is a resource that stays in the list.
        while (found := self._tagged()) and time.monotonic() < deadline_s:
            time.sleep(_TAGS_POLL_S)
        reasons = [(leftover, remove_left(self.account, leftover, output.say)) for leftover in found]
        return [leftover for leftover, why in reasons if not why], [(leftover, why) for leftover, why in reasons if why]

    def _tagged(self) -> list[Leftover]:
        """Return the leftovers that have the tag or the name of the stack."""
        found = Leftovers(self.account)
        tagged = list(found.tagged_resources())
        named = found.named_resources({one.resource.name for one in tagged}, output.say)
        return [one for one in (*tagged, *named) if one.resource.stack == self.stack.name and not one.is_used]

    def _remove_conform(self) -> list[str]:
        """Remove the resources of a recorded conformance run. Return a text for each resource that remains."""
        from batchlab.conform.target import Cleaner, endpoint

        name = self._conform_run()
        if not name:
            return []
        urls = self.account.pages("sqs", "list_queues", "QueueUrls", QueueNamePrefix=name)
        cleaner = Cleaner(endpoint(self._url, self.region))
        left = cleaner.queues({url.rpartition("/")[2]: url for url in urls})
        left += cleaner.objects(name, "", with_bucket=True)
        if not left:
            self._write_record("")
        return left

    def _conform_run(self) -> str:
        """Return the name of the conformance run whose resources may exist, or ""."""
        recorded = self._recorded()
        return recorded["run"] if recorded else ""


def _recorded_place(document: Any) -> dict[str, str]:
    """Return the content of a record. Raise ValueError for the name of another run, because the name is a prefix of the
    queues that are removed.
    """
    recorded = {name: str(document[name]) for name in ("account", "region", "run")}
    if recorded["run"] and not _RUN.fullmatch(recorded["run"]):
        raise ValueError(f"run is {recorded['run']!r}")
    return recorded


def check_bill(estimated: Usd, metered: Usd) -> None:
    """Raise BackendError if the metered usage costs more than the highest estimate."""
    if metered.typical > estimated.high:
        raise BackendError(f"The metered usage costs {metered}, more than the estimate of {estimated}.")


def _sum(amounts: Iterable[Usd]) -> Usd:
    return sum(amounts, NOTHING)


def _command(text: str, region: str) -> str:
    """Return the command that removes a resource. `text` has the kind and the name of the resource and a reason."""
    kind, _, rest = text.partition(" ")
    name = rest.partition(":")[0]
    if kind == "bucket":
        return f"aws s3 rb s3://{name} --force --region {region}"
    if kind == "role":
        policy = f"aws iam delete-role-policy --role-name {name} --policy-name {spot_notice.POLICY}"
        return f"{policy}; aws iam delete-role --role-name {name}"
    url = f"$(aws sqs get-queue-url --region {region} --queue-name {name} --output text)"
    return f"aws sqs delete-queue --region {region} --queue-url {url}"


def _aws_bill_hint(is_real: bool) -> str:
    if not is_real:
        return "AWS's own bill was not compared: an emulator does not have a bill."
    tags = json.dumps({"Tags": {"Key": "batchlab.stack", "Values": [STACK]}})
    today = time.strftime("%Y-%m-%d", time.gmtime())
    return (
        "AWS's own bill was not compared: AWS reports costs about a day later. With the cost allocation tag "
        "batchlab.stack, this command then shows the costs by service: aws ce get-cost-and-usage --granularity DAILY "
        f"--metrics UnblendedCost --group-by Type=DIMENSION,Key=SERVICE --filter '{tags}' "
        f"--time-period Start={today},End=TOMORROW"
    )


@contextmanager
def _checks_shown(number: int) -> Iterator[Callable[[Result], None]]:
    done = 0
    with bar() as show:

        def on_result(_: Result) -> None:
            nonlocal done
            done += 1
            show(done, number, f"{done} of {number} checks")

        yield on_result
