"""Headers of requests to services, and of their replies."""

from typing import Final

SERVICE_ERROR: Final = "Nats-Service-Error"
"""What went wrong (ADR-32). A reply with it is no result."""
SERVICE_ERROR_CODE: Final = "Nats-Service-Error-Code"
"""A number as in HTTP (ADR-32)."""
STREAM: Final = "Natsrt-Stream"
"""On a request: its sender takes several replies, of which an empty one is the end."""
PART: Final = "Natsrt-Part"
"""The number of a reply in a stream, from 1."""
PARTS: Final = "Natsrt-Parts"
"""On the end of a stream: the number of its replies, without the end."""
KEY: Final = "Natsrt-Key"
"""On a request: the key of the agent that is to handle it."""
