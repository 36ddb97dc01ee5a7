"""NATS services and agents: a responder that knows only NATS becomes an agent, and an agent becomes a NATS service.

Run it: python examples/nats_service.py
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass

import nats
from autogen_core import AgentId, MessageContext, RoutedAgent, message_handler
from local_server import local_server
from nats.aio.client import Client
from nats.aio.msg import Msg

import natsrt
from natsrt import NatsAgentRuntime
from natsrt.contrib.services import ServiceAgent, offer_service


@dataclass
class City:
    name: str


@dataclass
class Weather:
    text: str


@dataclass
class Advice:
    text: str


async def answer(request: Msg) -> None:
    """The responder, which could be written in any language."""
    name = json.loads(request.data)["name"]
    await request.respond(json.dumps({"text": f"it rains in {name}"}).encode())


class Adviser(RoutedAgent):
    """Asks the agent ``weather``, and does not know that it is a NATS service."""

    def __init__(self) -> None:
        super().__init__("says what to wear")

    @message_handler
    async def advise(self, message: City, ctx: MessageContext) -> Advice:
        weather = await self.send_message(message, AgentId("weather", "default"))
        return Advice(f"Take an umbrella: {weather.text}.")


async def find_services(client: Client) -> list[str]:
    """The names and schemas of the services that answer first, as ``nats service info`` shows them."""
    reply = await client.request("$SRV.INFO.advice", b"")
    [endpoint] = json.loads(reply.data)["endpoints"]
    return sorted(json.loads(endpoint["metadata"]["request_schema"])["properties"])


async def main() -> None:
    async with local_server() as url, NatsAgentRuntime(url) as runtime:
        station = await nats.connect(url)
        await station.subscribe("weather.get", cb=answer)

        def weather() -> ServiceAgent:
            return ServiceAgent(subject="weather.get", request_type=City, response_type=Weather)

        await natsrt.register(runtime, ServiceAgent, "weather", weather)
        await Adviser.register(runtime, "adviser", Adviser)
        await offer_service(
            runtime, "adviser", subject="advice.get", request_type=City, response_type=Advice, name="advice"
        )

        shop = await nats.connect(url)  # a client that knows only NATS
        print(f"the service takes: {', '.join(await find_services(shop))}")
        reply = await shop.request("advice.get", b'{"name": "Bergen"}')
        print(json.loads(reply.data)["text"])
        await shop.close()
        await station.close()


if __name__ == "__main__":
    asyncio.run(main())
