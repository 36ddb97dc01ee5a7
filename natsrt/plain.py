"""Plain NATS messages over the connection of a runtime: `NatsAgentRuntime.request_plain` and ``subscribe_plain``."""

from natsrt.transport.plain import (
    PlainHandler,
    PlainMessage,
    PlainReplies,
    PlainSubscription,
    checked_headers,
    checked_service_subject,
    checked_subject,
)

__all__ = [
    "PlainHandler",
    "PlainMessage",
    "PlainReplies",
    "PlainSubscription",
    "checked_headers",
    "checked_service_subject",
    "checked_subject",
]
