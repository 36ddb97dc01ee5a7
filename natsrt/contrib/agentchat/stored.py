"""What is stored of one session, beside the state of the agent or team itself: the answer of its last turn, perhaps.

A worker may be lost after it has stored the state of a turn, and before its caller has the answer. The caller tries the
turn again, and gets the stored answer. So the agent gets the messages of a turn once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import orjson
from autogen_agentchat.base import Response, TaskResult
from autogen_agentchat.messages import BaseChatMessage

from natsrt.contrib.agentchat.message_types import MessageTypes
from natsrt.errors import CannotSerialize

Result: TypeAlias = Response | TaskResult


@dataclass(frozen=True, slots=True)
class Stored:
    """What is stored of a session after a turn."""

    state: Mapping[str, Any]
    """What ``save_state`` of the agent or team returned."""
    turn: str | None = None
    """The id of the turn, if its answer is stored."""
    result: Mapping[str, Any] | None = None
    """The answer, as `dump_result` makes it."""

    def dump(self) -> dict[str, Any]:
        """The state of the session's agent."""
        dumped: dict[str, Any] = {"state": self.state}
        if self.turn is not None:
            dumped |= {"turn": self.turn, "result": self.result}
        return dumped

    def check(self) -> None:
        """Raise CannotSerialize if this would be something else after it is stored, such as NaN."""
        dumped = self.dump()
        try:
            same = orjson.loads(orjson.dumps(dumped)) == dumped
        except TypeError:
            same = False
        if not same:
            raise CannotSerialize("dict", "the agent's state holds what JSON cannot hold, or not as it is")

    @classmethod
    def load(cls, dumped: Mapping[str, Any]) -> Stored | None:
        """What `dump` has made; None of an empty state. Raises ValueError for anything else."""
        if not dumped:
            return None
        state = dumped.get("state")
        if not isinstance(state, Mapping) or dumped.keys() - {"state", "turn", "result"}:
            raise ValueError('the state of a session must be {"state": the state of the agent or team}')
        return cls(state, dumped.get("turn"), dumped.get("result"))


def dump_result(result: Result, types: MessageTypes) -> dict[str, Any]:
    """The answer of a turn as JSON values."""
    if isinstance(result, TaskResult):
        return {"messages": [types.dump(one) for one in result.messages], "stop_reason": result.stop_reason}
    inner = None if result.inner_messages is None else [types.dump(one) for one in result.inner_messages]
    return {"chat_message": types.dump(result.chat_message), "inner_messages": inner}


def load_result(dumped: Mapping[str, Any], types: MessageTypes) -> Result:
    """The answer that `dump_result` was given. Raises ValueError if the class of a message is not known here."""
    if "messages" in dumped:
        return TaskResult(messages=[types.load(one) for one in dumped["messages"]], stop_reason=dumped["stop_reason"])
    inner = dumped["inner_messages"]
    return Response(
        chat_message=cast(BaseChatMessage, types.load(dumped["chat_message"])),
        inner_messages=None if inner is None else [types.load(one) for one in inner],
    )
