"""``natsrt send --stream``: prints the items of a streamed call as they come."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import orjson
from autogen_core import AgentId

from natsrt.runtime import NatsAgentRuntime
from natsrt.sending.limits import Limit
from natsrt.sending.ready_bodies import checked_json, ready_message, untyped_message
from natsrt.wire.serialization import Encoded

from .connecting import Connecting
from .exits import CommandFailed, Exit
from .output import line
from .questions import AnswersFromInput


async def stream(connecting: Connecting, agent: AgentId, body: bytes, type_name: str | None, as_json: bool) -> None:
    """Call an agent, and print what its handler sends until it ends. If this ends before, the handler is stopped."""
    try:
        message = untyped_message(body) if type_name is None else ready_message(checked_json(body), type_name)
    except ValueError as error:
        raise CommandFailed(str(error), Exit.USAGE) from None
    async with connecting.runtime(call_timeout=connecting.timeout) as runtime:
        # The setting call_timeout limits no stream, but the option limits what this command does.
        limit = Limit(None if connecting.timeout is None else runtime.options.call_timeout, "--timeout")
        await limit.within(agent, _print_all(runtime, message, agent, as_json))


async def _print_all(runtime: NatsAgentRuntime, message: Encoded, agent: AgentId, as_json: bool) -> None:
    answers = AnswersFromInput(agent)
    async with runtime.stream_message(message, agent, on_question=answers.answer) as items:
        async for item in items:
            # In a thread: the runtime must answer for this process while a reader of the output makes it wait.
            await asyncio.to_thread(line, _shown(item, as_json))


def _shown(item: Encoded, as_json: bool) -> str:
    if not as_json:
        return item.payload.decode("utf-8", "backslashreplace")
    fields: dict[str, Any] = {"message_type": item.type_name or None}
    try:
        fields["data"] = orjson.loads(item.payload)
    except orjson.JSONDecodeError:
        fields["data_base64"] = base64.b64encode(item.payload).decode()
    return orjson.dumps(fields).decode()
