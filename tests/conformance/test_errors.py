"""What a handler raises reaches the caller as itself, with where it was raised."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from autogen_core import AgentId, FunctionCall, MessageContext, RoutedAgent, message_handler
from autogen_core.exceptions import CantHandleException
from autogen_core.tool_agent import (
    InvalidToolArgumentsException,
    ToolAgent,
    ToolExecutionException,
    ToolNotFoundException,
)
from autogen_core.tools import FunctionTool

from natsrt.errors import RemoteAgentError
from natsrt.wire.failures import Remote
from tests.conformance.conftest import World, natsrt_only
from tests.conformance.samples import Recorder, Text

RAISER = AgentId("raiser", "k")


class OwnError(Exception):
    """An exception of an application, with a constructor that its args alone cannot repeat."""

    def __init__(self, *, code: int, why: str) -> None:
        super().__init__(f"{why} ({code})")
        self.code = code
        self.why = why


class Raiser(RoutedAgent):
    def __init__(self, error: BaseException) -> None:
        super().__init__("raises")
        self.error = error

    @message_handler
    async def on_text(self, message: Text, ctx: MessageContext) -> Text:
        raise self.error


async def call_raiser(world: World, error: BaseException) -> BaseException:
    """What the caller of a handler that raises ``error`` gets."""
    await Raiser.register(world.host, "raiser", lambda: Raiser(error))
    with pytest.raises(BaseException) as raised:  # which one is what the tests look at
        await world.caller.send_message(Text("x"), RAISER)
    return raised.value


@pytest.mark.parametrize(
    "error",
    [
        ValueError("bad value"),
        KeyError("missing", 3),
        ConnectionResetError(104, "reset"),
        TimeoutError(),
        CantHandleException("not mine"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_an_exception_of_python_or_autogen_keeps_its_type_and_text(world: World, error: Exception) -> None:
    got = await call_raiser(world, error)
    assert type(got) is type(error)
    assert str(got) == str(error)
    assert got.args == error.args


@natsrt_only
async def test_an_exception_tells_where_it_was_raised(world: World) -> None:
    got: Any = await call_raiser(world, ValueError("bad value"))
    remote: Remote = got.natsrt_remote
    assert remote.agent == "raiser/k"
    assert remote.worker_id == world.host.worker_id
    assert remote.traceback is not None
    assert "in on_text" in remote.traceback
    assert "raise self.error" in remote.traceback
    assert any("in on_text" in note for note in got.__notes__)


@natsrt_only
async def test_tracebacks_can_be_turned_off(make_world: Any) -> None:
    world = await make_world(send_tracebacks=False)
    got: Any = await call_raiser(world, ValueError("bad value"))
    assert got.natsrt_remote.traceback is None
    assert got.natsrt_remote.agent == "raiser/k"


@natsrt_only
async def test_an_exception_that_the_caller_does_not_know_is_a_remote_agent_error(world: World) -> None:
    got: Any = await call_raiser(world, OwnError(code=7, why="no reason"))
    assert isinstance(got, RemoteAgentError)
    assert got.error_type == f"{__name__}.OwnError"
    assert got.message == "no reason (7)"
    assert got.natsrt_remote.agent == "raiser/k"
    assert got.natsrt_remote.worker_id == world.host.worker_id
    assert "OwnError" in got.natsrt_remote.traceback


@natsrt_only
async def test_a_registered_exception_arrives_as_itself_with_its_fields(world: World) -> None:
    world.caller.add_error_type(OwnError)
    got: Any = await call_raiser(world, OwnError(code=7, why="no reason"))
    assert type(got) is OwnError
    assert (got.code, got.why, str(got)) == (7, "no reason", "no reason (7)")


@natsrt_only
async def test_a_class_that_is_no_exception_cannot_be_registered_as_one(world: World) -> None:
    with pytest.raises(TypeError):
        world.caller.add_error_type(int)
    with pytest.raises(TypeError):
        world.caller.add_error_type(StopIteration)


@natsrt_only
@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit("x")], ids=repr)
async def test_an_exit_raised_by_a_handler_ends_neither_the_worker_nor_the_caller(
    world: World, error: BaseException
) -> None:
    got = await call_raiser(world, error)
    assert isinstance(got, RemoteAgentError)
    assert got.error_type == f"builtins.{type(error).__name__}"
    await Recorder.register(world.host, "recorder", lambda: Recorder([]))
    assert await world.caller.send_message(Text("a"), AgentId("recorder", "k")) == Text("k got a")


async def test_a_stop_iteration_is_the_runtime_error_that_a_coroutine_makes_of_it(world: World) -> None:
    got = await call_raiser(world, StopIteration("over"))
    assert type(got) is RuntimeError
    assert "StopIteration" in str(got)


async def test_a_cancelled_error_raised_by_a_handler_is_one_at_the_caller(world: World) -> None:
    assert type(await call_raiser(world, asyncio.CancelledError())) is asyncio.CancelledError


async def test_an_exception_group_arrives_with_its_members(world: World) -> None:
    got = await call_raiser(world, ExceptionGroup("several", [ValueError("a"), KeyError("b")]))
    assert isinstance(got, ExceptionGroup)
    assert str(got) == "several (2 sub-exceptions)"
    assert [(type(each), each.args) for each in got.exceptions] == [(ValueError, ("a",)), (KeyError, ("b",))]


async def test_a_cause_and_the_attributes_of_a_built_in_exception_arrive(world: World) -> None:
    error = FileNotFoundError(2, "No such file or directory", "no/such/file")
    error.__cause__ = ModuleNotFoundError("No module named 'lamps'", name="lamps")
    got = await call_raiser(world, error)
    assert isinstance(got, FileNotFoundError)
    assert (got.filename, str(got)) == ("no/such/file", "[Errno 2] No such file or directory: 'no/such/file'")
    assert isinstance(got.__cause__, ModuleNotFoundError)
    assert got.__cause__.name == "lamps"


@natsrt_only
async def test_an_exception_is_sent_and_known_under_the_name_that_both_sides_gave_its_class(world: World) -> None:
    world.host.add_error_type(OwnError, name="shop.OwnError")
    got: Any = await call_raiser(world, OwnError(code=7, why="no reason"))
    if world.caller is not world.host:
        assert (type(got), got.error_type) == (RemoteAgentError, "shop.OwnError")
    world.caller.add_error_type(OwnError, name="shop.OwnError")
    with pytest.raises(OwnError, match="no reason"):
        await world.caller.send_message(Text("x"), RAISER)


@natsrt_only
async def test_an_exception_whose_text_cannot_be_made_is_answered(world: World) -> None:
    class Broken(Exception):
        def __str__(self) -> str:
            raise ValueError("no text")

    got = await call_raiser(world, Broken())
    assert isinstance(got, RemoteAgentError)
    assert got.error_type.endswith("Broken")


@natsrt_only
async def test_an_exception_passes_through_an_agent_in_between(world: World) -> None:
    class Between(RoutedAgent):
        @message_handler
        async def on_text(self, message: Text, ctx: MessageContext) -> Text:
            return await self.send_message(message, RAISER)

    await Raiser.register(world.host, "raiser", lambda: Raiser(ValueError("deep")))
    await Between.register(world.host, "between", lambda: Between("between"))
    with pytest.raises(ValueError, match="deep") as raised:
        await world.caller.send_message(Text("x"), AgentId("between", "k"))
    assert raised.value.natsrt_remote.agent == "between/k"  # type: ignore[attr-defined]


def _divide(a: int, b: int) -> float:
    return a / b


@pytest.mark.parametrize(
    ("name", "arguments", "error"),
    [
        ("multiply", "{}", ToolNotFoundException),
        ("divide", "{not json", InvalidToolArgumentsException),
        ("divide", json.dumps({"a": 1, "b": 0}), ToolExecutionException),
    ],
)
async def test_the_exceptions_of_a_tool_agent_keep_their_type_and_fields(
    world: World, name: str, arguments: str, error: type[BaseException]
) -> None:
    tools = [FunctionTool(_divide, name="divide", description="divides")]
    await ToolAgent.register(world.host, "tools", lambda: ToolAgent("tools", tools))
    with pytest.raises(error) as raised:
        await world.caller.send_message(FunctionCall(id="7", name=name, arguments=arguments), AgentId("tools", "k"))
    got: Any = raised.value
    assert type(got) is error
    assert (got.call_id, got.name) == ("7", name)
    assert got.content.startswith("Error: ")


async def test_a_factory_that_raises_is_an_error_at_the_caller(world: World) -> None:
    def factory() -> Recorder:
        raise ValueError("no agent today")

    await Recorder.register(world.host, "recorder", factory)
    for _ in range(2):
        with pytest.raises(ValueError, match="no agent today"):
            await world.caller.send_message(Text("x"), AgentId("recorder", "k"))


async def test_a_handler_works_again_after_it_has_raised(world: World) -> None:
    agent_errors: list[BaseException | None] = [ValueError("once"), None]

    class Once(RoutedAgent):
        @message_handler
        async def on_text(self, message: Text, ctx: MessageContext) -> Text:
            if error := agent_errors.pop(0):
                raise error
            return message

    await Once.register(world.host, "once", lambda: Once("once"))
    with pytest.raises(ValueError, match="once"):
        await world.caller.send_message(Text("a"), AgentId("once", "k"))
    assert await world.caller.send_message(Text("b"), AgentId("once", "k")) == Text("b")


@natsrt_only
@pytest.mark.parametrize("kind", ["group", "cause", "field"])
async def test_an_exception_with_much_in_it_keeps_its_class(world: World, kind: str) -> None:
    huge = 2_000_000 * "x"
    errors: dict[str, Any] = {
        "group": ExceptionGroup("several", [ValueError(huge), KeyError(huge)]),
        "cause": ValueError("short"),
        "field": ValueError("short"),
    }
    errors["cause"].__cause__ = KeyError(huge)
    errors["field"].order = huge
    got = await call_raiser(world, errors[kind])
    assert type(got) is type(errors[kind])


@pytest.mark.parametrize("error", [ConnectionError, KeyError, RuntimeError])
async def test_an_exception_with_a_long_text_keeps_its_class(world: World, error: type[Exception]) -> None:
    class Raiser(RoutedAgent):
        @message_handler
        async def on_text(self, message: Text, ctx: MessageContext) -> None:
            raise error("<html>" + 2_000_000 * "x")

    await Raiser.register(world.host, "raiser", lambda: Raiser("raises"))
    with pytest.raises(error, match="<html>xxx") as raised:
        await world.caller.send_message(Text("a"), AgentId("raiser", "k"))
    if world.is_natsrt:
        text = str(raised.value)
        assert "x…" in text and len(text) < 1_100_000
