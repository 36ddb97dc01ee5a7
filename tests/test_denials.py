"""What the generated permissions do not include is refused: each denial is tried against a real server."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
import pytest_asyncio
from natsrt_cli.forbidden import forbidden, forms
from natsrt_cli.grant import SUBSCRIBE

from natsrt.embedded import EmbeddedServer
from tests.support.permission_scene import Case, Scene, configuration, in_namespace
from tests.support.processes import REPOSITORY, eventually
from tests.test_permission_matrix import DECLARATION

CASE = Case(in_namespace(DECLARATION, "denials"), "web", None)

FORBIDDEN = {
    # A worker of other types: their calls, control, events and the inboxes of clients that do not call its own.
    "safe": [
        "subscribe agent.echo",
        "subscribe agent.ledger",
        "subscribe agent.ledger.one",
        "subscribe natsrt.control.ledger",
        "subscribe natsrt.control.ledger.at.x",
        "subscribe topic.orders.one",
        "subscribe topic.ledger=3A.x.one",
        "subscribe _INBOX_bank.x",
        "publish agent.ledger",
        "publish agent.ledger.one",
        "publish natsrt.control.ledger.at.x",
        "publish topic.orders.one",
        "publish _INBOX_shop.x",
        "publish natsrt.registry.worker.x",
        "publish $JS.API.STREAM.DELETE.KV_natsrt_agents",
    ],
    # A caller: the states, the registry, control, other inboxes, other types.
    "web": [
        "publish $JS.API.INFO",
        "publish $JS.API.STREAM.INFO.KV_denials_natsrt_registry",
        "publish $JS.API.DIRECT.GET.KV_denials_natsrt_agents.$KV.denials_natsrt_agents.a.ledger.one",
        "publish $KV.denials_natsrt_agents.a.ledger.one",
        "publish $KV.denials_natsrt_registry.r.worker.x",
        "publish natsrt.registry.worker.x",
        "publish natsrt.control.ledger.at.x",
        "publish natsrt.control.echo",
        "publish natsrt.peer.x",
        "publish agent.vault",
        "publish agent.vault.one",
        "publish topic.bell.one",
        "publish _INBOX_web.x",
        "publish _INBOX_feed.x",
        "subscribe $KV.denials_natsrt_agents.>",
        "subscribe agent.echo",
        "subscribe topic.orders.one",
        "subscribe natsrt.cancel",
        "subscribe natsrt.view",
        "subscribe natsrt.worker.x",
        "subscribe _INBOX_feed.>",
    ],
    # A publisher: the same, and agents that take no events of its topics.
    "feed": ["publish agent.echo", "publish agent.vault", "publish topic.bell.one", "publish $JS.API.INFO"],
    # A client of one type: everything else.
    "shop": [
        "publish agent.ledger",
        "publish agent.echo.one",
        "publish agent.vault",
        "publish topic.orders.one",
        "publish natsrt.cancel",
        "publish natsrt.view",
        "publish natsrt.worker.x",
        "publish $SRV.PING",
        "subscribe natsrt.registry.>",
        "subscribe agent.echo",
        "subscribe topic.news.one",
        "subscribe _INBOX_web.>",
    ],
    # A tool: what an operator may.
    "look": ["publish natsrt.control.echo", "publish $JS.API.INFO", "publish agent.ledger", "publish topic.news.one"],
}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def denying(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EmbeddedServer]:
    async with EmbeddedServer(config=configuration([CASE], tmp_path_factory.mktemp("denials"))) as server:
        yield server


def subject_of(rest: str) -> str:
    return rest if rest.startswith(("$", "_")) else f"denials.{rest}"


async def is_refused(scene: Scene, user: str, operation: str, subject: str) -> None:
    client = await scene.client(user)
    scene.violations.clear()
    if operation == SUBSCRIBE:
        await client.subscribe(subject)
    else:
        await client.publish(subject, b"", reply=f"{scene.case.declaration.users[user].inbox}.answer")
    expected = f'permissions violation for {"subscription" if operation == SUBSCRIBE else "publish"} to "{subject}"'
    await eventually(lambda: any(expected.lower() in text for text in scene.violations), message=f"{user}: {subject}")


@pytest.mark.parametrize("user", FORBIDDEN)
async def test_what_a_user_is_not_for_is_refused(denying: EmbeddedServer, user: str) -> None:
    async with AsyncExitStack() as stack:
        scene = Scene(denying.url, CASE, stack)
        for line in FORBIDDEN[user]:
            operation, _, rest = line.partition(" ")
            await is_refused(scene, user, operation, subject_of(rest))


@pytest.mark.parametrize("user", list(DECLARATION.users))
async def test_what_would_make_a_user_another_role_is_refused(denying: EmbeddedServer, user: str) -> None:
    async with AsyncExitStack() as stack:
        scene = Scene(denying.url, CASE, stack)
        declaration = CASE.declaration
        client, expected = await scene.client(user), set[str]()
        for never in forbidden(declaration, declaration.users[user]):
            for subject in forms(declaration, declaration.users[user], never, "anybody"):
                if never.operation == SUBSCRIBE:
                    await client.subscribe(subject)
                else:
                    await client.publish(subject, b"!")
                what = "subscription" if never.operation == SUBSCRIBE else "publish"
                expected.add(f'permissions violation for {what} to "{subject}"'.lower())
        assert expected
        await eventually(lambda: not [text for text in expected if text not in "\n".join(scene.violations)])


async def test_a_trace_goes_only_where_its_user_may_publish(denying: EmbeddedServer) -> None:
    async with AsyncExitStack() as stack:
        scene = Scene(denying.url, CASE, stack)
        client = await scene.client("web")
        record = "$KV.denials_natsrt_agents.a.ledger.one"
        await client.publish(scene.subject("agent.ledger"), b"", headers={"Nats-Trace-Dest": record})
        expected = f'permissions violation for publish to "{record}"'
        await eventually(lambda: any(expected.lower() in text for text in scene.violations))


def test_each_test_that_the_security_page_names_exists() -> None:
    page = (REPOSITORY / "docs" / "security.md").read_text("utf-8")
    code = "".join(path.read_text("utf-8") for path in (REPOSITORY / "tests").rglob("*.py"))
    named = set(re.findall(r"`(test_\w+)`", page))
    assert len(named) > 15
    assert not [name for name in named if f"def {name}(" not in code]
