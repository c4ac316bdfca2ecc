"""Process of a worker, from its start to its end.

Invariant: a worker that gets SIGTERM returns its messages to the queue before it ends. A worker on the manager's
machine ends soon after the manager. A worker on an instance of its own also ends if no manager leads for `orphan_s`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
from collections.abc import Callable, Mapping

from batchlab.adapters.aws.group_descriptions import GPUS_TAG, POOL_TAG, SLOTS_TAG
from batchlab.adapters.aws.instance_metadata import Imds, ImdsNotices
from batchlab.core import container_images, gc_control, logs
from batchlab.core.errors import BackendError, UsageError
from batchlab.core.ports import Objects
from batchlab.core.pricing.request_costs import RequestCounter
from batchlab.core.text import count
from batchlab.runtime import factory
from batchlab.runtime.factory import Backend
from batchlab.runtime.home import Home
from batchlab.worker.inflight_message import Identity, Scratch
from batchlab.worker.loop import Worker
from batchlab.worker.process_runner import ProcessRunner

log = logging.getLogger(__name__)

VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"

ORPHAN_S = 15.0
"""Time in seconds without a manager after which a worker on the same machine drains and ends.

The limit ensures that worker processes do not outlive their grid.
"""


ORPHAN_EXIT = 69
"""Exit code of a worker that ends because no manager leads. On AWS, systemd then powers the instance off."""


def worker_main(
    home: Home, backend: Backend, *, pool: str = "", slots: int = 0, gpus: int | None = None, instance: str = ""
) -> None:
    """Run a worker until SIGTERM or a notice. A worker on the manager's machine also ends if no manager runs for
    ORPHAN_S. A worker on an instance of its own ends when it is idle and no manager leads for the manager's setting
    `orphan_s`.

    The values of omitted arguments come from the instance's metadata service.
    """
    logs.set_up(service="worker")
    if asyncio.run(_work(home, backend, pool, slots, gpus, instance)):
        raise SystemExit(ORPHAN_EXIT)


def gpu_names(gpus: int, environ: Mapping[str, str]) -> list[str]:
    """Return the names of `gpus` GPUs for CUDA_VISIBLE_DEVICES. The names come from the worker's own
    CUDA_VISIBLE_DEVICES, which may limit the worker to some GPUs of its machine, and are numbers without it."""
    names = [name.strip() for name in environ.get(VISIBLE_DEVICES, "").split(",") if name.strip()]
    if not names:
        return [str(number) for number in range(gpus)]
    if len(names) < gpus:
        raise UsageError(
            f"{VISIBLE_DEVICES} names {count(len(names), 'GPU')}, and the worker's pool declares {gpus}.",
            remedy=f"Unset {VISIBLE_DEVICES}, or declare fewer GPUs for the pool.",
        )
    return names[:gpus]


async def _work(home: Home, backend: Backend, pool: str, slots: int, gpus: int | None, instance: str) -> bool:
    """Run a worker, and return whether the worker has ended because no manager leads."""
    clock, ids = backend.open_clock(), backend.open_ids()
    imds = None if instance else Imds()
    if imds:
        instance = await asyncio.to_thread(imds.instance_id)
        pool = pool or await asyncio.to_thread(imds.require_tag, POOL_TAG)
        slots = slots or int(await asyncio.to_thread(imds.require_tag, SLOTS_TAG))
        if gpus is None:
            gpus = int(await asyncio.to_thread(imds.tag, GPUS_TAG) or 0)
    gpus = gpus or 0
    name = ids.fresh("w")
    logs.add_process_fields(worker=name, instance=instance, pool=pool)
    # A worker on an instance of its own cannot read the record of the manager.
    has_own_instance = imds is not None or backend.capabilities.remote_manager
    tally = RequestCounter(is_spot=await asyncio.to_thread(imds.is_spot) if imds else False)
    tracer = backend.open_tracer("worker", name)
    objects = backend.open_objects(home, tally)
    files = backend.open_local_files(home)
    scratch, cache_bytes = Scratch(home.scratch / instance), backend.worker.value_cache_bytes
    runner = ProcessRunner(
        objects, scratch, clock, slots, files, value_cache_bytes=cache_bytes, gpu_names=gpu_names(gpus, os.environ)
    )
    worker = Worker(
        Identity(name, instance, pool, slots, _instance_key(home, instance if imds else ""), gpus),
        objects,
        backend.open_queue(home, clock, tally),
        clock,
        runner,
        factory.patience(),
        backend.worker,
        ImdsNotices(imds) if imds else None,
        tally,
        tracer,
        backend.open_replies(home),
        ends_without_manager=has_own_instance,
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, worker.drain)
    background = [loop.create_task(_store_environment(objects, worker.who.worker, imds))]
    if not has_own_instance:
        background.append(loop.create_task(_drain_orphan(home, worker.drain)))
    gc_control.resume()
    runner.prepare()
    try:
        await worker.run()
    finally:
        for task in background:
            task.cancel()
        await tracer.close()
    if imds and (hook := backend.open_drain_hook(home, pool, imds)):
        await hook.complete(factory.patience())
    return worker.is_orphan


def _instance_key(home: Home, instance: str) -> str:
    """Return the secret key of an instance.

    The key of an instance is stored, so the next worker on the same instance has the same key. If `instance` is empty,
    return a new key, as for a worker on the manager's machine.
    """
    key = secrets.token_hex(16)
    if not instance:
        return key
    path = home.path / f"{instance}.key"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(key)
    except FileExistsError:
        return path.read_text() or key
    except OSError as error:
        # If the key cannot be stored, the manager will not accept the next worker on the instance, and the group
        # replaces the instance.
        log.warning("the key of this instance cannot be stored: %s", error)
    return key


async def _store_environment(objects: Objects, worker: str, imds: Imds | None) -> None:
    """Store a description of the environment of this worker's tasks, for the analysis of failures."""
    from batchlab.worker import environment

    try:
        image = os.environ.get(container_images.VARIABLE, "")
        if imds and not image:
            image = await asyncio.to_thread(imds.image)
        current = await asyncio.to_thread(environment.current, image=image)
        await environment.record(objects, worker, current, factory.patience())
    except BackendError as error:
        log.warning("the worker's environment could not be stored: %s", error)


async def _drain_orphan(home: Home, drain: Callable[[], None]) -> None:
    alone_s = 0.0
    while alone_s < ORPHAN_S:
        await asyncio.sleep(ORPHAN_S / 5)
        alone_s = 0.0 if home.record() else alone_s + ORPHAN_S / 5
    log.warning("no manager has run for %.0f s, so the worker drains", ORPHAN_S)
    drain()
