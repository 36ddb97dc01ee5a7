"""Each permission that natsrt generates for memories and caches is necessary and sufficient, and no other user has it.

See `tests.support.permission_matrix`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import nats
import pytest
from autogen_core.memory import MemoryContent
from natsrt_cli.declaration import parse
from natsrt_cli.forbidden import forbidden, forms
from natsrt_cli.permissions import grants

from natsrt import Options
from natsrt.contrib.cache import NatsCacheStore
from natsrt.contrib.memory import NatsMemory
from natsrt.embedded import EmbeddedServer
from natsrt.errors import ConfigurationError, PermissionDenied
from tests.support.permission_matrix import Matrix, delete_streams
from tests.support.permission_scene import PASSWORD, Scene
from tests.support.permission_tests import MatrixTests
from tests.support.processes import eventually

pytestmark = [pytest.mark.timeout(120)]

DECLARATION = parse(
    """
    [types.shop]
    [users.shelf]
    role = "keeper"
    memories = ["chats"]
    caches = ["models"]
    [users.mill]
    role = "worker"
    hosts = ["shop"]
    memories = ["chats"]
    caches = ["models"]
    [users.web]
    role = "caller"
    calls = ["shop"]
    [users.other]
    role = "keeper"
    memories = ["others"]
    caches = ["others"]
    """,
    "keepers",
)
MATRIX = Matrix(
    DECLARATION,
    [
        (name, grant)
        for name in ("shelf", "mill")
        for grant in grants(DECLARATION, DECLARATION.users[name])
        if name == "shelf" or grant.why.startswith(("the memory", "the cache"))
    ],
    "k",
)
needs = MATRIX.needs
MEMORY = (
    "publish to natsrt.memory.chats.>",
    "subscribe to natsrt.remembered.chats.>",
    *(
        f"publish to $JS.API.{request}.natsrt_memory_chats"
        for request in ("STREAM.CREATE", "STREAM.INFO", "STREAM.MSG.GET", "DIRECT.GET")
    ),
)
CACHE = (
    "publish to $KV.natsrt_cache_models.>",
    *(
        f"publish to $JS.API.{request}.KV_natsrt_cache_models"
        for request in ("STREAM.CREATE", "STREAM.INFO", "STREAM.MSG.GET")
    ),
)


def options(scene: Scene, user: str) -> Options:
    declaration = scene.case.declaration
    return Options(
        servers=scene.url,
        namespace=declaration.namespace,
        user=scene.case.login(user),
        password=PASSWORD,
        inbox_prefix=DECLARATION.users[user].inbox,
        connect_timeout=2,
        offline_timeout=2,
        publish_timeout=2,
    )


async def remembers(scene: Scene, make: Callable[[], NatsMemory]) -> None:
    for number in range(3):  # the third one reads a page
        memory = make()
        scene._stack.push_async_callback(memory.close)
        await memory.add(MemoryContent(content=str(number), mime_type="text/plain"))
        assert len((await memory.query()).results) == number + 1
    await memory.clear()
    assert (await memory.query()).results == []


async def caches(scene: Scene, user: str, name: str = "models") -> None:
    def use() -> None:
        with NatsCacheStore[int](options=options(scene, user), name=name, timeout=3, ttl=60) as store:
            store.set("key", 1)
            assert store.get("key") == 1

    await asyncio.to_thread(use)


@needs("shelf", *MEMORY, "subscribe to _INBOX_shelf.>")
async def remembers_apart(scene: Scene) -> None:
    await remembers(scene, lambda: NatsMemory("s", options=options(scene, "shelf"), name="chats"))


@needs("shelf", *CACHE)
async def caches_apart(scene: Scene) -> None:
    await caches(scene, "shelf")


@needs("mill", *MEMORY)
async def remembers_as_a_worker(scene: Scene) -> None:
    runtime = await scene.runtime("mill", offline_timeout=3, publish_timeout=3)
    await remembers(scene, lambda: NatsMemory("s", runtime=runtime, name="chats"))


@needs("mill", *CACHE)
async def caches_as_a_worker(scene: Scene) -> None:
    await caches(scene, "mill")


class TestEachPermission(MatrixTests):
    before = delete_streams


@pytest.mark.parametrize("user", ["other", "web"])
async def test_other_users_can_neither_read_nor_write_it(matrix: EmbeddedServer, user: str) -> None:
    async with AsyncExitStack() as stack:
        scene = Scene(matrix.url, MATRIX.case_of("shelf", None), stack)
        await remembers(scene, lambda: NatsMemory("s", options=options(scene, "shelf"), name="chats"))
        await caches(scene, "shelf")
        memory = NatsMemory("s", options=options(scene, user), name="chats")
        stack.push_async_callback(memory.close)
        with pytest.raises(PermissionDenied):
            await memory.query()
        with pytest.raises(PermissionDenied):
            await caches(scene, user)


@pytest.mark.parametrize("name", DECLARATION.users)
async def test_the_server_denies_all_that_is_forbidden(matrix: EmbeddedServer, name: str) -> None:
    async with AsyncExitStack() as stack:
        scene = Scene(matrix.url, MATRIX.case_of("shelf", None), stack)
        declaration = scene.case.declaration
        denied: list[str] = []

        async def on_error(error: Exception) -> None:
            denied.append(str(error).lower())

        client = await nats.connect(
            matrix.url, user=scene.case.login(name), password=PASSWORD, error_cb=on_error, inbox_prefix=f"_INBOX_{name}"
        )
        stack.push_async_callback(client.close)
        never = [
            one
            for one in forbidden(declaration, declaration.users[name])
            if "remember" in one.why or "cache" in one.why
        ]
        assert never or name == "mill"
        for one in never:
            for subject in forms(declaration, declaration.users[name], one, "anybody"):
                if one.operation == "publish":
                    await client.publish(subject, b"forged")
                else:
                    await client.subscribe(subject)
                await client.flush()
                named = f'"{subject.lower()}"'
                await eventually(lambda named=named: any(named in said for said in denied), message=named)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('role = "keeper"\nmemories = ["a.b"]', r"memories.*letters, digits"),
        ('role = "keeper"\ncaches = ["*"]', r"caches.*letters, digits"),
        ('role = "caller"\nmemories = ["a"]', "memories"),
        ('role = "keeper"\nhosts = ["a"]', "hosts"),
    ],
)
def test_a_wrong_declaration_is_named(text: str, named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        parse(f"[users.u]\n{text}", "keepers")


def test_they_are_in_the_account_of_their_users() -> None:
    text: Any = '{}jetstream_domain = "hub"\njetstream_account = "STORE"\n[users.u]\nrole = "keeper"\ncaches = ["a"]'
    with pytest.raises(ConfigurationError, match="caches.*account of their users"):
        parse(text.format(""), "keepers")
