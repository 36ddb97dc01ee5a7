"""The cost of keyed agents: of having one instance per key, and of storing the state before the reply.

Storing is compared with nats-py's ``KeyValue.update`` with the last revision, for as many keys and callers.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import replace

from nats.js.api import KeyValueConfig
from nats.js.kv import KeyValue

from benchmarks import measures
from benchmarks.harness import LESS, Goal, Scenario, Variant
from benchmarks.peers import NATSRT, Peer
from benchmarks.peers.bare import BareCaller
from benchmarks.roles import Role, Send
from benchmarks.scenarios.memory import beyond_itself
from benchmarks.setup import ECHO, Setup
from benchmarks.work import encoded, text_of

CONCURRENCY = 64
KEYS = 256

PLAIN = Setup(live_agents=KEYS)
KEYED = Setup(live_agents=KEYS, options=(("keyed", ECHO),))
KEEPER = replace(KEYED, agent="Keeper")
TALLY = replace(KEYED, agent="Tally")

_PLAIN, _KEYED, _UNCHANGED, _SAVED = (
    "natsrt",
    "keyed, no state",
    "keyed, state unchanged",
    "keyed, state saved",
)
_UPDATES, _CREATES = "kv.update", "kv.create"


class KeyValueCaller(BareCaller):
    """Updates and creates keys in a bucket that is configured like that of keyed agents. There is no worker."""

    bucket: KeyValue

    async def start(self) -> None:
        await super().start()
        config = KeyValueConfig(bucket=self.place.namespace, history=1, direct=True)
        self.bucket = await self.client.jetstream().create_key_value(config)
        self._free: deque[tuple[str, int]] = deque()
        self._new = itertools.count()

    async def make_live(self, count: int) -> None:
        """Create the ``count`` keys that the calls update."""
        for number in range(count):
            self._free.append((f"live{number}", await self.bucket.create(f"live{number}", b"")))

    async def calling(self, size: int) -> Send:
        value, free, update = encoded(text_of(size)), self._free, self.bucket.update

        async def call() -> None:
            key, revision = free.popleft()
            free.append((key, await update(key, value, last=revision)))

        return call

    async def first_calls(self, concurrency: int, count: int, size: int) -> float:
        """Create ``count`` keys by ``concurrency`` callers. Returns the seconds."""
        value = encoded(text_of(size))
        return await self.timed(lambda: self.bucket.create(f"new{next(self._new)}", value), concurrency, count)


ROLES: dict[str, type[Role]] = {"caller": KeyValueCaller}
KEY_VALUE = Peer(name="nats-py kv", title="nats-py's KeyValue", module=__name__, has_workers=False)


def scenarios(short: bool) -> Iterator[Scenario]:
    calls = measures.calls(CONCURRENCY)
    yield Scenario(
        name="keyed-calls",
        title=f"Calls to keyed agents, {CONCURRENCY} at a time over {KEYS} keys",
        unit="calls/s",
        baseline=_PLAIN,
        most=200_000,
        first=1,
        multiple=CONCURRENCY,
        variants=[
            Variant(name=_PLAIN, peer=NATSRT, measure=calls, setup=PLAIN),
            Variant(name=_KEYED, peer=NATSRT, measure=calls, setup=KEYED),
            Variant(name=_UNCHANGED, peer=NATSRT, measure=calls, setup=KEEPER),
        ],
        goals=[
            Goal(
                text="calls/s to keyed agents whose state does not change, 64 callers, against plain calls",
                of=_UNCHANGED,
                against=_PLAIN,
                at_least=0.9,
            )
        ],
    )
    yield Scenario(
        name="keyed-saves",
        title=f"Calls with state saved before the reply, and KV updates: {CONCURRENCY} at a time, {KEYS} keys",
        unit="saves/s",
        baseline=_UPDATES,
        most=100_000,
        first=1,
        multiple=CONCURRENCY,
        variants=[
            Variant(name=_UPDATES, peer=KEY_VALUE, measure=calls, setup=PLAIN),
            Variant(name=_SAVED, peer=NATSRT, measure=calls, setup=TALLY),
        ],
        goals=[
            Goal(
                text="calls/s with state saved before every reply, 64 callers, against nats-py's `kv.update`",
                of=_SAVED,
                against=_UPDATES,
                at_least=0.6,
            )
        ],
    )
    yield Scenario(
        name="keyed-events",
        title="Events to a keyed agent, one publisher",
        unit="events handled/s",
        baseline=_PLAIN,
        most=150_000,
        multiple=10,
        first=5,
        variants=[
            Variant(name=name, peer=NATSRT, measure=measures.events(), setup=replace(setup, live_agents=1))
            for name, setup in ((_PLAIN, PLAIN), (_KEYED, KEYED), (_UNCHANGED, KEEPER))
        ],
    )
    yield Scenario(
        name="keyed-activation",
        title=f"First calls to new agents, and new KV keys, {CONCURRENCY} at a time",
        unit="agents/s",
        baseline=_CREATES,
        most=10_000,
        first=1,
        multiple=CONCURRENCY,
        variants=[
            Variant(
                name=name, peer=peer, measure=measures.first_calls(CONCURRENCY), setup=replace(setup, live_agents=1)
            )
            for name, peer, setup in (
                (_CREATES, KEY_VALUE, PLAIN),
                (_PLAIN, NATSRT, PLAIN),
                (_KEYED, NATSRT, KEYED),
                (_SAVED, NATSRT, TALLY),
            )
        ],
    )
    agents = 100 if short else 5_000
    yield Scenario(
        name="keyed-memory",
        title=f"Memory of a live keyed agent beyond the agent's own, the mean of {agents:,}",
        unit="bytes",
        better=LESS,
        fresh=True,
        rounds=3,
        variants=[
            Variant(
                name=name,
                peer=NATSRT,
                measure=beyond_itself(agents),
                setup=replace(setup, live_agents=1, trace_memory=True),
            )
            for name, setup in ((_PLAIN, PLAIN), (_KEYED, KEYED), (_SAVED, TALLY))
        ],
    )
