"""`NatsAgentRuntime`: AutoGen's `AgentRuntime` over NATS.

A call passes from ``send_message`` through `natsrt.sending.sender`, `natsrt.transport.calls`, NATS,
`natsrt.hosting.intake` and `natsrt.hosting.dispatch` to the agent. The reply returns over NATS to
`natsrt.transport.calls`.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, cast

from autogen_core import (
    Agent,
    AgentId,
    AgentMetadata,
    AgentRuntime,
    AgentType,
    CancellationToken,
    InterventionHandler,
    MessageSerializer,
    Subscription,
    TopicId,
)
from autogen_core.exceptions import NotAccessibleError
from opentelemetry.trace import TracerProvider

from natsrt.agents import control
from natsrt.agents.catalog import Catalog
from natsrt.agents.chain import current_chain
from natsrt.agents.contained import contained
from natsrt.agents.declarations import Declarations
from natsrt.agents.interventions import Interventions
from natsrt.assembly import Program
from natsrt.errors import AmbiguousAgent, NatsrtError, SubscriptionNotServed, UnknownSubscription
from natsrt.keyed.ownership import OwnedElsewhere
from natsrt.keyed_types import KeyedOptions, keyed_options_of
from natsrt.observe.health import Health
from natsrt.options import Options
from natsrt.session import Session
from natsrt.signals import STOP_SIGNALS, StopSignals
from natsrt.wire.failures import ErrorTypes
from natsrt.wire.serialization import Serialization
from natsrt.wire.subjects import Subjects

logger = logging.getLogger("natsrt")

T = TypeVar("T", bound=Agent)
_type = type  # `type` is a parameter's name in AutoGen's protocol


class NatsAgentRuntime(AgentRuntime):
    """Runs AutoGen agents across processes and machines, connected by NATS.

    Args:
        servers: One URL or a list of URLs. None: ``NATS_URL``, else ``nats://127.0.0.1:4222``.
        name: The worker's name. Its id is this name plus a nonce for each start. None: the host's name.
        namespace: A prefix before every subject, bucket and stream name. Runtimes in different namespaces do not see
            each other. None: as in the other sources of settings, else no prefix.
        tracer_provider: OpenTelemetry's tracer provider. None: the global one, if one is set.
        intervention_handlers: AutoGen's intervention handlers. They run in the sending runtime. None: no handlers.
        options: All settings. Other settings that are passed too override those in ``options``. None: the settings are
            read by `Options.load`.
        settings: Any field of `Options` by name: credentials, TLS, a NATS context, timeouts. None means not given.

    Without ``options``, settings also come from the environment, a configuration file and a NATS context: see
    `Options.load`.

    Raises:
        ConfigurationError: A setting is unknown, misspelt or invalid.
    """

    def __init__(
        self,
        servers: str | Sequence[str] | None = None,
        *,
        name: str | None = None,
        namespace: str | None = None,
        tracer_provider: TracerProvider | None = None,
        intervention_handlers: Sequence[InterventionHandler] | None = None,
        options: Options | None = None,
        **settings: Any,
    ) -> None:
        given = {"servers": servers, "name": name, "namespace": namespace, **settings}
        given = {setting: value for setting, value in given.items() if value is not None}
        self._options = Options.load(**given) if options is None else options.replace(**given)
        self._tracer_provider = tracer_provider
        self._serialization = Serialization()
        self._error_types = ErrorTypes()
        self._catalog = Catalog(self, self._serialization)
        self._subscriptions = Declarations(Subjects(self._options.namespace))
        self._program = Program(
            options=self._options,
            catalog=self._catalog,
            serialization=self._serialization,
            interventions=Interventions(intervention_handlers),
            error_types=self._error_types,
            declarations=self._subscriptions,
        )
        self._session: Session | None = None
        self._starting: asyncio.Task[None] | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._abort = asyncio.Event()
        self._cut_short = 0
        self._stopped = asyncio.Event()
        self._closed: dict[int, Agent] = {}
        """The live agents that `close` has closed, by ``id()``, because an agent need not be hashable."""

    # -- AgentRuntime, in the protocol's order -------------------------------------------------------------------

    async def send_message(
        self,
        message: Any,
        recipient: AgentId,
        *,
        sender: AgentId | None = None,
        cancellation_token: CancellationToken | None = None,
        message_id: str | None = None,
        reply_type: type[Any] | None = None,
    ) -> Any:
        """Call an agent on any worker, and return what its handler returns.

        Args:
            message: A dataclass, Pydantic model, protobuf message, plain value, or a class with an added serializer.
            recipient: The agent to call.
            sender: The agent that sends the message; None if no agent sends it. It is not authenticated.
            cancellation_token: Cancels the call, and cancels the token of the handler in any process. None: the call
                cannot be cancelled by a token.
            message_id: The id of the message. None: a new id.
            reply_type: The class to which the reply is decoded. It is needed for plain NATS responders. None: a reply
                of an agent names its class; the reply of a plain responder becomes JSON values, text or bytes.

        Raises:
            asyncio.CancelledError: The token was cancelled.
            UndeliveredCall: No agent answered. The subclass of the error says why.
            CannotSerialize, MessageTooLarge: The message cannot be sent. Nothing was sent.
            CannotDecode: The reply cannot be read.
            ServerUnreachable: There was no connection for ``offline_timeout`` seconds.
            Exception: The exception that the handler raised, with its class if that is known here, else
                `RemoteAgentError`.
        """
        return await self._running().sender.send(
            message,
            recipient,
            sender=sender,
            token=cancellation_token,
            message_id=message_id,
            reply_type=reply_type,
        )

    async def publish_message(
        self,
        message: Any,
        topic_id: TopicId,
        *,
        sender: AgentId | None = None,
        cancellation_token: CancellationToken | None = None,
        message_id: str | None = None,
    ) -> None:
        """Publish an event to every agent id to which a subscription maps it, except the publisher itself.

        Core NATS delivers an event only to subscribers that are connected at that moment.

        Args:
            message: As in `send_message`.
            topic_id: The topic of the event.
            sender: The agent that publishes the event; None if no agent publishes it. It is not authenticated.
            cancellation_token: The handlers get a copy, which is cancelled with it. None: there is no token.
            message_id: The id of the message. None: a new id.

        Raises:
            CannotSerialize, MessageTooLarge: The message cannot be sent. Nothing was sent.
            ValueError: The subject of the topic would be too long. Nothing was sent.
            ServerUnreachable: There was no connection for ``offline_timeout`` seconds.
        """
        await self._running().sender.publish(
            message, topic_id, sender=sender, token=cancellation_token, message_id=message_id
        )

    async def register_factory(
        self,
        type: str | AgentType,
        agent_factory: Callable[[], T | Awaitable[T]],
        *,
        expected_class: type[T] | None = None,
        keyed: bool | KeyedOptions | None = None,
    ) -> AgentType:
        """Host an agent type in this runtime. If other workers host it too, its calls are distributed among them.

        Args:
            type: The agent type.
            agent_factory: Creates an agent. It may be asynchronous.
            expected_class: The class of the agents that the factory creates. None: the class is not checked, and its
                message types and its `natsrt.keyed` decorator are not known at registration.
            keyed: True or `KeyedOptions` if each id of the type has one live instance across all workers. False: the
                type is not keyed. None: the setting ``keyed`` for the type, else the `natsrt.keyed` decorator of the
                class.

        Raises:
            ValueError: The type already exists in this runtime, or with registered instances on any worker, or it is
                keyed here and not on another worker or the reverse.
            RegistryUnavailable: The registry could not be written. The registration was undone.
        """
        agent_type = type if isinstance(type, AgentType) else AgentType(type)
        session = await self._settled()
        said = self._options.keyed.get(agent_type.type) if keyed is None else keyed
        options = _keyed_options(said, expected_class)
        if session is not None:
            await session.membership.refuse_type(agent_type.type, keyed=options is not None)
        hosted = self._catalog.add_factory(
            agent_type.type, agent_factory, expected_class, options, decided=said is not None
        )
        if session is not None:
            try:
                await session.membership.host(hosted)
            except BaseException:
                await self.unregister(agent_type, keep_subscriptions=True)
                raise
        return agent_type

    async def register_agent_instance(self, agent_instance: Agent, agent_id: AgentId) -> AgentId:
        """Host one agent instance. All runtimes can reach it under ``agent_id``, and only under that id.

        Raises:
            ValueError: The id is in use in this or another runtime, or its type has a factory, or the other instances
                of its type have another class; or the class or the type is keyed, which instances cannot be.
        """
        _refuse_keyed_instance(agent_id.type, _type(agent_instance), self._options.keyed.get(agent_id.type))
        session = await self._settled()
        if session is not None:
            await session.membership.refuse_type(agent_id.type, instance=agent_id.key)
        hosted = self._catalog.add_instance(agent_instance, agent_id)
        try:
            await agent_instance.bind_id_and_runtime(id=agent_id, runtime=self)
            if session is not None:
                await session.membership.host(hosted)
        except BaseException:
            if session is not None:
                await session.membership.abandon(hosted, agent_id.key)
            self._catalog.remove_instance(agent_id)
            raise
        return agent_id

    # mypy cannot express that `type` defaults to the bound of T (as in AutoGen's own protocol)
    async def try_get_underlying_agent_instance(self, id: AgentId, type: type[T] = Agent) -> T:  # type: ignore[assignment]
        """Return the Python object of a local agent. It is created if it does not exist.

        Raises:
            LookupError: No live worker hosts the agent.
            NotAccessibleError: The agent lives in another process.
            TypeError: The agent is not an instance of ``type``.
        """
        session = await self._settled()
        hosted = self._catalog.find(id.type)
        if hosted is None:
            if session is not None and await session.registry.verify(id) is None:
                raise NotAccessibleError(f"Agent {id} lives in another process.")
            raise LookupError(f"Agent with name {id.type} not found.")
        if hosted.keyed is None or session is None:
            agent = await self._catalog.agent(hosted, id.key)
        else:
            try:
                agent = await session.operations.instance(hosted, id.key, current_chain.get())
            except OwnedElsewhere as owner:
                raise NotAccessibleError(f"Agent {id} lives on worker {owner.worker_id}.") from None
        if not isinstance(agent, type):
            raise TypeError(
                f"Agent with name {id.type} is not of type {type.__name__}. It is of type {_type(agent).__name__}"
            )
        return agent

    async def get(
        self, id_or_type: AgentId | AgentType | str, /, key: str = "default", *, lazy: bool = True
    ) -> AgentId:
        """Return the id of an agent. ``lazy=False`` also creates the agent on its worker if it does not exist."""
        if isinstance(id_or_type, AgentId):
            agent_id = id_or_type
        else:
            agent_id = AgentId(id_or_type if isinstance(id_or_type, str) else id_or_type.type, key)
        if not lazy:
            await self._control(agent_id, control.ACTIVATE)
        return agent_id

    async def save_state(self) -> Mapping[str, Any]:
        """Return the states of all live agents of this runtime, by agent id as text."""
        session, states = await self._settled(), {}
        for agent_id, agent in self._catalog.live_agents():
            hosted = self._catalog.find(agent_id.type)
            if hosted is None or hosted.keyed is None or session is None:
                states[str(agent_id)] = dict(await agent.save_state())
            else:
                try:
                    states[str(agent_id)] = dict(
                        await session.operations.state(hosted, agent_id.key, current_chain.get())
                    )
                except OwnedElsewhere:  # it has moved to another worker
                    continue
        return states

    async def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `save_state`, for the types that this runtime hosts. Agents are created as needed."""
        for name, agent_state in state.items():
            agent_id = AgentId.from_str(name)
            hosted = self._catalog.find(agent_id.type)
            if hosted is not None and hosted.keyed is not None:
                await self._control(agent_id, control.LOAD_STATE, dict(agent_state))
            elif hosted is not None:
                agent = await self._catalog.agent(hosted, agent_id.key)
                await agent.load_state(agent_state)

    async def agent_metadata(self, agent: AgentId) -> AgentMetadata:
        """Return the metadata of a local or remote agent.

        Raises:
            UndeliveredCall: A remote agent does not answer. The subclass of the error says why.
            AmbiguousAgent: The type is not keyed, and several live workers host it.
        """
        return cast(AgentMetadata, await self._control(agent, control.METADATA))

    async def agent_save_state(self, agent: AgentId) -> Mapping[str, Any]:
        """Return the state of a local or remote agent.

        Raises the same errors as `agent_metadata`, and any exception of the agent.
        """
        return cast(Mapping[str, Any], await self._control(agent, control.SAVE_STATE))

    async def agent_load_state(self, agent: AgentId, state: Mapping[str, Any]) -> None:
        """Load ``state`` into a local or remote agent. Raises the same errors as `agent_save_state`."""
        await self._control(agent, control.LOAD_STATE, dict(state))

    async def store_state(self, agent: AgentId) -> None:
        """Store the state of a keyed agent of this runtime now, independently of its ``save`` option.

        An agent may call this for itself inside a handler.

        Raises:
            LookupError: The agent is not live in this runtime.
            StateConflict, StateNotSaved: The state could not be stored.
        """
        await self._running().ownership.store(agent)

    async def add_subscription(self, subscription: Subscription) -> None:
        """Subscribe an agent type to topics. Returns when every live worker of the type serves the subscription.

        Raises:
            ValueError: An equal subscription was already added to this runtime, or no topic can have the prefix.
            SubscriptionNotServed: A worker did not confirm within ``subscription_timeout`` seconds. The subscription
                is stored nevertheless.
        """
        session = await self._settled()
        self._subscriptions.add(subscription)
        if session is not None:
            try:
                await session.membership.subscribe(subscription)
            except SubscriptionNotServed:  # it is stored nevertheless
                raise
            except BaseException:
                self._subscriptions.remove(subscription)
                await session.membership.forget(subscription)
                raise

    async def remove_subscription(self, id: str) -> None:
        """Remove a subscription that this runtime added, or that any runtime added without hosting the agent type.

        Raises:
            UnknownSubscription: There is no such subscription with this id. The error is a `LookupError` and a
                `ValueError`.
            SubscriptionNotServed: A worker did not confirm within ``subscription_timeout`` seconds. The subscription
                is removed nevertheless.
        """
        session = await self._settled()
        subscription = self._subscriptions.find(id)
        if subscription is not None:
            if session is None:
                self._subscriptions.remove(subscription)
            else:
                await session.membership.unsubscribe(subscription, stored=self._subscriptions.remove)
        elif session is None or not await session.membership.unsubscribe_foreign(id):
            raise UnknownSubscription(id)

    def add_message_serializer(self, serializer: MessageSerializer[Any] | Sequence[MessageSerializer[Any]]) -> None:
        """Add serializers. AutoGen's standard serializers are replaced by natsrt's, which keep nested types.

        Raises:
            ValueError: Two different classes have the same type name.
        """
        serializers = list(serializer) if isinstance(serializer, Sequence) else [serializer]
        self._serialization.add(serializers)
        self._catalog.serializers_added(serializers)

    # -- beyond the protocol -------------------------------------------------------------------------------------

    async def unregister(self, type: str | AgentType, *, keep_subscriptions: bool = False) -> None:
        """Stop hosting an agent type in this runtime, and remove the subscriptions that were added here for it.

        With ``keep_subscriptions`` the subscriptions remain, as if this runtime had added them without hosting the
        type. Live agents are removed but not closed. Keyed agents are stored, closed and released to other workers when
        their handlers have ended. Has no effect for an unknown type.
        """
        agent_type = type if isinstance(type, str) else type.type
        hosted = self._catalog.find(agent_type)
        if hosted is None:
            return
        ended = () if keep_subscriptions else self._subscriptions.of(agent_type)
        for subscription in ended:
            self._subscriptions.remove(subscription)
        self._catalog.remove(agent_type)
        if self._session is not None:
            await self._session.membership.abandon(hosted, ended=ended)

    def add_error_type(self, cls: type[BaseException]) -> None:
        """Raise exceptions of ``cls`` from remote handlers as ``cls`` instead of as `RemoteAgentError`.

        They are rebuilt from their ``args`` and ``__dict__``, without calling the class. Raises TypeError if ``cls`` is
        not an exception class that a call can raise.
        """
        self._error_types.add(cls)

    @property
    def options(self) -> Options:
        """The settings of this runtime."""
        return self._options

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
            return Health.stopped(f"Its start failed: {told}")
        return Health.stopped("It was stopped." if self._stopped.is_set() else "It was not started.")

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
        if self._session is not None:
            _in_its_loop(self._session)
            raise RuntimeError("Runtime is already started")
        self._abort.clear()
        self._stopped.clear()
        self._stopping = None
        self._session = Session(self._program, self._tracer_provider)
        self._starting = asyncio.ensure_future(self._start(self._session))
        self._starting.add_done_callback(_log_failure)
        return self._starting

    async def _start(self, session: Session) -> None:
        try:
            await session.start(self._abort)
        except BaseException:
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
            raise RuntimeError("Runtime is not started")
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
                await session.stop(self._options.drain_timeout)
        finally:
            self._cut_short = session.cut_short
            self._session = None
            self._starting = None
            self._stopped.set()
        if session.event_error is not None:
            raise session.event_error

    async def stop_when_idle(self) -> None:
        """Stop when nothing is queued, running or awaited in this runtime, before and after a round trip to the server.

        If it is called right after a publish, it waits for that event and for everything that the event causes in this
        runtime.
        """
        session = self._running()
        await self._await_start()
        await session.wait_idle()
        await self.stop()

    async def stop_when_signal(self, signals: Sequence[signal.Signals] = STOP_SIGNALS) -> None:
        """Stop the runtime at the first signal. At a second one, cancel the handlers that are still running.

        Signals within half a second are one signal, because terminals and process managers may both send it. The
        default is SIGTERM, SIGINT and SIGHUP. Processes that handlers fork do not get these signal handlers.
        """
        self._running()

        def again() -> None:
            logger.warning("second signal: cancelling the handlers that are still running")
            self._abort.set()

        with StopSignals(signals, again=again) as stop:
            waits = [asyncio.ensure_future(stop.received.wait()), asyncio.ensure_future(self._stopped.wait())]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                if self._session is not None:
                    await self.stop()
            finally:
                for wait in waits:
                    wait.cancel()

    async def wait_until_stopped(self) -> None:
        """Wait until the runtime is stopped. Returns at once if it is not started."""
        if self._session is not None:
            await self._stopped.wait()

    async def close(self) -> None:
        """Stop if running, and close every live agent. Agents that were already closed are not closed again.

        Raises:
            BaseException: The first exception of the stop and of the agents, after all agents were closed.
        """
        raised: list[BaseException] = []
        if self._session is not None:
            _in_its_loop(self._session)
            try:
                await self.stop()
            except Exception as error:
                raised.append(error)
        closed, self._closed = self._closed, {id(agent): agent for _, agent in self._catalog.live_agents()}
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
        await self.close()

    # -- helpers -------------------------------------------------------------------------------------------------

    def _running(self) -> Session:
        """Return the session, for a use in the present event loop. Raises RuntimeError while stopped."""
        session = self._session
        if session is None:
            if (failure := self._start_failure()) is not None:
                raise failure
            raise RuntimeError("Runtime is not started: call start() first")
        return _in_its_loop(session)

    def _start_failure(self) -> BaseException | None:
        """The error with which the last start failed; None if it did not fail."""
        if self._starting is None or not self._starting.done() or self._starting.cancelled():
            return None
        return self._starting.exception()

    async def _await_start(self) -> None:
        if self._starting is not None:
            await asyncio.shield(self._starting)

    async def _settled(self) -> Session | None:
        """Return the session, after waiting for a start that is under way; None while stopped."""
        if self._session is not None:
            _in_its_loop(self._session)
            await self._await_start()
        return self._session

    async def _control(self, agent: AgentId, operation: str, data: Any = None) -> Any:
        """Carry out a control operation on an agent, in this process if the agent is here, else on its worker."""
        session = await self._settled()
        hosted = self._catalog.find(agent.type)
        if session is not None:
            if session.connection.connected:
                await session.registry.catch_up()
            workers, keyed = session.registry.view.takers_of(agent), session.registry.is_keyed(agent.type)
            if len(workers) > 1 and not keyed:
                raise AmbiguousAgent(str(agent), workers)
            if keyed or hosted is None or session.worker_id not in workers:
                failure = await session.registry.verify(agent)
                if failure is not None:
                    raise failure
                return await session.control(agent, operation, data)
        if hosted is None:
            raise LookupError(f"Agent with name {agent.type} not found.")
        return await control.carry_out(await self._catalog.agent(hosted, agent.key), operation, data)


def create_distributed_runtime(
    broker_url: str | Sequence[str] | None = None,
    instance_id: str | None = None,
    tracer_provider: TracerProvider | None = None,
) -> NatsAgentRuntime:
    """Return a `NatsAgentRuntime`. The parameters have the names that AutoGen's documentation uses.

    ``broker_url`` is ``servers`` and ``instance_id`` is ``name`` of `NatsAgentRuntime`. None has the same meaning as
    there.
    """
    return NatsAgentRuntime(broker_url, name=instance_id, tracer_provider=tracer_provider)


def _keyed_options(said: bool | KeyedOptions | None, cls: type[Any] | None) -> KeyedOptions | None:
    """The options of a keyed type, from the argument or else the setting ``said``, else the class. None: not keyed."""
    of_class = keyed_options_of(cls)
    if said is None or said is True:
        return of_class or (KeyedOptions() if said else None)
    return said or None


def _refuse_keyed_instance(agent_type: str, cls: type[Agent], said: bool | KeyedOptions | None) -> None:
    """Raise ValueError if the type of an instance would be keyed, by the setting ``said`` or by its class."""
    if _keyed_options(said, cls) is None:
        return
    why = f"{cls.__name__} is a keyed class" if said is None else f"the setting keyed names the type {agent_type!r}"
    raise ValueError(
        f"{why}, and an instance cannot be keyed, because it cannot move to another worker: use "
        f"register_factory({agent_type!r}, ..., expected_class={cls.__name__}) instead, or, for an agent that stays on "
        f"this worker, the setting keyed={{{agent_type!r}: False}}"
    )


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
