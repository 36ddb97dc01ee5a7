"""Links that are cut again and again."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from benchmarks.chaos.proxy import Proxy


@asynccontextmanager
async def cut_again_and_again(choose: random.Random, *proxies: Proxy) -> AsyncIterator[None]:
    """Cut the connections of some of the proxies every 0.05 to 0.4 s, while the block runs."""

    async def cut() -> None:
        while not ended:
            await asyncio.sleep(choose.uniform(0.05, 0.4))
            for proxy in choose.sample(proxies, choose.choice([1, *range(1, len(proxies) + 1)])):
                proxy.cut()
                await proxy.restore()

    ended = False
    cutting = asyncio.ensure_future(cut())
    try:
        yield
    finally:
        ended = True
        await cutting
