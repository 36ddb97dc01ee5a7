"""The caller's side: a ``ChatCompletionClient`` whose model is in another process."""

from __future__ import annotations

import asyncio
import math
import random
import warnings
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, ClassVar, Final, Literal, Self, cast

import orjson
from autogen_core import AgentId, CancellationToken, Component, ComponentType, Image
from autogen_core.models import (
    ChatCompletionClient,
    CreateResult,
    LLMMessage,
    ModelCapabilities,
    ModelInfo,
    RequestUsage,
    validate_model_info,
)
from autogen_core.tools import Tool, ToolSchema
from pydantic import BaseModel

from natsrt import NatsAgentRuntime, Options
from natsrt.contrib.arguments import checked_retries
from natsrt.contrib.models.messages import (
    KEY,
    DescribeModel,
    ModelBusy,
    ModelDescription,
    ModelRequest,
    ModelStarted,
    choice_of,
    output_of,
    schema_of,
)
from natsrt.contrib.servers import ServersConfig, config_of, settings_in
from natsrt.errors import CannotDecode, NoLiveWorker, UnknownAgentType, WorkerBusy, WorkerLost, WorkerStopped

TokenCounter = Callable[[Sequence[LLMMessage], Sequence[Tool | ToolSchema]], int]

_BYTES_PER_TOKEN: Final = 3
"""For the estimate of tokens. Models need one token for about four bytes of English, and for fewer of most others."""
_PER_MESSAGE: Final = 4
"""Tokens that mark the begin and the end of a message."""
_PER_IMAGE: Final = 1105
"""Tokens of an image of 1024 x 1024 pixels in high detail, as OpenAI's models count them."""
_FIRST_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 2.0
"""Seconds between two attempts to reach a worker that has room, or is there: from half of it to one and a half."""
_WORKER_WITHIN: Final = 30.0
"""Seconds for which a request with retries is sent again while no worker hosts the model, as in `natsrt.agentchat`."""


class RemoteModelConfig(ServersConfig):
    """What `RemoteChatCompletionClient` writes into a component. Credentials are not part of it."""

    type: str
    """The agent type of the model."""
    model_info: ModelInfo | None = None
    max_tokens: int | None = None
    retries: int = 0


class RemoteChatCompletionClient(ChatCompletionClient, Component[RemoteModelConfig]):
    """Calls a model that `host_model` hosts in another process, as if its client were here.

    Create it with `connect`, which reads what the model can do. The constructor needs no connection, and for agents
    that ask what the model can do it needs ``model_info``.

    Args:
        type: The agent type of the model.
        runtime: The runtime that makes the calls. None: the client starts a runtime of its own with its first call,
            which hosts nothing, and stops it in `close`.
        servers: For a runtime of its own: the URLs of the servers, as for `NatsAgentRuntime`. Credentials come from the
            other settings, such as the environment.
        namespace: For a runtime of its own, as for `NatsAgentRuntime`.
        options: For a runtime of its own, as for `NatsAgentRuntime`.
        model_info: What the model can do. None: known after `connect` only.
        max_tokens: The tokens that the model takes, for `remaining_tokens`. None: known after `connect`, if the model's
            own client knows it.
        token_counter: Counts tokens for `count_tokens`, which cannot ask the worker since it is not asynchronous. None:
            they are estimated.
        retries: How often a request is sent again because its worker was lost or stopped, as long as no token of the
            answer was given out. With 1 or more, a request also waits up to 30 seconds for a worker, if there is none,
            which does not count as a retry.

    Raises:
        ValueError: An argument is wrong, or both a runtime and servers or a namespace are given.
    """

    component_type: ClassVar[ComponentType] = "model"
    component_config_schema = RemoteModelConfig
    component_provider_override: ClassVar[str | None] = "natsrt.contrib.models.RemoteChatCompletionClient"

    def __init__(
        self,
        type: str,
        runtime: NatsAgentRuntime | None = None,
        *,
        servers: str | Sequence[str] | None = None,
        namespace: str | None = None,
        options: Options | None = None,
        model_info: ModelInfo | None = None,
        max_tokens: int | None = None,
        token_counter: TokenCounter | None = None,
        retries: int = 0,
    ) -> None:
        if runtime is not None and not (servers is None and namespace is None and options is None):
            raise ValueError("servers, namespace and options are those of the runtime: give either a runtime or these")
        self._retries = checked_retries(retries)
        if model_info is not None:
            validate_model_info(model_info)
        if max_tokens is not None and (isinstance(max_tokens, bool) or not isinstance(max_tokens, int)):
            raise ValueError(f"max_tokens must be a whole number or None, not {max_tokens!r:.60}")
        if not (token_counter is None or callable(token_counter)):
            raise ValueError(f"token_counter must be a function of messages and tools, not {token_counter!r:.60}")
        self._agent = AgentId(type, KEY)
        self._own = runtime is None
        self._runtime = runtime or NatsAgentRuntime(servers, namespace=namespace, options=options)
        self._runtime.add_error_type(ModelBusy)
        self._runtime.add_message_type(ModelDescription, ModelStarted, CreateResult)
        self._starting = asyncio.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        """The event loop in which a runtime of its own runs; None before its first use."""
        self._closed = False
        self._info = model_info
        self._max_tokens = max_tokens
        self._token_counter = token_counter
        self._actual = RequestUsage(0, 0)
        self._total = RequestUsage(0, 0)

    @classmethod
    async def connect(
        cls,
        type: str,
        runtime: NatsAgentRuntime | None = None,
        *,
        servers: str | Sequence[str] | None = None,
        namespace: str | None = None,
        options: Options | None = None,
        token_counter: TokenCounter | None = None,
        retries: int = 0,
        timeout: float | None = 30.0,
    ) -> Self:
        """Wait until a worker hosts the model, read what it can do, and return a client.

        ``timeout`` is in seconds; None: without a limit. The other arguments are those of the class.

        Raises:
            AgentNotServed: No worker hosted the model in time.
            CallTimeout: The worker did not answer in time.
            ServerUnreachable, PermissionDenied: There is no connection.
        """
        client = cls(
            type,
            runtime,
            servers=servers,
            namespace=namespace,
            options=options,
            token_counter=token_counter,
            retries=retries,
        )
        try:
            await client._read_description(timeout)
        except BaseException:
            await client.close()
            raise
        return client

    async def _read_description(self, timeout: float | None) -> None:
        runtime = await self._started()
        await runtime.wait_for(self._agent.type, timeout=timeout)
        description = await runtime.send_message(
            DescribeModel(),
            self._agent,
            reply_type=ModelDescription,
            timeout=math.inf if timeout is None else timeout,
        )
        self._info = cast(ModelInfo, description.model_info)
        self._max_tokens = description.max_tokens

    async def _started(self) -> NatsAgentRuntime:
        """The runtime. One of its own is started first.

        Raises RuntimeError if that is closed, or runs in another event loop.
        """
        if self._own:
            self._check_loop()
            async with self._starting:
                if self._closed:
                    raise RuntimeError("this model client is closed: make another one")
                self._loop = asyncio.get_running_loop()
                if self._runtime.worker_id is None:
                    await self._runtime.start()
        return self._runtime

    def _check_loop(self) -> None:
        if self._loop not in (None, asyncio.get_running_loop()):
            raise RuntimeError(
                "this model client runs in another event loop, that of its first call: make one in each event loop, as "
                "for each asyncio.run"
            )

    # -- generations -------------------------------------------------------------------------------------------------

    async def create(
        self,
        messages: Sequence[LLMMessage],
        *,
        tools: Sequence[Tool | ToolSchema] = [],
        tool_choice: Tool | Literal["auto", "required", "none"] = "auto",
        json_output: bool | type[BaseModel] | None = None,
        extra_create_args: Mapping[str, Any] = {},
        cancellation_token: CancellationToken | None = None,
    ) -> CreateResult:
        """Create one response. Cancelling the token, or the task that awaits this, stops the generation.

        Raises:
            WorkerLost, WorkerStopped, NoLiveWorker, UnknownAgentType: No worker answered, also after the retries.
            ModelBusy: Every worker that was tried has as many requests as it takes.
            CannotSerialize: An argument cannot be sent exactly.
            Exception: What the model's own client raises, with its class as in `NatsAgentRuntime.send_message`.
        """
        request = _request(messages, tools, tool_choice, json_output, extra_create_args, stream=False)
        result: Any = None
        async with aclosing(self._items(request, cancellation_token)) as items:
            async for item in items:
                result = item
        if not isinstance(result, CreateResult):
            raise CannotDecode(f"the answer of {self._agent}", "it has no CreateResult: is it a hosted model?")
        return result

    async def create_stream(
        self,
        messages: Sequence[LLMMessage],
        *,
        tools: Sequence[Tool | ToolSchema] = [],
        tool_choice: Tool | Literal["auto", "required", "none"] = "auto",
        json_output: bool | type[BaseModel] | None = None,
        extra_create_args: Mapping[str, Any] = {},
        cancellation_token: CancellationToken | None = None,
    ) -> AsyncGenerator[str | CreateResult, None]:
        """Create a response as a stream of texts, which ends with the ``CreateResult``.

        Cancelling the token, or closing the generator, stops the generation. Raises as `create` does; errors come after
        the texts before them. A request of which a text was given out is not sent again.
        """
        request = _request(messages, tools, tool_choice, json_output, extra_create_args, stream=True)
        async with aclosing(self._items(request, cancellation_token)) as items:
            async for item in items:
                yield item

    async def _items(
        self, request: ModelRequest, token: CancellationToken | None
    ) -> AsyncGenerator[str | CreateResult, None]:
        runtime = await self._started()
        pauses = _Pauses(runtime.options.busy_retry, self._retries)
        while True:
            given_out = False
            try:
                async with runtime.stream_message(request, self._agent, cancellation_token=token) as stream:
                    async for item in stream:
                        if isinstance(item, ModelStarted):
                            continue
                        if isinstance(item, CreateResult):
                            self._count(item.usage)
                        given_out = True
                        yield item
                return
            except (ModelBusy, WorkerBusy, WorkerLost, WorkerStopped, NoLiveWorker, UnknownAgentType) as error:
                pause = pauses.after(error)
                if given_out or pause is None:
                    raise
            await asyncio.sleep(pause)

    def _count(self, usage: RequestUsage) -> None:
        self._actual = usage
        self._total = RequestUsage(
            self._total.prompt_tokens + usage.prompt_tokens, self._total.completion_tokens + usage.completion_tokens
        )

    async def close(self) -> None:
        """Stop the client's own runtime, if it has one. The model, and a runtime that was given, go on.

        A client with its own runtime cannot be used any more: its calls raise RuntimeError. So does this, in another
        event loop than that of the first call, unless that has ended.
        """
        if not self._own:
            return
        if self._loop is not None and self._loop.is_closed():
            self._closed = True  # nothing of the runtime runs any more
            return
        self._check_loop()
        async with self._starting:
            self._closed = True
            await self._runtime.close()

    # -- what is not asynchronous ------------------------------------------------------------------------------------

    def actual_usage(self) -> RequestUsage:
        """The tokens of the last response of this client."""
        return self._actual

    def total_usage(self) -> RequestUsage:
        """The tokens of all responses of this client. Those of other clients of the same model do not count."""
        return self._total

    def count_tokens(self, messages: Sequence[LLMMessage], *, tools: Sequence[Tool | ToolSchema] = []) -> int:
        """The number of tokens: by ``token_counter``, or else an estimate, which is rather too high.

        The estimate is a token for three bytes of the texts and of the tools' schemas, 4 for a message and 1,105 for
        an image.
        """
        if self._token_counter is not None:
            return self._token_counter(messages, tools)
        size = sum(len(orjson.dumps(schema_of(tool))) for tool in tools)
        tokens = 0
        for message in messages:
            tokens += _PER_MESSAGE
            content: Any = message.content
            for part in content if isinstance(content, list) else [content]:
                if isinstance(part, Image):
                    tokens += _PER_IMAGE
                else:
                    size += len(_text(part).encode())
        return tokens + math.ceil(size / _BYTES_PER_TOKEN)

    def remaining_tokens(self, messages: Sequence[LLMMessage], *, tools: Sequence[Tool | ToolSchema] = []) -> int:
        """``max_tokens`` less `count_tokens`. Raises RuntimeError if ``max_tokens`` is not known."""
        if self._max_tokens is None:
            raise RuntimeError(
                f"it is not known how many tokens the model {self._agent.type!r} takes: use `await "
                "RemoteChatCompletionClient.connect(...)`, or give max_tokens= if its own client does not know it"
            )
        return self._max_tokens - self.count_tokens(messages, tools=tools)

    @property
    def model_info(self) -> ModelInfo:
        """What the model can do. Raises RuntimeError if it is not known."""
        if self._info is None:
            raise RuntimeError(
                f"it is not known what the model {self._agent.type!r} can do: use `await "
                "RemoteChatCompletionClient.connect(...)`, or give model_info="
            )
        return self._info

    @property
    def capabilities(self) -> ModelCapabilities:
        """Deprecated in AutoGen: use `model_info`."""
        warnings.warn("capabilities is deprecated, use model_info instead", DeprecationWarning, stacklevel=2)
        info = self.model_info
        return ModelCapabilities(
            vision=info["vision"], function_calling=info["function_calling"], json_output=info["json_output"]
        )

    # -- as a component ----------------------------------------------------------------------------------------------

    def _to_config(self) -> RemoteModelConfig:
        return RemoteModelConfig(
            type=self._agent.type,
            **config_of(self._runtime.options),
            model_info=self._info,
            max_tokens=self._max_tokens,
            retries=self._retries,
        )

    @classmethod
    def _from_config(cls, config: RemoteModelConfig) -> Self:
        return cls(
            config.type,
            options=settings_in(config),
            model_info=config.model_info,
            max_tokens=config.max_tokens,
            retries=config.retries,
        )


class _Pauses:
    """Decides whether a request is sent again, and when."""

    def __init__(self, busy_retry: float, retries: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._busy_until = self._loop.time() + busy_retry
        self._waits = retries > 0
        self._retries = retries
        self._worker_until: float | None = None
        """Until when it is waited for a worker; None: there was one."""
        self._next = _FIRST_PAUSE

    def after(self, error: Exception) -> float | None:
        """Seconds to wait after this error; None: it is not sent again."""
        if not self._may_go_on(error, self._loop.time()):
            return None
        pause, self._next = self._next, min(self._next * 2, _LONGEST_PAUSE)
        return pause * random.uniform(0.5, 1.5)  # or those that were refused together would meet again

    def _may_go_on(self, error: Exception, now: float) -> bool:
        if isinstance(error, ModelBusy | WorkerBusy):
            return now <= self._busy_until
        if isinstance(error, NoLiveWorker | UnknownAgentType):
            if self._worker_until is None:
                self._worker_until = now + _WORKER_WITHIN
            return self._waits and now <= self._worker_until
        self._worker_until = None
        self._retries -= 1
        return self._retries >= 0


def _request(
    messages: Sequence[LLMMessage],
    tools: Sequence[Tool | ToolSchema],
    tool_choice: object,
    json_output: object,
    extra_create_args: Mapping[str, Any],
    *,
    stream: bool,
) -> ModelRequest:
    return ModelRequest(
        messages=list(messages),
        tools=[schema_of(tool) for tool in tools],
        tool_choice=choice_of(tool_choice),
        json_output=output_of(json_output),
        extra_create_args=dict(extra_create_args),
        stream=stream,
    )


def _text(part: Any) -> str:
    """What a model reads of a part of a message."""
    if isinstance(part, str):
        return part
    texts = (getattr(part, name, "") for name in ("name", "arguments", "content"))
    return " ".join(text for text in texts if isinstance(text, str))
