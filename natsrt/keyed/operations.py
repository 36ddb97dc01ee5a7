"""Operations on the keyed agents of a worker: everything that is asked of them besides handling messages."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from autogen_core import Agent, AgentId

from natsrt.agents import control
from natsrt.agents.catalog import Catalog
from natsrt.agents.chain import as_call, chain_of, current_chain
from natsrt.agents.hosted_type import HostedType
from natsrt.agents.inbound import Inbound
from natsrt.errors import CannotDecode
from natsrt.keyed.claiming import CannotOwn
from natsrt.keyed.ownership import Ownership
from natsrt.keyed.turns import Turns
from natsrt.transport.bodies import Bodies
from natsrt.wire.envelope import Envelope

T = TypeVar("T")


class KeyedOperations:
    """Operations on the keyed agents of one worker."""

    def __init__(self, turns: Turns, ownership: Ownership, catalog: Catalog, bodies: Bodies) -> None:
        self._turns = turns
        self._ownership = ownership
        self._catalog = catalog
        self._bodies = bodies

    async def instance(self, hosted: HostedType, key: str) -> Agent:
        """The live instance, made if there is none. Raises `OwnedElsewhere`, and what making it raises."""

        async def live() -> Agent:
            return hosted.live[key]

        return await as_call(self._in_turn(hosted, key, live))

    async def state(self, hosted: HostedType, key: str) -> Mapping[str, Any]:
        """What ``save_state`` returns, called in a turn. Raises `OwnedElsewhere`, and what the agent raises."""

        async def save() -> Mapping[str, Any]:
            return await hosted.live[key].save_state()

        return await as_call(self._in_turn(hosted, key, save))

    async def _in_turn(self, hosted: HostedType, key: str, work: Callable[[], Awaitable[T]]) -> T:
        try:
            return await self._turns.run(hosted, key, current_chain.get(), work)
        except CannotOwn as cannot:
            raise cannot.error from None

    async def control(self, hosted: HostedType, key: str, inbound: Inbound, body: Envelope) -> Any:
        """Carry out a control message in a turn of the agent. Returns the JSON result.

        Raises `OwnedElsewhere`, `CannotDecode`, and what the agent raises.
        """
        operation = body.required("operation")
        if operation == control.GIVE_AWAY:
            return await self._give_away(hosted, body.json())
        if operation == control.ACTIVATE:
            self._ownership.check_able(AgentId(hosted.agent_type, key))

        async def carry_out() -> Any:
            await self._bodies.load(body)
            return await control.carry_out_message(self._catalog, hosted, key, body)

        try:
            result = await self._turns.run(hosted, key, chain_of(body), carry_out, inbound=inbound)
        except CannotOwn as cannot:
            raise cannot.error from None
        if operation in (control.LOAD_STATE, control.STORE_STATE):
            await self._ownership.store(AgentId(hosted.agent_type, key))
        return result

    async def _give_away(self, hosted: HostedType, count: Any) -> int:
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise CannotDecode("a control message", "how many agents to give away must be a number of at least 0")
        return await self._ownership.release_some(hosted.agent_type, count)
