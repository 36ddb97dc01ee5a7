"""Memory of the Python objects that the worker keeps for a live agent, beyond the agent itself."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.harness import LESS, Goal, Measure, Sample, Scenario, Variant
from benchmarks.peers import IN_PROCESS, NATSRT
from benchmarks.setup import Setup
from benchmarks.teams import Team

WARM_UP = 100
"""Number of agents that are live before measuring starts."""


def scenarios(short: bool) -> Iterator[Scenario]:
    agents = 100 if short else 20_000
    yield Scenario(
        name="memory",
        title=f"Memory of a live agent beyond the agent's own, the mean of {agents:,}",
        unit="bytes",
        better=LESS,
        fresh=True,
        rounds=3,
        variants=[
            Variant(name=peer.name, peer=peer, measure=beyond_itself(agents), setup=Setup(trace_memory=True))
            for peer in (NATSRT, IN_PROCESS)
        ],
        goals=[Goal(text="memory per live agent beyond the agent's own, bytes", of="natsrt", at_most=1_000)],
    )


def beyond_itself(agents: int) -> Measure:
    """Measure the memory per live agent beyond the agent itself, in bytes: the mean of ``agents`` agents.

    Requires ``Setup.trace_memory``.
    """

    async def measure(team: Team, count: int) -> Sample:
        host = team.workers[0] if team.workers else team.caller
        await team.caller.ask("make_live", count=WARM_UP)
        before = await host.ask("memory")
        await team.caller.ask("make_live", count=WARM_UP + agents)
        together = await host.ask("memory") - before
        alone = await host.ask("agents_alone", count=agents)
        return Sample(value=(together - alone) / agents)

    return measure
