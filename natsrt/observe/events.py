"""AutoGen's structured events on the logger ``autogen_core.events``.

They are created only if that logger is enabled for INFO. They contain the payload only if it is enabled for DEBUG.
Otherwise the field is ``"(payload at DEBUG only)"``, so that payloads do not get into logs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Final

from autogen_core import EVENT_LOGGER_NAME, AgentId, TopicId
from autogen_core.logging import (
    AgentConstructionExceptionEvent,
    DeliveryStage,
    MessageDroppedEvent,
    MessageEvent,
    MessageHandlerExceptionEvent,
    MessageKind,
)

_logger = logging.getLogger(EVENT_LOGGER_NAME)
HIDDEN: Final = "(payload at DEBUG only)"


listening: Final[Callable[[], bool]] = partial(_logger.isEnabledFor, logging.INFO)
"""True if events are logged. It is called several times for each message; a function of Python would take longer."""


def _shown(payload: bytes) -> str:
    return payload.decode("utf-8", "replace") if _logger.isEnabledFor(logging.DEBUG) else HIDDEN


def message(
    payload: bytes,
    *,
    sender: AgentId | None,
    receiver: AgentId | TopicId | None,
    kind: MessageKind,
    stage: DeliveryStage,
) -> None:
    if listening():
        _logger.info(
            MessageEvent(payload=_shown(payload), sender=sender, receiver=receiver, kind=kind, delivery_stage=stage)
        )


def dropped(*, sender: AgentId | None, receiver: AgentId | TopicId | None, kind: MessageKind) -> None:
    if listening():
        _logger.info(MessageDroppedEvent(payload=HIDDEN, sender=sender, receiver=receiver, kind=kind))


def handler_failed(payload: bytes, *, agent: AgentId, error: BaseException) -> None:
    if listening():
        _logger.info(MessageHandlerExceptionEvent(payload=_shown(payload), handling_agent=agent, exception=error))


def construction_failed(*, agent: AgentId, error: BaseException) -> None:
    if listening():
        _logger.info(AgentConstructionExceptionEvent(agent_id=agent, exception=error))
