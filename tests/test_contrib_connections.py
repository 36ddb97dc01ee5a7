"""Memories, caches, model clients and services over TLS and with credentials. Configurations never have these."""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nats
import pytest
from autogen_core import AgentId, CacheStore, ComponentLoader, ComponentModel, MessageContext, RoutedAgent, rpc
from autogen_core.memory import Memory, MemoryContent
from autogen_core.models import ChatCompletionClient, UserMessage

import natsrt
from natsrt import NatsAgentRuntime, Options
from natsrt.contrib.cache import NatsCacheStore
from natsrt.contrib.memory import NatsMemory
from natsrt.contrib.models import RemoteChatCompletionClient, host_model
from natsrt.contrib.services import ServiceAgent, offer_service
from natsrt.errors import PermissionDenied, TlsFailed
from tests.programs.model_worker import Scripted
from tests.support.processes import Processes
from tests.test_tls import USERS, VERIFY, Place

SECRETS = ("secret", "app", ".pem", ".key")


@pytest.fixture
async def options(tmp_path: Path, processes: Processes) -> AsyncIterator[Options]:
    """The settings of a user of a server that requires TLS, a client certificate and a password."""
    place = Place(tmp_path, processes)
    address = await place.server(place.certificates.server("server", VERIFY) + USERS)
    yield Options(
        servers=f"nats://{address}",
        user="app",
        password="secret",
        connect_timeout=5.0,
        **place.ca,
        **place.certificates.client(),
    )


WRONG: list[tuple[dict[str, Any], type[Exception]]] = [
    ({"tls_ca": None}, TlsFailed),
    ({"tls_cert": None, "tls_key": None}, TlsFailed),
    ({"password": "wrong"}, PermissionDenied),
]


def written(component: Any) -> ComponentModel:
    """The configuration of a component, as a file would have it."""
    text = component.dump_component().model_dump_json()
    assert not [secret for secret in SECRETS if secret in text]
    return ComponentModel.model_validate_json(text)


def environment(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("user", "password", "tls_ca", "tls_cert", "tls_key"):
        value = getattr(options, name)
        text = value.get_secret_value() if hasattr(value, "get_secret_value") else str(value)
        monkeypatch.setenv(f"NATSRT_{name.upper()}", text)


async def test_a_memory_has_tls_and_credentials(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong, error in WRONG:
        with pytest.raises(error):
            await NatsMemory("s", options=options.replace(**wrong)).query()
    async with NatsMemory("s", options=options) as memory:
        await memory.add(MemoryContent(content="tea", mime_type="text/plain"))
        config = written(memory)
    environment(options, monkeypatch)
    loaded = Memory.load_component(config)
    assert [content.content for content in (await loaded.query()).results] == ["tea"]
    await loaded.close()


def test_a_cache_has_tls_and_credentials(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong, error in WRONG:
        with NatsCacheStore[int](options=options.replace(**wrong)) as store, pytest.raises(error):
            store.get("k")
    with NatsCacheStore[int](options=options) as store:
        store.set("k", 1)
        config = written(store)
    environment(options, monkeypatch)
    loaded = CacheStore.load_component(config)
    assert loaded.get("k") == 1
    loaded.close()  # type: ignore[attr-defined]


async def test_a_model_client_has_tls_and_credentials(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong, error in WRONG:
        with pytest.raises(error):
            await RemoteChatCompletionClient.connect("gpt", options=options.replace(**wrong))
    async with NatsAgentRuntime(options=options) as worker:
        await host_model(worker, "gpt", Scripted)
        client = await RemoteChatCompletionClient.connect("gpt", options=options)
        config = written(client)
        await client.close()
        environment(options, monkeypatch)
        loaded = ComponentLoader.load_component(config, ChatCompletionClient)
        result = await loaded.create([UserMessage(content="count 1", source="user")])
        assert result.content == "here"
        await loaded.close()


@dataclass
class Text:
    text: str


class Shouter(RoutedAgent):
    @rpc
    async def shout(self, message: Text, ctx: MessageContext) -> Text:
        return Text(message.text.upper())


async def test_services_have_tls_and_credentials(options: Options) -> None:
    async with NatsAgentRuntime(options=options) as runtime:
        await natsrt.register(runtime, Shouter, "shouter", lambda: Shouter("shouts"))
        await offer_service(runtime, "shouter", subject="texts.shout", request_type=Text, response_type=Text)
        await natsrt.register(
            runtime,
            ServiceAgent,
            "asker",
            lambda: ServiceAgent(subject="texts.shout", request_type=Text, response_type=Text),
        )
        assert await runtime.send_message(Text("a"), AgentId("asker", "x")) == Text("A")
        tls = ssl.create_default_context(cafile=str(options.tls_ca))
        tls.load_cert_chain(str(options.tls_cert), str(options.tls_key))
        client = await nats.connect(list(options.servers), tls=tls, user="app", password="secret")
        assert json.loads((await client.request("texts.shout", b'{"text": "b"}')).data) == {"text": "B"}
        await client.close()
