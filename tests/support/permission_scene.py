"""A server whose users have the permissions of a declaration, each of them perhaps without one permission.

One server has all users of all cases, each case in a namespace of its own: starting a server for each would take longer
than the cases.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nats
from autogen_core import AgentId, MessageContext, RoutedAgent, TypeSubscription, rpc
from autogen_core import event as event_handler
from nats.aio.client import Client
from nats.aio.msg import Msg
from natsrt_cli.declaration import Declaration
from natsrt_cli.grant import PUBLISH, SUBSCRIBE, Grant
from natsrt_cli.permissions import grants

from natsrt import NatsAgentRuntime, register
from tests.support.cli import Ended, natsrt

PASSWORD = "for-tests"
PROBED = re.compile(r"publish to '_INBOX_(web|feed|look)\.\w+\.t-")
"""The server may not report to callers who listens: they could forge replies to one another. They do without."""
CONFIG = """
server_name: "{name}"
listen: 127.0.0.1:-1
jetstream {{ store_dir: "{store}" }}
feature_flags {{ js_ack_fc_v2: false }}
"""


@dataclass
class Text:
    text: str


@dataclass(frozen=True)
class Case:
    """A declaration in a namespace of its own, in which ``user`` lacks the permission ``without``; None: it has all."""

    declaration: Declaration
    user: str
    without: Grant | None
    more: tuple[str, ...] = ()
    """Other subjects to which it may publish."""

    def users(self) -> list[dict[str, Any]]:
        """The users, as nats-server's configuration has them, and ``plain``, who may do all that a server allows."""
        plain = {"user": self.login("plain"), "password": PASSWORD}
        return [plain, *(self._user(name) for name in self.declaration.users)]

    def _user(self, name: str) -> dict[str, Any]:
        own = [
            grant
            for grant in grants(self.declaration, self.declaration.users[name])
            if name != self.user or grant != self.without
        ]
        allowed = {
            operation: [grant.subject for grant in own if grant.operation == operation]
            for operation in (PUBLISH, SUBSCRIBE)
        }
        allowed[PUBLISH] += self.more if name == self.user else ()
        permissions = {operation: subjects or {"deny": ">"} for operation, subjects in allowed.items()}
        return {"user": self.login(name), "password": PASSWORD, "permissions": permissions}

    def login(self, name: str) -> str:
        return f"{self.declaration.namespace}-{name}"


def in_namespace(declaration: Declaration, namespace: str) -> Declaration:
    return replace(declaration, namespace=namespace)


def configuration(cases: Iterable[Case], folder: Path) -> Path:
    """Write a server's configuration with all users of all cases."""
    users = [user for case in cases for user in case.users()]
    path = folder / "server.conf"
    path.write_text(
        CONFIG.format(name=folder.name, store=folder / "store") + "authorization: " + json.dumps({"users": users})
    )
    return path


class Served(RoutedAgent):
    """Answers calls, and remembers events and calls."""

    def __init__(self, seen: list[Any]) -> None:
        super().__init__("served")
        self.seen = seen
        self.state: dict[str, Any] = {"kept": "small"}

    @rpc
    async def on_text(self, message: Text, ctx: MessageContext) -> Text:
        self.seen.append(message)
        if message.text == "wait":
            await self._wait(ctx)
        return message

    async def _wait(self, ctx: MessageContext) -> None:
        """Wait until it is cancelled."""
        try:
            await ctx.cancellation_token.link_future(asyncio.get_running_loop().create_future())
        except asyncio.CancelledError:
            self.seen.append("cancelled")
            raise

    @event_handler
    async def on_event(self, message: dict, ctx: MessageContext) -> None:
        self.seen.append(message)
        if "wait" in message:
            await self._wait(ctx)

    async def save_state(self) -> Mapping[str, Any]:
        return self.state

    async def load_state(self, state: Mapping[str, Any]) -> None:
        self.state = dict(state)


class Scene:
    """The runtimes and clients of one case."""

    def __init__(self, url: str, case: Case, stack: AsyncExitStack) -> None:
        self.url, self.case, self._stack = url, case, stack
        self.seen: list[Any] = []
        """What agents received, of all workers."""
        self.violations: list[str] = []
        """What the server refused to clients, in lower case."""

    def subject(self, rest: str) -> str:
        return f"{self.case.declaration.namespace}.{rest}"

    def _login(self, name: str) -> dict[str, Any]:
        inbox = "_INBOX" if name == "plain" else self.case.declaration.users[name].inbox
        return {"user": self.case.login(name), "password": PASSWORD, "inbox_prefix": inbox}

    async def runtime(self, name: str, **settings: Any) -> NatsAgentRuntime:
        """A started runtime that hosts nothing yet."""
        return await self._stack.enter_async_context(self.unstarted(name, **settings))

    def unstarted(self, name: str, **settings: Any) -> NatsAgentRuntime:
        namespace = self.case.declaration.namespace
        defaults: dict[str, Any] = {"name": name, "check_after": 0.3, "offline_timeout": 3.0, "drain_timeout": 0.5}
        return NatsAgentRuntime(self.url, namespace=namespace, **self._login(name), **{**defaults, **settings})

    async def worker(self, name: str, **settings: Any) -> NatsAgentRuntime:
        """A worker that hosts what its user declares to host."""
        hosted = self.case.declaration.of(self.case.declaration.users[name].hosts)
        keyed = {agent_type.name: True for agent_type in hosted if agent_type.keyed}
        runtime = self.unstarted(name, keyed=keyed, **settings)
        for agent_type in hosted:
            if agent_type.instances:
                await runtime.register_agent_instance(Served(self.seen), AgentId(agent_type.name, "one"))
            else:
                await register(runtime, Served, agent_type.name, lambda: Served(self.seen))
            for topic in agent_type.subscribes:
                await runtime.add_subscription(TypeSubscription(topic, agent_type.name))
        return await self._stack.enter_async_context(runtime)

    async def client(self, name: str) -> Client:
        async def on_error(error: Exception) -> None:
            self.violations.append(str(error).lower())

        client = await nats.connect(self.url, **self._login(name), error_cb=on_error)
        self._stack.push_async_callback(client.close)
        return client

    async def ask(self, name: str, subject: str, body: bytes, **headers: str) -> Msg:
        client = await self.client(name)
        return await client.request(self.subject(subject), body, timeout=5, headers=headers or None)

    async def command(self, name: str, *arguments: str, code: int | None = 0, stdin: str | None = None) -> Ended:
        """Run a command of natsrt as a user; it must exit with ``code`` and complain of no permission."""
        login = [part for flag, value in self._login(name).items() for part in (f"--{flag.replace('_', '-')}", value)]
        namespace = ("--namespace", self.case.declaration.namespace, "--timeout", "3")
        ended = await natsrt(*arguments, "--server", self.url, *login, *namespace, stdin=stdin)
        assert code is None or ended.code == code, ended
        refused = [line for line in ended.stderr.splitlines() if "not let" in line and not PROBED.search(line)]
        assert not refused, ended
        return ended
