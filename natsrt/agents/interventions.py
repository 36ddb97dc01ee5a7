"""AutoGen's intervention handlers, as `SingleThreadedAgentRuntime` applies them.

They run once for each message, in the runtime that sends it, in send order. Their exceptions are raised in the caller,
unchanged. A message of a plain NATS client has no sending runtime, so the handlers of the worker that receives it run.
Each handler gets the result of the previous one. If a handler returns None, the message stays unchanged and there is a
warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from autogen_core import AgentId, DropMessage, InterventionHandler, MessageContext
from autogen_core.exceptions import MessageDroppedException
from autogen_core.logging import MessageKind

from natsrt.observe import events


class Interventions:
    """The intervention handlers of one runtime, in their order."""

    def __init__(self, handlers: Sequence[InterventionHandler] | None) -> None:
        self.handlers: tuple[InterventionHandler, ...] = tuple(handlers or ())
        """AutoGen's handlers, in the order in which they run; empty for none."""

    async def on_send(self, message: Any, context: MessageContext, recipient: AgentId) -> Any:
        """Return the message to send. Raises `MessageDroppedException` if a handler dropped it."""
        for handler in self.handlers:
            result = await handler.on_send(message, message_context=context, recipient=recipient)
            if _is_drop(result):
                events.dropped(sender=context.sender, receiver=recipient, kind=MessageKind.DIRECT)
                raise MessageDroppedException
            message = _or_unchanged(result, message, "on_send")
        return message

    async def on_publish(self, message: Any, context: MessageContext) -> Any:
        """Return the message to publish. Raises `MessageDroppedException` if a handler dropped it.

        The publishing code ignores that exception.
        """
        for handler in self.handlers:
            result = await handler.on_publish(message, message_context=context)
            if _is_drop(result):
                events.dropped(sender=context.sender, receiver=context.topic_id, kind=MessageKind.PUBLISH)
                raise MessageDroppedException
            message = _or_unchanged(result, message, "on_publish")
        return message

    async def on_response(self, message: Any, sender: AgentId, recipient: AgentId | None) -> Any:
        """Return the response for the caller. Raises `MessageDroppedException` if a handler dropped it."""
        for handler in self.handlers:
            result = await handler.on_response(message, sender=sender, recipient=recipient)
            if _is_drop(result):
                events.dropped(sender=sender, receiver=recipient, kind=MessageKind.RESPOND)
                raise MessageDroppedException
            if result is None and message is None:
                continue
            message = _or_unchanged(result, message, "on_response")
        return message


def _is_drop(result: Any) -> bool:
    return result is DropMessage or isinstance(result, DropMessage)


def _or_unchanged(result: Any, message: Any, name: str) -> Any:
    if result is not None:
        return result
    warnings.warn(
        f"Intervention handler {name} returned None. This might be unintentional. "
        "Consider returning the original message or DropMessage explicitly.",
        RuntimeWarning,
        stacklevel=3,
    )
    return message
