"""What users can do to the tasks of others: the lines about tasks in docs/security.md."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import nats.js.errors
import orjson
import pytest
import pytest_asyncio
from autogen_core import AgentId, MessageContext, RoutedAgent, rpc
from nats.aio.msg import Msg
from natsrt_cli.declaration import parse
from natsrt_cli.forbidden import forbidden, forms
from natsrt_cli.grant import PUBLISH, SUBSCRIBE

import natsrt
from natsrt import NatsAgentRuntime
from natsrt.embedded import EmbeddedServer
from natsrt.wire import envelope
from tests.support.permission_scene import Case, Scene, configuration
from tests.support.processes import eventually

pytestmark = pytest.mark.timeout(120)

CASE = Case(
    parse(
        """
        namespace = "security"
        [types.jobs]
        [types.others]
        [types.kept]
        keyed = true

        [users.mill]
        role = "worker"
        hosts = ["jobs", "others", "kept"]
        [users.yard]
        role = "worker"
        hosts = ["others"]
        [users.web]
        role = "caller"
        submits = ["jobs", "kept"]
        [users.mob]
        role = "caller"
        submits = ["others"]
        [users.shop]
        role = "client"
        calls = ["jobs"]
        [users.ops]
        role = "operator"
        """,
        "tasks",
    ),
    "nobody",
    None,
)
WITHIN = 10.0
TASKS, RESULTS = "natsrt_events_tasks", "natsrt_results"


class Works(RoutedAgent):
    goes_on, holds, handled = asyncio.Event(), False, list[str]()

    def __init__(self) -> None:
        super().__init__("works")

    @rpc
    async def on_job(self, message: str, ctx: MessageContext) -> str:
        Works.handled.append(message)
        if message == "wait":
            await ctx.cancellation_token.link_future(asyncio.get_running_loop().create_future())
        if message == "hold":
            Works.holds = True
            await Works.goes_on.wait()
        return message.upper()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EmbeddedServer]:
    async with EmbeddedServer(config=configuration([CASE], tmp_path_factory.mktemp("tasks"))) as started:
        yield started


@pytest_asyncio.fixture
async def scene(server: EmbeddedServer) -> AsyncIterator[Scene]:
    async with AsyncExitStack() as stack:
        yield Scene(server.url, CASE, stack)


async def worker(scene: Scene) -> NatsAgentRuntime:
    runtime = scene.unstarted("mill", keyed=["kept"])
    for name in ("jobs", "others", "kept"):
        await natsrt.register(runtime, Works, name, Works)
    started: NatsAgentRuntime = await scene._stack.enter_async_context(runtime)
    Works.goes_on, Works.holds, Works.handled = asyncio.Event(), False, []
    for name in ("jobs", "others", "kept"):
        await started.take_tasks(name)
    return started


async def refuses(scene: Scene, user: str, operation: str, subject: str) -> None:
    """Wait until the server refuses this to a user."""
    client = await scene.client(user)
    scene.violations.clear()
    if operation == SUBSCRIBE:
        await client.subscribe(subject)
    else:
        await client.publish(subject, b"{}")
    what = "subscription" if operation == SUBSCRIBE else "publish"
    expected = f'permissions violation for {what} to "{subject}"'.lower()
    await eventually(lambda: any(expected in text for text in scene.violations), message=f"{user}: {subject}")


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("user", "operation", "subject"),
    [
        *(
            (user, PUBLISH, f"natsrt.task.{kind}.{agent_type}.k.m")
            for kind in ("result", "progress")
            for user, agent_type in (("web", "jobs"), ("mob", "others"), ("shop", "jobs"), ("yard", "jobs"))
        ),
        *((user, PUBLISH, "natsrt.told.result.jobs.k.m") for user in ("web", "mill", "yard", "ops")),
        *((user, SUBSCRIBE, "natsrt.told.result.jobs.k.m") for user in ("mob", "shop", "mill", "yard")),
        *((user, SUBSCRIBE, "natsrt.task.result.jobs.k.m") for user in ("web", "mill", "yard", "ops")),
        *((user, PUBLISH, "natsrt.tasks.jobs") for user in ("mob", "shop", "yard")),
        *((user, SUBSCRIBE, "natsrt.tasks.jobs") for user in ("web", "yard", "ops")),
        *((user, PUBLISH, "topic.natsrt.task.jobs=3A.m.k") for user in ("mob", "shop", "mill", "yard")),
        *((user, PUBLISH, f"natsrt.again.security_{TASKS}.jobs") for user in ("web", "mob", "shop")),
    ],
)
async def test_what_a_user_may_not_do_with_tasks_is_refused(
    scene: Scene, user: str, operation: str, subject: str
) -> None:
    await refuses(scene, user, operation, scene.subject(subject))


@pytest.mark.parametrize("user", list(CASE.declaration.users))
async def test_what_would_give_a_user_more_of_tasks_than_it_is_meant_to_have_is_refused(
    scene: Scene, user: str
) -> None:
    declaration, tried = CASE.declaration, 0
    for never in forbidden(declaration, declaration.users[user]):
        if "tasks" in never.why or "results" in never.why:
            for subject in forms(declaration, declaration.users[user], never, "anybody"):
                await refuses(scene, user, never.operation, subject)
                tried += 1
    assert tried


def test_what_a_caller_may_not_do_with_tasks_is_tried_with_the_subjects_that_are_in_use() -> None:
    declaration, user = CASE.declaration, CASE.declaration.users["web"]
    tried = {
        subject for never in forbidden(declaration, user) for subject in forms(declaration, user, never, "anybody")
    }
    assert tried >= {
        *(f"security.natsrt.{tree}.jobs.anybody.anybody" for tree in ("task.result", "task.progress", "told.result")),
        "security.natsrt.told.result.others.anybody.anybody",
        "security.natsrt.tasks.others",
        *(f"$JS.API.STREAM.PURGE.security_{stream}" for stream in (TASKS, RESULTS)),
    }
    assert "security.natsrt.tasks.jobs" not in {
        subject
        for never in forbidden(declaration, user)
        if never.operation == PUBLISH
        for subject in forms(declaration, user, never, "anybody")
    }


async def test_a_caller_is_told_of_the_tasks_of_the_type_that_it_asks_about_only(scene: Scene) -> None:
    await worker(scene)
    plain = await scene.runtime("plain")
    ticket = await plain.submit_message("a", AgentId("others", "k"))
    assert await ticket.result(WITHIN) == "A"
    for want in ("result", "status", "cancel"):
        data = orjson.dumps({"id": ticket.id, "want": want, "ttl": 60})
        body = envelope.encode(envelope.TASKS, '"id":"question","source":"/"', data)
        refused = await scene.ask("web", "natsrt.tasks.jobs", body)
        assert b"is not a task of the agent type in the subject" in refused.data
        assert b"natsrt.reply" in (await scene.ask("mob", "natsrt.tasks.others", body)).data or want == "result"


# -- what is possible --------------------------------------------------------------------------------------------------


async def test_who_submits_tasks_to_a_type_reads_the_results_of_all_its_tasks(scene: Scene) -> None:
    await worker(scene)
    web, heard = await scene.client("web"), list[bytes]()

    async def hear(message: Msg) -> None:
        heard.append(message.data)

    await web.subscribe(scene.subject("natsrt.told.*.jobs.*.*"), cb=hear)
    await web.flush()
    plain = await scene.runtime("plain")
    await plain.submit_message("secret", AgentId("jobs", "k"))
    await eventually(lambda: any(b"SECRET" in data for data in heard))


async def test_who_submits_tasks_to_a_type_cancels_each_whose_id_it_knows(scene: Scene) -> None:
    await worker(scene)
    plain = await scene.runtime("plain")
    ticket = await plain.submit_message("wait", AgentId("jobs", "k"))
    web = await scene.runtime("web")
    assert await web.ticket(ticket.id).cancel()
    with pytest.raises(natsrt.TaskCancelled):
        await ticket.result(WITHIN)


async def acknowledged_on(scene: Scene, agent_type: str, message_id: str) -> None:
    """Have the stream of tasks acknowledge a message on the subject of a result of an agent of the key k, and wait
    until that is stored there."""
    subject = scene.subject(f"natsrt.task.result.{agent_type}.k.{message_id}")
    web = await scene.client("web")
    await web.publish(scene.subject(f"topic.natsrt.task.jobs=3A.{message_id}.trash"), b"{}", reply=subject)
    await web.flush()
    js = (await scene.client("plain")).jetstream()

    async def stored() -> bool:
        with contextlib.suppress(nats.js.errors.NotFoundError):
            return (await js.get_last_msg(f"security_{RESULTS}", subject)).data.startswith(b'{"stream":')
        return False

    await eventually(stored)


@pytest.mark.parametrize("agent_type", ["jobs", "kept"])
async def test_an_acknowledgement_in_place_of_a_result_gives_way_to_it(scene: Scene, agent_type: str) -> None:
    """Such a message is not taken for a result, also if it was stored while the task was handled."""
    await worker(scene)
    plain, agent = await scene.runtime("plain"), AgentId(agent_type, "k")
    await acknowledged_on(scene, agent_type, "before")
    before = await plain.submit_message("a", agent, message_id="before")
    assert await before.result(WITHIN) == "A"
    Works.goes_on.clear()
    during = await plain.submit_message("hold", agent, message_id="during")
    await eventually(lambda: Works.holds)
    await acknowledged_on(scene, agent_type, "during")
    Works.goes_on.set()
    assert await during.result(WITHIN) == "HOLD"
    assert (await during.status()).state == "done"
    assert Works.handled.count("hold") == 1


async def test_a_cancellation_takes_the_place_of_an_acknowledgement(scene: Scene) -> None:
    await worker(scene)
    plain = await scene.runtime("plain")
    ticket = await plain.submit_message("a", AgentId("jobs", "k"), message_id="late", delay=3600)
    await acknowledged_on(scene, "jobs", "late")
    assert await ticket.cancel()
    with pytest.raises(natsrt.TaskCancelled):
        await ticket.result(WITHIN)


async def test_who_submits_tasks_deletes_the_result_of_each_whose_id_it_knows(scene: Scene) -> None:
    """A limit of the server that docs/security.md tells of. If this fails, the server checks reply subjects now."""
    await worker(scene)
    plain = await scene.runtime("plain")
    ticket = await plain.submit_message("a", AgentId("others", "k"), message_id="over")
    assert await ticket.result(WITHIN) == "A"
    await acknowledged_on(scene, "others", "over")
    with pytest.raises(natsrt.TaskUnknown):
        await ticket.result(WITHIN)
