"""A user's program without an error: everything public is used as the documents say."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, assert_type

from autogen_core import AgentId, AgentRuntime, MessageContext, RoutedAgent, TopicId, message_handler
from pydantic import SecretStr

import natsrt
from natsrt import KeyedOptions, NatsAgentRuntime, Options
from natsrt.embedded import EmbeddedServer


@dataclass
class Add:
    amount: int


@dataclass
class Total:
    value: int


@natsrt.keyed
class Counter(RoutedAgent):
    def __init__(self, start: int = 0) -> None:
        super().__init__("counts")
        self.value = start

    @message_handler
    async def add(self, message: Add, ctx: MessageContext) -> Total:
        self.value += message.amount
        await natsrt.runtime_of(self).store_state(self.id)
        return Total(self.value)

    async def save_state(self) -> Mapping[str, Any]:
        return {"value": self.value}


@natsrt.keyed(save="manual", idle_timeout=None)
class Importer(Counter):
    def only_here(self) -> int:
        return self.value


assert_type(Counter(1), Counter)
assert_type(Counter(1).value, int)
assert_type(Importer(2).only_here(), int)

SETTINGS: dict[str, Any] = {"call_timeout": "1m"}


def runtimes() -> list[NatsAgentRuntime]:
    return [
        NatsAgentRuntime(),
        NatsAgentRuntime("nats://127.0.0.1:4222", name="billing", creds=Path("billing.creds"), tls_ca="ca.pem"),
        NatsAgentRuntime(["nats://a", "nats://b"], namespace=None, user="u", password="p", tls_first=True),
        NatsAgentRuntime(call_timeout=5, offline_timeout="none", max_pings_out=3, context="prod"),
        NatsAgentRuntime(
            token=SecretStr("t"), keyed={"counter": KeyedOptions(), "audit": False, "x": {"save": "manual"}}
        ),
        NatsAgentRuntime(keyed="counter,audit"),
        NatsAgentRuntime(keyed=["counter"]),
        NatsAgentRuntime(durable=["orders.", natsrt.DurableTopics("log.", name="log"), {"patterns": "x"}]),
        NatsAgentRuntime(durable=natsrt.DurableTopics("orders.", max_age=3600), publish_timeout=5),
        NatsAgentRuntime(options=Options(servers="nats://a", heartbeat_ttl=3.5, name="w")),
        NatsAgentRuntime(options=Options.load(environ={}, namespace="n").replace(name="w")),
        NatsAgentRuntime(**SETTINGS),
        natsrt.create_distributed_runtime("nats://a", instance_id="w"),
    ]


async def use(runtime: NatsAgentRuntime, agent: AgentId, wanted: type[Total] | None) -> None:
    as_autogen_sees_it: AgentRuntime = runtime
    assert_type(await as_autogen_sees_it.send_message(Add(1), agent), Any)
    assert_type(await runtime.send_message(Add(1), agent), Any)
    assert_type(await runtime.send_message(Add(1), agent, reply_type=None, timeout=5), Any)
    assert_type(await runtime.send_message(Add(1), agent, reply_type=Total, timeout=5), Total)
    assert_type(await runtime.send_message(Add(1), agent, reply_type=dict[str, int]), dict[str, int])
    await runtime.send_message(Add(1), agent, reply_type=wanted)
    await runtime.publish_message(Add(1), TopicId("adds", "server"))
    assert_type(await runtime.try_get_underlying_agent_instance(agent, Counter), Counter)
    assert_type(runtime.options.call_timeout, float | None)
    assert_type(runtime.options.servers, tuple[str, ...])
    assert_type(runtime.health().ready, bool)
    assert_type(runtime.worker_id, str | None)


async def counters_factory() -> Counter:
    return Counter()


async def main() -> None:
    async with EmbeddedServer() as server, NatsAgentRuntime(server.url) as runtime:
        assert_type(runtime, NatsAgentRuntime)
        await natsrt.register(runtime, Counter, "counter", Counter)
        await natsrt.register(runtime, Counter, "other", counters_factory)
        await Counter.register(runtime, "third", lambda: Counter())
        await runtime.register_factory("fourth", Counter, expected_class=Counter, keyed=KeyedOptions(save="interval"))
        await runtime.wait_for("counter", timeout=5)
        try:
            await use(runtime, AgentId("counter", "a"), None)
        except natsrt.UnknownAgentType as error:
            assert_type(error.known, list[str])
        except natsrt.WorkerLost as error:
            assert_type(error.worker_id, str | None)


def in_a_script() -> None:
    with EmbeddedServer(port=-1) as server:
        assert_type(server, EmbeddedServer)
        assert_type(server.url, str)
    asyncio.run(main())
