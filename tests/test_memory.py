"""`NatsMemory`: one session in many processes, the same order everywhere, whatever fails."""

from __future__ import annotations

import asyncio
import base64
import datetime
import gc
import json
import random
import re
import secrets
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import nats
import pytest
from autogen_core import CancellationToken, ComponentModel, Image
from autogen_core.memory import (
    ListMemory,
    Memory,
    MemoryContent,
    MemoryMimeType,
    MemoryQueryResult,
    UpdateContextResult,
)
from autogen_core.model_context import BufferedChatCompletionContext, ChatCompletionContext
from nats.aio.client import ServerVersion
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from PIL import Image as PillowImage

from benchmarks.chaos.proxy import Proxy
from natsrt import NatsAgentRuntime, Options
from natsrt.contrib.cache import NatsCacheStore
from natsrt.contrib.memory import NatsMemory
from natsrt.contrib.memory.contents import CLEAR, decode, encode
from natsrt.contrib.memory.session import Session
from natsrt.embedded import EmbeddedServer
from natsrt.errors import (
    CannotDecode,
    CannotSerialize,
    MessageTooLarge,
    PermissionDenied,
    ServerTooOld,
    ServerUnreachable,
    StreamUnavailable,
)
from natsrt.storage import LogMessage
from natsrt.transport.client import NatsClient
from natsrt.wire.subjects import Subjects
from tests.programs import memory_member
from tests.programs.memory_member import SESSION, digest, text
from tests.support.processes import Processes, eventually
from tests.support.topology import hub_and_leaf

PROGRAM = Path(memory_member.__file__)
Make = Callable[..., NatsMemory]


@pytest.fixture
async def make(server: EmbeddedServer, namespace: str) -> AsyncIterator[Make]:
    """Makes memories of one session, each as another process would have it. They are closed at the end."""
    async with AsyncExitStack() as stack:

        def memory(session: str = "s", url: str = server.url, **settings: Any) -> NatsMemory:
            settings = settings if "runtime" in settings else {"namespace": namespace, "servers": url, **settings}
            made = NatsMemory(session, **settings)
            stack.push_async_callback(made.close)
            return made

        yield memory


@pytest.fixture
async def js(server: EmbeddedServer) -> AsyncIterator[JetStreamContext]:
    client = await nats.connect(server.url)
    yield client.jetstream()
    await client.close()


async def texts(memory: NatsMemory) -> list[str]:
    return [str(content.content) for content in (await memory.query()).results]


async def add(memory: NatsMemory, *values: str) -> None:
    for value in values:
        await memory.add(text(value))


# -- contents ----------------------------------------------------------------------------------------------------------

CONTENTS: list[tuple[Any, Any, Any]] = [
    ("plain text, größer, 記憶, 🙂", MemoryMimeType.TEXT, None),
    ("the type as text", "text/plain", None),
    ("# markdown\r\n\0", MemoryMimeType.MARKDOWN, {}),
    ("", "", {"empty": ""}),
    ("a lone surrogate \ud800", "text/x-odd; charset=\ud800", {"\udfff": "\ud800"}),
    (b"\x00\xff binary", MemoryMimeType.BINARY, {"source": "a file"}),
    (b"", "application/octet-stream", None),
    ({"a": [1, 1.0, -0.0, 2**70, True, None, {"b": []}]}, MemoryMimeType.JSON, {"score": 0.1, "nested": {"x": [1]}}),
    ({}, "application/json", None),
    ({"kind": "clear"}, MemoryMimeType.JSON, None),
]


@pytest.mark.parametrize(("content", "mime_type", "metadata"), CONTENTS)
async def test_every_content_arrives_as_it_was_added(make: Make, content: Any, mime_type: Any, metadata: Any) -> None:
    added = MemoryContent(content=content, mime_type=mime_type, metadata=metadata)
    here, there = make(), make()
    await here.add(added)
    for memory in (here, there):
        [found] = (await memory.query("anything")).results
        assert found == added
        assert repr(found) == repr(added)  # 1 and 1.0 and True are equal, and are not the same
        assert type(found.content) is type(added.content) and type(found.mime_type) is type(added.mime_type)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
async def test_an_image_arrives_with_all_its_pixels(make: Make, mode: str) -> None:
    picture = PillowImage.frombytes("RGB", (64, 48), secrets.token_bytes(64 * 48 * 3)).convert(mode)
    here, there = make(), make()
    added = MemoryContent(content=Image.from_pil(picture), mime_type=MemoryMimeType.IMAGE, metadata={"of": "noise"})
    await here.add(added)
    [found] = (await there.query()).results
    assert isinstance(found.content, Image) and isinstance(added.content, Image)
    assert found.content.image.size == (64, 48)
    assert found.content.image.tobytes() == added.content.image.tobytes()
    assert (found.mime_type, found.metadata) == (MemoryMimeType.IMAGE, {"of": "noise"})


class Remark(MemoryContent):
    """What derives from a content may have more."""

    by: str = "somebody"


_CIRCLE: dict[str, Any] = {}
_CIRCLE["self"] = _CIRCLE


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (MemoryContent(content={"a": (1, 2)}, mime_type="x"), "content.a is a tuple"),
        (MemoryContent(content={"a": [float("nan")]}, mime_type="x"), "content.a[0] is nan"),
        (MemoryContent(content="x", mime_type="x", metadata={"at": datetime.date.min}), "metadata.at is a date"),
        (MemoryContent(content="x", mime_type="x", metadata={"n": MemoryMimeType.TEXT}), "metadata.n is a Memory"),
        (MemoryContent.model_construct(content={1: "a"}, mime_type="x"), "has the key 1"),
        (MemoryContent.model_construct(content=5, mime_type="x"), "content is a int"),
        (MemoryContent.model_construct(content="x", mime_type=5), "mime_type is a int"),
        (MemoryContent.model_construct(content=_CIRCLE, mime_type="x"), "contains itself"),
        (MemoryContent.model_construct(content="x", mime_type="x", metadata=[]), "metadata is a list"),
        (Remark(content="x", mime_type="x"), "no subclass of it"),
        ("just text", "holds MemoryContent"),
    ],
)
async def test_what_would_arrive_as_something_else_is_refused(make: Make, content: Any, named: str) -> None:
    memory = make()
    with pytest.raises(CannotSerialize, match=re.escape(named)):
        await memory.add(content)
    assert await texts(memory) == []


@pytest.mark.parametrize(
    "body",
    [
        *(
            b"",
            b"[]",
            b"nothing",
            b"\xff",
            b'{"kind":"text"}',
            b'{"kind":"song","content":"a","mimetype":"a","known":true}',
        ),
        *(
            b'{"kind":"image","content":"AAAA","mimetype":"a","known":true}',
            b'{"kind":"bytes","content":"a","mimetype":"a","known":false}',
            b'{"kind":"text","content":"a","mimetype":5,"known":false}',
            b'{"kind":"text","content":{},"mimetype":"a","known":false}',
            b'{"kind":"json","content":"a","mimetype":"a","known":false}',
            b'{"kind":"text","content":"a","mimetype":"a","known":false,"metadata":[]}',
            b"[" * 100_000,
        ),
    ],
)
def test_a_body_that_is_none_is_a_clear_error(body: bytes) -> None:
    with pytest.raises(CannotDecode):
        decode(body)


def test_a_mime_type_that_only_newer_versions_know_is_text() -> None:
    body = json.loads(encode(MemoryContent(content="a", mime_type=MemoryMimeType.TEXT)))
    read = decode(json.dumps(body | {"mimetype": "audio/*"}).encode())
    assert read is not None and read.mime_type == "audio/*"


async def test_a_content_that_is_too_large_is_refused_and_the_next_one_is_not(make: Make) -> None:
    memory = make()
    with pytest.raises(MessageTooLarge, match="the server accepts at most 8,"):
        await memory.add(text("x" * 8 * 1024 * 1024))
    largest = "x" * 8_000_000
    await memory.add(text(largest))
    assert await texts(memory) == await texts(make()) == [largest]


def test_an_int_of_too_many_digits_is_refused() -> None:
    with pytest.raises(CannotSerialize, match="it has an int of more than 4,300 digits"):
        encode(MemoryContent(content={"a": 10**5000}, mime_type=MemoryMimeType.JSON))


@pytest.mark.parametrize("size", [1_900, 2_000, 5_000])
async def test_a_content_that_is_larger_than_the_stream_is_refused_and_erases_nothing(make: Make, size: int) -> None:
    memory = make(max_bytes=2_000)
    await memory.add(text("before"))
    with pytest.raises(MessageTooLarge, match=r"the message has [2-5],\d+ bytes, .* max_bytes of .* is 2,000"):
        await memory.add(text("x" * size))
    assert await texts(memory) == ["before"]


async def test_the_largest_content_that_is_not_refused_is_kept(make: Make) -> None:
    memory, size = make(max_bytes=2_000), 2_000
    while True:
        try:
            await memory.add(text("x" * size))
            break
        except MessageTooLarge:
            size -= 1
    assert await texts(memory) == ["x" * size]
    assert size > 1_500


async def test_a_stream_that_is_too_small_for_a_clear_is_cleared(make: Make) -> None:
    memory = make(max_bytes=20)
    with pytest.raises(MessageTooLarge, match="is 20:"):
        await memory.add(text(""))
    await memory.clear()
    assert await texts(memory) == []


VECTORS = json.loads((Path(__file__).parent / "vectors" / "memory.json").read_text("utf-8"))


def _named(case: dict[str, Any]) -> str:
    return str(case["name"])


@pytest.mark.parametrize("case", VECTORS["subjects"], ids=_named)
def test_sessions_have_the_subjects_of_the_vectors(case: dict[str, Any]) -> None:
    subjects = Subjects("n")
    assert subjects.memory(case["memory"], case["session"]) == case["subject"]
    assert subjects.remembered(case["memory"], case["session"]) == case["told"]


@pytest.mark.parametrize("case", VECTORS["contents"], ids=_named)
def test_contents_are_written_and_read_as_the_vectors_say(case: dict[str, Any]) -> None:
    body = case["body"].encode()
    if case["kind"] == "clear":
        assert body == CLEAR and decode(body) is None
        return
    content = base64.b64decode(case["content"]) if case["kind"] == "bytes" else case["content"]
    mime_type = MemoryMimeType(case["mime_type"]) if case["known"] else case["mime_type"]
    meant = MemoryContent(content=content, mime_type=mime_type, metadata=case["metadata"])
    assert encode(meant) == body and repr(decode(body)) == repr(meant)


@pytest.mark.parametrize("case", VECTORS["unreadable"], ids=_named)
def test_what_the_vectors_call_unreadable_is_refused(case: dict[str, Any]) -> None:
    with pytest.raises(CannotDecode):
        decode(case["body"].encode())


# -- one session in many processes -------------------------------------------------------------------------------------


async def test_who_adds_sees_it_at_once_and_so_do_others(make: Make) -> None:
    one, two = make(), make()
    for number in range(50):
        await add((one, two)[number % 2], str(number))
        assert (await texts(one))[-1] == (await texts(two))[-1] == str(number)


async def test_others_have_it_without_asking(make: Make) -> None:
    here, there = make(), ListMemory()
    other = make(memory=there)
    await other.query()
    await add(here, "a", "b")
    await eventually(lambda: [content.content for content in there.content] == ["a", "b"], 1.0)


async def test_all_have_the_same_order_and_who_comes_later_too(make: Make) -> None:
    members = [make() for _ in range(3)]
    await asyncio.gather(*(add(members[n], *(f"{n} {i}" for i in range(100))) for n in range(3)))
    orders = [await texts(memory) for memory in (*members, make())]
    assert all(order == orders[0] for order in orders) and len(orders[0]) == 300
    for n in range(3):
        assert [one for one in orders[0] if one.startswith(f"{n} ")] == [f"{n} {i}" for i in range(100)]


async def test_who_queries_waits_for_nobody_who_adds_without_an_end(make: Make) -> None:
    reader = make(memory=Notes())
    await reader.query()
    adding = [asyncio.create_task(add(make(), *map(str, range(100_000)))) for _ in range(3)]
    for _ in range(20):
        async with asyncio.timeout(10):
            await reader.query()
    async with asyncio.timeout(10):
        assert await texts(make())
    for task in adding:
        assert not task.done()
        task.cancel()
    await asyncio.wait(adding)


async def test_update_context_adds_what_others_have_added(make: Make) -> None:
    here, there = make(), make()
    await add(here, "she likes tea")
    context = BufferedChatCompletionContext(buffer_size=5)
    result = await there.update_context(context)
    assert [content.content for content in result.memories.results] == ["she likes tea"]
    [message] = await context.get_messages()
    assert "1. she likes tea" in str(message.content)


@pytest.mark.parametrize("session", ["a b", "ü.>*", "x" * 500, "ada@example.com/1", "="])
async def test_sessions_have_any_name_and_are_apart(make: Make, session: str) -> None:
    here, there, other = make(session), make(session), make(f"{session}.")
    await add(here, "a")
    assert (await texts(there), await texts(other)) == (["a"], [])


async def test_names_and_namespaces_are_apart(make: Make, namespace: str) -> None:
    here = make()
    await add(here, "a")
    assert await texts(make(name="other")) == []
    assert await texts(make(namespace=f"{namespace}x")) == []


async def test_clear_clears_for_all_and_keeps_what_comes_later(
    make: Make, js: JetStreamContext, namespace: str
) -> None:
    one, two = make(), make()
    await add(one, "a", "b")
    assert await texts(two) == ["a", "b"]
    await two.clear()
    assert (await texts(one), await texts(two), await texts(make())) == ([], [], [])
    await add(one, "c")
    assert (await texts(one), await texts(two), await texts(make())) == (["c"], ["c"], ["c"])
    info = await js.stream_info(f"{namespace}_natsrt_memory_default")
    assert info.state.messages == 2  # what was forgotten is erased: "clear" and "c" are left


async def test_clear_has_its_place_among_the_adds_of_others(make: Make) -> None:
    members = [make() for _ in range(3)]

    async def works(n: int) -> None:
        for i in range(40):
            await (members[n].clear() if i % 10 == 9 else add(members[n], f"{n} {i}"))

    await asyncio.gather(*(works(n) for n in range(3)))
    orders = [await texts(memory) for memory in (*members, make())]
    assert all(order == orders[0] for order in orders)


# -- limits ------------------------------------------------------------------------------------------------------------


async def test_the_last_contents_of_each_session_are_kept(make: Make) -> None:
    here, there, other = make(max_messages=5), make(max_messages=5), make("other", max_messages=5)
    await add(other, "kept")
    await there.query()
    for number in range(20):
        await add(here, str(number))
        expected = [str(kept) for kept in range(max(0, number - 4), number + 1)]
        assert await texts(here) == await texts(there) == expected
    assert await texts(make(max_messages=5)) == ["15", "16", "17", "18", "19"]
    assert await texts(other) == ["kept"]
    await here.clear()
    await add(here, *"abcde")
    assert await texts(here) == await texts(there) == list("abcde")


async def test_old_contents_go_everywhere(make: Make) -> None:
    here, there = make(max_age=1), make(max_age=1)
    await add(here, "old")
    assert await texts(there) == ["old"]

    async def both() -> bool:
        return await texts(here) == await texts(there) == []

    await eventually(both, 10.0)
    await add(there, "new")
    assert await texts(here) == await texts(there) == ["new"]


async def test_a_stream_that_is_full_drops_the_oldest_everywhere(make: Make) -> None:
    here, there = make(max_bytes=20_000), make(max_bytes=20_000)
    await there.query()
    await add(here, *(f"{number} {'x' * 1000}" for number in range(40)))
    order = await texts(here)
    assert order == await texts(there) == await texts(make(max_bytes=20_000))
    assert 10 < len(order) < 20 and order[-1].startswith("39 ")


async def test_other_limits_of_the_same_stream_are_a_clear_error(make: Make) -> None:
    await make(max_messages=10).query()
    with pytest.raises(StreamUnavailable, match=r"max_msgs_per_subject is 10 and must be 20.*nats stream edit"):
        await make(max_messages=20).query()


class Notes(Memory):
    """A memory that cannot lose single contents, as those with embeddings. ``refuses``: how often it refuses a text."""

    component_config_schema = None  # type: ignore[assignment]

    def __init__(self, refuses: Mapping[str, int] | None = None) -> None:
        self.contents: list[str] = []
        self.refuses = dict(refuses or {})
        self.most = 0
        self.adds = 0
        self.closed = False
        self.pause = 0.0

    async def add(self, content: MemoryContent, cancellation_token: CancellationToken | None = None) -> None:
        await asyncio.sleep(self.pause)
        value = str(content.content)
        if self.refuses.get(value, 0):
            self.refuses[value] -= 1
            raise ValueError(f"no {value}")
        self.adds += 1
        self.contents.append(value)
        self.most = max(self.most, len(self.contents))

    async def query(
        self, query: str | MemoryContent, cancellation_token: CancellationToken | None = None, **kwargs: Any
    ) -> MemoryQueryResult:
        found = [text(one) for one in self.contents if str(query) in one]
        return MemoryQueryResult(results=found[: kwargs.get("top")])

    async def update_context(self, model_context: ChatCompletionContext) -> UpdateContextResult:
        return UpdateContextResult(memories=await self.query(""))

    async def clear(self) -> None:
        self.contents = []

    async def close(self) -> None:
        self.closed = True


async def test_any_memory_can_be_wrapped(make: Make) -> None:
    notes = Notes()
    here, there = make(memory=notes), make()
    await add(there, "tea", "coffee", "teapot")
    assert [content.content for content in (await here.query("tea", top=1)).results] == ["tea"]
    assert [content.content for content in (await here.query("tea")).results] == ["tea", "teapot"]
    await here.close()
    assert notes.closed


async def test_a_memory_that_cannot_forget_is_bounded_and_filled_again(make: Make) -> None:
    notes = Notes()
    here, there = make(memory=notes, max_messages=16), make(max_messages=16)
    for number in range(100):
        await add(there, str(number))
        kept = await texts(here)
        assert kept[-16:] == await texts(there) and len(kept) < 18
    assert notes.most <= 18 and notes.adds < 1000


async def test_what_the_wrapped_memory_holds_at_the_start_is_replaced(make: Make) -> None:
    notes = Notes()
    notes.contents = ["of another time"]
    assert await texts(make(memory=notes)) == []


async def test_what_the_memory_refuses_is_told_to_who_adds_it_and_blocks_nobody(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    here, there = make(memory=Notes({"bad": 9})), make(memory=Notes({"bad": 9, "slow": 2}))
    await add(here, "a")
    with pytest.raises(ValueError, match="no bad") as refused:
        await add(here, "bad")
    assert "The content is stored" in str(refused.value.__notes__)
    await add(here, "slow", "b")
    assert await texts(here) == await texts(there) == ["a", "slow", "b"]
    assert (here.left_out, there.left_out) == (1, 1)
    assert "is left out: the memory that is wrapped raised ValueError" in caplog.text
    assert "no bad" not in caplog.text  # it may quote the content


@pytest.mark.parametrize("call", ["add", "clear"])
async def test_a_memory_that_cancels_itself_stops_nobody(make: Make, call: str) -> None:
    class Cancelled(Notes):
        ends = 9

        async def _maybe(self) -> None:
            if self.ends:
                self.ends -= 1
                raise asyncio.CancelledError

        async def add(self, content: MemoryContent, cancellation_token: CancellationToken | None = None) -> None:
            if call == "add" and content.content == "bad":
                await self._maybe()
            await super().add(content)

        async def clear(self) -> None:
            if call == "clear":
                await self._maybe()
            await super().clear()

    wrapped, other = Cancelled(), make()
    here = make(memory=wrapped)
    async with asyncio.timeout(10):
        with pytest.raises(RuntimeError, match="the memory that is wrapped raised CancelledError"):
            await add(here, "bad")
        wrapped.ends = 0
        await add(here, "good")
        assert (await texts(here))[-1] == (await texts(other))[-1] == "good"


# -- what goes wrong ---------------------------------------------------------------------------------------------------


async def test_a_stream_that_is_deleted_is_made_again_and_all_agree(
    make: Make, js: JetStreamContext, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = make(), make()
    await add(one, *map(str, range(10)))
    assert len(await texts(two)) == 10
    await js.delete_stream(f"{namespace}_natsrt_memory_default")
    await add(two, "new")
    assert await texts(one) == await texts(two) == await texts(make()) == ["new"]
    await js.delete_stream(f"{namespace}_natsrt_memory_default")
    assert await texts(one) == await texts(two) == []
    await add(one, "newer")
    assert await texts(one) == await texts(two) == ["newer"]
    assert "was deleted, with all that its sessions remember" in caplog.text


async def test_what_an_operator_removes_is_gone_everywhere(make: Make, js: JetStreamContext, namespace: str) -> None:
    one, two = make(), make(memory=Notes())
    await add(one, *"abcde")
    assert await texts(two) == list("abcde")
    stream = f"{namespace}_natsrt_memory_default"
    first = (await js.stream_info(stream)).state.first_seq
    await js.delete_msg(stream, first + 2)
    assert await texts(one) == await texts(two) == list("abde")
    await js.purge_stream(stream, keep=1)
    assert await texts(one) == await texts(two) == ["e"]
    await js.purge_stream(stream)
    await add(two, "f")
    assert await texts(one) == await texts(two) == ["f"]


async def test_what_others_publish_there_is_left_out(
    make: Make, js: JetStreamContext, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = make(), make()
    await add(one, "a")
    await js.publish(f"{namespace}.natsrt.memory.default.s", b"secret garbage")
    await add(two, "b")
    assert await texts(one) == await texts(two) == ["a", "b"]
    assert one.left_out == 1
    assert "is left out: cannot decode what a session remembers" in caplog.text and "secret" not in caplog.text


@pytest.mark.parametrize("kill", [False, True])
async def test_a_server_that_restarts_loses_nothing(make: Make, own_server: EmbeddedServer, kill: bool) -> None:
    one, two = make(url=own_server.url), make(url=own_server.url)
    adding = asyncio.create_task(add(one, *map(str, range(400))))
    await eventually(lambda: _count(two, 50))
    await own_server.restart(kill=kill)
    await adding
    await add(two, "last")
    order = [*map(str, range(400)), "last"]
    assert await texts(one) == order and await texts(two) == order and await texts(make(url=own_server.url)) == order


async def _count(memory: NatsMemory, least: int) -> bool:
    return len(await texts(memory)) >= least


async def test_a_server_that_comes_back_with_an_older_disk_is_believed(tmp_path: Path) -> None:
    folder, copy = tmp_path / "data", tmp_path / "copy"
    async with EmbeddedServer(data_dir=folder) as server:
        one, two = NatsMemory("s", server.url), NatsMemory("s", server.url)
        await add(one, "a", "b")
        await server.kill()
        shutil.copytree(folder, copy)
        await server.start()
        await add(one, "lost", "lost too")
        assert await texts(two) == ["a", "b", "lost", "lost too"]
        await server.kill()
        shutil.rmtree(folder)
        shutil.copytree(copy, folder)
        await server.start()
        three = NatsMemory("s", server.url)
        await add(three, "c", "d", "e")  # with the sequences of those that are lost
        assert await texts(one) == await texts(two) == await texts(three) == list("abcde")
        for memory in (one, two, three):
            await memory.close()


async def test_who_was_cut_off_is_in_step_again_by_itself(make: Make, server: EmbeddedServer) -> None:
    async with Proxy(server.url) as proxy:
        there = ListMemory()
        here, cut = make(), make(url=proxy.url, memory=there)
        await add(here, "before")
        assert await texts(cut) == ["before"]
        for round in range(3):
            proxy.cut()
            await add(here, f"meanwhile {round}")
            await proxy.restore()
            await eventually(lambda: there.content and there.content[-1].content == f"meanwhile {round}", 10.0)  # noqa: B023
        assert await texts(cut) == await texts(here)


@pytest.mark.parametrize("seed", range(3))
async def test_links_that_are_cut_at_any_moment_lose_and_repeat_nothing(
    make: Make, server: EmbeddedServer, namespace: str, seed: int
) -> None:
    chance, each = random.Random(seed), 150
    async with AsyncExitStack() as stack:
        proxies = [await stack.enter_async_context(Proxy(server.url)) for _ in range(3)]
        members = [make(url=proxy.url, max_messages=None) for proxy in proxies]

        async def adds(number: int) -> None:
            for i in range(each):
                await add(members[number], f"{number} {i}")
                await asyncio.sleep(chance.uniform(0, 0.02))  # so that cuts meet adds in all their stages

        adding = asyncio.gather(*map(adds, range(3)))
        while not adding.done():
            proxy = chance.choice(proxies)
            proxy.cut()
            await proxy.restore()
            await asyncio.wait({adding}, timeout=chance.uniform(0.02, 0.3))
        await adding
        orders = [await texts(memory) for memory in (*members, make(max_messages=None))]
    assert all(order == orders[0] for order in orders)
    for number in range(3):
        assert [one for one in orders[0] if one.startswith(f"{number} ")] == [f"{number} {i}" for i in range(each)]


async def test_a_subscriber_that_answers_in_place_of_the_stream_is_ignored(
    make: Make, server: EmbeddedServer, namespace: str
) -> None:
    client = await nats.connect(server.url)
    forged = 0

    async def answer(message: Msg) -> None:
        nonlocal forged
        if message.reply:
            forged += 1
            await client.publish(message.reply, b'{"stream":"other","seq":1}')
            await client.publish(message.reply, b"hello")

    for subject in (f"{namespace}.natsrt.memory.>", f"$KV.{namespace}_natsrt_cache_default.>"):
        await client.subscribe(subject, cb=answer)
    await client.flush()
    memory = make()
    await add(memory, "a", "b")
    assert await texts(memory) == ["a", "b"]

    def use() -> int | None:
        with NatsCacheStore[int](options=memory._options) as store:
            store.set("k", 1)
            return store.get("k")

    assert await asyncio.to_thread(use) == 1
    await eventually(lambda: forged == 3)
    await client.close()


async def test_a_gap_in_what_is_told_is_noticed_at_the_next_message(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = ListMemory()
    here, other = make(), make(memory=there)
    await other.query()
    other_session, told = other._life and other._life.session, Session.told

    def all_but_one(session: Session, message: LogMessage) -> None:
        if session is not other_session or b"lost" not in message.body:
            told(session, message)

    monkeypatch.setattr(Session, "told", all_but_one)
    await add(here, "a", "lost", "c")
    await eventually(lambda: [content.content for content in there.content] == ["a", "lost", "c"])


@pytest.mark.parametrize("sequence", ["2", "9000000000000000000"], ids=["below the stream's", "above it"])
async def test_what_somebody_else_tells_is_forgotten_at_the_next_query(
    make: Make, server: EmbeddedServer, namespace: str, sequence: str
) -> None:
    here, other = make(), make()
    await add(other, "a", "b")
    assert await texts(here) == ["a", "b"]
    session = here._life and here._life.session
    assert session is not None
    liar = await nats.connect(server.url)
    await liar.publish(
        Subjects(namespace).remembered("default", "s"),
        encode(text("a lie")),
        headers={"Nats-Sequence": sequence, "Nats-Last-Sequence": str(session._position)},
    )
    await liar.flush()
    if int(sequence) > 2:
        await eventually(lambda: session._position == int(sequence))
    assert await texts(here) == ["a", "b"]
    await add(other, "c")
    assert await texts(here) == ["a", "b", "c"]
    await liar.close()


async def test_what_is_told_faster_than_a_memory_takes_it_is_read_later(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("natsrt.contrib.memory.session._MOST_TOLD", 3)
    notes = Notes()
    here, other = make(), make(memory=notes)
    await other.query()
    notes.pause = 0.01
    await add(here, *map(str, range(60)))
    await eventually(lambda: notes.contents == [*map(str, range(60))], 10.0)


async def test_what_is_told_may_be_lost(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    told, number = Session.told, 0

    def sometimes(session: Session, message: Any) -> None:
        nonlocal number
        number += 1
        if number % 3 == 0:
            told(session, message)

    monkeypatch.setattr(Session, "told", sometimes)
    one, two = make(), make()
    await asyncio.gather(add(one, *map(str, range(60))), add(two, *map(str, range(60, 120))))
    assert await texts(one) == await texts(two) and len(await texts(one)) == 120


async def test_a_server_that_is_gone_is_a_clear_error_in_time(make: Make, own_server: EmbeddedServer) -> None:
    options = Options(servers=own_server.url, offline_timeout=1, publish_timeout=1, connect_timeout=1)
    memory = NatsMemory("s", options=options)
    await add(memory, "a")
    await own_server.stop()
    async with asyncio.timeout(15):
        with pytest.raises((ServerUnreachable, StreamUnavailable)):
            await memory.query()
        with pytest.raises((ServerUnreachable, StreamUnavailable)):
            await add(memory, "b")
        with pytest.raises(ServerUnreachable):
            await NatsMemory("s", options=options).query()
    await own_server.start()
    await add(memory, "c")
    assert (await texts(memory))[-1] == "c"
    await memory.close()


async def test_a_first_use_that_fails_can_be_repeated(own_server: EmbeddedServer) -> None:
    url = own_server.url
    await own_server.stop()
    memory = NatsMemory("s", options=Options(servers=url, connect_timeout=0.5))
    with pytest.raises(ServerUnreachable):
        await add(memory, "a")
    await own_server.start()
    await add(memory, "b")
    assert await texts(memory) == ["b"]
    await memory.close()


async def test_a_token_cancels_what_waits(make: Make, own_server: EmbeddedServer) -> None:
    memory = make(url=own_server.url)
    await add(memory, "a")
    own_server.pause()
    token = CancellationToken()
    waiting = [
        asyncio.create_task(memory.query("", token)),
        asyncio.create_task(memory.add(text("b"), token)),
    ]
    await asyncio.sleep(0.05)
    token.cancel()
    async with asyncio.timeout(2):
        ended = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(one) for one in ended] == [asyncio.CancelledError] * 2
    own_server.resume()
    await add(memory, "c")
    assert (await texts(memory))[-1] == "c"


@pytest.mark.parametrize("leaf_domain", [None, "leaf"])
async def test_a_leaf_node_shares_the_memory_and_the_cache_of_the_hub(tmp_path: Path, leaf_domain: str | None) -> None:
    async with hub_and_leaf(tmp_path, leaf_domain=leaf_domain) as servers:
        there = ListMemory()
        hub = NatsMemory("s", servers.hub.url)
        leaf = NatsMemory("s", servers.leaf.url, jetstream_domain="hub", memory=there)
        async with hub, leaf:
            await add(hub, "a")
            assert await texts(leaf) == ["a"]
            await add(leaf, "b")
            assert await texts(hub) == ["a", "b"]
            await add(hub, "c")
            await eventually(lambda: [content.content for content in there.content] == ["a", "b", "c"])
        for url, domain in ((servers.leaf.url, "hub"), (servers.hub.url, None)):
            with NatsCacheStore[int](url, jetstream_domain=domain) as store:
                assert await asyncio.to_thread(store.get, "k") == (None if domain else 1)
                await asyncio.to_thread(store.set, "k", 1)


# -- with a runtime, with AgentChat, as a component --------------------------------------------------------------------


async def test_a_memory_shares_the_connection_of_a_runtime(make: Make, server: EmbeddedServer, namespace: str) -> None:
    runtime = NatsAgentRuntime(server.url, namespace=namespace)
    shared, other = make(runtime=runtime), make()
    with pytest.raises(RuntimeError, match="not started"):
        await add(shared, "a")
    async with runtime:
        await add(shared, "a")
        assert await texts(other) == ["a"]
    with pytest.raises(RuntimeError, match="not started"):
        await texts(shared)
    await add(other, "b")
    async with runtime:
        assert await texts(shared) == ["a", "b"]
        await shared.close()
        assert runtime.ready
        with pytest.raises(ValueError, match="give no others"):
            NatsMemory("s", server.url, runtime=runtime)


async def test_an_assistant_agent_remembers_what_another_one_was_told(make: Make) -> None:
    agents = pytest.importorskip("autogen_agentchat.agents")
    replay = pytest.importorskip("autogen_ext.models.replay")
    here, there = make(), make()
    await add(there, "The user is called Ada.")
    model = replay.ReplayChatCompletionClient(["Hello, Ada!"])
    assistant = agents.AssistantAgent("greeter", model, memory=[here])
    result = await assistant.run(task="Who am I?")
    assert "The user is called Ada." in str(model.create_calls[0]["messages"])
    assert any(message.type == "MemoryQueryEvent" for message in result.messages)
    loaded = agents.AssistantAgent.load_component(assistant.dump_component())
    assert isinstance(loaded._memory[0], NatsMemory)


async def test_a_configuration_names_servers_and_has_no_secret(
    make: Make, server: EmbeddedServer, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = server.url.removeprefix("nats://")
    options = Options(servers=f"nats://me:hidden@{address}", namespace=namespace)
    memory = NatsMemory(
        "s", options=options, memory=ListMemory("mine"), name="n", max_messages=7, max_age=60, max_bytes=10**6
    )
    await add(memory, "a private remark")
    written = memory.dump_component().model_dump_json()
    assert "hidden" not in written and "private" not in written and "me:" not in written
    loaded = Memory.load_component(ComponentModel.model_validate_json(written))
    assert isinstance(loaded, NatsMemory) and isinstance(loaded.memory, ListMemory) and loaded.memory.name == "mine"
    assert loaded.dump_component() == memory.dump_component()
    assert await texts(loaded) == ["a private remark"]
    await memory.close()
    await loaded.close()


async def test_a_configuration_names_a_context_which_has_the_credentials(
    server: EmbeddedServer, namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "nats" / "context"
    folder.mkdir(parents=True)
    (folder / "prod.json").write_text(json.dumps({"url": server.url, "user": "ada", "password": "hidden"}))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    memory = NatsMemory("s", context="prod", namespace=namespace)
    config = memory.dump_component().config
    assert (config["context"], "servers" in config) == ("prod", False)
    loaded = NatsMemory.load_component(memory.dump_component())
    assert loaded._options.user == "ada"
    assert "hidden" not in str(loaded.dump_component())
    await add(loaded, "a")
    await loaded.close()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"session": ""}, "session must be"),
        ({"session": 5}, "session must be"),
        ({"session": "\ud800"}, "session must be text that UTF-8 has, without a lone surrogate"),
        ({"name": "a.b"}, "name"),
        ({"name": ""}, "name"),
        ({"max_messages": 0}, "max_messages"),
        ({"max_messages": True}, "max_messages"),
        ({"max_age": 0.5}, "max_age"),
        ({"max_bytes": -1}, "max_bytes"),
        ({"memory": ListMemory(memory_contents=[text("a")])}, "memory has contents"),
        ({"options": Options(), "context": "prod"}, "context"),
    ],
)
def test_a_wrong_argument_is_named(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        NatsMemory(**{"session": "s", **settings})


# -- its life ----------------------------------------------------------------------------------------------------------


async def test_a_closed_memory_leaves_nothing_behind(make: Make, server: EmbeddedServer, namespace: str) -> None:
    before = asyncio.all_tasks()
    async with NatsMemory("s", server.url, namespace=namespace) as memory:
        await add(memory, "a")
    await memory.close()
    await eventually(lambda: asyncio.all_tasks() <= before)
    with pytest.raises(RuntimeError, match="closed"):
        await memory.query()
    assert await texts(make()) == ["a"]


async def test_who_waits_for_a_memory_that_is_closed_is_told(make: Make, own_server: EmbeddedServer) -> None:
    opening, used = make(url=own_server.url), make(url=own_server.url)
    await add(used, "a")
    own_server.pause()
    uses = [used.query(), used.query(), opening.query(), opening.update_context(BufferedChatCompletionContext(1))]
    waiting = [asyncio.ensure_future(use) for use in uses]
    await eventually(lambda: used._life and used._life.session and used._life.session._waiters)
    async with asyncio.timeout(10):
        await asyncio.gather(used.close(), opening.close())
        ended = await asyncio.gather(*waiting, return_exceptions=True)
    assert [str(one) for one in ended] == ["the memory was closed meanwhile"] * 4
    own_server.resume()


async def test_a_memory_is_closed_at_any_moment(make: Make) -> None:
    chance, writer = random.Random(1), make()

    async def adds() -> None:
        while True:
            await add(writer, "x")

    adding = asyncio.create_task(adds())
    for _ in range(60):  # nats-py may lose the cancellation of a request
        memory = make()
        uses = [asyncio.create_task(memory.query()) for _ in range(2)]
        await asyncio.sleep(chance.uniform(0, 0.06))
        async with asyncio.timeout(5):
            await memory.close()
        for use in uses:
            use.cancel()
        await asyncio.wait(uses)
    adding.cancel()
    await asyncio.wait({adding})


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the first loop closes no connection
def test_a_memory_goes_on_in_the_next_event_loop(server: EmbeddedServer, namespace: str) -> None:
    memory = NatsMemory("s", server.url, namespace=namespace)
    asyncio.run(add(memory, "a"))

    async def again() -> list[str]:
        await add(memory, "b")
        found = await texts(memory)
        await memory.close()
        return found

    assert asyncio.run(again()) == ["a", "b"]
    gc.collect()


async def test_a_memory_in_use_in_another_event_loop_says_so(make: Make) -> None:
    memory = make()
    await add(memory, "a")
    raised: list[BaseException] = []

    def elsewhere() -> None:
        for use in (add(memory, "b"), memory.close()):
            try:
                asyncio.run(use)
            except RuntimeError as error:
                raised.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    await asyncio.to_thread(thread.join)
    assert ["another event loop" in str(error) for error in raised] == [True, True]
    assert await texts(memory) == ["a"]


async def test_concurrent_first_uses_connect_once(make: Make) -> None:
    memory = make()
    await asyncio.gather(*(add(memory, str(number)) for number in range(20)), memory.query(), memory.query())
    assert sorted(map(int, await texts(memory))) == list(range(20))


async def test_a_first_use_that_is_cancelled_does_not_spoil_the_next(make: Make) -> None:
    memory = make()
    first = asyncio.create_task(memory.query())
    await asyncio.sleep(0)
    first.cancel()
    await add(memory, "a")
    assert await texts(memory) == ["a"]


async def test_a_server_that_is_too_old_is_named(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NatsClient, "connected_server_version", ServerVersion("2.10.9"))
    with pytest.raises(ServerTooOld, match=r"memories in JetStream need nats-server 2\.11 or newer.*runs 2\.10\.9"):
        await make().query()
    with (
        NatsCacheStore[int](make()._options.servers) as store,
        pytest.raises(ServerTooOld, match="caches in JetStream"),
    ):
        store.get("k")


async def test_the_server_may_refuse(tmp_path: Path) -> None:
    config = tmp_path / "server.conf"
    config.write_text(
        f'listen: 127.0.0.1:-1\njetstream {{ store_dir: "{tmp_path}" }}\nserver_name: refusing\n'
        'authorization { users: [{ user: u, password: p, permissions: { publish: ["$JS.API.>"], subscribe: ">" } }] }'
    )
    async with EmbeddedServer(config=config) as server:
        memory = NatsMemory("s", options=Options(servers=server.url, user="u", password="p"))
        assert await texts(memory) == []
        with pytest.raises(PermissionDenied, match=r"natsrt\.memory\.default\.s"):
            await add(memory, "a")
        await memory.close()
        wrong = NatsMemory("s", options=Options(servers=server.url, user="u", password="wrong"))
        with pytest.raises(PermissionDenied, match="connect"):
            await wrong.query()


# -- what must be shown ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(120)
async def test_three_processes_have_one_order_over_a_restart_and_a_kill(
    own_server: EmbeddedServer, namespace: str, processes: Processes
) -> None:
    each = 5_000
    members = [
        processes.python(PROGRAM, own_server.url, namespace, name, str(each), "a,b", name=name)
        for name in ("a", "b", "killed")
    ]
    for member in members:
        await member.wait_for_line("ready", 30.0)
    options = Options(servers=own_server.url, namespace=namespace)
    async with NatsMemory(SESSION, options=options, max_messages=None) as first:
        await add(first, "begin")
    for member in members:
        await member.wait_for_line("begun", 60.0)
    members[2].kill()
    await own_server.restart(kill=True)
    orders = [await member.wait_for_line("order ", 90.0) for member in members[:2]]
    async with NatsMemory(SESSION, options=options, max_messages=None) as late:
        contents = (await late.query()).results
    assert orders == [f"order {digest(contents)}"] * 2
    values = [str(content.content) for content in contents]
    for name in ("a", "b"):
        own = [value for value in values if value.startswith(f"{name} ")]
        assert own == [*(f"{name} {number}" for number in range(each)), f"{name} done"]
    killed = [value for value in values if value.startswith("killed ")]
    assert killed == [f"killed {number}" for number in range(len(killed))]
    assert each // 10 <= len(killed) < each
