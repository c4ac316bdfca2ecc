"""The leader's record of the images of pools, and its use in the replay of a task."""

from __future__ import annotations

import pytest

from batchlab.core.container_images import image_of_worker
from batchlab.core.errors import Malformed
from batchlab.core.model import Pool
from batchlab.core.protocol import object_keys
from batchlab.jobs import attempts
from batchlab.manager.pool_images import PoolImages
from tests.manager.test_usage_records import Scene, play

TOOLS = Pool("tools", image="tools:1")


def test_leader_records_the_images_and_the_next_leader_adds_its_own() -> None:
    async def main() -> None:
        scene = Scene()

        async def lead(*pools: Pool) -> None:
            await PoolImages(scene.ports, {pool.name: pool for pool in pools}).save()

        async def image(claimed: str) -> str:
            return image_of_worker(await attempts.pool_images(scene.objects, "tools", scene.ports.patience), claimed)

        assert await image("evil:1") == "", "without a record, no claim counts"
        await lead(TOOLS, Pool("default"))
        assert await image("evil:1") == "tools:1"
        await lead(Pool("tools", image="tools:2"))
        assert [await image(claimed) for claimed in ("tools:1", "tools:2", "")] == ["tools:1", "tools:2", "tools:2"]
        writes = scene.objects.requests
        await lead(Pool("tools", image="tools:2"))
        assert scene.objects.requests == writes + 1, "only the read"

    play(main)


def test_grid_without_images_sends_no_requests() -> None:
    async def main() -> None:
        scene = Scene()
        await PoolImages(scene.ports, {"default": Pool("default")}).save()
        assert scene.objects.requests == 0

    play(main)


def test_unreadable_record_selects_no_image_and_stays(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        scene = Scene()
        await scene.objects.put(object_keys.POOL_IMAGES, b"[]")
        await PoolImages(scene.ports, {"tools": TOOLS}).save()
        assert await scene.objects.get(object_keys.POOL_IMAGES) == b"[]"
        assert "Restore or delete the object grid/pool-images.json" in caplog.text
        with pytest.raises(Malformed, match="cannot be read") as found:
            await attempts.pool_images(scene.objects, "tools", scene.ports.patience)
        assert found.value.remedy == "Restore or delete the object grid/pool-images.json, and restart the manager."
        await scene.objects.put(object_keys.POOL_IMAGES, b"[" * 2_000_000)
        with pytest.raises(Malformed, match="at most 1048576 are allowed"):
            await attempts.pool_images(scene.objects, "tools", scene.ports.patience)

    play(main)
