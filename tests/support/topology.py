"""Servers that are joined otherwise than as a cluster: a hub with a leaf node, and clusters joined by gateways."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import nats
from nats.aio.msg import Msg

from benchmarks.chaos.proxy import Proxy
from natsrt.embedded import EmbeddedServer
from tests.support.processes import eventually


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, for what a client cannot be told later."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


@dataclass(frozen=True)
class HubAndLeaf:
    """A hub, and a leaf node that is connected to it through ``link``."""

    hub: EmbeddedServer
    leaf: EmbeddedServer
    link: Proxy

    async def joined(self) -> None:
        """Wait until messages pass from the leaf to the hub, and back."""
        async with await nats.connect(self.hub.url) as there, await nats.connect(self.leaf.url) as here:
            heard = await there.subscribe("joined.up", cb=answer)
            back = await here.subscribe("joined.down", cb=answer)
            for client, subject in ((here, "joined.up"), (there, "joined.down")):
                await eventually(lambda client=client, subject=subject: answers(client, subject), timeout=15)
            await heard.unsubscribe()
            await back.unsubscribe()


async def answer(message: Msg) -> None:
    await message.respond(b"")


async def answers(client: nats.NATS, subject: str) -> bool:
    try:
        await client.request(subject, b"", timeout=1)
    except nats.errors.Error:
        return False
    return True


@asynccontextmanager
async def hub_and_leaf(
    directory: Path,
    *,
    hub_domain: str | None = "hub",
    leaf_domain: str | None = "leaf",
    joined: bool = True,
    at_leaf: str = "",
) -> AsyncIterator[HubAndLeaf]:
    """``hub_domain`` None: a JetStream without a name. ``leaf_domain`` None: a leaf node without JetStream.

    ``at_leaf`` is more configuration of the leaf node.
    """
    (port,) = free_ports(1)
    domain = f"domain: {hub_domain}" if hub_domain else ""
    config = directory / "hub.conf"
    config.write_text(f"jetstream {{ {domain} }}\nleafnodes {{ host: 127.0.0.1, port: {port}, no_advertise: true }}\n")
    async with AsyncExitStack() as stack:
        hub = EmbeddedServer(config=config, data_dir=directory / "hub", port=-1)
        await stack.enter_async_context(hub)
        link = await stack.enter_async_context(Proxy(f"nats://127.0.0.1:{port}"))
        if not joined:
            link.cut()
        remote = f'leafnodes {{ reconnect: 1, remotes: [ {{ url: "{link.url}" }} ] }}\n'
        config = directory / "leaf.conf"
        config.write_text((f"jetstream {{ domain: {leaf_domain} }}\n" if leaf_domain else "") + remote + at_leaf)
        leaf = EmbeddedServer(config=config, data_dir=directory / "leaf" if leaf_domain else None, port=-1)
        await stack.enter_async_context(leaf)
        servers = HubAndLeaf(hub, leaf, link)
        if joined:
            await servers.joined()
        yield servers


@asynccontextmanager
async def supercluster(directory: Path) -> AsyncIterator[tuple[EmbeddedServer, EmbeddedServer]]:
    """Two clusters of one server each, joined by gateways; both must run for a leader of JetStream to be elected."""
    sides = ("east", "west")
    gateways, routes = free_ports(2), free_ports(2)
    remotes = ", ".join(
        f'{{ name: {side}, url: "nats://127.0.0.1:{port}" }}' for side, port in zip(sides, gateways, strict=True)
    )
    servers = []
    for side, gateway, route in zip(sides, gateways, routes, strict=True):
        config = directory / f"{side}.conf"
        config.write_text(
            f"server_name: {side}\njetstream {{ }}\n"
            f"cluster {{ name: {side}, listen: '127.0.0.1:{route}', routes: [ 'nats://127.0.0.1:{route}' ] }}\n"
            f"gateway {{ name: {side}, listen: '127.0.0.1:{gateway}', gateways: [ {remotes} ] }}\n"
        )
        servers.append(EmbeddedServer(config=config, data_dir=directory / side, port=-1, ready_timeout=30))
    async with AsyncExitStack() as stack:
        await asyncio.gather(*(server.start() for server in servers))
        for server in servers:
            stack.push_async_callback(server.stop)
        await eventually(lambda: has_leader(servers[0]), timeout=30)
        yield servers[0], servers[1]


async def has_leader(server: EmbeddedServer) -> bool:
    """Whether JetStream answers."""
    async with await nats.connect(server.url) as client:
        try:
            await client.jetstream(timeout=1).account_info()
        except (nats.errors.Error, TimeoutError):
            return False
        return True
