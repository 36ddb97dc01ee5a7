"""Duration of importing, and of a worker's start until its first reply."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterator

from benchmarks.harness import LESS, Goal, Measure, Sample, Scenario, Variant
from benchmarks.peers import BARE, GRPC, HTTP, NATSRT, Peer
from benchmarks.roles import Role
from benchmarks.setup import Setup
from benchmarks.teams import Team

BEFORE = "import autogen_core, nats"
_PROGRAM = "import time\n{before}\nbegan = time.perf_counter()\n{statement}\nprint(time.perf_counter() - began)"


class Importer(Role):
    """Imports modules in new Python processes."""

    async def start(self) -> None:
        """Do nothing."""

    async def stop(self) -> None:
        """Do nothing."""

    async def seconds(self, statement: str, before: str) -> float:
        """Run ``before``, then ``statement``, in a new Python process. Returns the seconds for ``statement``.

        Raises:
            RuntimeError: The process failed.
        """
        program = _PROGRAM.format(before=before, statement=statement)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", program, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE
        )
        written, _ = await process.communicate()
        if process.returncode:
            raise RuntimeError(f"{statement!r} failed with exit code {process.returncode}")
        return float(written)


ROLES: dict[str, type[Role]] = {"caller": Importer}
PYTHON = Peer(name="python", title="Python", module=__name__, has_workers=False)


def scenarios(short: bool) -> Iterator[Scenario]:
    yield Scenario(
        name="import",
        title="Importing",
        unit="ms",
        better=LESS,
        variants=[
            Variant(name="autogen_core and nats", peer=PYTHON, measure=_importing(BEFORE, "")),
            Variant(name="natsrt after these", peer=PYTHON, measure=_importing("import natsrt", BEFORE)),
        ],
        goals=[
            Goal(
                text="`import natsrt` beyond `import autogen_core` and `import nats`, ms",
                of="natsrt after these",
                at_most=60,
            )
        ],
    )
    yield Scenario(
        name="worker-start",
        title="From the start of a worker process to its first reply, server and caller running",
        unit="s",
        better=LESS,
        baseline=BARE.name,
        variants=[
            Variant(name=peer.name, peer=peer, measure=_first_reply, setup=Setup(workers=0))
            for peer in (BARE, NATSRT, GRPC, HTTP)
        ],
        goals=[Goal(text="worker start to first reply, server running, s", of="natsrt", at_most=0.7)],
    )


def _importing(statement: str, before: str) -> Measure:
    async def measure(team: Team, count: int) -> Sample:
        seconds = await team.caller.ask("seconds", statement=statement, before=before)
        return Sample(value=seconds * 1e3)

    return measure


async def _first_reply(team: Team, count: int) -> Sample:
    began = time.perf_counter()
    worker = await team.start_worker()
    try:
        await team.caller.ask("call_once")
        return Sample(value=time.perf_counter() - began)
    finally:
        await team.stop_worker(worker)
