"""`NatsAgentRuntime`: AutoGen's `AgentRuntime` over NATS.

A call passes from ``send_message`` through `natsrt.sending.sender`, `natsrt.transport.calls`, NATS,
`natsrt.hosting.intake` and `natsrt.hosting.dispatch` to the agent. The reply returns over NATS to
`natsrt.transport.calls`.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar, Unpack, cast, overload

from autogen_core import (
    Agent,
    AgentId,
    AgentMetadata,
    AgentRuntime,
    AgentType,
    BaseAgent,
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
from natsrt.agents.declarations import Declarations
from natsrt.agents.interventions import Interventions
from natsrt.assembly import Program
from natsrt.errors import AmbiguousAgent, SubscriptionNotServed, UnknownSubscription
from natsrt.jetstream.record import check_state
from natsrt.keyed.ownership import OwnedElsewhere
from natsrt.keyed_types import KeyedOptions, keyed_options_of
from natsrt.lifecycle import Lifecycle
from natsrt.options import Options
from natsrt.options.arguments import MoreSettings
from natsrt.sending.limits import Limit
from natsrt.wire.failures import ErrorTypes
from natsrt.wire.serialization import Serialization
from natsrt.wire.subjects import Subjects

logger: logging.Logger = logging.getLogger("natsrt")

T = TypeVar("T", bound=Agent)
R = TypeVar("R")
_type = type  # `type` is a parameter's name in AutoGen's protocol


class NatsAgentRuntime(Lifecycle, AgentRuntime):
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
        **settings: Unpack[MoreSettings],
    ) -> None:
        said = {"servers": servers, "name": name, "namespace": namespace, **settings}
        given: dict[str, Any] = {setting: value for setting, value in said.items() if value is not None}
        self._options = Options.load(**given) if options is None else options.replace(**given)
        self._limit = Limit(self._options.call_timeout, "call_timeout")
        self._serialization = Serialization()
        self._error_types = ErrorTypes()
        self._catalog = Catalog(self, self._serialization)
        self._subscriptions = Declarations(Subjects(self._options.namespace))
        program = Program(
            options=self._options,
            catalog=self._catalog,
            serialization=self._serialization,
            interventions=Interventions(intervention_handlers),
            error_types=self._error_types,
            declarations=self._subscriptions,
        )
        super().__init__(program, tracer_provider)

    # -- AgentRuntime, in the protocol's order -------------------------------------------------------------------

    @overload
    async def send_message(
        self,
        message: Any,
        recipient: AgentId,
        *,
        sender: AgentId | None = ...,
        cancellation_token: CancellationToken | None = ...,
        message_id: str | None = ...,
        reply_type: type[R],
        timeout: float | None = ...,
    ) -> R: ...
    @overload
    async def send_message(
        self,
        message: Any,
        recipient: AgentId,
        *,
        sender: AgentId | None = ...,
        cancellation_token: CancellationToken | None = ...,
        message_id: str | None = ...,
        reply_type: None = ...,
        timeout: float | None = ...,
    ) -> Any: ...
    async def send_message(
        self,
        message: Any,
        recipient: AgentId,
        *,
        sender: AgentId | None = None,
        cancellation_token: CancellationToken | None = None,
        message_id: str | None = None,
        reply_type: type[Any] | None = None,
        timeout: float | None = None,
    ) -> Any:
        """Call an agent on any worker, and return what its handler returns.

        Args:
            message: A dataclass, Pydantic model, protobuf message, plain value, or a class with an added serializer.
            recipient: The agent to call.
            sender: The agent that sends the message; None if no agent sends it. It is not authenticated.
            cancellation_token: Cancels the call, and cancels the token of the handler in any process. None: the call
                cannot be cancelled by a token.
            message_id: The id of the message. None: a new id.
            reply_type: The class to which the reply is decoded, and the type of the result for type checkers. It is
                needed for plain NATS responders. A reply of an agent names its class, and is of that class. None: the
                reply of a plain responder becomes JSON values, text or bytes.
            timeout: For how many seconds to wait for the result. It also counts before the start, while there is no
                connection, and while intervention handlers run. ``math.inf``: without a limit. None: the setting
                ``call_timeout``.

        A call whose caller stops waiting is not handled if its handler has not started: after the timeout, when its
        token is cancelled, or when the task that awaits it is. A handler that runs is not stopped.

        Raises:
            asyncio.CancelledError: The token was cancelled.
            CallTimeout: The timeout has passed. The call may have been handled.
            ValueError: ``timeout`` is not a number above 0.
            UndeliveredCall: No agent answered. The subclass of the error says why.
            CannotSerialize, MessageTooLarge: The message cannot be sent. Nothing was sent.
            CannotDecode: The reply cannot be read.
            ServerUnreachable: There was no connection for ``offline_timeout`` seconds.
            Exception: The exception that the handler raised, with its class if that is known here, else
                `RemoteAgentError`.
        """
        limit = self._limit if timeout is None else Limit.of_argument(timeout)
        sending = self._way_out().send(
            message,
            recipient,
            sender=sender,
            token=cancellation_token,
            message_id=message_id,
            reply_type=reply_type,
            deadline=limit.deadline(),
        )
        return await limit.within(recipient, sending)

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
        await self._way_out().publish(message, topic_id, sender=sender, token=cancellation_token, message_id=message_id)

    async def register_factory(
        self,
        type: str | AgentType,
        agent_factory: Callable[[], T | Awaitable[T]],
        *,
        expected_class: type[T] | None = None,
        keyed: bool | KeyedOptions | None = None,
        max_running: int | None = None,
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
            max_running: Number of handlers of the type that may run at once in this runtime; further messages wait, in
                order. None: only the setting ``max_running`` limits them. See docs/configuration.md.

        Raises:
            ValueError: The type already exists in this runtime, or with registered instances on any worker; it is keyed
                here and not on another worker or the reverse; or ``max_running`` is not a whole number of at least 1.
            RegistryUnavailable: The registry could not be written. The registration was undone.
        """
        agent_type = type if isinstance(type, AgentType) else AgentType(type)
        session = await self._settled()
        said = self._options.keyed.get(agent_type.type) if keyed is None else keyed
        options = _keyed_options(said, expected_class)
        if session is not None:
            await session.membership.refuse_type(agent_type.type, keyed=options is not None)
        hosted = self._catalog.add_factory(
            agent_type.type,
            agent_factory,
            expected_class,
            options,
            decided=said is not None,
            max_running=max_running,
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
                agent = await session.operations.instance(hosted, id.key)
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
                states[str(agent_id)] = check_state(await agent.save_state())
            else:
                try:
                    states[str(agent_id)] = check_state(await session.operations.state(hosted, agent_id.key))
                except OwnedElsewhere:  # it has moved to another worker
                    continue
        return states

    async def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `save_state`, for the types that this runtime hosts. Agents are created as needed."""
        for name, agent_state in state.items():
            agent_id = AgentId.from_str(name)
            hosted = self._catalog.find(agent_id.type)
            if hosted is not None and hosted.keyed is not None:
                await self._control(agent_id, control.LOAD_STATE, agent_state)
            elif hosted is not None:
                agent = await self._catalog.agent(hosted, agent_id.key)
                await agent.load_state(check_state(agent_state, control.TO_LOAD))

    async def agent_metadata(self, agent: AgentId) -> AgentMetadata:
        """Return the metadata of a local or remote agent.

        Raises:
            UndeliveredCall: A remote agent does not answer. The subclass of the error says why.
            AmbiguousAgent: The type is not keyed, and several live workers host it.
        """
        return cast(AgentMetadata, await self._control(agent, control.METADATA))

    async def agent_save_state(self, agent: AgentId) -> Mapping[str, Any]:
        """Return the state of a local or remote agent.

        Raises the same errors as `agent_metadata`, any exception of the agent, and `CannotSerialize` if the state of an
        agent of another process would arrive as something else, such as a tuple, which JSON turns into a list. A state
        that is not a ``dict``, or is of a subclass of it, is always refused.
        """
        return cast(Mapping[str, Any], await self._control(agent, control.SAVE_STATE))

    async def agent_load_state(self, agent: AgentId, state: Mapping[str, Any]) -> None:
        """Load ``state`` into a local or remote agent. Raises the same errors as `agent_save_state`."""
        await self._control(agent, control.LOAD_STATE, state)

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

        Several classes may have the same type name. A serializer replaces one that was added for the same class (or a
        former definition of it, with the same module and qualified name) and content type.
        """
        serializers = list(serializer) if isinstance(serializer, Sequence) else [serializer]
        self._serialization.add(serializers)
        self._catalog.serializers_added(serializers)

    # -- beyond the protocol -------------------------------------------------------------------------------------

    async def wait_for(self, agent: str | AgentType | AgentId, *, timeout: float | None = None) -> None:
        """Wait until a live worker serves an agent type, or one agent. A call that is made then reaches a worker.

        The worker has confirmed that it takes new messages for the agent, and that the server has its subscriptions. A
        worker that is starting or draining, or does not answer, does not count; this runtime itself does.

        An agent type is also served if workers have registered instances of it only. An `AgentId` is served if a worker
        can create the agent, or has registered this one instance. An agent is not created by this. For a keyed type it
        makes no difference which worker owns the agent.

        A plain NATS responder on ``agent.<type>`` counts if no worker hosts the type. NATS does not announce such
        responders, so they are looked for about once a second. It is only known that one is subscribed, not that it
        answers. This needs the permission to publish to one's own inboxes. A plain responder for the subject of one
        instance, ``agent.<type>.<key>``, is not noticed.

        Args:
            agent: The agent type, or the id of one agent.
            timeout: Seconds to wait, including the rest of a start that is under way. None: wait without a limit.

        Raises:
            AgentNotServed: The time is up. The error says what was missing.
            ServerUnreachable: There was no connection for ``offline_timeout`` seconds.
            PermissionDenied: This user may not ask the workers.
            RegistryUnavailable: This runtime was stopped.
            RuntimeError: The runtime is not started.
            ValueError: ``agent`` is not a valid agent type, or ``timeout`` is not more than 0.
        """
        if not isinstance(agent, AgentId):
            name = agent.type if isinstance(agent, AgentType) else agent
            agent = AgentId(name, "default").type  # raises if AutoGen does not accept the name
        await self._running().arrivals.wait_for(agent, timeout)

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

    def add_error_type(self, cls: type[BaseException], name: str | None = None) -> None:
        """Raise exceptions of ``cls`` from remote handlers as ``cls`` instead of as `RemoteAgentError`.

        They are rebuilt from their arguments and attributes, without calling the class. An argument or attribute that
        JSON cannot represent arrives as its ``repr``.

        Args:
            cls: The exception class.
            name: A name that does not depend on Python, such as ``shop.OutOfStock``, for workers and callers in other
                languages. This runtime sends such exceptions under it, and recognises them by it and by the name of the
                class. None: the name of the class, with its module.

        Raises:
            TypeError: ``cls`` is not an exception class that a call can raise, such as ``KeyboardInterrupt``.
            ValueError: ``name`` is empty, the name of another class, or begins with ``natsrt.``.
        """
        self._error_types.add(cls, name)

    @property
    def options(self) -> Options:
        """The settings of this runtime."""
        return self._options

    # -- helpers -------------------------------------------------------------------------------------------------

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


def runtime_of(agent: BaseAgent) -> NatsAgentRuntime:
    """Return the runtime in which an agent runs, for what only `NatsAgentRuntime` has, such as ``store_state``.

    It is ``agent.runtime``, with the type that type checkers need.

    Raises:
        TypeError: The agent runs in a runtime of another class.
    """
    runtime = agent.runtime
    if isinstance(runtime, NatsAgentRuntime):
        return runtime
    raise TypeError(f"agent {agent.id} runs in a {_type(runtime).__name__}, not in a NatsAgentRuntime")


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
