"""Exceptions and logging handlers that misbehave: every call is answered all the same, and no handler is left."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, NoReturn

import pytest
from autogen_core import AgentId, MessageContext, RoutedAgent, TopicId, TypeSubscription, event, rpc

import natsrt
from natsrt import KeyedOptions, NatsAgentRuntime
from natsrt.embedded import EmbeddedServer
from natsrt.errors import NatsrtError
from tests.support.processes import eventually


class LikeAnApiClient(Exception):
    """Offers the entries of its data as attributes, as errors of API clients do."""

    def __init__(self, data: dict[str, Any]) -> None:
        super().__init__(data["message"])
        self.data = data

    def __getattr__(self, name: str) -> Any:
        return self.data[name]


class BadArgs(Exception):
    @property
    def args(self) -> NoReturn:  # type: ignore[override]
        raise RuntimeError("no args")


class BadDict(Exception):
    @property
    def __dict__(self) -> NoReturn:  # type: ignore[override]
        raise RuntimeError("no dict")


class BadCause(Exception):
    @property
    def __cause__(self) -> NoReturn:  # type: ignore[override]
        raise RuntimeError("no cause")


class BadNotes(Exception):
    __notes__ = 5  # type: ignore[assignment]


class BadText(Exception):
    def __str__(self) -> str:
        raise SystemExit(3)

    __repr__ = __str__


class BadTraceback(Exception):
    @property
    def __traceback__(self) -> NoReturn:  # type: ignore[override]
        raise RuntimeError("no traceback")


class BadClass(Exception):
    @property
    def __class__(self) -> NoReturn:  # type: ignore[override]
        raise RuntimeError("no class")


class Unnamed(type):
    def __getattribute__(cls, name: str) -> Any:
        if name in ("__name__", "__qualname__", "__module__"):
            raise RuntimeError("no name")
        return super().__getattribute__(name)


class BadName(Exception, metaclass=Unnamed):
    pass


class BadCode(NatsrtError):
    code = "many"  # type: ignore[assignment]


class BadFields(Exception):
    def __init__(self) -> None:
        self.loop = self
        self.__dict__[5] = "a key that is no text"  # type: ignore[index]


ODD = {
    "LikeAnApiClient": lambda: LikeAnApiClient({"message": "quota"}),
    "BadArgs": BadArgs,
    "BadDict": BadDict,
    "BadCause": BadCause,
    "BadNotes": BadNotes,
    "BadText": BadText,
    "BadTraceback": BadTraceback,
    "BadClass": BadClass,
    "BadName": BadName,
    "BadCode": BadCode,
    "BadFields": BadFields,
    "SystemExit": lambda: SystemExit(2),
    "KeyboardInterrupt": KeyboardInterrupt,
    "GeneratorExit": GeneratorExit,
    "StopAsyncIteration": StopAsyncIteration,
}


@dataclass
class Ask:
    what: str


class Odd(RoutedAgent):
    def __init__(self) -> None:
        super().__init__("raises what it is told")

    @rpc
    async def ask(self, message: Ask, ctx: MessageContext) -> str:
        if message.what in ODD:
            raise ODD[message.what]()
        return message.what


class OddEvents(RoutedAgent):
    def __init__(self) -> None:
        super().__init__("raises what it is told")

    @event
    async def take(self, message: Ask, ctx: MessageContext) -> None:
        raise ODD[message.what]()


@dataclass
class Pair:
    worker: NatsAgentRuntime
    caller: NatsAgentRuntime


@pytest.fixture
async def pair(server: EmbeddedServer, namespace: str) -> AsyncIterator[Pair]:
    async with AsyncExitStack() as stack:

        async def runtime() -> NatsAgentRuntime:
            return await stack.enter_async_context(NatsAgentRuntime(server.url, namespace=namespace, drain_timeout=2.0))

        made = Pair(await runtime(), await runtime())
        await natsrt.register(made.worker, Odd, "odd", Odd)
        await natsrt.register(made.worker, OddEvents, "events", OddEvents)
        await made.worker.add_subscription(TypeSubscription("news", "events"))
        yield made


class Broken(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        raise RuntimeError("the log is broken")


@pytest.fixture(params=["log works", "log is broken"])
def log(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param == "log works":
        yield
        return
    handler = Broken()
    loggers = [logging.getLogger(name) for name in ("natsrt.hosting", "autogen_core")]
    for logger in loggers:
        logger.addHandler(handler)
    yield
    for logger in loggers:
        logger.removeHandler(handler)


async def all_ended(pair: Pair) -> None:
    await eventually(lambda: pair.worker.health().handlers_running == 0)
    assert await pair.caller.send_message(Ask("works"), AgentId("odd", "k")) == "works"


@pytest.mark.parametrize("what", ODD)
async def test_a_call_whose_exception_misbehaves_is_answered_with_the_name_of_its_class(
    pair: Pair, log: None, what: str
) -> None:
    with pytest.raises(BaseException) as caught:
        await asyncio.wait_for(pair.caller.send_message(Ask(what), AgentId("odd", "k")), 5)
    assert not isinstance(caught.value, TimeoutError)
    told = f"{type(caught.value).__name__} {caught.value}"
    assert what in told or "quota" in told, told
    await all_ended(pair)


@pytest.mark.parametrize("what", ODD)
async def test_an_event_whose_exception_misbehaves_leaves_no_handler(pair: Pair, log: None, what: str) -> None:
    await pair.caller.publish_message(Ask(what), TopicId("news", "k"))
    await eventually(lambda: pair.worker.health().messages_failed == 1)
    await all_ended(pair)


class Exits(RoutedAgent):
    """A keyed agent whose code ends the process, or tries to."""

    def __init__(self, where: str) -> None:
        super().__init__("exits")
        self._where = where
        self.saves = 0

    @rpc
    async def ask(self, message: Ask, ctx: MessageContext) -> str:
        return message.what

    async def save_state(self) -> dict[str, Any]:
        self.saves += 1
        if self._where == "save":
            raise SystemExit(4)
        return {"n": 1}

    async def close(self) -> None:
        if self._where == "close":
            raise SystemExit(5)


@pytest.mark.parametrize("save", ["message", "interval"])
@pytest.mark.parametrize("where", ["save", "close"])
async def test_an_agent_that_exits_where_it_is_saved_or_closed_does_not_end_the_worker(
    pair: Pair, where: str, save: Any
) -> None:
    options = KeyedOptions(save=save, save_interval=0.2, idle_timeout=0.5)
    made: list[Exits] = []

    def make() -> Exits:
        made.append(Exits(where))
        return made[-1]

    await pair.worker.register_factory("exits", make, expected_class=Exits, keyed=options)
    call = pair.caller.send_message(Ask("hi"), AgentId("exits", "k"))
    if where == "save" and save == "message":
        with pytest.raises(RuntimeError, match="SystemExit"):
            await call
    else:
        assert await call == "hi"
    if where == "close":
        await eventually(lambda: pair.worker.running.ownership.owned("exits") == 0, 10)
    else:  # it stays, because its state could not be stored, and that is tried again
        await eventually(lambda: made[0].saves > 2, 10)
    await all_ended(pair)
