"""Control messages from other runtimes: metadata, state and activation of an agent on this worker."""

from __future__ import annotations

from natsrt.agents.catalog import Catalog
from natsrt.agents.control import carry_out_message
from natsrt.agents.inbound import Answer, Inbound
from natsrt.errors import CannotDecode
from natsrt.hosting.answers import Answers
from natsrt.hosting.keyed_messages import KeyedMessages
from natsrt.transport.bodies import Bodies
from natsrt.wire import envelope


class Controls:
    """Carries out the control messages of one worker."""

    def __init__(self, catalog: Catalog, keyed: KeyedMessages, answers: Answers, bodies: Bodies) -> None:
        self._catalog = catalog
        self._keyed = keyed
        self._answers = answers
        self._bodies = bodies

    async def handle(self, inbound: Inbound) -> Answer | None:
        """Carry out one message. Returns the answer; None if the sender does not want one.

        Raises `CannotDecode`, what loading a payload raises, and any exception of the agent.
        """
        hosted, key, body = inbound.route.hosted, inbound.key, inbound.body
        if body is None or key is None:
            raise CannotDecode("a control message", f"expected {envelope.CONTROL}")
        if hosted.keyed is not None:
            return await self._keyed.control(inbound, body, key)
        await self._bodies.load(body)
        result = await carry_out_message(self._catalog, hosted, key, body)
        if not inbound.settlement.wants_answer:
            return None
        return await self._answers.control_result(result, body, hosted.agent_type, key)
