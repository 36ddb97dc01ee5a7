"""`NatsMemory`: AutoGen's `Memory` over a stream of JetStream."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Coroutine, Sequence
from types import TracebackType
from typing import Any, ClassVar, Final, Self, TypeVar

from autogen_core import CancellationToken, Component, ComponentModel, ComponentType, Image
from autogen_core.memory import ListMemory, Memory, MemoryContent, MemoryQueryResult, UpdateContextResult
from autogen_core.model_context import ChatCompletionContext

from natsrt import NatsAgentRuntime, Options
from natsrt.background import end_tasks
from natsrt.contrib.memory.contents import CLEAR, encode
from natsrt.contrib.memory.session import Session
from natsrt.contrib.servers import ServersConfig, config_of, settings_of
from natsrt.storage import Storage, check_limits

MAX_MESSAGES: Final = 10_000
"""Contents of a session that are kept unless another number is given."""

T = TypeVar("T")


class NatsMemoryConfig(ServersConfig):
    """The configuration of a `NatsMemory`. It has no credentials, and nothing of what is remembered."""

    session: str
    name: str = "default"
    max_messages: int | None = MAX_MESSAGES
    max_age: float | None = None
    max_bytes: int | None = None
    memory: ComponentModel | None = None
    """The memory that is wrapped. None: a `ListMemory`."""


class NatsMemory(Memory, Component[NatsMemoryConfig]):
    """What a session remembers, shared by all processes that name the session, and kept in JetStream.

    Each process has a memory of its own, which is wrapped. What any process adds is stored in a stream, and put into
    all of these in the order of the stream. It connects when it is first used.

    Args:
        session: Any text. All who use the same session, namespace and ``name`` share what is remembered.
        servers: One URL or a list of URLs. None: see ``options``.
        namespace: natsrt's namespace. None: see ``options``.
        context: The name of a context of the ``nats`` CLI. None: see ``options``.
        jetstream_domain: The JetStream domain of the stream. None: see ``options``.
        options: All settings of the connection, which the arguments before override. Reading waits for a lost server
            as long as ``offline_timeout`` says, writing as long as ``publish_timeout``. None: those of `Options.load`,
            so credentials may come from the environment.
        runtime: A runtime whose connection, namespace and settings are used. It must be started when the memory is
            first used. None: the memory has a connection of its own.
        memory: The memory that is wrapped: `ListMemory`, or any other. It belongs to the session: it is cleared and
            filled from the stream at the start. None: a new `ListMemory`.
        name: The end of the stream's name, ``natsrt_memory_<name>``. All sessions in a stream have the same limits.
        max_messages: Number of contents of a session that are kept, the last ones. None: without a limit.
        max_age: Seconds for which a content is kept, 1 or more. None: without a limit.
        max_bytes: Size of the stream, of all its sessions together; the oldest contents go first. None: without a
            limit.

    Raises:
        ConfigurationError: A setting, a name or a limit is wrong.
        ValueError: ``session`` is empty or no text, ``memory`` is a `ListMemory` that has contents, or both ``runtime``
            and other settings are given.
    """

    component_type: ClassVar[ComponentType] = "memory"
    component_config_schema: type[NatsMemoryConfig] = NatsMemoryConfig
    component_provider_override: ClassVar[str | None] = "natsrt.contrib.memory.NatsMemory"

    def __init__(
        self,
        session: str,
        servers: str | Sequence[str] | None = None,
        *,
        namespace: str | None = None,
        context: str | None = None,
        jetstream_domain: str | None = None,
        options: Options | None = None,
        runtime: NatsAgentRuntime | None = None,
        memory: Memory | None = None,
        name: str = "default",
        max_messages: int | None = MAX_MESSAGES,
        max_age: float | None = None,
        max_bytes: int | None = None,
    ) -> None:
        if not isinstance(session, str) or not session:
            raise ValueError(f"session must be the name of a session, such as a user's, not {session!r:.60}")
        try:
            session.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"session must be text that UTF-8 has, without a lone surrogate: {session!r:.60} has one"
            ) from error
        check_limits(name, max_messages=max_messages, max_age=max_age, max_bytes=max_bytes)
        if runtime is not None:
            if any(given is not None for given in (servers, namespace, context, jetstream_domain, options)):
                raise ValueError("a memory with a runtime has the runtime's servers and settings: give no others")
            self._options = runtime.options
        else:
            self._options = settings_of(options, servers, namespace, context, jetstream_domain)
        if isinstance(memory, ListMemory) and memory.content:
            raise ValueError(
                "memory has contents, which no other process would have: give an empty one, and add them to the "
                "NatsMemory"
            )
        self._session_name = session
        self._runtime = runtime
        self._memory: Memory = ListMemory() if memory is None else memory
        self._name = name
        self._max_messages = max_messages
        self._max_age = max_age
        self._max_bytes = max_bytes
        self._life: _Life | None = None
        self._closed = False

    @property
    def session(self) -> str:
        """The name of the session."""
        return self._session_name

    @property
    def memory(self) -> Memory:
        """The memory that is wrapped. What is done to it here does not reach other processes."""
        return self._memory

    @property
    def left_out(self) -> int:
        """Number of stored contents that this process does not have, because they could not be read, or because the
        memory that is wrapped refused them three times. The log names each. 0 before the first use."""
        session = None if self._life is None else self._life.session
        return 0 if session is None else session.left_out

    # -- Memory ------------------------------------------------------------------------------------------------------

    async def add(self, content: MemoryContent, cancellation_token: CancellationToken | None = None) -> None:
        """Add a content to the session. When this returns, it is stored, and this process has it.

        Raises:
            CannotSerialize: It would not arrive in other processes as it is. Nothing is stored.
            MessageTooLarge: It does not fit into one message of the server, or into ``max_bytes``. Nothing is stored.
            ServerUnreachable, StreamUnavailable: It may be stored or not.
            JetStreamFull, PermissionDenied: It is not stored.
            Exception: What the memory that is wrapped raises. The content is stored, and others may have it.
            asyncio.CancelledError: The token was cancelled. The content may be stored or not.
        """
        is_image = isinstance(content, MemoryContent) and isinstance(content.content, Image)
        body = await asyncio.to_thread(encode, content) if is_image else encode(content)
        await _linked(self._store(body), cancellation_token)

    async def _store(self, body: bytes, *, alone: bool = False) -> None:
        session = await self._session()
        await session.taken(await session.log.append(body, alone=alone))

    async def query(
        self, query: str | MemoryContent = "", cancellation_token: CancellationToken | None = None, **kwargs: Any
    ) -> MemoryQueryResult:
        """Query the memory that is wrapped, which has then all that any process had stored before.

        Raises:
            ServerUnreachable, StreamUnavailable, PermissionDenied: The stream cannot be read.
            Exception: What the memory that is wrapped raises.
        """
        session = await _linked(self._in_step(), cancellation_token)
        async with session.using:
            return await self._memory.query(query, cancellation_token, **kwargs)

    async def update_context(self, model_context: ChatCompletionContext) -> UpdateContextResult:
        """Have the memory that is wrapped update a context. Raises as `query`."""
        session = await self._in_step()
        async with session.using:
            return await self._memory.update_context(model_context)

    async def clear(self) -> None:
        """Forget all that the session remembers, in all processes: what was added before, and nothing that is added
        later. The stream erases it. Raises as `add`.
        """
        await self._store(CLEAR, alone=True)

    async def close(self) -> None:
        """Disconnect, and close the memory that is wrapped. What is stored stays. Has no effect if closed.

        Raises:
            RuntimeError: The memory runs in another event loop: close it there.
        """
        if self._closed:
            return
        life = self._life_here()
        self._closed, self._life = True, None
        try:
            if life is not None:
                await life.end()
        finally:
            await self._memory.close()

    async def __aenter__(self) -> Self:
        """Connect, and wait until the memory is in step. Raises as `query`."""
        await self._in_step()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # -- Component ---------------------------------------------------------------------------------------------------

    def _to_config(self) -> NatsMemoryConfig:
        wrapped = self._memory.dump_component()
        if isinstance(self._memory, ListMemory):
            wrapped.config.pop("memory_contents", None)  # they are the session's
        return NatsMemoryConfig(
            **config_of(self._options),
            session=self._session_name,
            name=self._name,
            max_messages=self._max_messages,
            max_age=self._max_age,
            max_bytes=self._max_bytes,
            memory=wrapped,
        )

    @classmethod
    def _from_config(cls, config: NatsMemoryConfig) -> Self:
        return cls(
            config.session,
            config.servers,
            namespace=config.namespace,
            context=config.context,
            jetstream_domain=config.jetstream_domain,
            memory=None if config.memory is None else Memory.load_component(config.memory),
            name=config.name,
            max_messages=config.max_messages,
            max_age=config.max_age,
            max_bytes=config.max_bytes,
        )

    # -- helpers -----------------------------------------------------------------------------------------------------

    async def _in_step(self) -> Session:
        session = await self._session()
        await session.in_step()
        return session

    async def _session(self) -> Session:
        """The session, connected. Raises RuntimeError if the memory is closed, or runs in another event loop."""
        if self._closed:
            raise RuntimeError("this memory is closed: make another one for the same session")
        life = self._life_here()
        if life is not None and self._runtime is not None and life.storage is not self._runtime.storage:
            self._life = None
            await life.end()  # the runtime was stopped, and started again
            life = None
        if life is None:
            storage = Storage(self._options) if self._runtime is None else self._runtime.storage
            life = self._life = _Life(storage, self)
        try:
            return await life.opened()
        except BaseException:
            if self._life is life and life.failed:
                self._life = None
            raise

    def _life_here(self) -> _Life | None:
        """What the memory has in this event loop; None before its first use. Raises RuntimeError if it has something in
        another one that is not closed."""
        life = self._life
        if life is None or life.loop is asyncio.get_running_loop():
            return life
        if life.loop.is_closed():  # as after asyncio.run: nothing of it runs any more
            return None
        raise RuntimeError("this memory runs in another event loop: make another one for the same session")

    def _new_session(self, storage: Storage) -> Session:
        log = storage.log(
            self._session_name,
            name=self._name,
            max_messages=self._max_messages,
            max_age=self._max_age,
            max_bytes=self._max_bytes,
        )
        return Session(log, self._memory, self._max_messages)


class _Life:
    """What a memory has in one event loop, from its first use until it is closed."""

    def __init__(self, storage: Storage, memory: NatsMemory) -> None:
        self.loop: asyncio.AbstractEventLoop = asyncio.get_running_loop()
        self.storage: Storage = storage
        self.session: Session | None = None
        """None before it is connected."""
        # It outlives the code that uses the memory first, so it takes nothing from the context of that code.
        context = contextvars.Context()
        self._opening = self.loop.create_task(self._open(memory), name="natsrt memory opens", context=context)

    @property
    def failed(self) -> bool:
        """Whether it could not be opened."""
        return self._opening.done() and (self._opening.cancelled() or self._opening.exception() is not None)

    async def opened(self) -> Session:
        """The session, once it is connected. Raises what kept it from being connected."""
        await asyncio.wait({self._opening})
        if self._opening.cancelled():
            raise RuntimeError("the memory was closed meanwhile")
        return self._opening.result()

    async def _open(self, memory: NatsMemory) -> Session:
        session = None
        try:
            await self.storage.open()
            session = memory._new_session(self.storage)
            await session.start()
        except BaseException:
            if session is not None:
                await session.stop()
            await self.storage.close()
            raise
        self.session = session
        return session

    async def end(self) -> None:
        await end_tasks(self._opening)
        if self.session is not None:
            await self.session.stop()
            await self.storage.close()


async def _linked(work: Coroutine[Any, Any, T], cancellation_token: CancellationToken | None) -> T:
    """The result of ``work``, which ends when the token is cancelled. None: there is no token."""
    if cancellation_token is None:
        return await work
    task = asyncio.ensure_future(work)
    cancellation_token.link_future(task)
    try:
        return await task
    finally:
        task.cancel()
