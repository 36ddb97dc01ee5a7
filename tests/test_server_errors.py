"""What a server says in ``-ERR``: limits, credentials and permissions, at the start and while a runtime runs."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from autogen_core import AgentId, MessageContext, RoutedAgent, TopicId, TypeSubscription, message_handler

import natsrt
from natsrt import KeyedOptions, NatsAgentRuntime
from natsrt.embedded import EmbeddedServer
from natsrt.transport import interests
from natsrt.transport.refusals import ServerError, SubscriptionLog
from tests.support import cli
from tests.support.processes import eventually
from tests.test_keyed import Add, Counting, Hold, Place, Total, agent

USER = '{ user: "app", password: "secret"%s }'
LOGIN = {"user": "app", "password": "secret"}


class Plain(RoutedAgent):
    """Is not keyed, and counts."""

    def __init__(self) -> None:
        super().__init__("counts")
        self.value = 0

    @message_handler
    async def on_add(self, message: Add, ctx: MessageContext) -> Total:
        self.value += message.amount
        return Total(self.value, "")

    @message_handler
    async def on_hold(self, message: Hold, ctx: MessageContext) -> None:
        raise AssertionError("a message arrived that is too large")


class Configured:
    """A server whose configuration changes while it runs."""

    def __init__(self, path: Path) -> None:
        self._path = path / "nats.conf"
        self._data = path / "data"
        self.server = EmbeddedServer(config=self._path, port=-1, data_dir=self._data)

    def write(self, settings: str) -> None:
        self._path.write_text(f"server_name: configured\nping_interval: 3s\njetstream {{}}\n{settings}\n")

    async def reload(self, settings: str) -> None:
        """Wait until the server has taken the settings: until then it may refuse everybody who connects."""
        self.write(settings)
        done = self._reloads
        assert self.server.pid is not None
        os.kill(self.server.pid, signal.SIGHUP)
        await eventually(lambda: self._reloads > done, timeout=10)

    @property
    def _reloads(self) -> int:
        assert self.server.log_path is not None
        return self.server.log_path.read_text().count("Reloaded server configuration")

    async def start(self, settings: str) -> str:
        self.write(settings)
        await self.server.start()
        return self.server.url


def account(limits: str = "", user: str = "") -> str:
    """An account with JetStream and these limits, one a line."""
    block = f"  limits {{\n{limits}\n  }}\n" if limits else ""
    return f"accounts {{\n APP {{\n  jetstream: enabled\n  users: [ {USER % user} ]\n{block} }}\n}}"


def users(permissions: str = "", user: str = "app") -> str:
    return f'authorization {{ users: [ {{ user: "{user}", password: "secret"{permissions} }} ] }}'


@pytest.fixture
async def configured(tmp_path: Path) -> AsyncIterator[Configured]:
    made = Configured(tmp_path)
    try:
        yield made
    finally:
        await made.server.stop()


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as entered:
        yield entered


def subscriptions(runtime: NatsAgentRuntime) -> int:
    """How many subscriptions the runtime's connection has."""
    return len(runtime.running.connection.client._subs)


# -- which subscriptions are refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(300))
def test_the_log_knows_which_subscriptions_a_server_has_refused(seed: int) -> None:
    chance = random.Random(seed)
    log, limit = SubscriptionLog(), chance.randint(1, 12)
    held: set[int] = set()
    refused: set[int] = set()
    wire: list[tuple[str, int]] = []
    queued: list[tuple[str, int]] = []
    known = {*range(chance.randint(0, 15))}
    log.restart(sorted(known))
    wire += [("sub", sid) for sid in sorted(known)]
    told: set[int] = set()
    for sid in range(100, 100 + chance.randint(5, 60)):
        choice = chance.random()
        if choice < 0.5:
            log.begun(sid)
            queued.append(("sub", sid))
            known.add(sid)
        elif choice < 0.75 and known:
            ended = chance.choice(sorted(known))
            known.remove(ended)
            log.ended(ended)
            queued.append(("unsub", ended))
        elif choice < 0.85:
            log.ping()  # it overtakes what is queued
            wire.append(("ping", 0))
        else:
            wire += _write(queued, log)
            log.ping()
            wire.append(("ping", 0))
        if chance.random() < 0.3:
            _serve(wire, limit, held, refused, log, told)
    wire += _write(queued, log)
    log.ping()
    wire.append(("ping", 0))
    _serve(wire, limit, held, refused, log, told)
    assert told == refused


def _write(queued: list[tuple[str, int]], log: SubscriptionLog) -> list[tuple[str, int]]:
    log.written()
    written = queued.copy()
    queued.clear()
    return written


def _serve(
    wire: list[tuple[str, int]], limit: int, held: set[int], refused: set[int], log: SubscriptionLog, told: set[int]
) -> None:
    """Do what a server does with everything on the wire."""
    for verb, sid in wire:
        if verb == "sub":
            if len(held) >= limit:
                log.refused()
                refused.add(sid)
            else:
                held.add(sid)
        elif verb == "unsub":
            held.discard(sid)
        else:
            told.update(log.pong())
    wire.clear()


@pytest.mark.parametrize(
    ("text", "ends", "credentials"),
    [
        ("Authorization Violation", True, True),
        ("User Authentication Expired", True, True),
        ("User Authentication Revoked", True, True),
        ("Account Authentication Expired", True, True),
        ("Authentication Timeout", True, False),
        ("maximum connections exceeded", True, False),
        ("maximum account active connections exceeded", True, False),
        ("Connection throttling is active. Please try again later.", True, False),
        ("Maximum Payload Violation", True, False),
        ("Unknown Protocol Operation", True, False),
        ("maximum control line exceeded", True, False),
        ("Secure Connection - TLS Required", True, False),
        ("maximum subscriptions exceeded", False, False),
        ('Permissions Violation for Publish to "a.b"', False, False),
        ('Permissions Violation for Subscription to "a.b" using queue "q" (sid "3")', False, False),
        ("Invalid Subject", False, False),
        ("Invalid Publish Subject", False, False),
    ],
)
def test_what_servers_say_is_understood(text: str, ends: bool, credentials: bool) -> None:
    error = ServerError(text)
    assert (error.text, error.ends_connection, error.refuses_credentials) == (text, ends, credentials)


# -- too many subscriptions ------------------------------------------------------------------------------------------


async def test_a_start_that_needs_more_subscriptions_than_allowed_says_so(
    configured: Configured, stack: AsyncExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    """With every limit the start ends, in the typed error or in a worker that is ready."""
    url = await configured.start("max_subscriptions: 60")
    place = Place(url, "first", stack)
    first = await place.worker("w1")
    needed = subscriptions(first) + 1  # reading the registry takes one more for a moment
    await first.stop()
    outcomes: list[str] = []
    for limit in range(1, needed + 3):
        configured.write(f"max_subscriptions: {limit}")
        await configured.server.restart()
        runtime = NatsAgentRuntime(url, namespace=f"n{limit}", connect_timeout=5.0)
        await runtime.register_factory("counting", lambda: Counting(place.life, "w"), expected_class=Counting)
        await runtime.add_subscription(TypeSubscription("numbers", "counting"))
        try:
            async with asyncio.timeout(10):
                await runtime.start()
        except natsrt.SubscriptionRefused as error:
            assert "maximum subscriptions exceeded" in str(error)
            outcomes.append("refused")
        else:
            assert runtime.ready
            outcomes.append("ready")
            await runtime.stop()
    assert outcomes == sorted(outcomes, reverse=True)
    assert outcomes[0] == "refused" and outcomes[-1] == "ready"
    assert "no NATS server answered" not in caplog.text


@pytest.mark.parametrize("where", ["server", "account"])
async def test_what_cannot_be_subscribed_is_refused_and_everything_else_goes_on(
    configured: Configured, stack: AsyncExitStack, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    limit = 40

    def settings(limit: int) -> str:
        return f"max_subscriptions: {limit}" if where == "server" else account(f"   max_subscriptions: {limit}")

    url = await configured.start(settings(limit))
    place = Place(url, "n", stack)
    login = LOGIN if where == "account" else {}
    worker = await place.worker("w1", **login)
    hosted = 0
    with pytest.raises(natsrt.SubscriptionRefused) as refused:
        for number in range(limit):
            await worker.register_factory(f"relay{number}", Plain)
            hosted += 1
    assert 0 < hosted < limit and "maximum subscriptions exceeded" in str(refused.value)
    with pytest.raises(natsrt.SubscriptionRefused):
        for number in range(limit):
            await worker.add_subscription(TypeSubscription(f"topic{number}", "counting"))
    assert (await worker.send_message(Add(), AgentId("relay0", "k"))).value == 1
    health = worker.health()
    assert (health.reconnects, health.connected) == (0, True)
    assert worker.running.registry.view.workers_hosting(f"relay{hosted}") == []
    lines = [record for record in caplog.records if "maximum subscriptions" in record.getMessage()]
    assert len([line for line in lines if line.name == "natsrt.connection"]) == 1
    assert health.server_error == "maximum subscriptions exceeded"


async def test_a_worker_without_room_keeps_its_keyed_agents_and_says_why_it_takes_no_more(
    configured: Configured, stack: AsyncExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    url = await configured.start("max_subscriptions: 40")
    place = Place(url, "n", stack)
    worker = await place.worker("w1", KeyedOptions(idle_timeout=0.5))
    caller = await place.caller()
    held = asyncio.ensure_future(caller.send_message(Hold("gate"), agent("held")))
    await place.life.gate("gate began").wait()
    calls = [caller.send_message(Add(), agent(f"k{number}")) for number in range(60)]
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    refused = [outcome for outcome in outcomes if isinstance(outcome, natsrt.SubscriptionRefused)]
    answered = [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]
    others = [outcome for outcome in outcomes if outcome not in (*refused, *answered)]
    assert not others and refused and answered, others[:1]
    place.life.gate("gate").set()
    await held
    assert worker.health().reconnects == 0 and worker.ready
    # There is room again when others were idle.
    await eventually(lambda: len(worker._catalog.find("counting").live) == 0, timeout=10)  # type: ignore[union-attr]
    again = await asyncio.gather(*(caller.send_message(Add(), agent(f"again{number}")) for number in range(10)))
    assert [total.value for total in again] == [1] * 10
    assert "no NATS server answered" not in caplog.text


async def test_agents_that_a_full_worker_declines_go_to_another(
    configured: Configured, stack: AsyncExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    url = await configured.start("max_subscriptions: 60")
    place = Place(url, "n", stack)
    full = await place.worker("full")
    with pytest.raises(natsrt.SubscriptionRefused):
        for number in range(60):
            await full.register_factory(f"relay{number}", Plain)
    roomy = await place.worker("roomy")
    caller = await place.caller()
    keys = [f"k{number}" for number in range(25)]
    totals = await asyncio.gather(*(caller.send_message(Add(), agent(key)) for key in keys))
    assert [total.value for total in totals] == [1] * len(keys)
    totals = await asyncio.gather(*(caller.send_message(Add(), agent(key)) for key in keys))
    assert [total.value for total in totals] == [2] * len(keys)
    assert {total.worker for total in totals} <= {"full", "roomy"}
    assert len(place.life.made) == len(keys)
    assert full.health().reconnects == roomy.health().reconnects == 0


async def test_keyed_agents_that_do_not_fit_after_a_reconnect_move_to_another_worker(
    configured: Configured, stack: AsyncExitStack
) -> None:
    url = await configured.start("max_subscriptions: 100")
    place = Place(url, "n", stack)
    first = await place.worker("w1")
    caller = await place.caller()
    keys = [f"k{number}" for number in range(30)]
    await asyncio.gather(*(caller.send_message(Add(), agent(key)) for key in keys))
    configured.write(f"max_subscriptions: {subscriptions(first) - 15}")
    await configured.server.restart()
    await eventually(lambda: caller.running.connection.connected and first.running.connection.connected, timeout=10)
    await place.worker("w2")
    await eventually(lambda: first.ready, timeout=20, message=f"{first.health()}")

    async def add(key: str) -> Total:
        try:
            total: Total = await caller.send_message(Add(), agent(key))
        except natsrt.StateConflict:  # a release whose acknowledgement found no room; the change was not kept
            total = await caller.send_message(Add(), agent(key))
        return total

    totals = await asyncio.gather(*map(add, keys))
    assert [total.value for total in totals] == [2] * len(keys)
    assert {total.worker for total in totals} == {"w1", "w2"}


# -- too many connections --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["server", "account"])
async def test_a_connection_too_many_is_refused_in_the_words_of_the_server(
    configured: Configured, stack: AsyncExitStack, where: str
) -> None:
    def settings(limit: int) -> str:
        return f"max_connections: {limit}" if where == "server" else account(f"   max_connections: {limit}")

    login = LOGIN if where == "account" else {}
    said = "maximum connections exceeded" if where == "server" else "maximum account active connections exceeded"
    url = await configured.start(settings(1))
    place = Place(url, "n", stack)
    worker = await place.worker("w1", **login)
    with pytest.raises(natsrt.ServerRefused) as refused:
        await place.caller(connect_timeout=1.0, **login)
    assert said in str(refused.value) and "natsrt server" not in str(refused.value)
    ended = await cli.natsrt("doctor", "--server", url, *_options(login))
    assert (ended.code, said in " ".join(ended.stdout.split())) == (7, True), ended.stdout
    await configured.reload(settings(2))
    caller = await place.caller(connect_timeout=5.0, **login)
    assert (await caller.send_message(Add(), agent("k"))).value == 1
    # One of the two is thrown out, and comes back when there is room.
    await configured.reload(settings(1))
    runtimes = (worker, caller)
    await eventually(lambda: any(said in " ".join(one.health().reasons) for one in runtimes), timeout=10)
    out = next(one for one in runtimes if not one.health().connected)
    assert out.health().server_error == said
    await configured.reload(settings(5))
    await eventually(lambda: worker.ready and caller.ready, timeout=10)
    assert (await caller.send_message(Add(), agent("k"))).value == 2
    assert out.health().server_error is None


def _options(login: dict[str, str]) -> list[str]:
    return [part for name, value in login.items() for part in (f"--{name}", value)]


# -- credentials and permissions that become wrong -------------------------------------------------------------------


async def test_credentials_that_become_wrong_are_permission_denied_until_they_are_right_again(
    configured: Configured, stack: AsyncExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    url = await configured.start(users())
    place = Place(url, "n", stack)
    worker = await place.worker("w1", **LOGIN)
    caller = await place.caller(offline_timeout=1.0, **LOGIN)
    assert (await caller.send_message(Add(), agent("k"))).value == 1
    held = asyncio.ensure_future(caller.send_message(Hold("gate"), agent("held")))
    await place.life.gate("gate began").wait()
    await configured.reload(users(user="another"))
    await eventually(lambda: "Authorization Violation" in " ".join(caller.health().reasons), timeout=10)
    work: list[Awaitable[Any]] = [
        held,
        caller.send_message(Add(), agent("k")),
        caller.publish_message(Add(), TopicId("numbers", "k")),
        caller.register_factory("plain", Plain),
        caller.add_subscription(TypeSubscription("topic", "counting")),
        caller.wait_for("counting", timeout=20),
    ]
    for call in work:
        with pytest.raises(natsrt.PermissionDenied) as denied:
            await call
        assert "Authorization Violation" in str(denied.value)
        assert "natsrt server" not in str(denied.value)
    assert "Authorization Violation" in caplog.text and "natsrt server" not in caplog.text
    assert caller.health().server_error == "Authorization Violation"
    place.life.gate("gate").set()
    await configured.reload(users())
    await eventually(lambda: caller.ready and worker.ready, timeout=10)
    assert (await caller.send_message(Add(), agent("k"))).value == 2
    assert caller.health().server_error is None


ALL = ', permissions: { publish: ">", subscribe: ">" }'
NO_PLAIN = ', permissions: { publish: ">", subscribe: { deny: ["n.agent.plain"] } }'
NO_KEYED = ', permissions: { publish: ">", subscribe: { deny: ["n.agent.counting.>"] } }'
NO_STORE = ', permissions: { publish: { deny: ["$KV.n_natsrt_agents.>"] }, subscribe: ">" }'


async def test_a_subscription_that_is_no_longer_allowed_shows_in_the_health_until_it_is_again(
    configured: Configured, stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interests, "REFUSED_AGAIN", 0.2)
    url = await configured.start(users(ALL))
    place = Place(url, "n", stack)
    worker = await place.worker("w1", **LOGIN)
    await worker.register_factory("plain", Plain)
    assert (await worker.send_message(Add(), AgentId("plain", "k"))).value == 1
    await configured.reload(users(NO_PLAIN))
    await eventually(lambda: "n.agent.plain" in " ".join(worker.health().reasons), timeout=10)
    assert not worker.ready and worker.health().connected
    assert "Permissions Violation" in str(worker.health().server_error)
    with pytest.raises(natsrt.PermissionDenied) as denied:
        await worker.add_subscription(TypeSubscription("more", "plain"))
    assert denied.value.subject == "n.agent.plain"
    await configured.reload(users(ALL))
    await eventually(lambda: worker.ready, timeout=10)
    assert (await worker.send_message(Add(), AgentId("plain", "k"))).value == 2
    assert worker.health().reconnects == 0


async def test_a_keyed_agent_that_may_no_longer_be_subscribed_is_released(
    configured: Configured, stack: AsyncExitStack
) -> None:
    url = await configured.start(users(ALL))
    place = Place(url, "n", stack)
    worker = await place.worker("w1", **LOGIN)
    await worker.send_message(Add(5), agent("k"))
    await configured.reload(users(NO_KEYED))
    await eventually(lambda: ("counting/k", "w1") in place.life.closed, timeout=10)
    with pytest.raises(natsrt.PermissionDenied):
        await worker.send_message(Add(1), agent("k"))
    await configured.reload(users(ALL))

    async def answers() -> bool:
        try:
            return bool((await worker.send_message(Add(1), agent("k"))).value == 6)
        except natsrt.PermissionDenied:
            return False

    await eventually(answers, timeout=15)


async def test_a_store_that_is_no_longer_allowed_is_not_a_silent_jetstream(
    configured: Configured, stack: AsyncExitStack
) -> None:
    url = await configured.start(users(ALL))
    place = Place(url, "n", stack)
    worker = await place.worker("w1", **LOGIN)
    await worker.send_message(Add(5), agent("k"))
    await configured.reload(users(NO_STORE))

    async def denied() -> BaseException | None:
        try:
            await worker.send_message(Add(0), agent("other"))
            await worker.send_message(Add(1), agent("k"))
        except natsrt.NatsrtError as error:
            return error
        return None

    error = await eventually(denied, timeout=15)
    assert "$KV.n_natsrt_agents" in str(error)


# -- messages that are too large -------------------------------------------------------------------------------------


async def test_a_message_that_is_too_large_for_the_account_is_refused_as_such(
    configured: Configured, stack: AsyncExitStack
) -> None:
    """The server announces its own limit only, not that of the account."""
    url = await configured.start(account("   max_payload: 20000"))
    place = Place(url, "n", stack)
    worker = await place.worker("w1", **LOGIN)
    await worker.register_factory("plain", Plain)
    with pytest.raises(natsrt.MessageTooLarge):
        async with asyncio.timeout(20):
            await worker.send_message(Hold("x" * 30_000), AgentId("plain", "k"))
    await eventually(lambda: worker.ready, timeout=10)
    assert (await worker.send_message(Add(), AgentId("plain", "k"))).value == 1
    with pytest.raises(natsrt.MessageTooLarge):
        await worker.send_message(Hold("x" * 30_000), AgentId("plain", "k"))


# -- logs --------------------------------------------------------------------------------------------------------------


async def test_an_error_that_comes_again_and_again_is_logged_once(
    configured: Configured, stack: AsyncExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    url = await configured.start(users(', permissions: { publish: { deny: ["secret.>"] }, subscribe: ">" }'))
    place = Place(url, "n", stack)
    caller = await place.caller(**LOGIN)
    connection = caller.running.connection
    for number in range(20):
        await connection.publish(f"secret.{number}", b"")
    await connection.barrier()
    lines = [record for record in caplog.records if record.levelno >= logging.WARNING and "secret." in record.message]
    assert len(lines) == 1
    assert connection.connected and connection.reconnects == 0
