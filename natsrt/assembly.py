"""Creates the parts of one started runtime, folder by folder, each after the parts that it depends on.

Every constructor gets complete parts, so no part has to be given a dependency later. `natsrt.session` starts and stops
the parts.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from natsrt.agents.catalog import Catalog
from natsrt.agents.declarations import Declarations
from natsrt.agents.inbound import Inbound
from natsrt.agents.interventions import Interventions
from natsrt.background import BackgroundTasks
from natsrt.hosting.answers import Answers
from natsrt.hosting.blob_answers import BlobAnswers
from natsrt.hosting.call_log import CallLog
from natsrt.hosting.controls import Controls
from natsrt.hosting.dispatch import Dispatch
from natsrt.hosting.durable import DurableConsumers
from natsrt.hosting.durable_settlement import DurableParts
from natsrt.hosting.feeder import FeederParts
from natsrt.hosting.intake import Intake
from natsrt.hosting.invocation import Invoker
from natsrt.hosting.keyed_messages import KeyedMessages
from natsrt.hosting.out_of_step import OutOfStep
from natsrt.hosting.peer_answers import PeerAnswers
from natsrt.hosting.places import Places
from natsrt.hosting.reader import Reader
from natsrt.hosting.reply_subjects import ReplySubjects
from natsrt.hosting.settlements import EventSettlement, ReplySettlement
from natsrt.hosting.streams import Streams
from natsrt.hosting.subscriptions import Subscriptions
from natsrt.hosting.task_answers import TaskAnswers
from natsrt.hosting.task_settlement import ConfirmedTasks
from natsrt.hosting.tasks import TaskParts, Tasks
from natsrt.hosting.view_answers import ViewAnswers
from natsrt.jetstream.agent_records import AgentRecords
from natsrt.jetstream.attempts import Attempts
from natsrt.jetstream.blobs import Blobs
from natsrt.jetstream.dead_letter_box import DeadLetterBox
from natsrt.jetstream.dead_letters import DeadLetters
from natsrt.jetstream.durable import DurableStreams
from natsrt.jetstream.later_retries import LaterRetries
from natsrt.jetstream.payload_sweep import PayloadSweep
from natsrt.jetstream.payload_uses import PayloadUses
from natsrt.jetstream.registry.registry import Registry
from natsrt.jetstream.stream_reader import StreamReader
from natsrt.jetstream.task_store import TaskStore
from natsrt.keyed.claiming import Claiming
from natsrt.keyed.deadlocks import Deadlocks
from natsrt.keyed.instances import Instances
from natsrt.keyed.operations import KeyedOperations
from natsrt.keyed.ownership import Ownership
from natsrt.keyed.releasing import Releasing
from natsrt.keyed.slots import AgentSlots, Doubts
from natsrt.keyed.turns import Turns
from natsrt.observe.event_errors import EventErrors
from natsrt.observe.metrics import Counters
from natsrt.observe.telemetry import Telemetry
from natsrt.options import Options
from natsrt.sending.again import Again
from natsrt.sending.arrivals import Arrivals
from natsrt.sending.attributes import MessageAttributes
from natsrt.sending.call_sender import Call, CallSender
from natsrt.sending.durable import DurablePublisher
from natsrt.sending.event_sender import Event, EventSender
from natsrt.sending.keyed_delivery import KeyedDelivery
from natsrt.sending.message_stream import IncomingStreams
from natsrt.sending.missing_instances import MissingInstances
from natsrt.sending.owner_cache import OwnerCache
from natsrt.sending.owner_locator import OwnerLocator
from natsrt.sending.questions import QuestionAnswers
from natsrt.sending.referring import Referring
from natsrt.sending.reminders import Reminders
from natsrt.sending.replies import Replies
from natsrt.sending.steps import SendSteps
from natsrt.sending.task_sender import TaskSender
from natsrt.sending.tickets import Tickets
from natsrt.storage import Storage
from natsrt.transport.bodies import Bodies
from natsrt.transport.call_watch import CallWatch
from natsrt.transport.calls import Calls
from natsrt.transport.cancellation import Cancellations
from natsrt.transport.connection import Connection
from natsrt.transport.inbox import Inbox
from natsrt.transport.peers import Peers
from natsrt.transport.plain import PlainSubscriptions
from natsrt.transport.probe import CLIENT_NAME, Probe
from natsrt.transport.readiness import Readiness
from natsrt.wire.failures import ErrorTypes
from natsrt.wire.serialization import Serialization
from natsrt.wire.subjects import Subjects

logger: logging.Logger = logging.getLogger("natsrt.hosting")


@dataclass(frozen=True, slots=True)
class Program:
    """The parts that belong to the runtime object and remain when it is stopped and started again."""

    options: Options
    catalog: Catalog
    serialization: Serialization
    interventions: Interventions
    error_types: ErrorTypes
    declarations: Declarations
    plain: PlainSubscriptions


class Network:
    """The connection and the parts that use it: replies, calls, the registry, the records of keyed agents."""

    def __init__(self, options: Options, worker_id: str) -> None:
        self.subjects: Subjects = Subjects(options.namespace)
        self.connection: Connection = self._new_connection(options, f"{CLIENT_NAME}{worker_id}")
        self.readiness: Readiness = Readiness(self.connection, options)
        self.inbox: Inbox = Inbox(self.connection, options)
        self.probe: Probe = Probe(self.connection, self.inbox)
        self.peers: Peers = Peers(self.connection, self.inbox, self.probe, self.subjects)
        self.cancellations: Cancellations = Cancellations(self.connection, self.inbox, self.subjects)
        self.registry: Registry = self._new_registry(options)
        self.blobs: Blobs = Blobs(self.connection, self.subjects, options, self.registry)
        self.bodies: Bodies = Bodies(self.connection, options, self.blobs)
        watch = CallWatch(self.connection, self.inbox, self.probe, options, self.registry)
        self.calls: Calls = Calls(self.connection, self.inbox, watch, options, self.registry)
        self.records: AgentRecords = AgentRecords(self.connection, self.subjects, options)
        self.streams: DurableStreams = DurableStreams(self.connection, self.subjects, options, self.registry)
        self.reader: StreamReader = StreamReader(self.connection, options)
        self.dead_letter_box: DeadLetterBox = DeadLetterBox(self.subjects, self.reader)
        self.payload_uses: PayloadUses = PayloadUses(self.subjects, self.reader)
        self.tasks: TaskStore = TaskStore(
            self.connection, self.subjects, options, self.streams, self.reader, self.blobs, worker_id
        )
        self.later: LaterRetries = LaterRetries(self.connection, self.subjects, options, self.registry, self.reader)
        self.storage: Storage = Storage.over(self.connection, options)

    # These are methods, so that all other parts can be explored without a server: see tests/support/keyed_world.py.

    def _new_connection(self, options: Options, client_name: str) -> Connection:
        return Connection(options, client_name=client_name)

    def _new_registry(self, options: Options) -> Registry:
        return Registry(self.connection, self.subjects, options, self.peers)


class Outgoing:
    """The sending side: calls, events, tasks, and the locations of keyed agents."""

    def __init__(
        self,
        program: Program,
        network: Network,
        *,
        counters: Counters,
        event_errors: EventErrors,
        telemetry: Telemetry | None,
    ) -> None:
        attributes = MessageAttributes(network.calls, network.cancellations, counters)
        replies = Replies(network.bodies, program.serialization, program.error_types)
        self.locator: OwnerLocator = OwnerLocator(
            bodies=network.bodies,
            subjects=network.subjects,
            calls=network.calls,
            replies=replies,
            attributes=attributes,
            peers=network.peers,
            rtt=network.connection.rtt,
        )
        self.arrivals: Arrivals = Arrivals(
            connection=network.connection,
            subjects=network.subjects,
            options=program.options,
            registry=network.registry,
            readiness=network.readiness,
            peers=network.peers,
            probe=network.probe,
        )
        owners = OwnerCache(network.subjects, network.registry, self.locator)
        self.delivery: KeyedDelivery = KeyedDelivery(
            connection=network.connection,
            owners=owners,
            bodies=network.bodies,
            subjects=network.subjects,
            options=program.options,
            calls=network.calls,
            inbox=network.inbox,
            replies=replies,
            counters=counters,
        )
        steps = self._steps = SendSteps(
            bodies=network.bodies,
            cancellations=network.cancellations,
            interventions=program.interventions,
            readiness=network.readiness,
        )
        referring = Referring(network.connection, network.registry, program.options, network.bodies)
        self.calls: CallSender = CallSender(
            steps=steps,
            bodies=network.bodies,
            subjects=network.subjects,
            options=program.options,
            calls=network.calls,
            serialization=program.serialization,
            interventions=program.interventions,
            replies=replies,
            registry=network.registry,
            referring=referring,
            attributes=attributes,
            owners=owners,
            counters=counters,
            telemetry=telemetry,
        )
        questions = QuestionAnswers(
            calls=network.calls,
            peers=network.peers,
            registry=network.registry,
            bodies=network.bodies,
            serialization=program.serialization,
            error_types=program.error_types,
            replies=replies,
            interventions=program.interventions,
            attributes=attributes,
            options=program.options,
        )
        self.streams: IncomingStreams = IncomingStreams(
            connection=network.connection,
            inbox=network.inbox,
            registry=network.registry,
            options=program.options,
            calls=self.calls,
            questions=questions,
            replies=replies,
            bodies=network.bodies,
            interventions=program.interventions,
        )
        self.publisher: DurablePublisher = DurablePublisher(
            network.connection, network.subjects, program.options, steps.queue, network.streams
        )
        self.events: EventSender = EventSender(
            steps=steps,
            connection=network.connection,
            bodies=network.bodies,
            subjects=network.subjects,
            options=program.options,
            serialization=program.serialization,
            interventions=program.interventions,
            registry=network.registry,
            streams=network.streams,
            publisher=self.publisher,
            referring=referring,
            readiness=network.readiness,
            attributes=attributes,
            delivery=self.delivery,
            missing=MissingInstances(network.registry, counters, event_errors),
            counters=counters,
            telemetry=telemetry,
        )
        self.send: Callable[[Call], Awaitable[Any]] = self.calls.send
        self.publish: Callable[[Event], Awaitable[None]] = self.events.publish
        self.again: Again = Again(
            self.publisher, network.subjects, network.dead_letter_box, network.bodies, network.registry
        )
        self.reminders: Reminders = Reminders(
            steps=steps,
            subjects=network.subjects,
            registry=network.registry,
            serialization=program.serialization,
            streams=network.streams,
            publisher=self.publisher,
            bodies=network.bodies,
            referring=referring,
            uses=network.payload_uses,
        )
        self.tickets: Tickets = Tickets(
            connection=network.connection,
            subjects=network.subjects,
            options=program.options,
            registry=network.registry,
            store=network.tasks,
            replies=replies,
            bodies=network.bodies,
            cancellations=network.cancellations,
            dead_letters=network.dead_letter_box,
            again=self.again,
        )
        self.tasks: TaskSender = TaskSender(
            steps=steps,
            subjects=network.subjects,
            options=program.options,
            registry=network.registry,
            serialization=program.serialization,
            interventions=program.interventions,
            events=self.events,
            tickets=self.tickets,
            attributes=attributes,
            counters=counters,
        )

    @property
    def under_way(self) -> int:
        """Number of sends that have not completed: calls without a reply, and events not yet published or delivered."""
        return self._steps.under_way + self.delivery.under_way


class Incoming:
    """The receiving side: from the subscriptions to the handlers, and the keyed agents that this worker owns."""

    def __init__(
        self,
        program: Program,
        network: Network,
        outgoing: Outgoing,
        *,
        worker_id: str,
        counters: Counters,
        event_errors: EventErrors,
        telemetry: Telemetry | None,
    ) -> None:
        options, catalog = program.options, program.catalog
        connection, subjects, registry = network.connection, network.subjects, network.registry
        self.active: set[Inbound] = set()
        """The messages that are being handled."""
        self.call_log: CallLog = CallLog(connection, options, worker_id)
        answers = Answers(network.bodies, program.serialization, program.error_types, options, worker_id)
        self.reply_subjects: ReplySubjects = ReplySubjects(subjects, registry)
        self.events: EventSettlement = EventSettlement(event_errors, counters)
        self.intake: Intake = Intake(connection, options, counters)
        self.places: Places = Places(options.max_running)
        reader = Reader(
            subjects=network.subjects,
            catalog=program.catalog,
            serialization=program.serialization,
            cancellations=network.cancellations,
            interventions=program.interventions,
            declarations=program.declarations,
            options=program.options,
        )
        tasks = Tasks(
            TaskParts(
                store=network.tasks,
                answers=answers,
                bodies=network.bodies,
                result_ttl=options.result_ttl,
                background=BackgroundTasks(logger, "the progress of a task could not be told"),
            )
        )
        dead_letters = DeadLetters(connection, subjects, options, program.error_types, network.streams, network.blobs)
        self.durable: DurableConsumers = DurableConsumers(
            DurableParts(
                worker_id=worker_id,
                connection=connection,
                options=options,
                registry=registry,
                intake=self.intake,
                dead_letters=dead_letters,
                box=network.dead_letter_box,
                attempts=Attempts(connection, subjects),
                later=network.later,
                payloads=PayloadSweep(subjects, options, registry, network.reader, network.blobs, network.payload_uses),
                event_errors=event_errors,
                counters=counters,
            ),
            FeederParts(
                bodies=network.bodies,
                reader=reader,
                records=network.records,
                sender=outgoing.events,
                delivery=outgoing.delivery,
                events=self.events,
                tasks=tasks,
                task_answers=TaskAnswers(
                    connection=connection,
                    subjects=subjects,
                    registry=registry,
                    store=network.tasks,
                    result_ttl=options.result_ttl,
                    answers=answers,
                    reply_subjects=self.reply_subjects,
                ),
            ),
            subjects,
            program.declarations,
        )
        replies = ReplySettlement(
            connection=connection,
            reply_subjects=self.reply_subjects,
            call_log=self.call_log,
            answers=answers,
            events=self.events,
            counters=counters,
        )
        replies.tasks = ConfirmedTasks(replies, answers, tasks)
        self.subscriptions: Subscriptions = Subscriptions(
            connection=connection,
            subjects=subjects,
            catalog=catalog,
            declarations=program.declarations,
            registry=registry,
            intake=self.intake,
            replies=replies,
            events=self.events,
            durable=self.durable,
            worker_id=worker_id,
        )
        self.deadlocks: Deadlocks = Deadlocks(
            active=self.active, calls=network.calls, registry=registry, peers=network.peers, worker_id=worker_id
        )
        slots = AgentSlots(catalog)
        instances = Instances(
            connection=connection, worker_id=worker_id, catalog=catalog, records=network.records, counters=counters
        )
        releasing = Releasing(
            connection=connection,
            catalog=catalog,
            registry=registry,
            records=network.records,
            slots=slots,
            instances=instances,
            subjects=self.subscriptions,
        )
        doubts = Doubts()
        self.ownership: Ownership = Ownership(
            connection=connection,
            options=options,
            worker_id=worker_id,
            registry=registry,
            records=network.records,
            slots=slots,
            instances=instances,
            releasing=releasing,
            claiming=Claiming(
                connection=connection,
                options=options,
                worker_id=worker_id,
                registry=registry,
                peers=network.peers,
                records=network.records,
                subjects=self.subscriptions,
                locator=outgoing.locator,
                slots=slots,
                instances=instances,
                releasing=releasing,
                doubts=doubts,
            ),
            doubts=doubts,
        )
        self.turns: Turns = Turns(slots, self.ownership, instances, self.deadlocks)
        self.operations: KeyedOperations = KeyedOperations(self.turns, self.ownership, catalog, network.bodies)
        self.streams: Streams = Streams(
            connection,
            program.serialization,
            program.error_types,
            network.bodies,
            answers,
            network.cancellations,
            self.reply_subjects,
            network.probe,
            options,
        )
        self.peer_answers: PeerAnswers = PeerAnswers(
            connection=connection,
            subjects=subjects,
            worker_id=worker_id,
            call_log=self.call_log,
            ownership=self.ownership,
            deadlocks=self.deadlocks,
            subscriptions=self.subscriptions,
            answers=answers,
            registry=registry,
            inbox=network.inbox,
            reply_subjects=self.reply_subjects,
            streams=self.streams,
        )
        self.view_answers: ViewAnswers = ViewAnswers(
            connection=connection,
            subjects=subjects,
            registry=registry,
            answers=answers,
            reply_subjects=self.reply_subjects,
        )
        self.blob_answers: BlobAnswers = BlobAnswers(
            connection=connection,
            subjects=subjects,
            registry=registry,
            blobs=network.blobs,
            options=options,
            answers=answers,
            reply_subjects=self.reply_subjects,
        )
        self.dispatch: Dispatch = self._dispatch(
            program, network, outgoing, answers, reader, worker_id, counters, telemetry
        )

    def _dispatch(
        self,
        program: Program,
        network: Network,
        outgoing: Outgoing,
        answers: Answers,
        reader: Reader,
        worker_id: str,
        counters: Counters,
        telemetry: Telemetry | None,
    ) -> Dispatch:
        invoker = Invoker(
            subjects=network.subjects,
            catalog=program.catalog,
            reader=reader,
            intake=self.intake,
            answers=answers,
            counters=counters,
            telemetry=telemetry,
            places=self.places,
            bodies=network.bodies,
            streams=self.streams,
        )
        keyed = KeyedMessages(
            worker_id=worker_id,
            turns=self.turns,
            ownership=self.ownership,
            operations=self.operations,
            invoker=invoker,
            reader=reader,
            answers=answers,
            intake=self.intake,
            sender=outgoing.events,
            delivery=outgoing.delivery,
        )
        return Dispatch(
            worker_id=worker_id,
            intake=self.intake,
            bodies=network.bodies,
            reader=reader,
            invoker=invoker,
            keyed=keyed,
            controls=Controls(program.catalog, keyed, answers, network.bodies),
            active=self.active,
            counters=counters,
            out_of_step=OutOfStep(network.registry, self.intake),
        )
