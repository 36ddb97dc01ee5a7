"""The lifecycle of a runtime: started, stepped, stopped, closed; and what waits for that.

Rules:

1. One life, from `Lifecycle.start` to `Lifecycle.stop`, is a `Session`. There is at most one at a time.
2. Everything runs in the event loop in which the session was started. Another one is refused.
3. A runtime that is stepped by `Lifecycle.process_next` has a session, too. But until `Lifecycle.start`, messages for
   its agents wait in the intake, and messages that it sends wait in the outbox.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Self

from autogen_core import Agent
from opentelemetry.trace import TracerProvider

from natsrt.agents.chain import current_chain
from natsrt.agents.contained import contained
from natsrt.agents.message_types import explain_refused_types
from natsrt.assembly import Network, Program
from natsrt.errors import NatsrtError
from natsrt.observe.health import Counts, Health
from natsrt.sending.outbox import Outbox, WayOut
from natsrt.sending.send_queue import in_intervention
from natsrt.session import Session
from natsrt.signals import STOP_SIGNALS, StopSignals

logger: logging.Logger = logging.getLogger("natsrt")

_CHECK_PERIOD = 1.0
"""Seconds between two checks of a condition in `Lifecycle.stop_when`, as in AutoGen."""
_PAUSE = 0.005
"""Seconds between two looks for the next message in `Lifecycle.process_next`."""


class NotStarted(RuntimeError):
    """Something needs a runtime that is started."""


class Lifecycle:
    """Starts and stops the sessions of one program."""

    _network: type[Network] = Network
    """What a session reaches other processes by."""

    def __init__(self, program: Program, tracer_provider: TracerProvider | None) -> None:
        self._program = program
        self._tracer_provider = tracer_provider
        self._outbox = Outbox(program.options, program.serialization, program.interventions)
        self._session: Session | None = None
        self._stepping = False
        """True from the first `process_next` to `start`, if there was no `start` before."""
        self._starting: asyncio.Task[None] | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._abort = asyncio.Event()
        self._cut_short = 0
        self._counts = Counts()
        """What the last session counted; empty before its end."""
        self._stopped = asyncio.Event()
        self._closed: dict[int, Agent] = {}
        """The live agents that `close` has closed, by ``id()``, because an agent need not be hashable."""

    # -- state ---------------------------------------------------------------------------------------------------

    @property
    def worker_id(self) -> str | None:
        """The worker id, which is new for each start; None while stopped."""
        return None if self._session is None else self._session.worker_id

    @property
    def ready(self) -> bool:
        """True if the runtime is started, connected, in step with the registry, and not stopping."""
        return self._session is not None and self._session.ready

    def health(self) -> Health:
        """Return the current health of this runtime. Never raises, and also works while the runtime is stopped.

        Call it in the runtime's event loop.
        """
        if self._session is not None:
            return self._session.health()
        if (failure := self._start_failure()) is not None:
            told = str(failure) if isinstance(failure, NatsrtError) else type(failure).__qualname__
            return Health.stopped(f"Its start failed: {told}", self._counts)
        return Health.stopped("It was stopped." if self._stopped.is_set() else "It was not started.", self._counts)

    @property
    def running(self) -> Session:
        """The parts of a started runtime, for tools. Raises RuntimeError while stopped."""
        return self._running()

    @property
    def cut_short(self) -> int:
        """Number of handlers that the last stop cancelled, because they did not finish within ``drain_timeout`` seconds
        or before a second signal. 0 if all finished, or before the first stop.
        """
        return self._cut_short

    # -- lifecycle -----------------------------------------------------------------------------------------------

    def start(self) -> Awaitable[None]:
        """Connect and serve. The result may be awaited. Messages that are sent before it completes wait for it.

        Raises:
            RuntimeError: The runtime is already started.
            ServerUnreachable, PermissionDenied, JetStreamRequired, RegistryUnavailable: The start failed. These are
                raised when the result is awaited, or by the first send.
        """
        if self._session is None:
            return self._begin(stepping=False)
        session = _in_its_loop(self._session)
        if not self._stepping or self._starting is None:
            raise RuntimeError("Runtime is already started")
        self._stepping = False
        self._starting = asyncio.ensure_future(self._go_on(session, self._starting))
        self._starting.add_done_callback(_log_failure)
        return self._starting

    def _begin(self, *, stepping: bool) -> asyncio.Task[None]:
        self._abort.clear()
        self._stopped.clear()
        self._stopping = None
        self._stepping = stepping
        self._session = session = Session(self._program, self._tracer_provider, self._network)
        self._outbox.holds = stepping or len(self._outbox) > 0
        if stepping:
            session.intake.hold()
        self._starting = asyncio.ensure_future(self._start(session))
        self._starting.add_done_callback(_log_failure)
        return self._starting

    async def _go_on(self, session: Session, starting: asyncio.Task[None]) -> None:
        """Let the messages go that wait for `process_next`."""
        await asyncio.shield(starting)
        session.intake.release()
        await self._pass_on(session, hold=False)

    async def _pass_on(self, session: Session, *, hold: bool) -> None:
        """Send what waits. ``hold``: what is sent later waits again."""
        await self._outbox.pass_on(session.outgoing, session.network.readiness)
        self._outbox.holds = hold

    async def _start(self, session: Session) -> None:
        try:
            if self._outbox.holds and not self._stepping:
                await self._pass_on(session, hold=False)  # it joins the queue of sends, which waits for the start
            await session.start(self._abort)
        except BaseException:
            self._counts = session.counts()
            self._session = None
            self._stopped.set()
            raise

    async def stop(self) -> None:
        """Stop accepting messages, finish the accepted ones within ``drain_timeout`` seconds, leave the registry, and
        disconnect.

        A handler may stop its own runtime. The stop does not wait for this handler, and its reply can no longer be
        sent.

        Raises:
            RuntimeError: The runtime is not started.
            BaseException: The first exception of an event's handler, if ``ignore_unhandled_exceptions`` is off.
        """
        if self._session is None:
            raise NotStarted("Runtime is not started")
        session = _in_its_loop(self._session)
        if self._stopping is None:
            self._stopping = asyncio.ensure_future(self._stop(session))
        session.exempt(asyncio.current_task(), current_chain.get())
        await asyncio.shield(self._stopping)

    async def _stop(self, session: Session) -> None:
        try:
            if self._starting is not None:
                await asyncio.gather(self._starting, return_exceptions=True)
            if self._session is session:
                if self._stepping:
                    self._stepping = False
                    session.intake.release()
                    await self._pass_on(session, hold=False)
                await session.stop(self._program.options.drain_timeout)
        finally:
            self._cut_short = session.cut_short
            self._counts = session.counts()
            self._session = None
            self._starting = None
            self._stopped.set()
        if (error := session.take_event_error()) is not None:
            raise error

    async def stop_when_idle(self) -> None:
        """Stop when nothing is queued, running or awaited in this runtime, before and after a round trip to the server.

        If it is called right after a publish, it waits for that event and for everything that the event causes in this
        runtime.
        """
        session = self._started()
        await self._await_start()
        await session.wait_idle()
        await self.stop()

    async def stop_when(self, condition: Callable[[], bool]) -> None:
        """Stop when ``condition()`` is true. It is called at once, and then every second.

        Also returns when the runtime is stopped by other means. Raises the exception of ``condition``, and does not
        stop then; and the error of a start that fails meanwhile.
        """
        self._started()
        while not condition():
            try:
                async with asyncio.timeout(_CHECK_PERIOD):
                    await self._stopped.wait()
            except TimeoutError:
                continue
            break
        if self._session is not None:
            await self.stop()
        self._raise_start_failure()

    async def stop_when_signal(self, signals: Sequence[signal.Signals] = STOP_SIGNALS) -> None:
        """Stop the runtime at the first signal. At a second one, cancel the handlers that are still running.

        Signals within half a second are one signal, because terminals and process managers may both send it. The
        default is SIGTERM, SIGINT and SIGHUP. Processes that handlers fork do not get these signal handlers.

        Raises the error of a start that fails meanwhile, and those of `stop`.
        """
        self._started()

        def again() -> None:
            logger.warning("second signal: cancelling the handlers that are still running")
            self._abort.set()

        with StopSignals(signals, again=again) as stop:
            waits = [asyncio.ensure_future(stop.received.wait()), asyncio.ensure_future(self._stopped.wait())]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                if self._session is not None:
                    await self.stop()
                self._raise_start_failure()
            finally:
                for wait in waits:
                    wait.cancel()

    async def wait_until_stopped(self) -> None:
        """Wait until the runtime is stopped. Returns at once if it is not started.

        Raises the error of a start that fails meanwhile.
        """
        if self._session is not None:
            await self._stopped.wait()
            self._raise_start_failure()

    async def close(self) -> None:
        """Stop if running, and close every live agent. Agents that were already closed are not closed again.

        Raises:
            BaseException: The first exception of the stop and of the agents, after all agents were closed.
        """
        raised: list[BaseException] = []
        self._outbox.close()
        if self._session is not None:
            _in_its_loop(self._session)
            try:
                await self.stop()
            except Exception as error:
                raised.append(error)
        self._stopped.set()
        closed, self._closed = self._closed, {id(agent): agent for _, agent in self._program.catalog.live_agents()}
        for key, agent in self._closed.items():
            if key not in closed:
                try:
                    await contained(agent.close())
                except Exception as error:
                    raised.append(error)
        if raised:
            raise raised[0]

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            explain_refused_types(error)
        await self.close()

    # -- stepping ------------------------------------------------------------------------------------------------

    @property
    def unprocessed_messages_count(self) -> int:
        """Number of messages that wait in this runtime: sent before the start or between two steps, or received and not
        yet given to a handler.
        """
        received = 0 if self._session is None else self._session.intake.queued
        return len(self._outbox) + received

    async def process_next(self) -> None:
        """Begin to handle the next message of this runtime, as soon as there is one.

        Without `start`, the first call connects, and messages are handled by these calls only, one by each. `start`
        lets all further messages go by themselves. Calls of other runtimes wait too.

        Also returns without a message if nothing is queued, running or awaited in this runtime, before and after a
        round trip to the server. In AutoGen it would wait for ever then.

        Raises:
            BaseException: The first exception of an event's handler, if ``ignore_unhandled_exceptions`` is off. It is
                not raised again.
            ServerUnreachable, PermissionDenied, JetStreamRequired, RegistryUnavailable: It could not connect.
        """
        if self._session is None:
            self._begin(stepping=True)
        session = self._running()
        await self._await_start()
        if (error := session.take_event_error()) is not None:
            raise error
        taken_in = session.counters.taken_in
        while self._session is session:
            if self._stepping:
                await self._send_what_waits(session)
                if session.intake.step():
                    break
            elif session.counters.taken_in != taken_in:
                break
            idle = await session.is_idle() and not len(self._outbox)
            await asyncio.sleep(_PAUSE)  # also before returning: a loop around this must not take all of a processor
            if idle:
                break
        await asyncio.sleep(0)  # the handler begins

    async def _send_what_waits(self, session: Session) -> None:
        """Send the messages of the outbox, and wait until those for this runtime have come in, so that they count."""
        if not len(self._outbox):
            return
        await self._pass_on(session, hold=True)
        await self._outbox.sent()
        await session.connection.round_trip(self._program.options.offline_timeout)
        await asyncio.sleep(0)

    # -- helpers -------------------------------------------------------------------------------------------------

    def _way_out(self) -> WayOut:
        """What takes a message that is sent now. Raises RuntimeError after a stop."""
        session = self._session
        if session is None:
            return self._running().outgoing if self._stopped.is_set() else self._outbox
        _in_its_loop(session)
        return self._outbox if self._outbox.holds and not in_intervention() else session.outgoing

    def _started(self) -> Session:
        """Return the session if it is started and not stepped. Raises RuntimeError if not."""
        session = self._running()
        if self._stepping:
            raise RuntimeError("Runtime is not started: its messages wait for process_next() or start()")
        return session

    def _running(self) -> Session:
        """Return the session, for a use in the present event loop. Raises RuntimeError while stopped."""
        session = self._session
        if session is None:
            self._raise_start_failure()
            raise NotStarted("Runtime is not started: call start() first")
        return _in_its_loop(session)

    def _start_failure(self) -> BaseException | None:
        """The error with which the last start failed; None if it did not fail."""
        if self._starting is None or not self._starting.done() or self._starting.cancelled():
            return None
        return self._starting.exception()

    def _raise_start_failure(self) -> None:
        """Raise the error with which the last start failed, if it did."""
        if (failure := self._start_failure()) is not None:
            raise failure

    async def _await_start(self) -> None:
        if self._starting is not None:
            await asyncio.shield(self._starting)

    async def _settled(self) -> Session | None:
        """Return the session, after waiting for a start that is under way; None while stopped."""
        if self._session is not None:
            _in_its_loop(self._session)
            await self._await_start()
        return self._session


def _in_its_loop(session: Session) -> Session:
    """Return ``session`` if the present code runs in its event loop. Raises RuntimeError if not.

    From another loop, its futures would only be noticed when its own loop happens to wake up.
    """
    if session.loop is asyncio._get_running_loop():
        return session
    if session.loop.is_closed():
        raise RuntimeError(
            "the event loop in which this runtime was started is closed, as after asyncio.run: start a new runtime"
        )
    raise RuntimeError(
        "this runtime runs in another event loop: use asyncio.run_coroutine_threadsafe(coroutine, loop), with the loop "
        "in which it was started"
    )


def _log_failure(starting: asyncio.Future[None]) -> None:
    """Log why a start failed, at DEBUG. This also marks its exception as retrieved if the start is not awaited."""
    if not starting.cancelled() and (error := starting.exception()) is not None:
        logger.debug("the runtime did not start: %s", error)
