"""The keyed agents that host AgentChat's agents and teams: one for each session.

Rules:

1. The live agent or team is ahead of what is stored only while a turn runs. A turn that is not completed, because it
   failed, was cancelled, or its caller left, drops it, and the next turn starts from what is stored.
2. A turn is completed when its caller has room for its answer, and the state is stored. The state is taken before that,
   and stored before the caller gets the end. If it cannot be stored, the turn has failed.
3. An agent that is left in the middle of a turn is told so by its cancellation token, before its generator is closed: a
   team whose generator is closed would otherwise go on to its end first.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, ClassVar, Final, Generic, NoReturn, TypeVar

from autogen_agentchat.base import ChatAgent, Response, TaskResult, Team
from autogen_agentchat.messages import BaseAgentEvent, BaseChatMessage
from autogen_core import CancellationToken, MessageContext, RoutedAgent, message_handler

import natsrt
from natsrt.contrib.agentchat.ahead import Ahead
from natsrt.contrib.agentchat.chain import in_turn
from natsrt.contrib.agentchat.closing import Live
from natsrt.contrib.agentchat.factory import SessionFactory
from natsrt.contrib.agentchat.leaving import is_cancelled, left
from natsrt.contrib.agentchat.requests import (
    OF_BOTH,
    ChatTurn,
    Close,
    Forget,
    LoadState,
    Pause,
    Reset,
    Resume,
    SaveState,
    State,
    TeamRun,
    TurnStarted,
)
from natsrt.contrib.agentchat.sources import renamed
from natsrt.contrib.agentchat.stored import Answer, Result, Stored, dump_result, load_result
from natsrt.errors import StateConflict, UnhandledMessage

logger: logging.Logger = logging.getLogger("natsrt.agentchat")

_NOT_RUNNING: Final = "The team is not running, so it cannot be paused or resumed."
_TRACEBACK: Final = "\nTraceback"

Hosted = TypeVar("Hosted", ChatAgent, Team)


class Conversation(RoutedAgent, ABC, Generic[Hosted]):
    """One session of a hosted agent or team."""

    turn_class: ClassVar[type[ChatTurn | TeamRun]]
    """The request for a turn."""

    def __init__(self, factory: SessionFactory, description: str, *, stores_turns: bool = True) -> None:
        """``stores_turns``: whether each turn is stored before it counts, as with ``save="message"``."""
        super().__init__(description)
        self._factory = factory
        self._stores_turns = stores_turns
        self._stored: Stored | None = None
        """What the session is after its last completed turn; None: it had no turn."""
        self._live: Live[Hosted] | None = None
        """The agent or team, as it is after its last completed turn, unless a turn runs; None: to be made."""
        self._untouched = False
        """True while the live one has had nothing to do."""
        self._running: Ahead | None = None
        """What the team says whose run is under way; None: no run, or an agent."""
        self._unfit = False
        """Whether the live one is not to have another turn."""
        self._making = asyncio.Lock()
        self._closing: set[asyncio.Task[None]] = set()

    # -- the live agent or team ----------------------------------------------------------------------------------

    @abstractmethod
    def _checked(self, made: ChatAgent | Team) -> Hosted:
        """``made``, if it is of the kind that is hosted here. Raises TypeError."""

    async def instance(self) -> Hosted:
        """The live agent or team, made and loaded if there is none. Raises what its factory and its state raise."""
        async with self._making:
            if self._live is None:
                live = await self._factory.make(self.runtime, self.id)
                try:
                    checked = self._checked(live.one)
                    if self._stored is not None:
                        await checked.load_state(self._stored.state)
                except BaseException:
                    self._close_soon(live)
                    raise
                self._live, self._untouched = Live(checked, live.end), self._stored is None
            return self._live.one

    @asynccontextmanager
    async def _turn(
        self, ctx: MessageContext, callers: Sequence[str] = ()
    ) -> AsyncIterator[tuple[Hosted, CancellationToken]]:
        """The live one, and the token of this turn, for the block that completes the turn or raises."""
        live, token = await self.instance(), CancellationToken()
        if self._stored is None:
            self._stored = Stored(dict(await live.save_state()))
        self._untouched = False
        ctx.cancellation_token.add_callback(token.cancel)
        self._unfit = False
        try:
            with in_turn(str(self.id), callers):
                yield live, token
        except BaseException as error:
            was_cancelled = ctx.cancellation_token.is_cancelled() or is_cancelled()
            token.cancel()
            self._drop()
            if isinstance(error, asyncio.CancelledError) and not was_cancelled:
                raise RuntimeError(f"{self.id} was cancelled, but not by its caller") from error
            if type(error) is RuntimeError and _TRACEBACK in str(error):
                # AgentChat puts the traceback of a participant into the text, which is not for callers, as a cause too.
                logger.warning("a turn of %s failed: %s", self.id, str(error).partition("\n")[0])
                raise RuntimeError(str(error).partition(_TRACEBACK)[0].strip()) from None
            raise
        finally:
            self._running = None
            if self._unfit:
                self._drop()

    async def _said(
        self,
        live: Hosted,
        token: CancellationToken,
        items: AsyncGenerator[Any, None],
        last: type[Result],
        turn: str | None = None,
        names: tuple[str, str] = ("", ""),
    ) -> AsyncGenerator[Any, None]:
        """What the live one says in a turn, and then its answer, of the class ``last``, which completes the turn.

        ``turn`` is the id of the turn, if its answer is to be stored. ``names`` are the agent's own name, and that
        under which the caller knows it.
        """
        answer: Result | None = None
        if isinstance(live, Team):
            self._running = Ahead(items)
            items = self._running.items()
        async with left(items, token):
            async for item in items:
                if isinstance(item, last):
                    answer = renamed(item, *names) if isinstance(item, Response) else item
                else:
                    yield renamed(item, *names)
        if answer is None:
            raise RuntimeError(f"{self.id} gave no final {last.__name__}")
        state = await self._completed(live, token)
        kept = None if turn is None else Answer(turn, dump_result(answer, self._factory.types))
        stored = (self._stored or Stored(state)).after(state, kept)
        yield answer
        await self._keep(stored)

    async def _completed(self, live: Hosted, token: CancellationToken) -> Mapping[str, Any]:
        """The state after a turn that is about to be completed.

        Raises CancelledError if the turn was cancelled, which the live one may not have noticed.
        """
        state = dict(await live.save_state())
        if token.is_cancelled():
            raise asyncio.CancelledError("the turn was cancelled")
        return state

    async def _keep(self, stored: Stored) -> None:
        """Complete a turn: store what the session is after it. If that fails, it is what it was before.

        Raises CannotSerialize for what cannot be stored, and as `NatsAgentRuntime.store_state`.
        """
        former, self._stored = self._stored, stored
        try:
            if self._stores_turns:
                await self._store()
            else:
                stored.check()
        except BaseException:
            self._stored = former
            raise

    async def _store(self) -> None:
        runtime = natsrt.runtime_of(self)
        try:
            await runtime.store_state(self.id)
        except LookupError:  # natsrt has dropped this instance meanwhile
            raise StateConflict(str(self.id), str(runtime.worker_id)) from None

    def _answer(self, turn: str) -> Result | None:
        """The answer of a turn that was completed before; None if it is not kept."""
        result = None if self._stored is None else self._stored.result_of(turn)
        return None if result is None else load_result(result, self._factory.types)

    def _drop(self) -> None:
        """Let the next turn make a live one, and close this one in the background."""
        live, self._live = self._live, None
        if live is not None:
            self._close_soon(live)

    def _close_soon(self, live: Live[Any]) -> None:
        task = asyncio.get_running_loop().create_task(live.close(str(self.id)), name=f"close {self.id}")
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    # -- the keyed agent -----------------------------------------------------------------------------------------

    async def save_state(self) -> Mapping[str, Any]:
        return {} if self._stored is None else self._stored.dump()

    async def load_state(self, state: Mapping[str, Any]) -> None:
        stored = Stored.load(state)
        if not self._untouched:
            self._drop()
        self._stored = stored
        live = await self.instance()
        if self._untouched and stored is not None:
            self._untouched = False
            try:
                await live.load_state(stored.state)
            except BaseException:
                self._drop()
                raise

    async def close(self) -> None:
        self._drop()
        while self._closing:
            await asyncio.wait(self._closing)

    # -- messages ------------------------------------------------------------------------------------------------

    @message_handler
    async def on_reset(self, message: Reset, ctx: MessageContext) -> None:
        async with self._turn(ctx) as (live, token):
            await (live.reset() if isinstance(live, Team) else live.on_reset(token))
            await self._keep(Stored(await self._completed(live, token)))

    @message_handler
    async def on_load(self, message: LoadState, ctx: MessageContext) -> None:
        async with self._turn(ctx) as (live, token):
            await live.load_state(message.state)
            await self._keep(Stored(await self._completed(live, token)))

    @natsrt.out_of_turn
    @message_handler
    async def on_save(self, message: SaveState, ctx: MessageContext) -> State:
        if self._stored is None:
            return State(dict(await (await self.instance()).save_state()))
        return State(dict(self._stored.state))

    @natsrt.out_of_turn
    @message_handler
    async def on_pause(self, message: Pause, ctx: MessageContext) -> None:
        live = await self.instance()
        await (self._in_run(live.pause) if isinstance(live, Team) else live.on_pause(ctx.cancellation_token))

    @natsrt.out_of_turn
    @message_handler
    async def on_resume(self, message: Resume, ctx: MessageContext) -> None:
        live = await self.instance()
        await (self._in_run(live.resume) if isinstance(live, Team) else live.on_resume(ctx.cancellation_token))

    async def _in_run(self, action: Callable[[], Awaitable[None]]) -> None:
        """Pause or resume a team in its run. Raises RuntimeError if it does not run, or if its run ends before that.

        Between two runs, AutoGen's teams would wait for the next one, and pause that.
        """
        running = self._running
        if running is None or running.ended.is_set():
            raise RuntimeError(_NOT_RUNNING)
        acting, ended = asyncio.ensure_future(action()), asyncio.ensure_future(running.ended.wait())
        try:
            await asyncio.wait({acting, ended}, return_when=asyncio.FIRST_COMPLETED)
            if acting.done():
                acting.result()
                return
            self._unfit = True  # its next run would begin with this
            if self._running is not running:
                self._drop()
            raise RuntimeError(_NOT_RUNNING)
        finally:
            acting.cancel()
            ended.cancel()

    @message_handler
    async def on_close(self, message: Close, ctx: MessageContext) -> None:
        await self.close()

    @message_handler
    async def on_forget(self, message: Forget, ctx: MessageContext) -> None:
        natsrt.runtime_of(self).delete_state(self.id)

    async def on_unhandled_message(self, message: Any, ctx: MessageContext) -> NoReturn:
        """Refuse what another session of this worker would take, such as the run of a team."""
        handled = [one.__name__ for one in (self.turn_class, *OF_BOTH, str)]
        raise UnhandledMessage(str(self.id), type(message).__name__, handled)

    @natsrt.streaming
    async def on_text(
        self, message: str, ctx: MessageContext
    ) -> AsyncGenerator[BaseAgentEvent | BaseChatMessage | TaskResult, None]:
        """A task as a text, as any NATS client can send it."""
        async with self._turn(ctx) as (live, token):
            running = live.run_stream(task=message, cancellation_token=token)
            async with aclosing(self._said(live, token, running, TaskResult)) as items:
                async for item in items:
                    yield item


class AgentConversation(Conversation[ChatAgent]):
    """One session of a hosted chat agent."""

    turn_class: ClassVar[type[ChatTurn | TeamRun]] = ChatTurn

    def _checked(self, made: ChatAgent | Team) -> ChatAgent:
        if isinstance(made, ChatAgent):
            return made
        raise TypeError(f"the factory of {self.id.type!r} has made a ChatAgent before, and now {made!r:.80}")

    @natsrt.streaming
    async def on_turn(
        self, message: ChatTurn, ctx: MessageContext
    ) -> AsyncGenerator[TurnStarted | BaseAgentEvent | BaseChatMessage | Response, None]:
        if message.started:
            yield TurnStarted()
        answer = self._answer(message.turn)
        if isinstance(answer, Response):
            for inner in answer.inner_messages or ():
                yield inner
            yield answer
            return
        async with self._turn(ctx, message.callers) as (live, token):
            answering = live.on_messages_stream(message.messages, token)
            own, turn = live.name, message.turn if message.keep else None
            async with aclosing(self._said(live, token, answering, Response, turn, (own, message.name))) as items:
                async for item in items:
                    yield item


class TeamConversation(Conversation[Team]):
    """One session of a hosted team."""

    turn_class: ClassVar[type[ChatTurn | TeamRun]] = TeamRun

    def _checked(self, made: ChatAgent | Team) -> Team:
        if isinstance(made, Team):
            return made
        raise TypeError(f"the factory of {self.id.type!r} has made a Team before, and now {made!r:.80}")

    @natsrt.streaming
    async def on_run(
        self, message: TeamRun, ctx: MessageContext
    ) -> AsyncGenerator[TurnStarted | BaseAgentEvent | BaseChatMessage | TaskResult, None]:
        if message.started:
            yield TurnStarted()
        answer = self._answer(message.turn)
        if isinstance(answer, TaskResult):
            for one in answer.messages:
                yield one
            yield answer
            return
        async with self._turn(ctx, message.callers) as (live, token):
            running = live.run_stream(
                task=message.task, cancellation_token=token, output_task_messages=message.output_task_messages
            )
            turn = message.turn if message.keep else None
            async with aclosing(self._said(live, token, running, TaskResult, turn)) as items:
                async for item in items:
                    yield item
