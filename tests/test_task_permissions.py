"""Each permission that natsrt generates for tasks is necessary and sufficient.

See `tests.support.permission_matrix`. The matrix has the permissions of tasks alone: a worker handles them with those
of durable topics too, which tests/test_durable_permissions.py has.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import pytest
from autogen_core import AgentId, MessageContext, RoutedAgent, rpc
from nats.aio.msg import Msg
from natsrt_cli.declaration import parse
from natsrt_cli.permissions import grants
from natsrt_cli.recording import Recording

import natsrt
from natsrt import NatsAgentRuntime
from natsrt.embedded import EmbeddedServer
from natsrt.errors import ConfigurationError, NatsrtError
from natsrt.task_types import TaskId
from natsrt.wire import envelope
from natsrt.wire.subjects import Subjects
from tests.support.permission_matrix import Matrix, delete_streams
from tests.support.permission_scene import Scene
from tests.support.permission_tests import MatrixTests
from tests.support.processes import eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]  # each permission is a case with workers of its own

DECLARATION = parse(
    """
    [types.jobs]
    [types.others]

    [users.mill]
    role = "worker"
    hosts = ["jobs"]
    [users.yard]
    role = "worker"
    hosts = ["others"]
    submits = ["jobs"]
    [users.web]
    role = "caller"
    submits = ["jobs"]
    [users.ops]
    role = "operator"
    """,
    "tasks",
)
MATRIX = Matrix(
    DECLARATION,
    [
        (name, grant)
        for name, user in DECLARATION.users.items()
        for grant in grants(DECLARATION, user)
        if grant.why.startswith("tasks")
    ],
    "t",
)
needs = MATRIX.needs
AGENT = AgentId("jobs", "k")
API = "publish to $JS.API"
RESULTS, TASKS = "natsrt_results", "natsrt_events_tasks"
WAITS = 10.0


@dataclass
class Job:
    name: str


class Works(RoutedAgent):
    free = asyncio.Event()

    def __init__(self) -> None:
        super().__init__("works")

    @rpc
    async def on_job(self, message: Job, ctx: MessageContext) -> str:
        if message.name == "fail":
            raise ValueError(message.name)
        if message.name == "wait":
            while not ctx.cancellation_token.is_cancelled():
                natsrt.progress(0.5, "waiting")
                await asyncio.sleep(0.05)
        return message.name


async def worker(scene: Scene, user: str = "mill") -> NatsAgentRuntime:
    runtime = scene.unstarted(user)
    await natsrt.register(runtime, Works, "jobs", Works)
    started: NatsAgentRuntime = await scene._stack.enter_async_context(runtime)
    await started.take_tasks("jobs")
    return started


async def queued(runtime: NatsAgentRuntime) -> int:
    """The number of tasks that are stored."""
    js, subjects = runtime.running.connection.jetstream, runtime.running.network.subjects
    return (await js.stream_info(subjects.bucket(TASKS))).state.messages


async def has_an_answer(runtime: NatsAgentRuntime, **how: Any) -> None:
    ticket = await runtime.submit_message(Job("a"), AGENT, **how)
    assert await ticket.result(WAITS) == "a"


async def cancels_what_it_follows(runtime: NatsAgentRuntime) -> None:
    """To follow always subscribes; a result may be there before it is waited for."""
    waiting = await runtime.submit_message(Job("wait"), AGENT)
    async for status in waiting:
        if status.state == "running":
            assert await waiting.cancel()
    assert status.state == "cancelled"
    assert hears_what_is_told(runtime)


def hears_what_is_told(runtime: NatsAgentRuntime) -> bool:
    return "told" not in (runtime.running.connection.server_error or "")


# -- a worker that hosts the agents ------------------------------------------------------------------------------------


@needs(
    "mill",
    *(f"{API}.STREAM.{what}.{RESULTS}" for what in ("INFO", "CREATE")),
    f"{API}.STREAM.MSG.DELETE.{TASKS}",
    "publish to natsrt.task.*.jobs.*.*",
)
async def handles_tasks_in_an_empty_account(scene: Scene) -> None:
    await worker(scene)
    plain = await scene.runtime("plain")
    await has_an_answer(plain)

    async def is_removed() -> bool:
        return await queued(plain) == 0

    await eventually(is_removed, 5.0)


@needs(
    "mill",
    "subscribe to natsrt.tasks.jobs",
    f"{API}.DIRECT.GET.{RESULTS}.natsrt.task.*.jobs.*.*",
    f"{API}.DIRECT.GET.{TASKS}.topic.natsrt.task.jobs=3A.*.>",
    f"{API}.DIRECT.GET.{TASKS}.natsrt.later.{TASKS}.event.*.natsrt.task.jobs=3A.*.>",
)
async def answers_callers(scene: Scene) -> None:
    await scene.runtime("plain")
    await worker(scene)
    web = await scene.runtime("web")
    ticket = await web.submit_message(Job("a"), AGENT, delay=3600)
    assert (await ticket.status()).state == "scheduled"
    assert await ticket.cancel()
    with pytest.raises(natsrt.TaskCancelled):
        await ticket.result(WAITS)


# -- a caller ----------------------------------------------------------------------------------------------------------


@needs(
    "web",
    "publish to topic.natsrt.task.jobs=3A.*.>",
    "publish to natsrt.tasks.jobs",
    "subscribe to natsrt.told.*.jobs.*.*",
)
async def submits_and_reads_results_and_progress(scene: Scene) -> None:
    await worker(scene)
    web = await scene.runtime("web")
    await has_an_answer(web, message_id="mine")
    await cancels_what_it_follows(web)


@needs("web", f"publish to natsrt.later.{TASKS}.event.*.natsrt.task.jobs=3A.*.>")
async def submits_for_later(scene: Scene) -> None:
    await worker(scene)
    await has_an_answer(await scene.runtime("web", publish_timeout=3), delay=0.5)


async def test_a_caller_is_told_that_a_type_takes_no_tasks_yet(matrix: EmbeddedServer) -> None:
    async with AsyncExitStack() as stack:
        scene = Scene(matrix.url, MATRIX.case_of("web", None), stack)
        await delete_streams(scene)
        runtime = scene.unstarted("mill")
        await natsrt.register(runtime, Works, "jobs", Works)
        await stack.enter_async_context(runtime)
        web = await scene.runtime("web")
        with pytest.raises(natsrt.RegistryUnavailable, match=r"take_tasks\('jobs'\)"):
            await web.submit_message(Job("a"), AGENT)
        await runtime.take_tasks("jobs")
        await has_an_answer(web)


async def test_a_caller_knows_nothing_of_the_tasks_of_other_types(matrix: EmbeddedServer) -> None:
    async with AsyncExitStack() as stack:
        scene = Scene(matrix.url, MATRIX.case_of("web", None), stack)
        await delete_streams(scene)
        plain = scene.unstarted("plain")
        await natsrt.register(plain, Works, "others", Works)
        await stack.enter_async_context(plain)
        ticket = await plain.submit_message(Job("a"), AgentId("others", "k"))
        web = await scene.runtime("web", publish_timeout=2)
        for attempt in (web.ticket(ticket.id).status(), web.ticket(ticket.id).cancel()):
            with pytest.raises(NatsrtError):
                await attempt
        with pytest.raises(natsrt.CallTimeout):
            await web.ticket(ticket.id).result(1.0)
        with pytest.raises(natsrt.PermissionDenied):
            await web.submit_message(Job("a"), AgentId("others", "k"))


# -- a worker that submits ---------------------------------------------------------------------------------------------


@needs(
    "yard",
    "publish to topic.natsrt.task.jobs=3A.*.>",
    "subscribe to natsrt.told.*.jobs.*.*",
    "publish to natsrt.task.*.jobs.*.*",
    f"{API}.STREAM.MSG.DELETE.{TASKS}",
    f"{API}.DIRECT.GET.{RESULTS}.natsrt.task.*.jobs.*.*",
    f"{API}.DIRECT.GET.{TASKS}.topic.natsrt.task.jobs=3A.*.>",
    f"{API}.DIRECT.GET.{TASKS}.natsrt.later.{TASKS}.event.*.natsrt.task.jobs=3A.*.>",
)
async def submits_and_cancels_as_a_worker(scene: Scene) -> None:
    await worker(scene)
    yard = await scene.runtime("yard", publish_timeout=3)
    await has_an_answer(yard)
    await cancels_what_it_follows(yard)


@needs("yard", f"publish to natsrt.later.{TASKS}.event.*.natsrt.task.jobs=3A.*.>")
async def submits_for_later_as_a_worker(scene: Scene) -> None:
    await worker(scene)
    await has_an_answer(await scene.runtime("yard", publish_timeout=3), delay=0.5)


# -- an operator -------------------------------------------------------------------------------------------------------


@needs(
    "ops",
    "publish to natsrt.task.*.*.*.*",
    "subscribe to natsrt.told.*.*.*.*",
    f"{API}.STREAM.MSG.DELETE.{TASKS}",
    f"{API}.DIRECT.GET.{RESULTS}.natsrt.task.*.*.*.*",
    f"{API}.DIRECT.GET.{TASKS}.topic.natsrt.task.*.>",
    f"{API}.DIRECT.GET.{TASKS}.natsrt.later.{TASKS}.event.*.natsrt.task.*.>",
    f"publish to natsrt.later.{TASKS}.event.*.natsrt.task.*.>",
)
async def looks_after_tasks(scene: Scene) -> None:
    await worker(scene)
    ops = await scene.runtime("ops", publish_timeout=3)
    await has_an_answer(ops, delay=0.5)
    waiting = await ops.submit_message(Job("wait"), AGENT)
    await waiting.status()
    assert await waiting.cancel()
    assert hears_what_is_told(ops)


@needs("ops", f"{API}.STREAM.INFO.{RESULTS}")
async def examines_tasks(scene: Scene) -> None:
    await worker(scene)
    said = (await scene.command("ops", "doctor", "--json", code=None)).json
    [found] = [one for one in said if one["check"] == "tasks"]
    assert found["level"] == "ok" and "results" in found["text"]


@needs(
    "ops",
    *(f"{API}.CONSUMER.{what}.{stream}.>" for what in ("CREATE", "INFO", "MSG.NEXT") for stream in (TASKS, RESULTS)),
    f"{API}.DIRECT.GET.{RESULTS}",
    f"{API}.STREAM.PURGE.{RESULTS}",
)
async def lists_tasks_and_tries_them_again(scene: Scene) -> None:
    await worker(scene)
    plain = await scene.runtime("plain")
    failed = await plain.submit_message(Job("fail"), AGENT, retries=0)
    with pytest.raises(ValueError, match="fail"):
        await failed.result(WAITS)
    later = await plain.submit_message(Job("a"), AGENT, delay=3600)
    listed = (await scene.command("ops", "tasks", "ls", "--json")).json
    assert [row["id"] for row in listed] == [failed.id, later.id]
    await scene.command("ops", "tasks", "retry", failed.id)


@needs("ops", *(f"{API}.CONSUMER.DELETE.{stream}.>" for stream in (TASKS, RESULTS)))
async def leaves_no_consumers_when_it_has_listed_tasks(scene: Scene) -> None:
    plain = await scene.runtime("plain")
    ticket = await plain.submit_message(Job("a"), AGENT)
    cancelled = await plain.submit_message(Job("a"), AGENT)
    await cancelled.cancel()
    listed = (await scene.command("ops", "tasks", "ls", "--json")).json
    assert [row["id"] for row in listed] == [ticket.id, cancelled.id]
    for stream in (TASKS, RESULTS):
        await eventually(lambda stream=stream: _has_no_consumers(plain, stream))  # type: ignore[misc]


async def _has_no_consumers(runtime: NatsAgentRuntime, stream: str) -> bool:
    js, subjects = runtime.running.connection.jetstream, runtime.running.network.subjects
    return (await js.stream_info(subjects.bucket(stream))).state.consumer_count == 0


# -- the tests ---------------------------------------------------------------------------------------------------------


def test_a_recording_declares_who_submits_tasks() -> None:
    recording = Recording(Subjects())
    attributes = '"id":"r1-1","source":"/","messagetype":"Job"'
    body = envelope.encode(envelope.EVENT, attributes, b"{}")
    for name in ("jobs", "others"):
        task = TaskId.of(AgentId(name, "k"), "m1").topic
        subject = Subjects().topic(task.type, task.source)
        recording.take(Msg(None, subject, "_INBOX_web.x.1", body))  # type: ignore[arg-type]
    declared = parse(recording.toml(""), "recorded")
    [user] = declared.users.values()
    assert (user.role, user.submits, user.publishes) == ("caller", ("jobs", "others"), ())
    assert set(declared.types) == {"jobs", "others"}


def test_tasks_need_streams_in_the_account_of_the_users() -> None:
    text = """
        jetstream_domain = "hub"
        jetstream_account = "STORE"
        [types.jobs]
        [users.web]
        role = "caller"
        submits = ["jobs"]
        """
    with pytest.raises(ConfigurationError, match="submits.*their own account"):
        parse(text, "tasks")


class TestEachPermission(MatrixTests):
    before = delete_streams
