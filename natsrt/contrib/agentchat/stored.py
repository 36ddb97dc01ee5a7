"""What is stored of one session, beside the state of the agent or team itself: the answers of its last turns, perhaps.

A worker may be lost after it has stored the state of a turn, and before its caller has the answer. The caller tries the
turn again, and gets the stored answer. So the agent gets the messages of a turn once. Other callers of the session may
have had turns by then, so a few answers are kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias, cast

import orjson
from autogen_agentchat.base import Response, TaskResult
from autogen_agentchat.messages import BaseChatMessage
from pydantic import TypeAdapter, ValidationError

from natsrt.contrib.agentchat.message_types import MessageTypes
from natsrt.errors import CannotSerialize

Result: TypeAlias = Response | TaskResult

EARLIER_ANSWERS: Final = 7
"""How many answers are kept beside the last one."""
EARLIER_BYTES: Final = 64 * 1024
"""Bytes of JSON that the answers beside the last one have at most, together."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer of a turn."""

    turn: str
    """The id of the turn."""
    result: Mapping[str, Any]
    """The answer, as `dump_result` makes it."""

    @property
    def size(self) -> int:
        """Bytes that it takes as JSON, about."""
        return len(json.dumps(self.result, ensure_ascii=False).encode(errors="replace"))


@dataclass(frozen=True, slots=True)
class Stored:
    """What is stored of a session after a turn."""

    state: Mapping[str, Any]
    """What ``save_state`` of the agent or team returned."""
    answers: Sequence[Answer] = ()
    """The answers of the last turns that may be tried again, the latest last."""

    def after(self, state: Mapping[str, Any], answer: Answer | None = None) -> Stored:
        """What is stored after the next turn; ``answer`` None: it is not tried again.

        A new answer is kept, whatever its size. Of those before it, the latest are kept, within `EARLIER_ANSWERS` and
        `EARLIER_BYTES`.
        """
        if answer is None:
            return replace(self, state=state)
        kept, room = [answer], EARLIER_BYTES
        for one in reversed(self.answers[-EARLIER_ANSWERS:]):
            room -= one.size
            if room < 0:
                break
            kept.insert(0, one)
        return Stored(state, kept)

    def result_of(self, turn: str) -> Mapping[str, Any] | None:
        """The answer of a turn, as `dump_result` made it; None if it is not kept."""
        return next((one.result for one in self.answers if one.turn == turn), None)

    def dump(self) -> dict[str, Any]:
        """The state of the session's agent."""
        dumped: dict[str, Any] = {"state": self.state}
        if self.answers:
            dumped["answers"] = [{"turn": one.turn, "result": one.result} for one in self.answers]
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
        if not isinstance(state, Mapping) or dumped.keys() - {"state", "answers"}:
            raise ValueError('the state of a session must be {"state": the state of the agent or team}')
        try:
            answers = _answers.validate_python(dumped.get("answers", ()))
        except ValidationError as error:
            raise ValueError(f"the answers in the state of a session cannot be read: {error}") from None
        return cls(state, answers)


_answers: TypeAdapter[list[Answer]] = TypeAdapter(list[Answer])


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
