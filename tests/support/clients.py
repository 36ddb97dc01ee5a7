"""Clients of nats-py in tests."""

from __future__ import annotations

import asyncio

from nats.aio.client import Client


async def settled(client: Client) -> None:
    """Wait until the server has processed everything that ``client`` has sent, its subscriptions included.

    ``flush`` alone may write its ping ahead of a subscription that was made just before.
    """
    await asyncio.sleep(0)
    await client.flush()
