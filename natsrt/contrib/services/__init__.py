"""NATS services and agents: each can be used as the other.

`ServiceAgent` makes any NATS responder an agent. `offer_service` makes an agent type a NATS service, with its schemas,
on a subject of one's choice. It needs no extra. See docs/services.md.
"""

from natsrt.contrib.services.agent import ServiceAgent
from natsrt.contrib.services.offered import OfferedService, offer_service

__all__ = ["OfferedService", "ServiceAgent", "offer_service"]
