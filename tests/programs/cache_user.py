"""A process that uses a cache from synchronous code inside a running event loop.

Usage: cache_user.py URL NAMESPACE WRITES READS: sets the keys of the range WRITES, such as 0-500, says so, and then
gets those of READS until it has all.
"""

from __future__ import annotations

import asyncio
import sys
import time

from natsrt.contrib.cache import NatsCacheStore


def span(text: str) -> range:
    first, _, last = text.partition("-")
    return range(int(first), int(last))


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


async def main(url: str, namespace: str, writes: str, reads: str) -> None:
    with NatsCacheStore[dict[str, int]](url, namespace=namespace) as store:
        for number in span(writes):
            store.set(f"key {number}", {"number": number})
        say("written")
        until = time.monotonic() + 30
        missing = [*span(reads)]
        while missing and time.monotonic() < until:
            missing = [number for number in missing if store.get(f"key {number}") != {"number": number}]
        say(f"missing {len(missing)}")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
