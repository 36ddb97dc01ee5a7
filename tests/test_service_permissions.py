"""Each permission that natsrt generates for plain NATS services is necessary and sufficient.

See `tests.support.permission_matrix`. The matrix has the permissions of services alone.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack
from dataclasses import dataclass

import pytest
from autogen_core import AgentId, MessageContext, RoutedAgent, rpc
from nats.aio.msg import Msg
from natsrt_cli.declaration import parse
from natsrt_cli.grant import Grant
from natsrt_cli.permissions import grants

import natsrt
from natsrt import NatsAgentRuntime
from natsrt.contrib.services import ServiceAgent, offer_service
from natsrt.embedded import EmbeddedServer
from tests.support.permission_matrix import Matrix
from tests.support.permission_scene import Scene
from tests.support.permission_tests import MatrixTests

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

DECLARATION = parse(
    """
    [types.weather]
    [types.clock]

    [users.desk]
    role = "worker"
    hosts = ["weather"]
    calls = ["weather"]
    requests = ["station.get.*"]
    [users.gate]
    role = "worker"
    hosts = ["clock"]
    calls = ["clock"]
    offers = ["clock.get"]
    [users.web]
    role = "caller"
    requests = ["clock.get"]
    [users.shop]
    role = "client"
    requests = ["clock.get"]
    [users.station]
    role = "client"
    offers = ["station.>"]
    [users.look]
    role = "tool"
    """,
    "services",
)


def _permissions() -> list[tuple[str, Grant]]:
    """All that only services need. Workers may reply to runtimes, and are monitored, without services."""
    found = [(name, grant) for name, user in DECLARATION.users.items() for grant in grants(DECLARATION, user)]
    return [
        (name, grant)
        for name, grant in found
        if name in ("shop", "station")
        or grant.why.startswith("requests to")
        or (name == "gate" and grant.subject == "_INBOX_shop.>")
    ]


MATRIX = Matrix(DECLARATION, _permissions(), "s")
needs = MATRIX.needs


@dataclass
class Text:
    text: str


class Clock(RoutedAgent):
    @rpc
    async def tell(self, message: Text, ctx: MessageContext) -> Text:
        return Text(f"{message.text}: noon")


async def _answers(message: Msg) -> None:
    await message.respond(b'{"text": "rain"}')


async def _offers_clock(scene: Scene) -> None:
    gate = await scene.runtime("gate")
    await natsrt.register(gate, Clock, "clock", lambda: Clock("tells the time"))
    await offer_service(gate, "clock", subject="clock.get", request_type=Text, response_type=Text)


async def _asks(runtime: NatsAgentRuntime, subject: str) -> None:
    async with asyncio.timeout(3), runtime.request_plain(subject, b'{"text": "now"}') as replies:
        assert json.loads((await anext(replies)).payload)["text"] in ("rain", "now: noon")


@needs("desk", "publish to station.get.*")
@needs("station", "subscribe to station.>", "publish to _INBOX_desk.>")
async def an_agent_asks_a_service(scene: Scene) -> None:
    station = await scene.client("station")
    await station.subscribe("station.>", cb=_answers)
    await station.flush()
    desk = await scene.runtime("desk")

    def make() -> ServiceAgent:
        return ServiceAgent(subject="station.get.now", request_type=Text, response_type=Text, timeout=3)

    await natsrt.register(desk, ServiceAgent, "weather", make)
    async with asyncio.timeout(5):
        assert await desk.send_message(Text("now"), AgentId("weather", "default")) == Text("rain")


@needs("gate", "subscribe to clock.get", "publish to _INBOX_shop.>")
@needs("shop", "publish to clock.get", "subscribe to _INBOX_shop.>")
async def a_client_uses_an_offered_service(scene: Scene) -> None:
    await _offers_clock(scene)
    shop = await scene.client("shop")
    reply = await shop.request("clock.get", b'{"text": "now"}', timeout=3)
    assert json.loads(reply.data) == {"text": "now: noon"}


@needs("web", "publish to clock.get")
async def a_caller_asks_a_service(scene: Scene) -> None:
    await _offers_clock(scene)
    await _asks(await scene.runtime("web"), "clock.get")


@needs("station", "subscribe to $SRV.>", "publish to _INBOX_look.>")
async def a_service_is_listed(scene: Scene) -> None:
    station, look = await scene.client("station"), await scene.client("look")

    async def ping(message: Msg) -> None:
        await message.respond(b"{}")

    await station.subscribe("$SRV.PING.station", cb=ping)
    await station.flush()
    await look.request("$SRV.PING.station", b"", timeout=3)


# -- the tests ---------------------------------------------------------------------------------------------------------


class TestEachPermission(MatrixTests):
    pass


async def test_a_request_that_is_not_permitted_is_an_error_at_once(matrix: EmbeddedServer) -> None:
    async with AsyncExitStack() as stack:
        scene = Scene(matrix.url, MATRIX.case_of("web", None), stack)
        await _offers_clock(scene)
        web = await scene.runtime("web")
        with pytest.raises(natsrt.PermissionDenied, match="does not let this user publish to 'station.get.now'"):
            await _asks(web, "station.get.now")


async def test_an_offer_that_is_not_permitted_is_an_error(matrix: EmbeddedServer) -> None:
    async with AsyncExitStack() as stack:
        gate = await Scene(matrix.url, MATRIX.case_of("gate", None), stack).runtime("gate")
        with pytest.raises(natsrt.PermissionDenied, match="subscribe to 'other.get'"):
            await offer_service(gate, "clock", subject="other.get", request_type=Text, response_type=Text)
        assert list(gate._plain) == []
