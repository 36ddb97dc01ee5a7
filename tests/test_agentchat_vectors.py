"""A plain NATS client takes turns with hosted agents and teams, as tests/vectors/agentchat.json and PROTOCOL say."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import nats
import pytest

pytest.importorskip("autogen_agentchat", reason="autogen-agentchat is not installed: pip install 'natsrt[dev]'")

from autogen_agentchat.teams import RoundRobinGroupChat
from autogen_core import AgentId
from nats.aio.client import Client
from nats.aio.msg import Msg

from natsrt import NatsAgentRuntime
from natsrt.agentchat import host
from natsrt.embedded import EmbeddedServer
from tests.support.chat import Counter

VECTORS: dict[str, Any] = json.loads((Path(__file__).parent / "vectors" / "agentchat.json").read_text("utf-8"))


@pytest.fixture
async def worker(server: EmbeddedServer, namespace: str) -> AsyncIterator[NatsAgentRuntime]:
    async with NatsAgentRuntime(server.url, namespace=namespace) as started:
        await host(started, "counter", Counter)
        await host(started, "pair", lambda: RoundRobinGroupChat([Counter("one")], max_turns=1))
        yield started


@pytest.fixture
async def client(server: EmbeddedServer) -> AsyncIterator[Client]:
    connected = await nats.connect(server.url)
    yield connected
    await connected.close()


async def replies(client: Client, namespace: str, case: dict[str, Any]) -> list[Msg]:
    """All messages that a call gets, with an empty one at the end if it is streamed."""
    inbox = client.new_inbox()
    subscription = await client.subscribe(inbox)
    headers = {"Natsrt-Key": case["key"]}
    if "type" in case:
        headers["Natsrt-Type"] = case["type"]
    if "items" in case:
        headers["Natsrt-Stream"] = "1"
    body = case["data"] if isinstance(case["data"], str) else json.dumps(case["data"])
    await client.publish(f"{namespace}.{case['subject']}", body.encode(), reply=inbox, headers=headers)
    got = [await subscription.next_msg(timeout=10)]
    while "items" in case and "Natsrt-Parts" not in (got[-1].headers or {}):
        got.append(await subscription.next_msg(timeout=10))
    await subscription.unsubscribe()
    return got


def agrees(whole: Any, part: Any) -> bool:
    """True if ``whole`` is ``part``, and may have more members in its objects."""
    if isinstance(part, dict) and isinstance(whole, dict):
        return all(name in whole and agrees(whole[name], value) for name, value in part.items())
    if isinstance(part, list) and isinstance(whole, list):
        return len(whole) == len(part) and all(map(agrees, whole, part))
    return bool(whole == part)


async def stored(runtime: NatsAgentRuntime) -> Any:
    record = await runtime.running.records.read(AgentId("counter", "ada"))
    state = None if record is None else await runtime.running.records.state(record)
    return None if state is None else json.loads(state)


async def test_a_plain_client_has_the_conversation_of_the_vectors(
    worker: NatsAgentRuntime, namespace: str, client: Client
) -> None:
    for case in VECTORS["conversation"]:
        got = await replies(client, namespace, case)
        name = case["name"]
        if "items" in case:
            items = [((one.headers or {}).get("Natsrt-Type"), json.loads(one.data)) for one in got[:-1]]
            assert [kind for kind, _ in items] == [kind for kind, _ in case["items"]], name
            assert agrees([data for _, data in items], [data for _, data in case["items"]]), (name, items)
            assert "Nats-Service-Error" not in (got[-1].headers or {}), name
        elif "error" in case:
            assert (got[0].headers or {}).get("Nats-Service-Error", "").startswith(case["error"]), (name, got[0].data)
        else:
            assert "Nats-Service-Error" not in (got[0].headers or {}), (name, got[0].headers)
            assert agrees(json.loads(got[0].data), case["answer"]), (name, got[0].data)
        if "stored" in case:
            found = await stored(worker)
            assert (found is None) == (case["stored"] is None), name
            assert agrees(found, case["stored"]), (name, found)
            assert case["stored"] is None or found.keys() == case["stored"].keys(), name


async def test_agents_and_teams_are_announced_as_the_vectors_say(worker: NatsAgentRuntime) -> None:
    for agent_type, details in VECTORS["details"].items():
        await worker.wait_for(agent_type, timeout=10)
        assert agrees(worker.type_details(agent_type), details)


async def test_no_traceback_of_a_team_is_sent_where_none_is_to_be_sent(
    server: EmbeddedServer, namespace: str, client: Client
) -> None:
    """AgentChat puts tracebacks of participants into the text of its errors, which have causes, too."""
    async with NatsAgentRuntime(server.url, namespace=namespace, send_tracebacks=False) as worker:
        await host(worker, "pair", lambda: RoundRobinGroupChat([Counter("one")], max_turns=1))
        (got,) = await replies(client, namespace, {"subject": "agent.pair", "key": "ada", "data": "fail"})
        assert (got.headers or {})["Nats-Service-Error"] == "ValueError: it failed"
        assert b"Traceback" not in got.data
        assert b"test_agentchat" not in got.data
        assert b".py" not in got.data
