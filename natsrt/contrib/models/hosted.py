"""The worker's side: a model client as an agent type."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager, nullcontext
from typing import Any

from autogen_core import AgentId, AgentInstantiationContext, AgentType, MessageContext, RoutedAgent, rpc
from autogen_core.models import ChatCompletionClient, CreateResult

import natsrt
from natsrt import NatsAgentRuntime
from natsrt.contrib.models.messages import (
    KEY,
    DescribeModel,
    ModelBusy,
    ModelDescription,
    ModelRequest,
    ModelStarted,
    NamedTool,
    model_of_schema,
)

logger: logging.Logger = logging.getLogger("natsrt.contrib")

Factory = Callable[[], ChatCompletionClient | Awaitable[ChatCompletionClient]]


class ModelAgent(RoutedAgent):
    """Answers the requests of `RemoteChatCompletionClient` with a model client.

    Args:
        client: The model client. It is closed with the agent.
        max_running: Number of generations that may run at once; others wait, in order. None: any number.
        max_waiting: Number of requests that may wait; others get `ModelBusy`. None: any number.
    """

    def __init__(
        self, client: ChatCompletionClient, *, max_running: int | None = None, max_waiting: int | None = None
    ) -> None:
        super().__init__(f"the model client {type(client).__name__}")
        self._client = client
        self._max_running = _checked("max_running", max_running, 1)
        self._max_waiting = _checked("max_waiting", max_waiting, 0)
        self._places = None if max_running is None else asyncio.Semaphore(max_running)
        self._admitted = 0
        """Requests that run or wait."""

    @natsrt.streaming
    async def create(
        self, message: ModelRequest, ctx: MessageContext
    ) -> AsyncGenerator[ModelStarted | str | CreateResult, None]:
        """Run a generation. It is stopped when the caller cancels it, leaves the stream, or disappears."""
        with self._admitted_request():
            yield ModelStarted()
            arguments = self._arguments(message, ctx)
            async with self._places or nullcontext():
                if not message.stream:
                    yield await self._client.create(message.messages, **arguments)
                    return
                async with aclosing(self._client.create_stream(message.messages, **arguments)) as items:
                    async for item in items:
                        yield item

    @contextmanager
    def _admitted_request(self) -> Iterator[None]:
        """Count a request. Raises `ModelBusy` if there are as many as may run and wait."""
        if self._max_running is not None and self._max_waiting is not None:
            waiting = self._admitted - self._max_running
            if waiting >= self._max_waiting:
                raise ModelBusy(self.id.type, self._max_running, max(0, waiting))
        self._admitted += 1
        try:
            yield
        finally:
            self._admitted -= 1

    def _arguments(self, message: ModelRequest, ctx: MessageContext) -> dict[str, Any]:
        choice, output = message.tool_choice, message.json_output
        return {
            "tools": message.tools,
            "tool_choice": NamedTool(choice) if isinstance(choice, dict) else choice,
            "json_output": output if output is None or isinstance(output, bool) else model_of_schema(output),
            "extra_create_args": message.extra_create_args,
            "cancellation_token": ctx.cancellation_token,
        }

    @rpc
    async def describe(self, message: DescribeModel, ctx: MessageContext) -> ModelDescription:
        return ModelDescription(model_info=dict(self._client.model_info), max_tokens=self._max_tokens())

    def _max_tokens(self) -> int | None:
        try:
            return self._client.remaining_tokens([])
        except Exception as error:  # clients do not know the limit of every model
            logger.debug("%s cannot say how many tokens it takes: %s", type(self._client).__name__, error)
            return None

    async def close(self) -> None:
        await self._client.close()


async def host_model(
    runtime: NatsAgentRuntime,
    type: str | AgentType,
    factory: Factory,
    *,
    max_running: int | None = None,
    max_waiting: int | None = None,
) -> AgentType:
    """Host a model: make a model client an agent type, which `RemoteChatCompletionClient` calls in any process.

    Any number of workers can host the same model. They share its requests: NATS gives each one to any of them. The
    first client is made at once, so that a model that cannot be loaded is noticed at the start, and the worker is ready
    when the model is. There is one agent, and one client, on each worker: the key of its id is ``default``, and
    others are refused.

    Args:
        runtime: The runtime that will host the model. It closes the client when it is closed.
        type: The agent type: the name of the model for its callers.
        factory: Makes the model client. It may be asynchronous.
        max_running: Number of generations that may run at once on this worker; others wait, in order. None: any number.
        max_waiting: Number of requests that may wait here. Others are answered with `ModelBusy`, and their callers try
            again, which brings them to other workers too. None: any number.

    Returns:
        The agent type.

    Raises:
        TypeError: The factory makes something else than a ``ChatCompletionClient``.
        ValueError: The type exists already in this runtime, ``max_running`` is not a whole number of at least 1, or
            ``max_waiting`` is not one of at least 0, or is given without ``max_running``.
        Exception: What the factory raises.
    """
    if max_waiting is not None and max_running is None:
        raise ValueError("max_waiting needs max_running: without a limit no request waits")
    _checked("max_running", max_running, 1)
    _checked("max_waiting", max_waiting, 0)
    unused = [await _made(factory)]

    async def make() -> ModelAgent:
        id = AgentInstantiationContext.current_agent_id()
        if id.key != KEY:  # another agent would have another client, and its own limits
            raise ValueError(
                f"the model {id.type!r} is one agent, {id.type}/{KEY}: the key {id.key!r:.60} is not hosted"
            )
        client = unused.pop() if unused else await _made(factory)
        return ModelAgent(client, max_running=max_running, max_waiting=max_waiting)

    try:
        hosted = await natsrt.register(runtime, ModelAgent, type, make, skip_direct_message_subscription=True)
        # The runtime closes the agents that it has made, so a model without requests needs its agent too.
        await runtime.try_get_underlying_agent_instance(AgentId(hosted.type, KEY), ModelAgent)
    except BaseException:
        if unused:
            await unused.pop().close()
        raise
    return hosted


async def _made(factory: Factory) -> ChatCompletionClient:
    made = factory()
    client = await made if inspect.isawaitable(made) else made
    if not isinstance(client, ChatCompletionClient):
        raise TypeError(
            f"the factory of a model must return an autogen_core.models.ChatCompletionClient, not {client!r:.100}"
        )
    return client


def _checked(name: str, value: int | None, least: int) -> int | None:
    """``value``, if it is None or a whole number of at least ``least``. Raises ValueError."""
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= least):
        return value
    raise ValueError(f"{name} must be a whole number of at least {least}, or None, not {value!r:.60}")
