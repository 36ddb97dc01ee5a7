"""The chain of a message: the handlers of keyed agents that wait for it.

While a keyed agent handles a message, that handler has an id. What the handler calls carries the ids of all handlers
that wait for the call, the outermost first: its *chain*. A message whose chain names a handler that is inside a keyed
agent's mailbox may enter the mailbox at once, because that handler waits for it.

The chain travels in the envelope's extension ``chain``, its ids separated by spaces.
"""

from __future__ import annotations

from collections.abc import Collection
from contextvars import ContextVar

from natsrt.wire.envelope import Envelope

current_chain: ContextVar[tuple[str, ...]] = ContextVar("natsrt_chain", default=())
"""The chain of what the present code sends: the ids of the handlers that wait for it, the outermost first."""


def chain_of(body: Envelope | None) -> tuple[str, ...]:
    """The chain of a message; empty for a plain body (None) and for a body without a chain."""
    ids = None if body is None else body.text("chain")
    return () if ids is None else tuple(ids.split())


def chain_attribute(ids: Collection[str]) -> str:
    """The envelope attribute for a chain, with a leading comma; ``""`` for an empty chain."""
    return f',"chain":"{" ".join(ids)}"' if ids else ""
