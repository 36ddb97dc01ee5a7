"""`NatsAgentRuntime`: AutoGen's `AgentRuntime` over NATS.

A call goes from ``send_message`` through `natsrt.sending.sender`, `natsrt.transport.calls`, NATS,
`natsrt.hosting.intake` and `natsrt.hosting.dispatch` to the agent, and its reply goes back.
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
from natsrt.agents.declarations import Declarations
from natsrt.agents.interventions import Interventions
from natsrt.assembly import Program
from natsrt.errors import AmbiguousAgent, NatsrtError, SubscriptionNotServed, UnknownSubscription
from natsrt.keyed.ownership import OwnedElsewhere
from natsrt.keyed_types import KeyedOptions, keyed_options_of
from natsrt.observe.health import Health
from natsrt.options import Options
from natsrt.session import Session
from natsrt.wire.failures import ErrorTypes
from natsrt.wire.serialization import Serialization
from natsrt.wire.subjects import Subjects

logger = logging.getLogger("natsrt")

T = TypeVar("T", bound=Agent)
_type = type  # `type` is a parameter's name in AutoGen's protocol


class NatsAgentRuntime(AgentRuntime):
    """Runs AutoGen agents across processes and machines, with NATS in between.

    Args:
        servers: A URL or a list of them. None: ``NATS_URL``, else ``nats://127.0.0.1:4222``.
        name: The worker's name; its id is this plus a nonce per start. None: the host's name.
        namespace: A prefix before every subject, bucket and stream name; runtimes of different namespaces do not meet.
        tracer_provider: OpenTelemetry's; None means the global one, if one is set.
        intervention_handlers: AutoGen's; they run in the sending runtime.
        options: All settings at once. Settings given beside it replace its own.
        settings: Any field of `Options` by name: credentials, TLS, a NATS context, timeouts.

    Without ``options`` the environment, a configuration file and a NATS context count too: see `Options.load`.

    Raises:
        ConfigurationError: A setting is unknown, misspelt or wrong.
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
        self._stopped = asyncio.Event()
        self._closed: dict[int, Agent] = {}
        """The live agents that `close` has closed, by identity: an agent need not be hashable."""

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
        """Call an agent, wherever it lives, and return what its handler returns.

        Args:
            message: A dataclass, Pydantic model, protobuf message, plain value, or what an added serializer takes.
            recipient: The agent.
            sender: The agent that sends; None from outside of agents. A claim, not an identity.
            cancellation_token: Cancels the call and sets the token of the handler, in any process.
            message_id: None makes one.
            reply_type: What a plain NATS responder's reply is to be decoded to; None gives JSON values.

        Raises:
            asyncio.CancelledError: The token was cancelled.
            UndeliveredCall: One of its subclasses says why no agent answered.
            CannotSerialize, MessageTooLarge: Before anything was sent.
            ServerUnreachable: No server for ``offline_timeout`` seconds.
            Exception: What the handler raised, as its own class where that is known here, else `RemoteAgentError`.
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
        """Publish an event to every agent id that a subscription gives it to, the publisher's own excepted.

        Core NATS delivers to subscribers that are connected at the moment.

        Raises:
            CannotSerialize, MessageTooLarge, ValueError: Before anything was sent; ValueError for a topic whose
                subject would be too long.
            ServerUnreachable: No server for ``offline_timeout`` seconds.
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
        """Host an agent type here. Other workers may host the same type; its calls are then shared out.

        Args:
            type: The agent type.
            agent_factory: Makes an agent.
            expected_class: The class of what it makes. None: not checked, and what the class says is not known.
            keyed: Whether each id of the type has one live instance over all workers, and how such agents behave.
                None: as the setting ``keyed`` says for the type, else as `natsrt.keyed` says for the class.

        Raises:
            ValueError: The type exists in this runtime already, as instances anywhere, or keyed otherwise elsewhere.
            RegistryUnavailable: The registry could not be written; nothing is left behind.
        """
        agent_type = type if isinstance(type, AgentType) else AgentType(type)
        session = await self._settled()
        options = self._keyed_options(agent_type.type, expected_class, keyed)
        await self._refuse_mixture(session, agent_type.type, instances=False)
        if session is not None:
            session.membership.refuse_mixture(agent_type.type, options is not None)
        hosted = self._catalog.add_factory(agent_type.type, agent_factory, expected_class, options)
        if session is not None:
            try:
                await session.membership.host(hosted)
            except BaseException:
                await self.unregister(agent_type, keep_subscriptions=True)
                raise
        return agent_type

    async def register_agent_instance(self, agent_instance: Agent, agent_id: AgentId) -> AgentId:
        """Make one agent instance reachable from everywhere under ``agent_id``, and only under that.

        Raises:
            ValueError: The id is taken, here or elsewhere, or its type has a factory, or another class.
        """
        session = await self._settled()
        await self._refuse_mixture(session, agent_id.type, instances=True)
        if session is not None and (holders := session.registry.view.instance_holders(agent_id.type, agent_id.key)):
            raise ValueError(f"Agent with id {agent_id} already exists on worker {holders[0]}.")
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
        """The Python object behind a local agent, made if it is not there yet.

        Raises:
            LookupError: No live worker hosts the agent.
            NotAccessibleError: The agent lives in another process.
            TypeError: The agent is not a ``type``.
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
        """The id of an agent. ``lazy=False`` also makes the agent, wherever it lives."""
        if isinstance(id_or_type, AgentId):
            agent_id = id_or_type
        else:
            agent_id = AgentId(id_or_type if isinstance(id_or_type, str) else id_or_type.type, key)
        if not lazy:
            await self._control(agent_id, control.ACTIVATE)
        return agent_id

    async def save_state(self) -> Mapping[str, Any]:
        """The states of all live agents of this runtime, by agent id as text."""
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
                except OwnedElsewhere:  # it moved away meanwhile
                    continue
        return states

    async def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `save_state` returned, for the types that this runtime hosts; agents are made as needed."""
        for name, agent_state in state.items():
            agent_id = AgentId.from_str(name)
            hosted = self._catalog.find(agent_id.type)
            if hosted is not None and hosted.keyed is not None:
                await self._control(agent_id, control.LOAD_STATE, dict(agent_state))
            elif hosted is not None:
                agent = await self._catalog.agent(hosted, agent_id.key)
                await agent.load_state(agent_state)

    async def agent_metadata(self, agent: AgentId) -> AgentMetadata:
        """The metadata of a local or remote agent.

        Raises:
            UndeliveredCall: One of its subclasses, for a remote agent that does not answer.
            AmbiguousAgent: The type is not keyed and several live workers host it.
        """
        return cast(AgentMetadata, await self._control(agent, control.METADATA))

    async def agent_save_state(self, agent: AgentId) -> Mapping[str, Any]:
        """The state of a local or remote agent. Raises as `agent_metadata` does, and what the agent raises."""
        return cast(Mapping[str, Any], await self._control(agent, control.SAVE_STATE))

    async def agent_load_state(self, agent: AgentId, state: Mapping[str, Any]) -> None:
        """Load ``state`` into a local or remote agent. Raises as `agent_save_state` does."""
        await self._control(agent, control.LOAD_STATE, dict(state))

    async def store_state(self, agent: AgentId) -> None:
        """Store the state of a keyed agent that lives in this runtime now, whatever its options say of saving.

        An agent may do so for itself, in the middle of a handler.

        Raises:
            LookupError: It does not live here.
            StateConflict, StateNotSaved: It could not be stored.
        """
        await self._running().ownership.store(agent)

    async def add_subscription(self, subscription: Subscription) -> None:
        """Subscribe an agent type to topics. Returns once every live worker of the type serves the subscription.

        Raises:
            ValueError: An equal subscription was added here already, or the prefix is one that no topic can have.
            SubscriptionNotServed: A worker did not confirm within ``subscription_timeout`` seconds.
        """
        session = await self._settled()
        self._subscriptions.add(subscription)
        if session is not None:
            try:
                await session.membership.subscribe(subscription)
            except SubscriptionNotServed:  # it is stored all the same
                raise
            except BaseException:
                self._subscriptions.remove(subscription)
                await session.membership.forget(subscription)
                raise

    async def remove_subscription(self, id: str) -> None:
        """End a subscription that this runtime added, or that a runtime without the agent type added anywhere.

        Raises:
            UnknownSubscription: A `LookupError` and `ValueError`: there is none with this id.
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
        """Add serializers. Those of AutoGen itself are replaced by natsrt's own, which keep nested types.

        Raises:
            ValueError: Two different classes have the same type name.
        """
        serializers = list(serializer) if isinstance(serializer, Sequence) else [serializer]
        self._serialization.add(serializers)
        self._catalog.serializers_added(serializers)

    # -- beyond the protocol -------------------------------------------------------------------------------------

    async def unregister(self, type: str | AgentType, *, keep_subscriptions: bool = False) -> None:
        """Stop hosting an agent type here, and end the subscriptions that were added here for it.

        Its live agents are forgotten, not closed; keyed ones are left to other workers, stored and closed, when their
        handlers have ended. An unknown type changes nothing. With ``keep_subscriptions`` they
        stay, as those of a runtime that does not host the type.
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
        """Let a remote handler's exceptions of ``cls`` arrive as themselves instead of as `RemoteAgentError`.

        They are rebuilt from their ``args`` and ``__dict__``, without calling the class.
        """
        self._error_types.add(cls)

    @property
    def options(self) -> Options:
        """The settings in force."""
        return self._options

    @property
    def worker_id(self) -> str | None:
        """This start's worker id; None while stopped."""
        return None if self._session is None else self._session.worker_id

    @property
    def ready(self) -> bool:
        """Whether the runtime is started, connected, and in step with the registry."""
        return self._session is not None and self._session.ready

    def health(self) -> Health:
        """The health of this runtime at this moment. Never raises, and works while the runtime is stopped too.

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

    # -- lifecycle -----------------------------------------------------------------------------------------------

    def start(self) -> Awaitable[None]:
        """Connect and serve. May be awaited or not; what is sent before it completes waits for it.

        Raises:
            RuntimeError: Already started.
            ServerUnreachable, PermissionDenied, JetStreamRequired, RegistryUnavailable: From the awaited result, or
                from the first send.
        """
        if self._session is not None:
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
        """Stop taking messages, finish what was taken (``drain_timeout`` seconds at most), leave, disconnect.

        A handler may stop its own runtime; it is not waited for, and its reply can no longer be sent.

        Raises:
            RuntimeError: Not started.
            BaseException: The first exception of an event's handler, where ``ignore_unhandled_exceptions`` is off.
        """
        if self._session is None:
            raise RuntimeError("Runtime is not started")
        if self._stopping is None:
            self._stopping = asyncio.ensure_future(self._stop(self._session))
        self._session.exempt(asyncio.current_task(), current_chain.get())
        await asyncio.shield(self._stopping)

    async def _stop(self, session: Session) -> None:
        try:
            if self._starting is not None:
                await asyncio.gather(self._starting, return_exceptions=True)
            if self._session is session:
                await session.stop(self._options.drain_timeout)
        finally:
            self._session = None
            self._starting = None
            self._stopped.set()
        if session.event_error is not None:
            raise session.event_error

    async def stop_when_idle(self) -> None:
        """Stop once nothing is queued, running or awaited here, proved by a round trip through the server.

        Called right after a publish, it waits for that event and for all that it causes in this runtime.
        """
        session = self._running()
        await self._await_start()
        await session.wait_idle()
        await self.stop()

    async def stop_when_signal(self, signals: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGINT)) -> None:
        """Stop in order at the first signal; a second one ends what still runs at once."""
        self._running()
        loop = asyncio.get_running_loop()
        received = asyncio.Event()

        def on_signal() -> None:
            if received.is_set():
                logger.warning("second signal: ending what still runs")
                self._abort.set()
            received.set()

        for number in signals:
            loop.add_signal_handler(number, on_signal)
        waits = [asyncio.ensure_future(received.wait()), asyncio.ensure_future(self._stopped.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if self._session is not None:
                await self.stop()
        finally:
            for wait in waits:
                wait.cancel()
            for number in signals:
                loop.remove_signal_handler(number)

    async def wait_until_stopped(self) -> None:
        """Return when the runtime is stopped, by whomever; at once if it was never started."""
        if self._session is not None:
            await self._stopped.wait()

    async def close(self) -> None:
        """Stop, if running, and close every live agent. Closing twice is harmless.

        Raises:
            BaseException: The first of what stopping and the agents raised, after all of them were closed.
        """
        raised: list[BaseException] = []
        if self._session is not None:
            try:
                await self.stop()
            except Exception as error:
                raised.append(error)
        closed, self._closed = self._closed, {id(agent): agent for _, agent in self._catalog.live_agents()}
        for key, agent in self._closed.items():
            if key not in closed:
                try:
                    await agent.close()
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
        if self._session is None:
            if (failure := self._start_failure()) is not None:
                raise failure
            raise RuntimeError("Runtime is not started: call start() first")
        return self._session

    def _start_failure(self) -> BaseException | None:
        """Why the last start failed; None if it did not."""
        if self._starting is None or not self._starting.done() or self._starting.cancelled():
            return None
        return self._starting.exception()

    async def _await_start(self) -> None:
        if self._starting is not None:
            await asyncio.shield(self._starting)

    async def _settled(self) -> Session | None:
        """The running worker, after a start that is under way; None while stopped."""
        if self._session is not None:
            await self._await_start()
        return self._session

    async def _control(self, agent: AgentId, operation: str, data: Any = None) -> Any:
        """Carry out a control operation here if the agent lives here, else where it lives."""
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

    def _keyed_options(
        self, agent_type: str, cls: type[Any] | None, keyed: bool | KeyedOptions | None
    ) -> KeyedOptions | None:
        """The options of a keyed type: by the argument, else by the setting, else by the class. None: not keyed."""
        said_of_class = keyed_options_of(cls)
        said = self._options.keyed.get(agent_type) if keyed is None else keyed
        if said is None or said is True:
            return said_of_class or (KeyedOptions() if said else None)
        return said or None

    async def _refuse_mixture(self, session: Session | None, agent_type: str, *, instances: bool) -> None:
        """AutoGen's rule, over all workers as they are now: a type has a factory or instances, not both."""
        if session is None:
            return
        await session.registry.catch_up()
        view = session.registry.view
        for worker_id in view.workers_hosting(agent_type):
            if view.hosts[agent_type][worker_id].instances != instances:
                raise ValueError("Agent factories and agent instances cannot be registered to the same type.")


def create_distributed_runtime(
    broker_url: str | Sequence[str] | None = None,
    instance_id: str | None = None,
    tracer_provider: TracerProvider | None = None,
) -> NatsAgentRuntime:
    """A runtime under the names that AutoGen's documentation uses for distributed runtimes.

    ``broker_url`` is ``servers`` and ``instance_id`` is ``name`` of `NatsAgentRuntime`; None means the same there.
    """
    return NatsAgentRuntime(broker_url, name=instance_id, tracer_provider=tracer_provider)


def _log_failure(starting: asyncio.Future[None]) -> None:
    """Log why a start failed, if nobody awaits it."""
    if not starting.cancelled() and (error := starting.exception()) is not None:
        logger.debug("the runtime did not start: %s", error)
