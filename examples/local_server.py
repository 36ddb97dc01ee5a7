"""The NATS server for an example: the one in NATS_URL, or else one that runs as long as the example."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from natsrt.embedded import EmbeddedServer


@asynccontextmanager
async def local_server() -> AsyncIterator[str]:
    """Yields the URL of the server."""
    if url := os.environ.get("NATS_URL"):
        yield url
        return
    async with EmbeddedServer() as server:
        yield server.url
