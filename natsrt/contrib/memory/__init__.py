"""`NatsMemory`: what agents remember, shared by many processes. See docs/memory.md."""

from natsrt.contrib.memory.memory import NatsMemory, NatsMemoryConfig

__all__ = ["NatsMemory", "NatsMemoryConfig"]
