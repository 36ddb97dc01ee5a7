"""The chain of a message: the handlers of keyed agents that wait for it.

While a keyed agent handles a message, that handler has an id. A call that the handler makes carries the ids of all
handlers that wait for the call, outermost first: its *chain*. If the chain of a message names a handler that is inside
a keyed agent's mailbox, the message may enter the mailbox at once, because that handler waits for it.

The chain is sent in the envelope's extension ``chain``, with the ids separated by spaces.
"""

from __future__ import annotations

from collections.abc import Collection
from contextvars import ContextVar

from natsrt.wire.envelope import Envelope

current_chain: ContextVar[tuple[str, ...]] = ContextVar("natsrt_chain", default=())
"""The chain of messages that the current code sends: the ids of the handlers that wait for them, outermost first."""


def chain_of(body: Envelope | None) -> tuple[str, ...]:
    """Return the chain of a message. It is empty for a plain body (None) and for a body without a chain."""
    ids = None if body is None else body.text("chain")
    return () if ids is None else tuple(ids.split())


def chain_attribute(ids: Collection[str]) -> str:
    """Return the envelope attribute for a chain, with a leading comma; ``""`` for an empty chain."""
    return f',"chain":"{" ".join(ids)}"' if ids else ""
