"""Each permission that natsrt generates for recorders, and for those who read records, is necessary and sufficient.

See `tests.support.permission_matrix`.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from datetime import UTC, datetime
from typing import Any

import nats
import pytest
from autogen_core import AgentId, MessageContext, RoutedAgent, rpc
from natsrt_cli.check_streams import judge_record
from natsrt_cli.declaration import parse
from natsrt_cli.forbidden import forbidden
from natsrt_cli.permissions import grants

import natsrt
from natsrt.embedded import EmbeddedServer
from natsrt.errors import ConfigurationError, StreamUnavailable
from natsrt.jetstream.recorder import Recorder
from tests.support.cli import natsrt as natsrt_command
from tests.support.permission_matrix import Matrix, delete_streams
from tests.support.permission_scene import Scene
from tests.support.permission_tests import MatrixTests

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]  # each permission is a case with a recorder of its own

DECLARATION = parse(
    """
    [types.shop]
    [users.mill]
    role = "worker"
    hosts = ["shop"]
    [users.web]
    role = "caller"
    calls = ["shop"]
    [users.ear]
    role = "recorder"
    records = ["audit"]
    [users.ops]
    role = "operator"
    """,
    "recorders",
)
MATRIX = Matrix(
    DECLARATION,
    [
        (name, grant)
        for name in ("ear", "ops")
        for grant in grants(DECLARATION, DECLARATION.users[name])
        if name == "ear" or grant.why.startswith("records")
    ],
    "r",
)
needs = MATRIX.needs
API = "publish to $JS.API"


class Shop(RoutedAgent):
    def __init__(self) -> None:
        super().__init__("sells")

    @rpc
    async def on_text(self, message: str, ctx: MessageContext) -> str:
        return message.upper()


async def recorded(scene: Scene) -> Counter[str]:
    """Record a call, and an event, and count what was recorded."""
    worker = scene.unstarted("mill")
    await natsrt.register(worker, Shop, "shop", Shop)
    await scene._stack.enter_async_context(worker)
    web = await scene.runtime("web")
    inboxes = [f"--inbox=_INBOX_{name}" for name in ("mill", "web", "ops")]
    recording = asyncio.create_task(scene.command("ear", "record", "--to", "audit", "--for", "1", *inboxes))
    calls = 0
    while not recording.done():
        calls += 1
        assert await web.send_message("a", AgentId("shop", "k")) == "A"
        await asyncio.sleep(0.2)
    await recording
    reader = await scene.runtime("plain")
    found = Counter([entry.kind async for entry in reader.recorded("audit")])
    assert found["call"] and found["reply"], found
    return found


@needs(
    "ear",
    "subscribe to agent.>",
    "subscribe to topic.>",
    "subscribe to natsrt.blob.>",
    "publish to natsrt.record.audit.>",
    *(f"{API}.STREAM.{what}.audit" for what in ("INFO", "CREATE")),
    *(f"subscribe to {inbox}.>" for inbox in ("_INBOX", "_INBOX_ear", "_INBOX_web", "_INBOX_mill", "_INBOX_ops")),
)
async def records_calls_and_replies(scene: Scene) -> None:
    await recorded(scene)


@needs("ops", f"{API}.STREAM.INFO.audit", f"{API}.DIRECT.GET.audit")
async def reads_records(scene: Scene) -> None:
    plain = await scene.client("plain")
    namespace = scene.case.declaration.namespace
    await plain.jetstream().add_stream(name="audit", subjects=[f"{namespace}.natsrt.record.audit.>"], allow_direct=True)
    ops = await scene.runtime("ops")
    assert [entry async for entry in ops.recorded("audit")] == []


@needs("ops", f"{API}.STREAM.NAMES")
async def finds_streams_of_records(scene: Scene) -> None:
    await reads_records(scene)
    said = (await scene.command("ops", "doctor", "--json", code=None)).json
    [found] = [one for one in said if one["check"] == "records"]
    assert (found["level"], found["text"]) == ("ok", "the stream audit has 0 records in 0 bytes")


@pytest.mark.parametrize(
    ("config", "bytes_used", "level", "says"),
    [
        ({"max_bytes": -1, "max_msgs": -1}, 10**12, "ok", "the last one of 2030-01-31T09:00:00Z, 1 day, 0:05:00 ago"),
        ({"max_bytes": 1000, "max_msgs": -1}, 949, "ok", "949 bytes"),
        (
            {"max_bytes": 1000, "discard": "old"},
            950,
            "warning",
            "max_bytes is 1,000, so the oldest records are dropped",
        ),
        ({"max_msgs": 5, "discard": "new"}, 10, "warning", "max_msgs is 5, so no more records are stored"),
    ],
)
def test_doctor_judges_a_stream_of_records(config: dict[str, Any], bytes_used: int, level: str, says: str) -> None:
    state = {"messages": 5, "bytes": bytes_used, "last_ts": "2030-01-31T09:00:00.123456789Z"}
    now = datetime(2030, 2, 1, 9, 5, tzinfo=UTC).timestamp()
    found, text, advice = judge_record("audit", config, state, [], now)
    assert (found, says in text, bool(advice)) == (level, True, level == "warning"), text


async def test_doctor_finds_a_stream_of_records_that_somebody_has_changed(
    server: EmbeddedServer, namespace: str
) -> None:
    client = await nats.connect(server.url)
    js, tree = client.jetstream(), f"{namespace}.natsrt.record.{namespace}"
    try:
        # The first is a copy of all that passes, and no stream of records.
        await js.add_stream(name=f"{namespace}-all", subjects=[f"{namespace}.natsrt.>"])

        async def said() -> list[dict[str, Any]]:
            ended = await natsrt_command("doctor", "--json", "--server", server.url, "--namespace", namespace)
            return [one for one in ended.json if one["check"] == "records"]

        assert await said() == []
        await js.delete_stream(f"{namespace}-all")
        async with natsrt.NatsAgentRuntime(server.url, namespace=namespace) as runtime:
            recorder = Recorder(runtime.options, namespace, tell=lambda line: None)
            await recorder.open()
            await recorder.close()
        [found] = await said()
        assert found["level"] == "ok"
        config = (await js.stream_info(namespace)).config
        await js.update_stream(config.evolve(subjects=[f"{tree}.call.>"]))
        [found] = await said()
        assert found["level"] == "problem" and f"{tree}.call.>" in found["text"], found
        assert f"--subjects='{tree}.>'" in found["advice"]
        refused = Recorder(runtime.options, namespace, tell=lambda line: None)
        with pytest.raises(StreamUnavailable, match="subjects"):
            await refused.open()
        await refused.close()
    finally:
        await client.close()


def test_a_recorder_publishes_nothing_but_records() -> None:
    user = DECLARATION.users["ear"]
    own = {grant.subject for grant in grants(DECLARATION, user) if grant.operation == "publish"}
    assert own == {"natsrt.record.audit.>", "$JS.API.STREAM.INFO.audit", "$JS.API.STREAM.CREATE.audit"}
    assert any(grant.subject == "natsrt.control.>" for grant in forbidden(DECLARATION, user))


@pytest.mark.parametrize("name", ["natsrt_events", "KV_x", "a.b"])
def test_a_stream_that_cannot_have_records_is_refused(name: str) -> None:
    text = f"""
        [users.ear]
        role = "recorder"
        records = ["{name}"]
        """
    with pytest.raises(ConfigurationError, match="users.ear.records"):
        parse(text, "recorders")


async def purge(scene: Scene) -> None:
    """Remove what the use before has left."""
    await delete_streams(scene, "audit")


class TestEachPermission(MatrixTests):
    before = purge
    before_failing = purge
