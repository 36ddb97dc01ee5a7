"""Control operations from another process: read an agent's metadata, read or load its state, and activate it.

They use separate subjects, ``natsrt.control.<type>``. So permission to call ``agent.<type>`` does not include
permission to read or write an agent's state.
"""

from __future__ import annotations

from typing import Any, Final

import orjson
from autogen_core import Agent

from natsrt.agents.catalog import Catalog
from natsrt.agents.hosted_type import HostedType
from natsrt.errors import CannotDecode
from natsrt.jetstream.record import check_state, encode_state
from natsrt.wire.envelope import Envelope

METADATA: Final = "metadata"
SAVE_STATE: Final = "save_state"
LOAD_STATE: Final = "load_state"
ACTIVATE: Final = "activate"
STORE_STATE: Final = "store_state"
"""Store the state of a keyed agent now, without waiting for its next save."""
GIVE_AWAY: Final = "give_away"
"""Release a number of idle agents of the type, so that other workers can claim them. It applies to a worker, not to an
agent."""

TO_LOAD: Final = "load_state takes a dict, but was given"
"""How the error begins for a state to load that is something else."""

_OPERATIONS: Final = (METADATA, SAVE_STATE, LOAD_STATE, ACTIVATE, STORE_STATE)
"""The operations on one agent."""


async def carry_out(agent: Agent, operation: str, data: Any) -> Any:
    """Carry out an operation on an agent. Returns its result, None if it has none. Raises any exception of the agent,
    and `CannotSerialize` if a state is not a ``dict``.

    Does nothing for `ACTIVATE`, for which the agent only has to exist, and for `STORE_STATE` (keyed agents only).
    """
    if operation == METADATA:
        return agent.metadata
    if operation == SAVE_STATE:
        return check_state(await agent.save_state())
    if operation == LOAD_STATE:
        await agent.load_state(check_state(data, TO_LOAD))
    return None


def encode_data(operation: str, data: Any) -> bytes:
    """The JSON of what an operation is given: a state for `LOAD_STATE`, else plain JSON values.

    A state may also be its JSON, as an ``orjson.Fragment``. Raises `CannotSerialize` if ``load_state`` would get a
    value that is not equal to the state.
    """
    is_state = operation == LOAD_STATE and not isinstance(data, orjson.Fragment)
    return encode_state(data, TO_LOAD) if is_state else orjson.dumps(data)


async def carry_out_message(catalog: Catalog, hosted: HostedType, key: str, body: Envelope) -> Any:
    """Carry out a control message for an agent, which is created if it does not exist. Returns the JSON result.

    Raises `CannotDecode` for an unknown operation or a state that is not a JSON object, `CannotSerialize` if the state
    of the agent would arrive as something else, the errors of `Catalog.agent`, and any exception of the agent.
    """
    operation, data = body.required("operation"), body.json()
    if operation not in _OPERATIONS:
        raise CannotDecode("a control message", f"its operation must be one of {', '.join(_OPERATIONS)}")
    if operation == LOAD_STATE and not isinstance(data, dict):
        raise CannotDecode("a state", "it must be a JSON object")
    result = await carry_out(await catalog.agent(hosted, key), operation, data)
    return orjson.Fragment(encode_state(result)) if operation == SAVE_STATE else result
