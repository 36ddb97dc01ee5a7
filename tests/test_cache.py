"""`NatsCacheStore`: a cache of many processes, from synchronous code anywhere."""

from __future__ import annotations

import asyncio
import concurrent.futures
import datetime
import enum
import gc
import json
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import nats
import pytest
from autogen_core import CacheStore, ComponentModel, FunctionCall, InMemoryStore
from autogen_core.models import CreateResult, RequestUsage, UserMessage
from nats.js import JetStreamContext
from pydantic import BaseModel, ConfigDict, Field

from natsrt import Options
from natsrt.contrib.cache import NatsCacheStore
from natsrt.embedded import EmbeddedServer
from natsrt.errors import (
    CannotSerialize,
    ConfigurationError,
    MessageTooLarge,
    PermissionDenied,
    ServerUnreachable,
    StreamUnavailable,
)
from tests.programs import cache_user
from tests.support.processes import Processes, eventually

PROGRAM = Path(cache_user.__file__)
Make = Callable[..., NatsCacheStore[Any]]
RESULT = CreateResult(
    finish_reason="function_calls",
    content=[FunctionCall(id="1", arguments='{"a": 1}', name="f")],
    usage=RequestUsage(prompt_tokens=1, completion_tokens=2),
    cached=False,
    thought="größer 🙂",
)


class Colour(enum.Enum):
    RED = "red"


class Point(BaseModel):
    x: float
    at: datetime.datetime
    colour: Colour = Colour.RED
    data: Any = None
    name: str = Field("", alias="Name")
    others: list[Point] = []


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)
    hidden: str = Field("", exclude=True)


POINT = Point(x=1, at=datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC), Name="p")


@pytest.fixture
def make(server: EmbeddedServer, namespace: str) -> Iterator[Make]:
    """Makes stores, each as another process would have it. They are closed at the end, and leave no thread."""
    stores: list[NatsCacheStore[Any]] = []

    def store(url: str = server.url, **settings: Any) -> NatsCacheStore[Any]:
        stores.append(NatsCacheStore(url, **{"namespace": namespace, **settings}))
        return stores[-1]

    yield store
    for made in stores:
        made.close()
    assert not _threads()


def _threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("natsrt cache")]


@pytest.fixture
async def js(server: EmbeddedServer) -> AsyncIterator[JetStreamContext]:
    client = await nats.connect(server.url)
    yield client.jetstream()
    await client.close()


# -- keys and values ---------------------------------------------------------------------------------------------------

VALUES: list[Any] = [
    *("text", "", "größer 記憶 🙂\0", "a lone surrogate \ud800", '{"looks": "like JSON"}'),
    *(0, -(2**100), 1.5, 1e300, True, False, None, [], {}, [1, [2, {"a": None}]], {"a": {"": []}, "ü": 1.0}),
    *({"$model": "x"}, {"$dict": {"$model": 1}}, [{"$": {"$$": []}}], {"value": 1}),
    *(
        RESULT,
        [RESULT, "chunk", RESULT],
        {"r": [RESULT]},
        POINT,
        [POINT, Point(**{**POINT.model_dump(by_alias=True), "others": [POINT]})],
    ),
    Point(x=0.1, at=POINT.at, data={"a": [1, None, "x"]}),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: ascii(repr(value)[:30]))
def test_a_value_is_read_as_it_was_stored(make: Make, value: Any) -> None:
    here, there = make(types=[CreateResult, Point]), make(types=[CreateResult, Point])
    here.set("key", value)
    for store in (here, there):
        assert store.get("key", "the default") == value
        if "Point" not in repr(value):  # Pydantic has a class of its own for time zones
            assert repr(store.get("key", "the default")) == repr(value)  # 1 and 1.0 are equal, and not the same


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ((1, 2), "a tuple"),
        ({1, 2}, "a set"),
        (b"x", "bytes"),
        ([{"a": {"b": (1,)}}], r"\[0\]\['a'\]\['b'\] is a tuple"),
        ({1: "a"}, "the key 1"),
        (float("nan"), "nan"),
        ([float("inf")], "inf"),
        (Colour.RED, "a Colour"),
        (object(), "an? object"),
        (Frozen(), r"types=\[tests.test_cache.Frozen\]"),
        (Point(x=1, at=POINT.at, data=(1, 2)), "changes its type"),
        (Point(x=1, at=POINT.at, data=datetime.date.min), "changes its type"),
        (Point(x=float("nan"), at=POINT.at), "cannot be read from its own JSON"),
    ],
)
def test_a_value_that_would_be_read_as_something_else_is_refused(make: Make, value: Any, named: str) -> None:
    store = make(types=[Point])
    store.set("key", "before")
    with pytest.raises(CannotSerialize, match=named):
        store.set("key", value)
    assert store.get("key") == "before"


def test_a_field_that_json_leaves_out_is_refused(make: Make) -> None:
    store = make(types=[Frozen])
    store.set("key", Frozen())
    with pytest.raises(CannotSerialize, match="changes its type"):
        store.set("key", Frozen(hidden="x"))


def test_what_contains_itself_is_refused(make: Make) -> None:
    circle: list[Any] = []
    circle.append(circle)
    with pytest.raises(CannotSerialize, match="contains itself"):
        make().set("key", circle)


@pytest.mark.parametrize(
    "case",
    json.loads((Path(__file__).parent / "vectors" / "memory.json").read_text("utf-8"))["values"],
    ids=lambda case: case["name"],
)
async def test_values_are_written_as_the_vectors_say(
    make: Make, js: JetStreamContext, namespace: str, case: dict[str, Any]
) -> None:
    store = make()
    store.set(case["key"], case["value"])
    subject = case["subject"].replace(".n_", f".{namespace}_")
    stored = await js.get_last_msg(f"KV_{namespace}_natsrt_cache_default", subject)
    assert stored.data == case["body"].encode() and store.get(case["key"]) == case["value"]


KEYS = ["a", "", "=", "a b.c>*", "ü/🙂", "x" * 1000, "x" * 1001, "\r\n", "=61", "A" * 64]


def test_keys_are_any_text_and_apart(make: Make) -> None:
    here, there = make(), make()
    for number, key in enumerate(KEYS):
        here.set(key, number)
    assert [there.get(key) for key in KEYS] == list(range(len(KEYS)))
    assert there.get("b") is None and there.get("b", 7) == 7
    for wrong in (5, None, b"a"):
        with pytest.raises(TypeError, match="key must be text"):
            here.get(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="key must be text that UTF-8 has, without a lone surrogate"):
        here.set("\ud800", 1)


def test_get_and_set_mean_what_they_mean_in_memory(make: Make) -> None:
    def use(store: CacheStore[Any]) -> list[Any]:
        seen = [store.get("k"), store.get("k", "d")]
        for value in ("a", "b", None, 0, ""):
            store.set("k", value)
            seen += [store.get("k"), store.get("k", "d")]
        return seen

    assert use(make()) == use(InMemoryStore())


def test_a_value_that_is_too_large_is_refused_and_the_next_one_is_not(make: Make) -> None:
    store = make()
    with pytest.raises(MessageTooLarge):
        store.set("k", "x" * 9_000_000)
    store.set("k", "y" * 8_000_000)
    assert store.get("k") == "y" * 8_000_000


@pytest.mark.parametrize("value", [10**5000, [{"a": -(10**5000)}, "\ud800"]], ids=["int", "nested"])
def test_an_int_of_too_many_digits_is_refused(make: Make, value: Any) -> None:
    with pytest.raises(CannotSerialize, match="it has an int of more than 4,300 digits"):
        make().set("k", value)


def test_a_bool_is_no_time() -> None:
    for setting in ("ttl", "timeout"):
        with pytest.raises(ConfigurationError, match=f"{setting}.*not True"):
            NatsCacheStore(**{setting: True})


def test_a_value_that_is_larger_than_the_bucket_is_refused_and_erases_nothing(make: Make) -> None:
    store = make(max_bytes=1_000)
    store.set("before", 1)
    for size in (950, 1_000, 5_000):
        with pytest.raises(MessageTooLarge, match=r"the message has [1-5],\d+ bytes, .* max_bytes of .* is 1,000"):
            store.set("k", "x" * size)
    assert store.get("before") == 1 and store.get("k") is None
    store.set("k", "x" * 500)
    assert store.get("k") == "x" * 500


async def test_what_cannot_be_read_counts_as_missing_and_is_replaced(
    make: Make, js: JetStreamContext, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    writer, reader = make(types=[Point]), make()
    writer.set("model", POINT)
    assert reader.get("model", "d") == "d"
    assert "does not know the class 'tests.test_cache.Point'" in caplog.text
    bucket = f"{namespace}_natsrt_cache_default"
    for body in (b"", b"\xff", b"[]", b'{"value":{"$model":[]}}', b'{"value":{"$dict":5}}', b"[" * 100_000):
        await js.publish(f"$KV.{bucket}.odd", body)
        assert reader.get("odd", "d") == "d"
    await js.publish(f"$KV.{bucket}.odd", b'{"value":{"$model":"tests.test_cache.Point","fields":{"x":"secret"}}}')
    assert make(types=[Point]).get("odd", "d") == "d"
    assert "x: float_parsing" in caplog.text and "secret" not in caplog.text
    writer.set("odd", 1)
    assert reader.get("odd") == 1


async def test_the_bucket_is_an_ordinary_one(make: Make, js: JetStreamContext, namespace: str) -> None:
    store = make()
    store.set("key", [1])
    bucket = await js.key_value(f"{namespace}_natsrt_cache_default")
    assert (await bucket.get("key")).value == b'{"value":[1]}'
    await bucket.delete("key")
    assert store.get("key", "gone") == "gone"
    await bucket.put("other", b'{"value":"from elsewhere"}')
    assert store.get("other") == "from elsewhere"


# -- time and room -----------------------------------------------------------------------------------------------------


async def test_values_expire_each_in_its_time(make: Make) -> None:
    short, long, endless = make(ttl=1), make(ttl=60), make()
    for number in range(20):
        short.set(f"short {number}", number)
    long.set("long", 1)
    endless.set("endless", 2)
    assert [long.get(f"short {number}") for number in range(20)] == list(range(20))
    await eventually(lambda: all(endless.get(f"short {number}") is None for number in range(20)), 5.0)
    assert (short.get("long"), short.get("endless")) == (1, 2)
    endless.set("short 0", "new")
    assert short.get("short 0") == "new"


def test_a_value_that_is_set_again_lives_as_long_as_said_last(make: Make) -> None:
    short, endless = make(ttl=1), make()
    short.set("k", 1)
    endless.set("k", 2)
    time.sleep(2.5)  # longer than the first one lives: that nothing happens cannot be waited for
    assert short.get("k") == 2


def test_a_bucket_that_is_full_drops_the_oldest(make: Make) -> None:
    store = make(max_bytes=50_000)
    for number in range(100):
        store.set(str(number), "x" * 1000)
    assert store.get("0") is None and store.get("99") is not None


# -- from where it is used ---------------------------------------------------------------------------------------------


async def test_threads_and_loops_use_one_store_at_once(make: Make) -> None:
    store = make()

    def use(thread: int) -> bool:
        for number in range(50):
            store.set(f"{thread} {number}", number)
        return all(store.get(f"{thread} {number}") == number for number in range(50))

    async def in_a_loop(thread: int) -> bool:
        return use(thread)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        uses = [pool.submit(use, thread) for thread in range(6)]
        uses += [pool.submit(lambda: asyncio.run(in_a_loop(6)))]
        assert use(7)
        assert all(one.result(30) for one in uses)
    assert len(_threads()) == 1


async def test_chat_completions_are_cached_for_other_processes(make: Make) -> None:
    cache = pytest.importorskip("autogen_ext.models.cache")
    replay = pytest.importorskip("autogen_ext.models.replay")
    model, idle = replay.ReplayChatCompletionClient(["one", "two words"]), replay.ReplayChatCompletionClient([])
    here, there = cache.ChatCompletionCache(model, make()), cache.ChatCompletionCache(idle, make())
    question, other = [UserMessage(content="Q", source="u")], [UserMessage(content="R", source="u")]
    first = await here.create(question)
    again = await there.create(question)
    assert first.content == "one"
    assert (again.content, again.cached, again.usage) == ("one", True, first.usage)
    streamed = [item async for item in here.create_stream(other)]
    cached = [item async for item in there.create_stream(other)]
    assert streamed[:-1] == cached[:-1] and "".join(map(str, cached[:-1])) == "two words"
    assert isinstance(cached[-1], CreateResult) and cached[-1].content == "two words"
    assert (await there.create(other)).cached
    loaded = cache.ChatCompletionCache.load_component(here.dump_component())
    assert isinstance(loaded.store, NatsCacheStore)
    loaded.store.close()


def test_a_forked_child_uses_it_too_and_disturbs_nothing(make: Make) -> None:
    store = make()
    store.set("parent", 1)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            assert store.get("parent") == 1
            store.set("child", 2)
            store.close()
            gc.collect()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (store.get("parent"), store.get("child")) == (1, 2)


def test_a_fork_while_the_store_is_locked(make: Make) -> None:
    store = make()
    with store._lock:
        if (child := os.fork()) == 0:
            code = 1
            try:
                store.set("k", 1)
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert store.get("k") == 1


def test_a_fork_while_other_threads_use_it(make: Make) -> None:
    store, ended = make(), threading.Event()

    def use() -> None:
        while not ended.is_set():
            store.set("k", 1)

    threads = [threading.Thread(target=use) for _ in range(3)]
    for thread in threads:
        thread.start()
    children = []
    for _ in range(5):
        if (child := os.fork()) == 0:
            os._exit(0 if store.get("k", 1) == 1 else 1)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    ended.set()
    for thread in threads:
        thread.join()
    assert codes == [0] * 5


_EXITS = """
import sys
from natsrt.contrib.cache import NatsCacheStore
store = NatsCacheStore(sys.argv[1])
store.set("k", 1)
print(store.get("k"))
if sys.argv[2] == "keep":
    keep = store
elif sys.argv[2] == "drop":
    del store
elif sys.argv[2] == "raise":
    raise SystemExit(3)
"""


@pytest.mark.parametrize(("how", "code"), [("keep", 0), ("drop", 0), ("raise", 3)])
async def test_the_interpreter_exits_at_once(
    own_server: EmbeddedServer, processes: Processes, how: str, code: int
) -> None:
    program = processes.python(_EXITS, own_server.url, how)
    await program.wait_for_line("1")
    assert await program.wait(10.0) == code
    assert program.stderr == ""


async def test_the_interpreter_exits_soon_while_the_server_hangs(
    own_server: EmbeddedServer, processes: Processes
) -> None:
    source = _EXITS + "\nimport os, signal, time\nos.kill(int(sys.argv[3]), signal.SIGSTOP)\n"
    program = processes.python(source, own_server.url, "keep", str(own_server.pid))
    try:
        assert await program.wait(15.0) == 0, program.describe()
    finally:
        own_server.resume()


def test_a_store_that_nobody_has_any_more_ends_its_thread(server: EmbeddedServer, namespace: str) -> None:
    store: NatsCacheStore[int] | None = NatsCacheStore(server.url, namespace=namespace)
    assert store is not None
    store.set("k", 1)
    assert len(_threads()) == 1
    store = None
    gc.collect()
    assert not _threads()


async def test_a_closed_store_leaves_no_thread_and_no_connection(own_server: EmbeddedServer) -> None:
    client = await nats.connect(own_server.url)
    with NatsCacheStore[int](own_server.url, options=Options(name="watched")) as store:
        store.set("k", 1)
        assert len(_threads()) == 1
    store.close()
    assert not _threads()
    for use in (lambda: store.get("k"), lambda: store.set("k", 1)):
        with pytest.raises(RuntimeError, match="closed"):
            use()
    await client.close()
    assert own_server.monitor_url is not None
    import httpx

    async with httpx.AsyncClient() as web:

        async def none_is_left() -> bool:
            answer = await web.get(f"{own_server.monitor_url}/connz")
            return not any("natsrt" in one.get("name", "") for one in answer.json()["connections"])

        await eventually(none_is_left)


async def test_who_waits_for_a_store_that_is_closed_is_told(own_server: EmbeddedServer) -> None:
    store = NatsCacheStore[int](own_server.url, timeout=20)
    store.set("k", 1)
    own_server.pause()
    waiting = [asyncio.create_task(asyncio.to_thread(store.get, "k")) for _ in range(3)]
    worker = store._worker
    assert worker is not None
    await eventually(lambda: len(asyncio.all_tasks(worker._thread._loop)) > 5)
    async with asyncio.timeout(10):
        await asyncio.to_thread(store.close)
        ended = await asyncio.gather(*waiting, return_exceptions=True)
    assert [str(one) for one in ended] == ["this cache store was closed meanwhile"] * 3
    with pytest.raises(RuntimeError, match="closed meanwhile"):
        worker.run(lambda bucket: bucket.get("k"))
    assert not _threads()
    own_server.resume()


# -- what goes wrong ---------------------------------------------------------------------------------------------------


async def test_a_server_that_restarts_is_not_noticed(make: Make, own_server: EmbeddedServer) -> None:
    store = make(own_server.url, timeout=10)
    store.set("k", 1)
    for kill in (False, True):
        await own_server.restart(kill=kill)
        assert store.get("k") == 1
        store.set("k", 1)


@pytest.mark.parametrize("hangs", [False, True])
async def test_a_server_that_is_gone_is_a_clear_error_in_time(
    make: Make, own_server: EmbeddedServer, hangs: bool
) -> None:
    store, unused = make(own_server.url, timeout=1), make(own_server.url, timeout=1)
    store.set("k", 1)
    if hangs:
        own_server.pause()
    else:
        await own_server.kill()
    for use in (lambda: store.get("k"), lambda: store.set("k", 2), lambda: unused.get("k")):
        begun = time.monotonic()
        with pytest.raises((ServerUnreachable, StreamUnavailable)):
            use()
        assert time.monotonic() - begun < 8  # seconds: 1, the time to give up, and what a busy machine adds
    if hangs:
        own_server.resume()
    else:
        await own_server.start()
    await eventually(lambda: _gets(store), 20.0)
    await eventually(lambda: _gets(unused), 20.0)


def _gets(store: NatsCacheStore[Any]) -> bool:
    try:
        return store.get("k") in (1, 2)
    except (ServerUnreachable, StreamUnavailable):
        return False


async def test_a_bucket_that_is_deleted_is_made_again(make: Make, js: JetStreamContext, namespace: str) -> None:
    store = make()
    for use in (lambda: store.get("k"), lambda: store.set("k", 2)):
        store.set("k", 1)
        await js.delete_stream(f"KV_{namespace}_natsrt_cache_default")
        assert use() is None
    assert store.get("k") == 2


def test_other_limits_of_the_same_bucket_are_a_clear_error(make: Make) -> None:
    make(max_bytes=100_000).set("k", 1)
    with pytest.raises(StreamUnavailable, match=r"max_bytes is 100000 and must be 200000.*nats stream edit"):
        make(max_bytes=200_000, timeout=2).get("k")


async def test_the_server_may_refuse(tmp_path: Path) -> None:
    config = tmp_path / "server.conf"
    config.write_text(
        f'listen: 127.0.0.1:-1\njetstream {{ store_dir: "{tmp_path}" }}\nserver_name: refusing\n'
        'authorization { users: [{ user: u, password: p, permissions: { publish: ["$JS.API.>"], subscribe: ">" } }] }'
    )
    async with EmbeddedServer(config=config) as server:
        with NatsCacheStore[int](options=Options(servers=server.url, user="u", password="p")) as store:
            assert store.get("k") is None
            with pytest.raises(PermissionDenied, match=r"\$KV\.natsrt_cache_default\.k"):
                store.set("k", 1)
        wrong = NatsCacheStore[int](options=Options(servers=server.url, user="u", password="wrong"))
        with pytest.raises(PermissionDenied, match="connect"):
            wrong.get("k")
        wrong.close()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"name": "a.b"}, "name"),
        ({"ttl": 0.5}, "ttl"),
        ({"ttl": "1"}, "ttl"),
        ({"timeout": 0}, "timeout"),
        ({"max_bytes": 0}, "max_bytes"),
        ({"servers": "http://x"}, "servers"),
    ],
)
def test_a_wrong_argument_is_named(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        NatsCacheStore(**settings)


def test_a_class_that_is_no_model_is_named() -> None:
    with pytest.raises(TypeError, match="types must be classes of Pydantic models"):
        NatsCacheStore(types=[dict])  # type: ignore[list-item]


def test_a_configuration_names_servers_and_has_no_secret(make: Make, server: EmbeddedServer, namespace: str) -> None:
    address = server.url.removeprefix("nats://")
    options = Options(servers=f"nats://me:hidden@{address}", namespace=namespace)
    store = NatsCacheStore[Any](
        options=options, name="n", ttl=60, max_bytes=10**6, timeout=3, types=[CreateResult, Point]
    )
    store.set("k", POINT)
    written = store.dump_component().model_dump_json()
    assert "hidden" not in written and "me:" not in written
    loaded = CacheStore.load_component(ComponentModel.model_validate_json(written))
    assert isinstance(loaded, NatsCacheStore) and loaded.dump_component() == store.dump_component()
    assert loaded.get("k") == POINT
    loaded.close()
    store.close()
    assert "types" not in make().dump_component().config
    wrong = json.loads(written)
    wrong["config"]["types"] = ["no_such_module.Class"]
    with pytest.raises(ConfigurationError, match=r"no_such_module\.Class"):
        CacheStore.load_component(wrong)


# -- what must be shown ------------------------------------------------------------------------------------------------


async def test_two_processes_share_a_thousand_keys(
    server: EmbeddedServer, namespace: str, processes: Processes
) -> None:
    users = [
        processes.python(PROGRAM, server.url, namespace, *spans, name="cache-user")
        for spans in (("0-500", "500-1000"), ("500-1000", "0-500"))
    ]
    for user in users:
        assert await user.wait_for_line("missing", 60.0) == "missing 0"
        assert await user.wait() == 0
        assert user.stderr == ""
