"""What users import, and that every exception means what its tree says and survives the wire."""

from __future__ import annotations

import builtins
import re

import pytest
from autogen_core import AgentId, RoutedAgent, SingleThreadedAgentRuntime
from autogen_core import exceptions as autogen_exceptions

import natsrt
from natsrt import errors
from natsrt.wire.failures import ErrorTypes, describe

PUBLIC = [
    "AgentNotServed",
    "AmbiguousAgent",
    "BlobDamaged",
    "BlobLost",
    "CallTimeout",
    "CannotDecode",
    "CannotSchedule",
    "CannotSerialize",
    "ConfigurationError",
    "DeadLetter",
    "Deadlock",
    "DeliveryInfo",
    "DurableConflict",
    "DurableTopics",
    "EmbeddedServerError",
    "EventNotStored",
    "Health",
    "JetStreamFull",
    "JetStreamRequired",
    "KeyedOptions",
    "MessageStream",
    "MessageTooLarge",
    "NatsAgentRuntime",
    "NatsrtError",
    "NoLiveWorker",
    "NoResponders",
    "NobodyToAsk",
    "NotSettled",
    "Options",
    "PermissionDenied",
    "RecordedEntry",
    "RegistryUnavailable",
    "Reject",
    "Reminder",
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
    "TaskStatus",
    "TaskUnknown",
    "Ticket",
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
    "__version__",
    "ask",
    "create_distributed_runtime",
    "current_delivery",
    "emit",
    "keyed",
    "out_of_turn",
    "progress",
    "register",
    "runtime_of",
    "streaming",
]

SAMPLES: list[errors.NatsrtError] = [
    errors.NatsrtError("something"),
    errors.ConfigurationError("NATSRT_NAME", "is wrong"),
    errors.DurableConflict("natsrt_events", "max_age is 5 and 6"),
    errors.ServerUnreachable(["nats://a:4222", "nats://b:4222"], 2.5, "refused"),
    errors.PermissionDenied("publish to", "agent.admin"),
    errors.PermissionDenied("connect", "with these credentials", "Authorization Violation"),
    errors.SubscriptionRefused("agent.chat", "maximum subscriptions exceeded"),
    errors.ServerRefused(["nats://127.0.0.1:4222"], 2.0, "maximum connections exceeded"),
    errors.TlsFailed(["nats://127.0.0.1:4222"], 0.0, "the server requires a client certificate"),
    errors.JetStreamRequired("127.0.0.1:4222"),
    errors.ServerTooOld("durable topics", "2.10.1", "2.14"),
    errors.EmbeddedServerError("it did not start"),
    errors.SubscriptionNotServed("chat", ["w-1", "w-2"], 2.0),
    errors.AgentNotServed("chat", 2.0, "no worker hosts it"),
    errors.UnknownSubscription("id-1"),
    errors.RegistryUnavailable("write to", "no leader"),
    errors.StateUnavailable("write to", "no leader"),
    errors.StreamUnavailable("write to", "natsrt_events", "no leader", passing=True),
    errors.JetStreamFull("write to", "natsrt_agents", "max_file", "raise max_file"),
    errors.EventNotStored("orders.new/a", "natsrt_events", "no leader", may_be_stored=True),
    errors.CannotSchedule("an event on orders.new/a", "the topic is not durable"),
    errors.TaskUnknown("chat/a/1"),
    errors.TaskCancelled("chat/a/1"),
    errors.TaskResultLost("chat/a/1"),
    errors.UndeliveredCall("chat/a", "nobody answered"),
    errors.UnknownAgentType("chat/a", "chat", ["mail", "news"]),
    errors.UnknownAgent("chat/a", ["chat/b"]),
    errors.NoLiveWorker("chat/a", "chat"),
    errors.WorkerLost("chat/a", "w-1", "it does not answer"),
    errors.WorkerLost("chat/a", None, "nobody accepted it"),
    errors.StreamAbandoned("chat/a"),
    errors.NobodyToAsk("chat/a", "its caller gave no on_question"),
    errors.NobodyToAsk(None, "no call is being handled"),
    errors.NoResponders("weather.get"),
    errors.ServiceError("weather.get", 404, "no such place"),
    errors.TooManyReplies("weather.get", 67_108_864),
    errors.WorkerBusy("chat/a", "w-1", 67_108_864),
    errors.WorkerStopped("chat/a", "w-1"),
    errors.Deadlock("chat/a", ["chat/b", "chat/a"]),
    errors.StateConflict("chat/a", "w-1"),
    errors.StateNotSaved("chat/a", "w-1", "no leader"),
    errors.CallTimeout("chat/a", 1.5, "call_timeout"),
    errors.AmbiguousAgent("chat/a", ["w-1", "w-2"]),
    errors.RemoteAgentError("shop.OutOfStock", "no lamps"),
    errors.CannotSerialize("Order", "the field is missing"),
    errors.CannotDecode("an envelope", "it is no JSON", b"payload"),
    errors.MessageTooLarge(2_000_000, 1_048_576),
    errors.MessageTooLarge(300_000_000, 268_435_456, "and the setting max_blob_size is 268,435,456"),
    errors.BlobLost("x" * 32, 2, 4),
    errors.BlobDamaged("x" * 32, "its SHA-256 is another"),
    errors.UnhandledMessage("chat/a", "Order", ["Text"]),
    errors.NotSettled("natsrt_events", 7, 5),
    errors.Reject("no such customer"),
    errors.Retry(after=30.0, reason="closed"),
    errors.Retry(),
]


def test_the_public_names_are_these() -> None:
    assert sorted(natsrt.__all__) == PUBLIC
    assert all(hasattr(natsrt, name) for name in natsrt.__all__)
    assert errors.__all__ == sorted(errors.__all__)


def drawn_tree() -> dict[str, tuple[str | None, list[str]]]:
    """Each class in the docstring of `natsrt.errors`: its parent in the tree, and its other bases."""
    tree: dict[str, tuple[str | None, list[str]]] = {}
    parents: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        drawn = re.match(r"    ((?:│   |    )*(?:├── |└── )?)(\w+)\s*(?:([A-Z]\w+(?:, [A-Z]\w+)*)(?: |$))?", line)
        if drawn is None:
            continue
        name = drawn[2]
        del parents[len(drawn[1]) // 4 :]
        tree[name] = (parents[-1] if parents else None, drawn[3].split(", ") if drawn[3] else [])
        parents.append(name)
    return tree


def test_every_exception_is_in_the_tree_of_the_docstring_under_its_own_base() -> None:
    tree = drawn_tree()
    assert sorted(tree) == errors.__all__
    for name, (parent, others) in tree.items():
        cls = getattr(errors, name)
        expected = [] if parent is None else [getattr(errors, parent)]
        for other in others:
            places = (builtins, autogen_exceptions, errors)
            expected.append(next(getattr(place, other) for place in places if hasattr(place, other)))
        assert set(cls.__bases__) == set(expected or [Exception]), name


def test_there_is_a_sample_of_every_exception() -> None:
    assert {type(sample).__name__ for sample in SAMPLES} == set(errors.__all__)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: type(sample).__name__)
def test_every_exception_survives_the_wire_with_its_fields(sample: errors.NatsrtError) -> None:
    failure = describe(sample, with_traceback=True)
    rebuilt = ErrorTypes().rebuild(failure.payload, agent="chat/a", worker_id="w-1")
    assert type(rebuilt) is type(sample)
    assert str(rebuilt) == str(sample)
    assert rebuilt.args == sample.args
    assert failure.code == (503 if isinstance(sample, errors.WorkerBusy) else sample.code)
    fields = {name: value for name, value in vars(sample).items() if name != "payload"}
    assert fields.items() <= vars(rebuilt).items()
    remote = rebuilt.natsrt_remote  # type: ignore[attr-defined]
    assert (remote.agent, remote.worker_id) == ("chat/a", "w-1")


def test_only_a_worker_that_refused_a_call_itself_says_that_it_is_busy() -> None:
    # A handler whose own call met a busy worker was started: its caller must not send the call again.
    busy = errors.WorkerBusy("chat/a", "w-1", 1)
    assert describe(busy, with_traceback=False, refused=True).code == errors.WorkerBusy.code == 429
    assert describe(busy, with_traceback=False).code == 503


def test_the_bytes_of_a_message_that_could_not_be_decoded_stay_where_they_are() -> None:
    assert b"secret" not in describe(errors.CannotDecode("a body", "why", b"secret"), with_traceback=True).payload


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: type(sample).__name__)
def test_every_exception_has_a_text_and_shows_no_quotes_of_a_key_error(sample: errors.NatsrtError) -> None:
    assert str(sample) and not str(sample).startswith(("'", '"'))


class Inside(RoutedAgent):
    """An agent without handlers."""


async def test_an_agent_has_its_runtime_with_the_methods_that_only_natsrt_has() -> None:
    runtime = natsrt.NatsAgentRuntime()
    agent = Inside("an agent")
    await agent.bind_id_and_runtime(id=AgentId("inside", "k"), runtime=runtime)
    assert natsrt.runtime_of(agent) is runtime


async def test_an_agent_of_another_runtime_is_told_so() -> None:
    runtime = SingleThreadedAgentRuntime()
    await Inside.register(runtime, "inside", lambda: Inside("an agent"))
    agent = await runtime.try_get_underlying_agent_instance(AgentId("inside", "k"), Inside)
    with pytest.raises(TypeError, match=r"inside/k runs in a SingleThreadedAgentRuntime, not in a NatsAgentRuntime"):
        natsrt.runtime_of(agent)
