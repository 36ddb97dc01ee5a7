"""The exceptions of natsrt.

Every class has its facts as fields, and makes its text from them. Each class also derives from the exception that
AutoGen or the standard library raises in that case, so existing ``except`` clauses keep working::

    NatsrtError
    ├── ConfigurationError          ValueError              a setting is wrong
    │   └── DurableConflict                                 other runtimes declared the durable topics otherwise
    ├── ServerUnreachable           UndeliverableException, ConnectionError
    │   ├── ServerRefused                                   a server answered, and does not accept the connection
    │   └── TlsFailed                                       no secure connection to the server can be made
    ├── PermissionDenied            UndeliverableException, PermissionError
    ├── SubscriptionRefused         ConnectionError         the server's limit of subscriptions is reached
    ├── JetStreamRequired           RuntimeError            the server runs without JetStream
    ├── ServerTooOld                RuntimeError            the server lacks what a setting needs
    ├── EmbeddedServerError         RuntimeError            the development server did not start
    ├── SubscriptionNotServed       TimeoutError            a worker did not confirm a subscription
    ├── AgentNotServed              TimeoutError            no live worker served an agent type in time
    ├── UnknownSubscription         LookupError, ValueError no subscription has the id
    ├── RegistryUnavailable         ConnectionError         the registry could not be read or written
    ├── StateUnavailable            ConnectionError         the records of keyed agents could not be read or written
    │   └── JetStreamFull           RegistryUnavailable     a limit of JetStream is reached
    ├── StreamUnavailable           ConnectionError         a stream could not be used
    ├── EventNotStored              UndeliverableException  a stream did not confirm an event on a durable topic
    ├── CannotSchedule              ValueError              a message cannot be published later
    ├── TaskUnknown                 LookupError             there is no such task, and no result of one
    ├── TaskCancelled                                       a task was cancelled
    ├── TaskResultLost                                      a task was handled, and its result was lost
    ├── UndeliveredCall             UndeliverableException  no agent answered
    │   ├── UnknownAgentType        LookupError             no worker registered the type within the last day
    │   ├── UnknownAgent            LookupError             the type has registered instances only, and not this one
    │   ├── NoLiveWorker                                    the type is known, but no worker hosts it now
    │   ├── WorkerLost                                      the worker was lost; the message may have been handled
    │   ├── WorkerBusy                                      the worker's intake is full
    │   ├── WorkerStopped                                   the worker stopped before the handler finished
    │   ├── Deadlock                                        keyed agents call one another at the same moment
    │   ├── StateConflict                                   the agent's stored state was changed elsewhere meanwhile
    │   └── StateNotSaved                                   the agent's state could not be stored
    ├── CallTimeout                 TimeoutError            a deadline of the caller passed
    ├── NoResponders                UndeliverableException  nobody listens on a subject
    ├── ServiceError                                        a NATS service answered with an error
    ├── TooManyReplies                                      replies to a plain request were not read fast enough
    ├── StreamAbandoned                                     the caller that streams wants no more items
    ├── NobodyToAsk                                         nobody answers the questions of a handler
    ├── AmbiguousAgent              UndeliverableException  several workers each have an agent of that id
    ├── RemoteAgentError                                    a handler raised an exception of a class unknown here
    ├── CannotSerialize             ValueError              a value cannot be sent exactly
    ├── CannotDecode                ValueError              a body cannot be read
    ├── MessageTooLarge             ValueError              the message is larger than can be sent
    ├── BlobLost                    LookupError             a payload that was sent by reference is gone
    ├── BlobDamaged                 ValueError              a payload that was sent by reference is not what was sent
    ├── UnhandledMessage            CantHandleException     the agent has no handler for the message's type
    ├── NotSettled                                          no attempt to handle an event came to its end
    ├── Reject                                              raised by a handler: the event becomes a dead letter
    └── Retry                                               raised by a handler: the event is tried again later
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from typing import Any

from autogen_core.exceptions import CantHandleException, UndeliverableException

__all__ = [
    "AgentNotServed",
    "AmbiguousAgent",
    "BlobDamaged",
    "BlobLost",
    "CallTimeout",
    "CannotDecode",
    "CannotSchedule",
    "CannotSerialize",
    "ConfigurationError",
    "Deadlock",
    "DurableConflict",
    "EmbeddedServerError",
    "EventNotStored",
    "JetStreamFull",
    "JetStreamRequired",
    "MessageTooLarge",
    "NatsrtError",
    "NoLiveWorker",
    "NoResponders",
    "NobodyToAsk",
    "NotSettled",
    "PermissionDenied",
    "RegistryUnavailable",
    "Reject",
    "RemoteAgentError",
    "Retry",
    "ServerRefused",
    "ServerTooOld",
    "ServerUnreachable",
    "ServiceError",
    "StateConflict",
    "StateNotSaved",
    "StateUnavailable",
    "StreamAbandoned",
    "StreamUnavailable",
    "SubscriptionNotServed",
    "SubscriptionRefused",
    "TaskCancelled",
    "TaskResultLost",
    "TaskUnknown",
    "TlsFailed",
    "TooManyReplies",
    "UndeliveredCall",
    "UnhandledMessage",
    "UnknownAgent",
    "UnknownAgentType",
    "UnknownSubscription",
    "WorkerBusy",
    "WorkerLost",
    "WorkerStopped",
]

_PERMISSIONS = "docs/permissions.md lists what natsrt needs"


_LONGEST_NAME = 100
"""Longer names are not compared: they may come from the wire, and comparing them takes long."""


def near_names(name: str, known: Sequence[str], cutoff: float = 0.6) -> list[str]:
    """The one of ``known`` that was probably meant by ``name``; empty if there is none.

    ``cutoff`` is how alike the two must be, from 0 to 1.
    """
    return difflib.get_close_matches(name, known, 1, cutoff) if len(name) <= _LONGEST_NAME else []


class NatsrtError(Exception):
    """Base class of all errors that natsrt itself raises."""

    code: int = 500
    """The number sent as ``Nats-Service-Error-Code`` (ADR-32) when the error answers a call."""


class ConfigurationError(NatsrtError, ValueError):
    """A setting is unknown, misspelt or has a value that cannot be used.

    ``setting`` is its name as the user wrote it; ``problem`` says what is wrong and what is allowed.
    """

    def __init__(self, setting: str, problem: str) -> None:
        self.setting = setting
        self.problem = problem
        super().__init__(f"{setting}: {problem}")


class DurableConflict(ConfigurationError):
    """The setting ``durable`` disagrees with what other runtimes have declared for the namespace.

    ``stream`` is the stream that they declared. ``reason`` names both.
    """

    code = 409

    def __init__(self, stream: str, reason: str) -> None:
        self.stream = stream
        self.reason = reason
        super().__init__("durable", reason)


class ServerUnreachable(NatsrtError, UndeliverableException, ConnectionError):
    """No server answered for ``seconds`` seconds. ``reason`` is the last error, None if unknown."""

    code = 503

    def __init__(self, servers: Sequence[str], seconds: float, reason: str | None = None) -> None:
        self.servers: list[str] = list(servers)
        self.seconds = seconds
        self.reason = reason
        because = f": {reason}" if reason else ""
        super().__init__(
            f"no NATS server answered at {', '.join(self.servers)} for {seconds:g} s{because}. "
            "Start one with `natsrt server`, or name another with servers=, NATS_URL or --server."
        )


class ServerRefused(ServerUnreachable):
    """A server answered, but did not accept the connection for ``seconds`` seconds. ``reason`` is what it said."""

    reason: str

    def __init__(self, servers: Sequence[str], seconds: float, reason: str) -> None:
        super().__init__(servers, seconds, reason)
        self.args: tuple[Any, ...] = (
            f"the NATS server at {', '.join(self.servers)} does not accept the connection: it says {reason!r}. "
            "Change its configuration, the limits of the account, or the settings of this program.",
        )


class TlsFailed(ServerUnreachable):
    """A server answered, but no secure connection to it can be made. ``reason`` says why, and what would be right."""

    reason: str

    def __init__(self, servers: Sequence[str], seconds: float, reason: str) -> None:
        super().__init__(servers, seconds, reason)
        self.args: tuple[Any, ...] = (f"no TLS connection to {', '.join(self.servers)}: {reason}",)


class PermissionDenied(NatsrtError, UndeliverableException, PermissionError):
    """The server refused the credentials, or does not allow this user the ``operation`` on ``subject``.

    ``reason`` is what the server said about the credentials; None if it is about a subject.
    """

    code = 403

    def __init__(self, operation: str, subject: str, reason: str | None = None) -> None:
        self.operation = operation
        self.subject = subject
        self.reason = reason
        said = f": it says {reason!r}" if reason else ""
        what = subject if operation == "connect" else repr(subject)
        page = "docs/configuration.md says how to give credentials" if operation == "connect" else _PERMISSIONS
        super().__init__(f"the server does not let this user {operation} {what}{said}; {page}")


class SubscriptionRefused(NatsrtError, ConnectionError):
    """The server refused a subscription to ``subject``. ``reason`` is what it said.

    A connection has as many subscriptions as ``max_subscriptions`` allows, of the server or of the account.
    """

    code = 503
    operation = "subscribe to"

    def __init__(self, subject: str, reason: str) -> None:
        self.subject = subject
        self.reason = reason
        super().__init__(
            f"the server refuses the subscription to {subject!r}: it says {reason!r}. Raise max_subscriptions of the "
            "server or of the account, or host less in this process."
        )


class JetStreamRequired(NatsrtError, RuntimeError):
    """The server, or this account on it, has no JetStream, which natsrt needs for its registry."""

    def __init__(self, server: str) -> None:
        self.server = server
        super().__init__(
            f"the server {server} runs without JetStream, which natsrt needs for its registry. Start it with "
            "`nats-server -js`, add a `jetstream` block to its configuration, or use `natsrt server`. "
            "On a leaf node, set jetstream_domain to the domain of its hub. If other servers of its cluster have "
            "JetStream, they cannot be reached now."
        )


class ServerTooOld(NatsrtError, RuntimeError):
    """The server's ``version`` is older than the one that ``feature`` needs: ``needed``. Both are texts."""

    def __init__(self, feature: str, version: str, needed: str) -> None:
        self.feature = feature
        self.version = version
        self.needed = needed
        super().__init__(
            f"{feature} need nats-server {needed} or newer, and the server runs {version}: update it, or remove the "
            "setting"
        )


class EmbeddedServerError(NatsrtError, RuntimeError):
    """The development server could not be found or did not become ready; the text has its last output."""


class SubscriptionNotServed(NatsrtError, TimeoutError):
    """A live worker of the agent type did not confirm a subscription within ``seconds`` seconds."""

    code = 504

    def __init__(self, agent_type: str, workers: Sequence[str], seconds: float) -> None:
        self.agent_type = agent_type
        self.workers: list[str] = list(workers)
        self.seconds = seconds
        super().__init__(
            f"the subscription of agent type {agent_type!r} is stored, but worker {', '.join(self.workers)} did not "
            f"confirm within {seconds:g} s that it serves it; events may be missed until it does"
        )


class AgentNotServed(NatsrtError, TimeoutError):
    """No live worker served an agent type, or one agent, within ``seconds`` seconds.

    ``agent`` is the agent type, or the agent id as text, ``type/key``. ``reason`` says what was missing at the end.
    """

    code = 504

    def __init__(self, agent: str, seconds: float, reason: str) -> None:
        self.agent = agent
        self.seconds = seconds
        self.reason = reason
        super().__init__(f"no live worker served {agent!r} within {seconds:g} s: {reason}")


class UnknownSubscription(NatsrtError, LookupError, ValueError):
    """There is no subscription with ``subscription_id`` that this runtime may remove.

    It may remove its own, and those that were added by runtimes without the agent type.
    """

    code = 404

    def __init__(self, subscription_id: str) -> None:
        self.subscription_id = subscription_id
        super().__init__(f"there is no subscription with the id {subscription_id!r} that this runtime may remove")

    def __str__(self) -> str:
        return Exception.__str__(self)


class RegistryUnavailable(NatsrtError, ConnectionError):
    """The registry bucket could not be read or written. ``reason`` is the text of the server or of the NATS client."""

    code = 503

    def __init__(self, operation: str, reason: str) -> None:
        self.operation = operation
        self.reason = reason
        super().__init__(f"cannot {operation} the registry: {reason}")


class StateUnavailable(NatsrtError, ConnectionError):
    """The bucket with the owners and states of keyed agents could not be read or written.

    ``reason`` is the text of the server or of the NATS client.
    """

    code = 503

    def __init__(self, operation: str, reason: str) -> None:
        self.operation = operation
        self.reason = reason
        super().__init__(f"cannot {operation} the records of keyed agents: {reason}")


class StreamUnavailable(NatsrtError, ConnectionError):
    """A stream, or a consumer of it, could not be made, read or changed, or is not as natsrt needs it.

    ``reason`` says why: it is the text of the server or of the NATS client, or names what is wrong with the stream.
    ``passing`` is True if the cause may pass by itself, as a server that does not answer.
    """

    code = 503

    def __init__(self, operation: str, stream: str, reason: str, *, passing: bool = False) -> None:
        self.operation = operation
        self.stream = stream
        self.reason = reason
        self.passing = passing
        super().__init__(f"cannot {operation} the stream {stream}: {reason}")


class EventNotStored(NatsrtError, UndeliverableException):
    """The stream of a durable topic did not confirm an event.

    ``topic`` is the topic as text, ``type/source``. ``may_be_stored`` is True if the event may have been stored
    nevertheless. Publish it again with the same ``message_id``: within two minutes it is then stored once.
    """

    code = 503

    def __init__(self, topic: str, stream: str, reason: str, *, may_be_stored: bool) -> None:
        self.topic = topic
        self.stream = stream
        self.reason = reason
        self.may_be_stored = may_be_stored
        what = "did not confirm" if may_be_stored else "did not store"
        more = "; it may have been stored" if may_be_stored else ""
        super().__init__(f"the stream {stream} {what} an event on {topic}: {reason}{more}")


class CannotSchedule(NatsrtError, ValueError):
    """A message cannot be published at a later time.

    ``what`` is the message: an event on a topic, or a reminder. ``reason`` says why, and what would be right.
    """

    code = 422

    def __init__(self, what: str, reason: str) -> None:
        self.what = what
        self.reason = reason
        super().__init__(f"{what} cannot be published later: {reason}")


class TaskUnknown(NatsrtError, LookupError):
    """There is no task with this id, and no result of one.

    ``task`` is the id of its ticket. It was never submitted, or its result was kept for its time and is gone.
    """

    code = 404

    def __init__(self, task: str) -> None:
        self.task = task
        super().__init__(
            f"there is no task {task}: it was never submitted, or its result has expired (result_ttl says when)"
        )


class TaskCancelled(NatsrtError):
    """The task was cancelled, and has no other result. ``task`` is the id of its ticket."""

    code = 410

    def __init__(self, task: str) -> None:
        self.task = task
        super().__init__(f"the task {task} was cancelled")


class TaskResultLost(NatsrtError):
    """The task was handled, and its agent's state is stored, but the worker was lost before it stored the result.

    ``task`` is the id of its ticket. It is not handled again, because its effect would be in the state twice.
    """

    code = 500

    def __init__(self, task: str) -> None:
        self.task = task
        super().__init__(f"the task {task} was handled, and its result was lost with its worker")


class JetStreamFull(StateUnavailable, RegistryUnavailable):
    """JetStream refused a request because a limit is reached: of the account, the server, a bucket, or the disk.

    ``bucket`` is the bucket or stream of the request. ``limit`` is the name of the limit in the server's configuration,
    such as ``max_file`` or ``max_streams``; ``disk`` if the disk itself is full. ``reason`` says what to do, and has
    the server's text.
    """

    def __init__(self, operation: str, bucket: str, limit: str, reason: str) -> None:
        NatsrtError.__init__(self, f"cannot {operation} {bucket}: {reason}")
        self.operation = operation
        self.bucket = bucket
        self.limit = limit
        self.reason = reason


class UndeliveredCall(NatsrtError, UndeliverableException):
    """Base class for calls that no agent answered. ``recipient`` is the agent id as text, ``type/key``."""

    code = 503

    def __init__(self, recipient: str, text: str) -> None:
        self.recipient = recipient
        super().__init__(text)


class UnknownAgentType(UndeliveredCall, LookupError):
    """No worker hosted the agent type within the last day, or the last one stopped in order more than 15 minutes ago.

    ``known`` lists types that are registered, 20 at most.
    """

    code = 404

    def __init__(self, recipient: str, agent_type: str, known: Sequence[str] = ()) -> None:
        self.agent_type = agent_type
        self.known: list[str] = list(known)
        have = f"; registered types: {', '.join(self.known)}" if self.known else "; no type is registered"
        near = near_names(agent_type, self.known)
        have = f"; did you mean {near[0]!r}?{have.replace('; r', ' R', 1)}" if near else have
        super().__init__(recipient, f"agent type {agent_type!r} is unknown{have}")

    def __str__(self) -> str:
        return Exception.__str__(self)


class UnknownAgent(UndeliveredCall, LookupError):
    """The agent type has registered instances only, and none has this id. ``known`` lists the instances."""

    code = 404

    def __init__(self, recipient: str, known: Sequence[str] = ()) -> None:
        self.known: list[str] = list(known)
        have = ", ".join(self.known) or "none"
        super().__init__(recipient, f"there is no agent {recipient}: its type has registered instances only ({have})")

    def __str__(self) -> str:
        return Exception.__str__(self)


class NoLiveWorker(UndeliveredCall):
    """The agent type is known, but no worker that hosts it is alive."""

    def __init__(self, recipient: str, agent_type: str) -> None:
        self.agent_type = agent_type
        super().__init__(recipient, f"agent type {agent_type!r} is known, but no worker that hosts it is alive")


class WorkerLost(UndeliveredCall):
    """The worker disappeared, restarted or lost the call. The message may or may not have been handled.

    ``worker_id`` is None if no worker had accepted the call yet.
    """

    def __init__(self, recipient: str, worker_id: str | None, reason: str) -> None:
        self.worker_id = worker_id
        self.reason = reason
        who = f"worker {worker_id}" if worker_id else "the worker"
        super().__init__(
            recipient, f"{who} was lost during a call to {recipient} ({reason}); it may or may not have handled it"
        )


class NoResponders(NatsrtError, UndeliverableException):
    """Nobody listens on ``subject``, to which a plain NATS request was sent."""

    code = 503

    def __init__(self, subject: str) -> None:
        self.subject = subject
        super().__init__(f"nobody listens on the subject {subject!r}: start its responder, or correct the subject")


class ServiceError(NatsrtError):
    """A NATS service answered a request on ``subject`` with an error.

    ``description`` is its ``Nats-Service-Error`` header, and ``code`` its ``Nats-Service-Error-Code``, as a number; 500
    if it has none, or one that is not a number.
    """

    def __init__(self, subject: str, code: int, description: str) -> None:
        self.subject = subject
        self.code = code
        self.description = description
        super().__init__(f"the service on {subject} answered with error {code}: {description}")


class TooManyReplies(NatsrtError):
    """More than ``limit`` bytes of replies to one plain request on ``subject`` waited to be read. The rest was dropped.

    Plain NATS has no flow control: the responder cannot be asked to wait. ``limit`` is the setting
    ``max_pending_bytes``.
    """

    code = 507

    def __init__(self, subject: str, limit: int) -> None:
        self.subject = subject
        self.limit = limit
        super().__init__(
            f"more than {limit:,} bytes of replies from {subject} waited to be read (max_pending_bytes): the rest was "
            "dropped"
        )


class StreamAbandoned(NatsrtError):
    """The caller that streams the present call gets no more items: it has left its loop, cancelled, or disappeared.

    Raised at the handler, by `natsrt.emit`. The generator of a `natsrt.streaming` handler is closed at its ``yield``.
    """

    code = 410

    def __init__(self, agent: str, reason: str | None = None) -> None:
        """``reason``: why it gets no more; None: it wants no more."""
        self.agent = agent
        self.reason = reason
        wants_none = f"the caller that streams from {agent} wants no more items"
        super().__init__(wants_none if reason is None else f"{agent} must not send any more items: {reason}")


class NobodyToAsk(NatsrtError):
    """A handler has asked a question that nobody answers: raised by `natsrt.ask`."""

    code = 404

    def __init__(self, agent: str | None, reason: str) -> None:
        """``agent``: the agent that asks; None if no call is being handled."""
        self.agent = agent
        self.reason = reason
        who = "questions" if agent is None else f"the questions of {agent}"
        super().__init__(f"nobody answers {who}: {reason}")


class WorkerBusy(UndeliveredCall):
    """The messages that wait in the worker's intake exceed its limit. The call was not started."""

    code = 429

    def __init__(self, recipient: str, worker_id: str, pending_bytes: int) -> None:
        self.worker_id = worker_id
        self.pending_bytes = pending_bytes
        super().__init__(
            recipient,
            f"worker {worker_id} is too busy for a call to {recipient}: "
            f"{pending_bytes:,} bytes of messages wait to be started",
        )


class WorkerStopped(UndeliveredCall):
    """The worker was stopped, and cancelled the handler before it finished."""

    def __init__(self, recipient: str, worker_id: str) -> None:
        self.worker_id = worker_id
        super().__init__(recipient, f"worker {worker_id} stopped before its handler for {recipient} finished")


class Deadlock(UndeliveredCall):
    """The call would have waited for ever, because it waits for handlers that wait for it.

    ``agents`` are the agents where the calls of these handlers wait. The call was not handled. The other calls go on,
    so it can be made again later.
    """

    code = 508

    def __init__(self, recipient: str, agents: Sequence[str]) -> None:
        self.agents: list[str] = list(agents)
        super().__init__(
            recipient,
            f"the call to {recipient} would wait for ever, and was not handled: "
            f"it waits for handlers that wait for it, in calls to {', '.join(self.agents)}",
        )


class StateConflict(UndeliveredCall):
    """Another worker or an operator changed the agent's stored state while ``worker_id`` had it.

    The message was handled, but its changes to the agent's state were not stored, and the worker dropped its instance.
    The call can be made again; the agent then starts from the state that is stored now.
    """

    code = 409

    def __init__(self, recipient: str, worker_id: str) -> None:
        self.worker_id = worker_id
        super().__init__(
            recipient,
            f"the stored state of {recipient} was changed elsewhere while worker {worker_id} had the agent: the "
            "changes of this call were not stored; call again",
        )


class StateNotSaved(UndeliveredCall):
    """The message was handled, but the agent's state could not be stored; ``reason`` says why.

    The worker keeps the instance, and stores its state with the next message.
    """

    def __init__(self, recipient: str, worker_id: str, reason: str) -> None:
        self.worker_id = worker_id
        self.reason = reason
        super().__init__(
            recipient,
            f"worker {worker_id} handled the call to {recipient} but could not store the agent's state ({reason}); "
            "it keeps the state in memory, and stores it with the next message",
        )


class CallTimeout(NatsrtError, TimeoutError):
    """No reply came within ``seconds`` seconds.

    ``setting`` names the limit: ``timeout`` if it was an argument, ``call_timeout``, or ``plain_timeout`` for a plain
    NATS responder.
    """

    code = 504

    def __init__(self, recipient: str, seconds: float, setting: str) -> None:
        self.recipient = recipient
        self.seconds = seconds
        self.setting = setting
        super().__init__(f"no reply from {recipient} within {setting} = {seconds:g} s")


class AmbiguousAgent(NatsrtError, UndeliverableException):
    """The agent type is not keyed and several live workers host it, so several agents may have this id."""

    code = 409

    def __init__(self, recipient: str, workers: Sequence[str]) -> None:
        self.recipient = recipient
        self.workers: list[str] = list(workers)
        super().__init__(
            f"{recipient} is not one agent: its type is not keyed and {len(self.workers)} workers host it "
            f"({', '.join(self.workers)})"
        )


class RemoteAgentError(NatsrtError):
    """A handler raised an exception whose class this process does not know.

    ``error_type`` is the qualified name of the class, ``message`` the text. Register the class with
    ``runtime.add_error_type`` to receive the exception itself.
    """

    def __init__(self, error_type: str, message: str) -> None:
        self.error_type = error_type
        self.message = message
        super().__init__(f"{error_type}: {message}" if message else error_type)


class CannotSerialize(NatsrtError, ValueError):
    """A value cannot be sent, or would not arrive exactly as it is. ``type_name`` is the message's type."""

    code = 422

    def __init__(self, type_name: str, reason: str) -> None:
        self.type_name = type_name
        self.reason = reason
        super().__init__(f"cannot serialize a message of type {type_name}: {reason}")


class CannotDecode(NatsrtError, ValueError):
    """A body cannot be read. ``payload`` has its bytes, which are never logged and never sent."""

    code = 400

    def __init__(self, what: str, reason: str, payload: bytes = b"") -> None:
        self.what = what
        self.reason = reason
        self.payload = payload
        super().__init__(f"cannot decode {what}: {reason}")


class MessageTooLarge(NatsrtError, ValueError):
    """A message is larger than can be sent, and nothing of it was sent.

    ``size`` is in bytes, of the encoded message with its headers, of its payload alone, or of its headers alone.
    ``max_payload`` is the limit in bytes: the server's ``max_payload``, the setting ``max_blob_size``, or what a stream
    accepts as headers. ``reason`` says what the limit is, and why the payload is not sent by reference; None: the limit
    is the server's, for a message that is never sent otherwise.
    """

    code = 413

    def __init__(self, size: int, max_payload: int, reason: str | None = None) -> None:
        self.size = size
        self.max_payload = max_payload
        self.reason = reason
        text = reason or (
            f"but the server accepts at most {max_payload:,}: raise max_payload in the server's configuration (8MB is "
            "the most that it advises), or send less in one message"
        )
        super().__init__(f"the message has {size:,} bytes, {text}")


class BlobLost(NatsrtError, LookupError):
    """A payload that was sent by reference is not there any more, or a part of it is not.

    ``blob_id`` is its id. ``chunk`` is the number of the first chunk that is missing, from 0, and ``chunks`` is how
    many it has.
    """

    code = 410

    def __init__(self, blob_id: str, chunk: int, chunks: int) -> None:
        self.blob_id = blob_id
        self.chunk = chunk
        self.chunks = chunks
        super().__init__(
            f"the payload was sent by reference, and chunk {chunk} of {chunks} of the blob {blob_id} is gone: it "
            "expired (blob_ttl), its sender does not wait any more, or somebody deleted it"
        )


class BlobDamaged(NatsrtError, ValueError):
    """A payload that was sent by reference is not what was sent.

    ``blob_id`` is its id. ``reason`` says what differs.
    """

    code = 422

    def __init__(self, blob_id: str, reason: str) -> None:
        self.blob_id = blob_id
        self.reason = reason
        super().__init__(f"the payload was sent by reference, and the blob {blob_id} is damaged: {reason}")


class UnhandledMessage(NatsrtError, CantHandleException):
    """The agent has no handler for this type of message, and does not override ``on_unhandled_message``."""

    code = 422

    def __init__(self, recipient: str, type_name: str, handled: Sequence[str]) -> None:
        self.recipient = recipient
        self.type_name = type_name
        self.handled: list[str] = list(handled)
        # A class of the same name in another module is no misspelling.
        plain = type_name.rpartition(".")[2]
        others = [name for name in self.handled if name.rpartition(".")[2] != plain]
        near = near_names(type_name, others)
        super().__init__(
            f"{recipient} has no handler for messages of type {type_name!r}; it handles: {', '.join(self.handled)}"
            + (f"; did you mean {near[0]!r}?" if near else "")
        )


class NotSettled(NatsrtError):
    """No attempt to handle an event of a durable topic came to its end: its workers died, or were frozen.

    ``attempts`` is their number. It is the error of the event's dead letter, and is not raised.
    """

    def __init__(self, stream: str, sequence: int, attempts: int) -> None:
        self.stream = stream
        self.sequence = sequence
        self.attempts = attempts
        super().__init__(
            f"none of {attempts} attempts to handle event {sequence} of {stream} came to its end: the workers died, or "
            "were frozen"
        )


class Reject(NatsrtError):
    """A handler raises this for an event of a durable topic that it will never be able to handle.

    The event becomes a dead letter at once, with ``reason``, and is not tried again. For calls and for other events, it
    is an exception like any other.

    ``reason`` may be any object. The attribute is a text: the class and the text of an exception, as in ``ValueError:
    no such customer``, and the ``str`` of any other object.
    """

    code = 422
    reason: str = ""

    def __init__(self, reason: object) -> None:
        self.reason = _said(reason)
        super().__init__(self.reason)


class Retry(NatsrtError):
    """A handler raises this for an event of a durable topic that it cannot handle now.

    The event is tried again ``after`` seconds; None: after the delay that follows any other exception. It counts as an
    attempt, so after the last one the event becomes a dead letter. ``reason`` is for logs and for the dead letter, and
    may be any object, as that of `Reject`. For calls and for other events, it is an exception like any other.

    Raises:
        ValueError: ``after`` is negative, not a number or infinite.
    """

    code = 503
    after: float | None = None
    reason: str = ""

    def __init__(self, after: float | None = None, reason: object = "") -> None:
        if after is not None and (isinstance(after, bool) or not 0 <= after < math.inf):
            raise ValueError(f"after must be a number of seconds of at least 0, or None, not {after!r}")
        self.after = after
        self.reason = _said(reason)
        when = "later" if after is None else f"in {after:g} s"
        super().__init__(f"to be tried again {when}{f': {self.reason}' if self.reason else ''}")


def _said(reason: object) -> str:
    """The text of a reason, which may be any object."""
    if isinstance(reason, BaseException):
        name, text = type(reason).__name__, str(reason)
        return f"{name}: {text}" if text else name
    return str(reason)
