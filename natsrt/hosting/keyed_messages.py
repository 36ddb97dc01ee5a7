"""Incoming messages for keyed agents: each is handled, forwarded to the owner, or sent back.

A message is handled here if this worker owns its agent, or claims it because no worker does. If another worker owns the
agent, the message is forwarded to it. There is one exception: a call that natsrt sent on the subject of the agent was
sent to this worker as the owner. If this worker no longer owns the agent, the call is sent back, and its caller looks
up the owner again.
"""

from __future__ import annotations

import asyncio
import math
from functools import partial

from autogen_core import AgentId
from nats.aio.msg import Msg

from natsrt.agents.inbound import LOCATE, Answer, Inbound, SentBack
from natsrt.errors import WorkerLost
from natsrt.hosting.answers import Answers
from natsrt.hosting.intake import Intake
from natsrt.hosting.invocation import Invoker
from natsrt.hosting.reader import Reader
from natsrt.keyed.claiming import CannotOwn
from natsrt.keyed.operations import KeyedOperations
from natsrt.keyed.ownership import NotOwned, OwnedElsewhere, Ownership
from natsrt.keyed.turns import Turns
from natsrt.sending.event_sender import EventSender
from natsrt.sending.keyed_delivery import KeyedDelivery
from natsrt.wire.envelope import Envelope
from natsrt.wire.peer_messages import says_missing


class KeyedMessages:
    """Handles the messages for keyed agents on one worker."""

    def __init__(
        self,
        *,
        worker_id: str,
        turns: Turns,
        ownership: Ownership,
        operations: KeyedOperations,
        invoker: Invoker,
        reader: Reader,
        answers: Answers,
        intake: Intake,
        sender: EventSender,
        delivery: KeyedDelivery,
    ) -> None:
        self._worker_id = worker_id
        self._turns = turns
        self._ownership = ownership
        self._operations = operations
        self._invoker = invoker
        self._reader = reader
        self._answers = answers
        self._intake = intake
        self._sender = sender
        self._delivery = delivery

    async def handle(self, inbound: Inbound) -> Answer | None:
        """Handle a call, an event, or a question about the owner of an agent.

        Returns the answer; None if the sender does not want one. Raises `SentBack`, and any error in handling or
        forwarding the message.
        """
        hosted, key = inbound.route.hosted, inbound.key
        assert key is not None
        if inbound.kind is LOCATE:
            return await self._locate(inbound, key)
        if inbound.call is not None and inbound.body is not None and "cancelid" in inbound.body.attributes:
            inbound.token = self._reader.token(inbound.body)  # a cancellation reaches it while it waits
        sent_to_owner = inbound.can_be_sent_back and inbound.route.key is not None
        handle = partial(self._invoker.handle, inbound)
        try:
            return await self._turns.run(
                hosted,
                key,
                inbound.chain,
                handle,
                inbound=inbound,
                claim=not sent_to_owner,
                out_of_turn=inbound.is_out_of_turn,
            )
        except NotOwned:
            raise self._not_owned(inbound) from None
        except CannotOwn as cannot:
            if inbound.can_be_sent_back:
                raise SentBack(cannot.error) from None
            return await self._forward(inbound, AgentId(hosted.agent_type, key))
        except OwnedElsewhere:
            if inbound.event is not None:  # its sender waits for the owner's own answer
                raise self._not_owned(inbound) from None
            return await self._forward(inbound, AgentId(hosted.agent_type, key))

    def _not_owned(self, inbound: Inbound) -> SentBack:
        agent = f"{inbound.agent_type}/{inbound.key}"
        return SentBack(WorkerLost(agent, self._worker_id, "it no longer owns the agent"))

    async def control(self, inbound: Inbound, body: Envelope, key: str) -> Answer | None:
        """Carry out a control message. Returns the answer; None if the sender does not want one.

        Raises any exception of the agent.
        """
        hosted = inbound.route.hosted
        try:
            result = await self._operations.control(hosted, key, inbound, body)
        except OwnedElsewhere as owner:
            agent = AgentId(hosted.agent_type, key)
            return _as_answer(await self._delivery.forward_control(agent, owner.worker_id, body))
        if not inbound.settlement.wants_answer:
            return None
        return await self._answers.control_result(result, body, hosted.agent_type, key)

    async def _locate(self, inbound: Inbound, key: str) -> Answer | None:
        body = inbound.body
        missing = body is not None and says_missing(body)
        location = await self._ownership.locate(inbound.route.hosted, key, inbound.chain, missing=missing)
        if body is None or not inbound.settlement.wants_answer:
            return None
        return self._answers.control_reply(location._asdict(), body, inbound.agent_type, key)

    async def _forward(self, inbound: Inbound, agent: AgentId) -> Answer | None:
        """Send a message to the owner of its agent, because its sender did not know the owner.

        An event counts towards the limit of the intake until it is sent, or has a place in the queue of those that wait
        for an owner. So the queue of a worker that forwards events is bounded, too.
        """
        topic, body = inbound.topic, inbound.body
        if topic is None:
            self._intake.started(inbound)
            return await self._forward_call(inbound, agent)
        if body is None:  # a plain event is forwarded in an envelope
            delivery = await self._reader.plain_delivery(inbound, agent, inbound.route.hosted.handles)
            await self._sender.publish_to(agent, delivery.message, topic, delivery.context.message_id)
        else:
            await self._delivery.forward_event(agent, topic, body)
        return None

    async def _forward_call(self, inbound: Inbound, agent: AgentId) -> Answer:
        call, timeout = inbound.call, None
        inbound.refuse_unwanted()
        if call is not None:
            if call.wanted_until != math.inf:
                timeout = call.wanted_until - asyncio.get_running_loop().time()
            call.on_abandoned = inbound.cancel
        try:
            return _as_answer(await self._delivery.forward_call(agent, inbound.message, inbound.body, timeout))
        except asyncio.CancelledError:
            inbound.refuse_unwanted()
            raise
        finally:
            if call is not None:
                call.on_abandoned = None


def _as_answer(reply: Msg) -> Answer:
    """The owner's reply, as the answer to the sender of the forwarded message."""
    return Answer(reply.data, reply.headers)
