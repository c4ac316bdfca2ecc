"""Record of the container images of pools, which is stored for the replay of tasks.

Invariant: only the leader writes the record. The images come from the manager's configuration, and never from a worker.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from batchlab.core import container_images
from batchlab.core.container_images import Images
from batchlab.core.errors import Refused
from batchlab.core.model import Pool
from batchlab.core.protocol import object_keys
from batchlab.manager.state import Ports
from batchlab.manager.versioned_document import VersionedDocument

log = logging.getLogger(__name__)


class PoolImages:
    """The images of `pools`, and the images that the pools had before. A grid without images sends no requests."""

    def __init__(self, ports: Ports, pools: Mapping[str, Pool]) -> None:
        self._pools = pools
        self._images: Images = {}
        self._document = VersionedDocument(ports, object_keys.POOL_IMAGES, self._merge, keeps_unreadable=True)

    async def save(self) -> None:
        """Add the current images to the stored record. An unreadable record stays unchanged, because it may have images
        of earlier workers. Raise BackendError if the bucket does not respond."""
        current = {name: pool.image for name, pool in self._pools.items()}
        if not any(current.values()):
            return
        await self._document.load()
        if container_images.with_current(self._images, current) == self._images:
            return
        try:
            await self._document.write(
                lambda: container_images.encode_images(container_images.with_current(self._images, current))
            )
        except Refused:
            # The record may be of a later release. It must not prevent a manager from leading.
            log.error(
                "The images of pools are not recorded, so `job replay-task` runs tasks without their image. %s",
                container_images.REPAIR,
            )

    def _merge(self, content: bytes) -> None:
        self._images = container_images.decode_images(content)
