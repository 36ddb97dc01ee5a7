"""A process that shares a session: it adds contents, waits until all others are done, and prints the order it has.

Usage: memory_member.py URL NAMESPACE NAME ADDS NAMES, where NAMES are those, with commas, that will say that they are
done.
"""

from __future__ import annotations

import asyncio
import hashlib
import sys

from autogen_core.memory import MemoryContent

from natsrt import Options
from natsrt.contrib.memory import NatsMemory

SESSION = "crowd"


def text(value: str) -> MemoryContent:
    return MemoryContent(content=value, mime_type="text/plain")


def digest(contents: list[MemoryContent]) -> str:
    """The number of contents, and a hash of their order."""
    joined = "\n".join(str(content.content) for content in contents)
    return f"{len(contents)} {hashlib.sha256(joined.encode()).hexdigest()}"


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


async def main(url: str, namespace: str, name: str, adds: int, names: list[str]) -> None:
    options = Options(servers=url, namespace=namespace, publish_timeout=30)
    async with NatsMemory(SESSION, options=options, max_messages=None) as memory:
        say("ready")
        while not (await memory.query()).results:  # the first content is the sign to begin
            await asyncio.sleep(0.01)
        for number in range(adds):
            await memory.add(text(f"{name} {number}"))
            if number == adds // 10:
                say("begun")
        await memory.add(text(f"{name} done"))
        while True:
            contents = (await memory.query()).results
            if {f"{other} done" for other in names} <= {str(content.content) for content in contents}:
                break
            await asyncio.sleep(0.05)
        say(f"order {digest(contents)}")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5].split(",")))
