"""Plain NATS messages over the connection of a runtime: `NatsAgentRuntime.request_plain` and ``subscribe_plain``.

The constants are the headers that natsrt and NATS services give to such messages (docs/PROTOCOL.md).
"""

from natsrt.transport.plain import (
    PlainHandler,
    PlainMessage,
    PlainReplies,
    PlainSubscription,
    checked_headers,
    checked_service_subject,
    checked_subject,
)
from natsrt.wire.envelope import KEY_HEADER
from natsrt.wire.failures import SERVICE_ERROR, SERVICE_ERROR_CODE, header_text
from natsrt.wire.part_messages import PART_HEADER, PARTS_HEADER, STREAM_HEADER

__all__ = [
    "KEY_HEADER",
    "PARTS_HEADER",
    "PART_HEADER",
    "SERVICE_ERROR",
    "SERVICE_ERROR_CODE",
    "STREAM_HEADER",
    "PlainHandler",
    "PlainMessage",
    "PlainReplies",
    "PlainSubscription",
    "checked_headers",
    "checked_service_subject",
    "checked_subject",
    "header_text",
]
