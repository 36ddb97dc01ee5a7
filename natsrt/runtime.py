"""`NatsAgentRuntime`: AutoGen's `AgentRuntime` over NATS.

A call passes from ``send_message`` through `natsrt.sending.call_sender`, `natsrt.transport.calls`, NATS,
`natsrt.hosting.intake` and `natsrt.hosting.dispatch` to the agent. The reply returns over NATS to
`natsrt.transport.calls`.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from datetime import datetime
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
from natsrt.arguments import checked_agent, checked_message_id, checked_topic, checked_type
from natsrt.assembly import Program
from natsrt.errors import AmbiguousAgent, SubscriptionNotServed, UnknownSubscription
from natsrt.jetstream.consumers import START_NOW, Start
from natsrt.jetstream.dead_letter_box import DeadLetter
from natsrt.jetstream.record import check_state
from natsrt.jetstream.recorded_stream import RecordedEntry, RecordedStream
from natsrt.keyed.ownership import OwnedElsewhere
from natsrt.keyed_types import KeyedOptions, keyed_options_of
from natsrt.lifecycle import Lifecycle
from natsrt.options import Options
from natsrt.options.arguments import MoreSettings
from natsrt.reminder_types import Reminder, reminder_topic
from natsrt.sending.call_sender import Call
from natsrt.sending.event_sender import Event
from natsrt.sending.limits import Limit
from natsrt.sending.message_stream import MessageStream, last_item
from natsrt.sending.questions import OnQuestion
from natsrt.sending.tickets import Ticket
from natsrt.storage import Storage
from natsrt.task_types import TaskId, TaskStatus, checked_result_ttl
from natsrt.transport.plain import (
    PlainHandler,
    PlainReplies,
    PlainSubscription,
    PlainSubscriptions,
    checked_headers,
    checked_plain_subject,
    checked_subject,
)
from natsrt.wire.failures import ErrorTypes
from natsrt.wire.part_flow import DEFAULT_WINDOW
from natsrt.wire.part_messages import checked_window
from natsrt.wire.schedules import due_time, of_reminder
from natsrt.wire.serialization import Serialization
from natsrt.wire.subjects import Subjects
from natsrt.wire.task_attributes import MOST
from natsrt.wire.times import known

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
        self._plain = PlainSubscriptions()
        program = Program(
            options=self._options,
            catalog=self._catalog,
            serialization=self._serialization,
            interventions=Interventions(intervention_handlers),
            error_types=self._error_types,
            declarations=self._subscriptions,
            plain=self._plain,
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
        on_question: OnQuestion | None = ...,
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
        on_question: OnQuestion | None = ...,
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
        on_question: OnQuestion | None = None,
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
            on_question: Answers the questions that the handler asks with `natsrt.ask`: a function of the question that
                returns the answer, or an awaitable of it. The annotation of its parameter says which classes the
                questions have, if these are not known otherwise. What it raises is raised at the handler. None: nobody
                answers. With it, the runtime must be started. See docs/streams.md.

        A call whose caller stops waiting is not handled if its handler has not started: after the timeout, when its
        token is cancelled, or when the task that awaits it is. A handler that runs is not stopped.

        Raises:
            asyncio.CancelledError: The token was cancelled.
            CallTimeout: The timeout has passed. The call may have been handled.
            ValueError: ``timeout`` is not a number above 0.
            RuntimeError: ``on_question`` is given, and the runtime is not started.
            UndeliveredCall: No agent answered. The subclass of the error says why.
            CannotSerialize, MessageTooLarge: The message cannot be sent. Nothing was sent.
            CannotDecode: The reply cannot be read.
            ServerUnreachable: There was no connection for ``offline_timeout`` seconds.
            Exception: The exception that the handler raised, with its class if that is known here, else
                `RemoteAgentError`.
        """
        limit = self._limit if timeout is None else Limit.of_argument(timeout)
        call = Call(message, recipient, sender, cancellation_token, message_id, reply_type, limit.deadline())
        sending: Awaitable[Any]
        if on_question is None:
            sending = self._way_out().send(call)
        else:
            checked_agent(recipient, "recipient")
            streams = self._running().outgoing.streams
            sending = last_item(MessageStream(streams, call, DEFAULT_WINDOW, on_question, wants_items=False))
        return await limit.within(recipient, sending)

    def stream_message(
        self,
        message: Any,
        recipient: AgentId,
        *,
        sender: AgentId | None = None,
        cancellation_token: CancellationToken | None = None,
        message_id: str | None = None,
        item_type: type[Any] | None = None,
        on_question: OnQuestion | None = None,
        window: int = DEFAULT_WINDOW.items,
        window_bytes: int = DEFAULT_WINDOW.size,
    ) -> MessageStream:
        """Call an agent, and iterate over what its handler sends: the items of a `natsrt.streaming` handler, what any
        handler sends with `natsrt.emit`, and then what it returns.

        The items come in their order, each once, also over reconnects. A handler whose items nobody takes waits. See
        docs/streams.md.

        Args:
            message: As in `send_message`.
            recipient: As in `send_message`.
            sender: As in `send_message`.
            cancellation_token: Cancels the handler and ends the stream, which raises CancelledError. None: there is no
                token.
            message_id: As in `send_message`.
            item_type: The class of the items. None: each item names its class.
            on_question: As in `send_message`. The handler's question comes after the items before it, and is answered
                while the iteration waits for the next item.
            window: The handler may be so many items ahead of the consumer: from 1 to 65,536.
            window_bytes: The handler may be so many bytes ahead of the consumer, and one item more: from 1 to
                67,108,864.

        Returns:
            A stream, which makes the call when the iteration begins. The iteration raises what `send_message` would
            raise, after the items that were received before. ``CallTimeout`` is not among that: no deadline is set.

        Raises:
            TypeError: ``on_question`` is no function.
            ValueError: ``window`` or ``window_bytes`` is wrong.
            RuntimeError: The runtime is not started.
        """
        checked_agent(recipient, "recipient")
        call = Call(message, recipient, sender, cancellation_token, message_id, item_type)
        window_of = checked_window(window, window_bytes)
        return MessageStream(self._running().outgoing.streams, call, window_of, on_question)

    async def publish_message(
        self,
        message: Any,
        topic_id: TopicId,
        *,
        sender: AgentId | None = None,
        cancellation_token: CancellationToken | None = None,
        message_id: str | None = None,
        delay: float | None = None,
        at: datetime | None = None,
    ) -> None:
        """Publish an event to every agent id to which a subscription maps it, except the publisher itself.

        Core NATS delivers an event only to subscribers that are connected at that moment. On a durable topic (the
        setting ``durable``), this returns when the topic's stream has stored the event.

        Args:
            message: As in `send_message`.
            topic_id: The topic of the event.
            sender: The agent that publishes the event; None if no agent publishes it. It is not authenticated.
            cancellation_token: The handlers get a copy, which is cancelled with it. None: there is no token.
            message_id: The id of the message. None: a new id. On a durable topic, events with one id are one event.
            delay: Seconds after which the event is published, on a durable topic. None: see ``at``.
            at: When the event is published, on a durable topic, with a time zone; in the past: at once. None: at once.

        Raises:
            CannotSerialize, MessageTooLarge: The message cannot be sent. Nothing was sent.
            EventNotStored: The stream of a durable topic did not confirm the event within ``publish_timeout`` seconds.
            JetStreamFull, PermissionDenied: The event was not stored, or not sent.
            CannotSchedule, ServerTooOld: The event cannot be published later. Nothing was stored.
            ValueError: The subject of the topic would be too long, or ``delay``, ``at`` or ``message_id`` is wrong.
                Nothing was sent.
            RuntimeError: The runtime is not started, and too many messages wait for that, or a stream is to store this
                one.
            ServerUnreachable: There was no connection for ``offline_timeout`` seconds. On a durable topic it is
                `EventNotStored`, after ``publish_timeout`` seconds, if that is less.
        """
        due = None if delay is None and at is None else due_time(delay, at)
        await self._way_out().publish(Event(message, topic_id, sender, cancellation_token, message_id, due))

    async def register_factory(
        self,
        type: str | AgentType,
        agent_factory: Callable[[], T | Awaitable[T]],
        *,
        expected_class: type[T] | None = None,
        keyed: bool | KeyedOptions | None = None,
        max_running: int | None = None,
        start_from: Start = START_NOW,
        details: Mapping[str, Any] | None = None,
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
            start_from: With which events of durable topics the type begins, if no worker has subscribed it to their
                stream before: ``"now"``, with those that are stored later; ``"all"``, with the oldest one that is
                stored; a sequence of the stream; or a ``datetime``, with those that were stored then or later (without
                a zone, it is local time). Later starts of workers go on where the type is, whatever this says.
            details: What the registry is to say about the type, for programs that know what to make of it: a dict of
                JSON values, of up to 16 KiB as JSON. `type_details` returns it in every runtime. None: nothing.

        Raises:
            ValueError: The type already exists in this runtime, or with registered instances on any worker; it is keyed
                here and not on another worker or the reverse; ``max_running`` is not a whole number of at least 1;
                ``start_from`` is none of these; or ``details`` are no JSON values, or too large.
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
            start_from=start_from,
            details=details,
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

    def delete_state(self, agent: AgentId) -> None:
        """Let a keyed agent end: delete what is stored of it when its handler, which calls this, has ended.

        The instance is closed then, before the call is answered. The agent's next message makes a new one, without a
        state. What is deleted is the record, with the sequences of the events of streams that the agent has handled;
        its reminders stay. Handlers that run in the agent at the same time end first, and so do those of messages that
        enter before the last of them has ended; those out of turn get `StateConflict`.

        Raises:
            LookupError: The agent is not live in this runtime.
            RuntimeError: This is not called in a handler of the agent.

        The call that is being handled raises `StateNotSaved` if the record cannot be deleted. The agent stays then, and
        an event of a durable topic is handled again.
        """
        self._running().ownership.delete_after_handler(agent)

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

    def type_details(self, type: str | AgentType) -> Mapping[str, Any] | None:
        """Return what the workers of an agent type say about it: the ``details`` of `register_factory`.

        It is what this runtime knows at the moment, and nothing is sent. Wait for the type first, with `wait_for`. If
        the workers of the type differ, it is what the one says that has registered the type last.

        Returns:
            The details, empty if the type has none; None if no live worker hosts the type.

        Raises:
            ValueError: ``type`` is not a valid agent type.
            RuntimeError: The runtime is not started.
        """
        name = checked_type(type, "type")
        return self._running().registry.view.details(name)

    async def cancel_delayed(self, message_id: str, topic_id: TopicId) -> bool:
        """Cancel an event that was published with ``delay`` or ``at``, under this id, on this topic.

        Returns True if it was removed before its time. Returns False if it is not there: it was published by now, or
        cancelled before, or there never was one.

        An event that was cancelled stays cancelled: for two minutes after it was published, an event with the same id
        is not stored.

        Raises:
            CannotSchedule: The topic has no delayed events, because it is not durable for example.
            StreamUnavailable: The stream does not answer. Call it again.
            PermissionDenied: This user may not remove messages of the stream.
            RuntimeError: The runtime is not started.
        """
        topic_id = checked_topic(topic_id, "topic_id")
        return await self._running().outgoing.events.cancel_delayed(checked_message_id(message_id), topic_id)

    async def remind(
        self,
        agent: AgentId,
        name: str,
        message: Any,
        *,
        every: float | None = None,
        cron: str | None = None,
        timezone: str | None = None,
        at: datetime | None = None,
    ) -> None:
        """Have an agent handle ``message`` at later times, also after restarts of everything.

        One of ``every``, ``cron`` and ``at`` says when. The agent gets the message as an event, with its handler for
        the message's type, and no sender. It is handled at least once for each time, as events on durable topics are:
        see docs/durable.md. A reminder of the agent with the same name is replaced.

        Args:
            agent: The agent. Its type may be hosted by any worker, and need not be hosted now.
            name: The name of the reminder, among those of the agent: letters, digits and ``_ - . : =``.
            message: As in `send_message`. It is the same each time. One that is large is stored until the reminder is
                removed or replaced: see docs/payloads.md.
            every: The interval in seconds, at least 1. The first time is one interval from now. None: see ``cron``.
            cron: Six fields: second, minute, hour, day of month, month, day of week. None: see ``at``.
            timezone: The time zone of ``cron``, such as ``Europe/Berlin``. None: UTC.
            at: The only time, with a time zone; in the past: at once. None: see ``every``.

        Raises:
            ValueError: An argument is wrong. Nothing was set.
            CannotSchedule: The server does not accept the cron line or the time zone. It is a ValueError too.
            CannotSerialize, MessageTooLarge: The message cannot be sent. Nothing was set.
            EventNotStored, JetStreamFull: The reminder was not stored. Set it again.
            ServerTooOld: The server is older than 2.14.
            SubscriptionNotServed: A worker of the type did not confirm that it takes reminders within
                ``subscription_timeout`` seconds. Set it again.
            DurableConflict, StreamUnavailable, RegistryUnavailable, PermissionDenied: The stream of reminders cannot be
                made or used.
            RuntimeError: The runtime is not started.
        """
        schedule = of_reminder(every, cron, timezone, at)
        reminder_topic(checked_agent(agent, "agent"), name)
        session = self._running()
        await session.membership.take_reminders(agent.type)
        await session.outgoing.reminders.set(agent, name, message, schedule)

    async def forget_reminder(self, agent: AgentId, name: str) -> bool:
        """Remove a reminder. Returns False if the agent has none with this name.

        What was due before is handled nevertheless.

        Raises:
            ValueError: No reminder can have this name.
            StreamUnavailable: The stream does not answer. Call it again.
            PermissionDenied: This user may not remove messages of the stream.
            RuntimeError: The runtime is not started.
        """
        return await self._running().outgoing.reminders.forget(checked_agent(agent, "agent"), name)

    async def reminders(self, agent: AgentId | AgentType | str | None = None) -> list[Reminder]:
        """Return the reminders that are set, in the order of agents and names.

        Args:
            agent: Only those of this agent, or of this agent type. None: all.

        Raises:
            StreamUnavailable: The stream does not answer. Call it again.
            PermissionDenied: This user may not read the stream.
            RuntimeError: The runtime is not started.
        """
        if isinstance(agent, AgentId):
            return await self._running().outgoing.reminders.list(agent.type, agent.key)
        agent_type = None if agent is None else checked_type(agent, "agent")
        return await self._running().outgoing.reminders.list(agent_type, None)

    async def submit_message(
        self,
        message: Any,
        recipient: AgentId,
        *,
        sender: AgentId | None = None,
        message_id: str | None = None,
        delay: float | None = None,
        at: datetime | None = None,
        retries: int | None = None,
        result_ttl: float | None = None,
    ) -> Ticket:
        """Submit a task: a call that is stored before this returns, and handled at least once by any worker.

        Its agent handles it as a call, and what the handler returns is stored as the result. If the handler raises, or
        its worker dies, the task is tried again, with growing delays; after the last attempt it has failed, and is a
        dead letter too. See docs/tasks.md.

        Args:
            message: As in `send_message`.
            recipient: The agent. Its type may be hosted by any worker, and need not be hosted now.
            sender: The agent that submits the task; None if no agent does. It is not authenticated.
            message_id: The id of the message, of 1 to 200 bytes. Tasks of one agent with one id are one task, as long
                as the first one or its result is stored. None: a new id.
            delay: Seconds after which the task is handled. None: see ``at``.
            at: When the task is handled, with a time zone; in the past: at once. None: at once.
            retries: How often the task is tried again after it has failed: 0 or more. None: ``max_deliver`` of the
                agent's type on its workers, less 1.
            result_ttl: Seconds for which the result is kept: from 1 to 1,000,000,000, which is 31 years. None: the
                setting ``result_ttl``.

        Returns:
            The ticket of the task. Any process can get it with its id: see `ticket`.

        Raises:
            ValueError: An argument is wrong. Nothing was stored.
            CannotSerialize, MessageTooLarge: The message cannot be sent. Nothing was stored.
            EventNotStored, JetStreamFull: The task was not stored. With the same ``message_id`` it can be submitted
                again.
            ServerTooOld: The server is older than 2.14.
            SubscriptionNotServed: A worker of the type did not confirm that it takes tasks within
                ``subscription_timeout`` seconds. Submit it again.
            DurableConflict, StreamUnavailable, RegistryUnavailable, PermissionDenied: The stream of tasks cannot be
                made or used.
            RuntimeError: The runtime is not started.
        """
        due = None if delay is None and at is None else due_time(delay, at)
        if retries is not None and (
            isinstance(retries, bool) or not isinstance(retries, int) or not 0 <= retries < MOST
        ):
            raise ValueError(f"retries must be a whole number of at least 0 and below {MOST:,}, not {retries!r:.60}")
        ttl = checked_result_ttl(self._options.result_ttl if result_ttl is None else result_ttl)
        checked_agent(recipient, "recipient")
        if sender is not None:
            checked_agent(sender, "sender")
        if message_id is not None:
            TaskId.of(recipient, message_id)
        session = self._running()
        await session.membership.take_tasks(recipient.type)
        return await session.outgoing.tasks.submit(
            message,
            recipient,
            sender=sender,
            message_id=message_id,
            due=due,
            attempts=None if retries is None else retries + 1,
            result_ttl=ttl,
        )

    def ticket(self, id: str) -> Ticket:
        """Return the ticket of a task that was submitted before, by any process. Its methods say if there is none.

        Args:
            id: The id of the ticket, as `Ticket.id` has it.

        Raises:
            ValueError: No ticket can have this id.
            RuntimeError: The runtime is not started.
        """
        return self._running().outgoing.tickets.ticket(TaskId.parse(id))

    def tasks(self, agent_type: str | AgentType | None = None) -> AsyncIterator[TaskStatus]:
        """Return what is known of each task that is stored, or whose result is: the one that changed last comes last.

        Tasks that go on meanwhile are listed once. A task is in the list until its result has expired.

        Args:
            agent_type: Only the tasks of this agent type. None: of all types.

        Raises:
            StreamUnavailable: JetStream does not answer, or refuses the request.
            PermissionDenied: This user may not read the tasks or their results.
            RuntimeError: The runtime is not started.
        """
        name = None if agent_type is None else checked_type(agent_type, "agent_type")
        return self._running().outgoing.tickets.statuses(name)

    async def take_tasks(self, type: str | AgentType) -> None:
        """Have the workers of an agent type take tasks, now and later. `submit_message` does so itself.

        Call it where the type is hosted, if those who submit tasks may not write to the registry. Raises as
        `submit_message`.
        """
        agent_type = type if isinstance(type, AgentType) else AgentType(type)
        await self._running().membership.take_tasks(agent_type.type)

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

    def dead_letters(
        self, agent_type: str | AgentType | None = None, *, since: datetime | None = None
    ) -> AsyncIterator[DeadLetter]:
        """Return the events of durable topics that could not be handled, the oldest first.

        Those are listed that are there when the iteration begins.

        Args:
            agent_type: Only those of this agent type. None: of all types.
            since: Only those that became dead letters then or later; without a zone, it is local time. None: all.

        Raises:
            StreamUnavailable: JetStream does not answer, or refuses the request.
            PermissionDenied: This user may not read dead letters.
            RuntimeError: The runtime is not started.
        """
        name = agent_type.type if isinstance(agent_type, AgentType) else agent_type
        return self._running().dead_letters.read(name, None if since is None else known(since).timestamp())

    def recorded(self, stream: str, *, since: datetime | None = None) -> AsyncIterator[RecordedEntry]:
        """Return what ``natsrt record --to STREAM`` has recorded, in the order of the stream, for audit and for tests.

        Those are listed that are there when the iteration begins. Messages are of the classes that this runtime, or its
        process, knows; see `RecordedEntry`. Nothing is handled, or sent, again.

        Args:
            stream: The name of the stream.
            since: Only what was stored then or later; without a zone, it is local time. None: all. The call of a reply
                is not known if it was stored before.

        Raises:
            ConfigurationError: ``stream`` cannot be the name of a stream of records.
            StreamUnavailable: There is no such stream, or JetStream does not answer, or refuses the request.
            PermissionDenied: This user may not read the stream.
            CannotDecode: Something in the stream is not a record.
            RuntimeError: The runtime is not started.
        """
        network = self._running().network
        records = RecordedStream(network.subjects, network.reader, self._serialization, self._error_types)
        return records.read(stream, None if since is None else known(since).timestamp())

    async def redrive(self, dead_letter: DeadLetter) -> None:
        """Give a dead letter to its agent type again, and remove it. Its attempts begin with 1.

        The event keeps its message id. If this is interrupted after the event was stored, the dead letter is still
        there; when it is redriven again within two minutes, the event is not stored a second time.

        Raises:
            EventNotStored: The stream did not confirm the event within ``publish_timeout`` seconds. The dead letter
                stays.
            MessageTooLarge: The event does not fit into a message together with the headers that it needs now.
            JetStreamFull, PermissionDenied, StreamUnavailable: The dead letter stays.
        """
        await self._running().outgoing.again.redrive(dead_letter)

    async def discard(self, dead_letter: DeadLetter) -> bool:
        """Remove a dead letter for good. Returns False if it was removed before.

        Raises `StreamUnavailable` and `PermissionDenied`. The dead letter then stays.
        """
        return await self._running().dead_letters.discard(dead_letter)

    def request_plain(self, subject: str, payload: bytes, *, headers: Mapping[str, str] | None = None) -> PlainReplies:
        """Send a plain NATS request, to a responder that need not know natsrt, over the connection of this runtime.

        Args:
            subject: The subject, as it is: without the namespace.
            payload: The bytes of the request.
            headers: Its headers. None: it has none.

        Returns:
            The replies. ``async with`` sends the request; the iteration gives one reply after the other, and ends with
            the block: see `PlainReplies`.

        Raises:
            ValueError: The subject or a header is not valid.
            RuntimeError: The runtime is not started.
        """
        return self._running().plain.request(checked_subject(subject), payload, checked_headers(headers))

    async def subscribe_plain(
        self, subject: str, handler: PlainHandler, *, queue: str = "", optional: bool = False
    ) -> PlainSubscription:
        """Handle the plain NATS messages on a subject, over the connection of this runtime.

        A runtime that stops takes no more messages first. Then it finishes the handlers, while it can still be used to
        make calls, within ``drain_timeout``.

        Args:
            subject: The subject, as it is: without the namespace. It may have wildcards. It may be one of the server,
                such as ``$JS.EVENT.ADVISORY.>``. It may match no subject of natsrt (``agent``, ``topic``, ``natsrt``
                and all below them, in the namespace of this runtime or without one), and no inbox (``_INBOX`` or the
                setting ``inbox_prefix``, and all below): so it begins with no wildcard.
            handler: Called for each message, in a task of its own. It answers with `PlainMessage.respond`. What it
                raises is logged.
            queue: The queue group: each message goes to one member of it. Empty: none.
            optional: True if the runtime is to start, and to be ready, even if the server refuses the subscription.

        Returns:
            The subscription, which remains when the runtime is stopped and started again.

        Raises:
            ValueError: The subject or the queue group is not valid, or the subject matches some that it may not.
            PermissionDenied, SubscriptionRefused: The server refuses the subscription. Before the start, it is the
                start that raises this.
            ServerUnreachable: There was no connection for ``offline_timeout`` seconds.
        """
        checked_plain_subject(subject, self._options)
        if queue:
            checked_subject(queue)
        await self._settled()
        return await self._plain.add(PlainSubscription(self._plain, subject, handler, queue, optional=optional))

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

    def add_message_type(self, *types: type[Any]) -> None:
        """Make classes of messages known to this runtime. What it receives that names them becomes objects of them.

        The classes that agents of this runtime handle and return, and those that were sent from here, are known
        anyway. A runtime that only calls needs this for replies of several classes, such as the items of a stream; for
        replies of one class ``reply_type`` does it, too.

        Raises:
            CannotSerialize: natsrt cannot serialize a class.
        """
        for one in types:
            self._serialization.add_class(one)

    @property
    def options(self) -> Options:
        """The settings of this runtime."""
        return self._options

    @property
    def storage(self) -> Storage:
        """What can be kept in JetStream beside agents, over the connection of this runtime. It ends with the runtime's
        stop; after another start there is a new one.

        Raises:
            RuntimeError: The runtime is not started.
        """
        return self._running().network.storage

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
