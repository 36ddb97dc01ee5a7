"""Control of agents from afar: metadata, state and activation, over subjects of their own.

A permission to call ``agent.<type>`` is none to read or write an agent's state: that is ``natsrt.control.<type>``.
"""

from __future__ import annotations

from typing import Any, Final

from autogen_core import Agent

from natsrt.agents.catalog import Catalog, HostedType
from natsrt.errors import CannotDecode
from natsrt.wire.envelope import Envelope

METADATA: Final = "metadata"
SAVE_STATE: Final = "save_state"
LOAD_STATE: Final = "load_state"
ACTIVATE: Final = "activate"
STORE_STATE: Final = "store_state"
"""Store the state of a keyed agent now."""
GIVE_AWAY: Final = "give_away"
"""Of a worker, not of an agent: release so many idle agents of the type, so that others get them."""

_OPERATIONS: Final = (METADATA, SAVE_STATE, LOAD_STATE, ACTIVATE, STORE_STATE)


async def carry_out(agent: Agent, operation: str, data: Any) -> Any:
    """One operation on a live agent. Returns what it gives; raises what the agent raises."""
    if operation == METADATA:
        return agent.metadata
    if operation == SAVE_STATE:
        return await agent.save_state()
    if operation == LOAD_STATE:
        await agent.load_state(data)
    return None


async def carry_out_message(catalog: Catalog, hosted: HostedType, key: str, body: Envelope) -> Any:
    """One control message. Returns its JSON result."""
    operation, data = body.required("operation"), body.json()
    if operation not in _OPERATIONS:
        raise CannotDecode("a control message", f"its operation must be one of {', '.join(_OPERATIONS)}")
    if operation == LOAD_STATE and not isinstance(data, dict):
        raise CannotDecode("a state", "it must be a JSON object")
    return await carry_out(await catalog.agent(hosted, key), operation, data)
