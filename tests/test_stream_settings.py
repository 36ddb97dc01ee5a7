"""Buckets that an operator makes: which settings natsrt accepts, and what it says of others."""

from __future__ import annotations

import asyncio
import re
import shlex
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import nats
import pytest
from nats.js import JetStreamContext, api

import natsrt
from natsrt import NatsAgentRuntime
from natsrt.embedded import EmbeddedServer
from natsrt.jetstream.agent_bucket import agents_bucket
from natsrt.jetstream.stream_settings import described, remedy, wrong_settings
from natsrt.options import Options
from natsrt.wire.subjects import Subjects
from tests.support import cli
from tests.test_jetstream_gone import bulky
from tests.test_keyed import Add, Place, agent, place

__all__ = ["place"]

OPERATIONS = Path(__file__).parents[1] / "docs" / "operations.md"
RIGHT: dict[str, Any] = {
    "max_msgs_per_subject": 1,
    "discard": api.DiscardPolicy.NEW,
    "allow_direct": True,
    "allow_rollup_hdrs": True,
    "allow_msg_ttl": True,
    "subject_delete_marker_ttl": 60,
}


@pytest.fixture
async def js(server: EmbeddedServer) -> AsyncIterator[JetStreamContext]:
    client = await nats.connect(server.url)
    yield client.jetstream()
    await client.close()


async def make(js: JetStreamContext, namespace: str, bucket: str = "natsrt_agents", **settings: Any) -> str:
    name = f"{namespace}_{bucket}"
    given = {"subjects": [f"$KV.{name}.>"], **RIGHT, **settings}
    await js.add_stream(api.StreamConfig(name=f"KV_{name}", **given))
    return f"KV_{name}"


@pytest.mark.parametrize(
    ("setting", "value", "option"),
    [
        ("subjects", ["foo.>"], "--subjects='$KV.natsrt_agents.>'"),
        ("retention", api.RetentionPolicy.INTEREST, None),
        ("max_age", 5.0, "--max-age=0"),
        ("max_msgs_per_subject", 5, "--max-msgs-per-subject=1"),
        ("discard", api.DiscardPolicy.OLD, "--discard=new"),
        ("discard_new_per_subject", True, "--no-discard-per-subject"),
        ("allow_direct", None, "--allow-direct"),
        ("allow_msg_ttl", None, "--allow-msg-ttl"),
        ("subject_delete_marker_ttl", None, "--subject-del-markers-ttl=60s"),
        ("no_ack", True, None),
        ("deny_purge", True, None),
        ("sources", [api.StreamSource(name="other")], None),
    ],
)
def test_each_wrong_setting_is_named_with_what_corrects_it(setting: str, value: Any, option: str | None) -> None:
    config = api.StreamConfig(name="KV_natsrt_agents", subjects=["$KV.natsrt_agents.>"], **RIGHT)
    wanted = agents_bucket(Subjects(""), Options())
    assert wrong_settings(config, wanted) == []
    wrong = wrong_settings(config.evolve(**{setting: value}), wanted)
    assert [one.name for one in wrong] == [setting] and f"{setting} is " in described(wanted.bucket, wrong)
    assert (option or "delete the bucket") in remedy(f"KV_{wanted.bucket}", wrong)


async def test_a_worker_does_not_start_with_a_bucket_that_loses_states(
    place: Place, js: JetStreamContext, namespace: str
) -> None:
    stream = await make(js, namespace, max_age=5, duplicate_window=1)
    with pytest.raises(natsrt.StateUnavailable, match=r"max_age is 5s and must be 0: run .* --max-age=0`"):
        await place.worker("w1")
    config = (await js.stream_info(stream)).config
    await js.update_stream(config.evolve(max_age=0))
    worker = await place.worker("w2")
    assert (await worker.send_message(Add(5), agent("k"))).value == 5


async def test_no_runtime_starts_with_a_registry_whose_entries_vanish(
    place: Place, js: JetStreamContext, namespace: str
) -> None:
    republish = api.RePublish(src=f"$KV.{namespace}_natsrt_registry.r.>", dest=f"{namespace}.elsewhere.>")
    await make(js, namespace, "natsrt_registry", max_age=5, duplicate_window=1, republish=republish)
    with pytest.raises(natsrt.RegistryUnavailable, match=r"max_age is 5s and must be 0; republish is .*elsewhere"):
        await place.caller()


async def test_limits_of_the_operator_are_accepted_and_a_state_that_is_too_large_names_them(
    place: Place, js: JetStreamContext, namespace: str, server: EmbeddedServer
) -> None:
    limits = {"max_bytes": 1_000_000, "max_msgs": 100, "max_msg_size": 4_000}
    await make(js, namespace, storage=api.StorageType.MEMORY, **limits)
    runtime = await bulky(place, "w1", "x" * 10_000)
    with pytest.raises(natsrt.StateNotSaved, match=r"max_msg_size \(nats stream edit --max-msg-size\)"):
        await runtime.send_message(Add(5), agent("k"))
    assert runtime.health().ready
    (found,) = await findings(server, namespace, "agents' bucket")
    assert found["level"] == "warning"
    assert "in memory, max_msg_size 4,000" in found["text"] and "--max-msg-size=-1" in found["advice"]


async def findings(server: EmbeddedServer, namespace: str, check: str) -> list[dict[str, Any]]:
    ended = await cli.natsrt("doctor", "--json", "--server", server.url, "--namespace", namespace)
    return [found for found in ended.json if found["check"] == check]


async def test_a_bucket_that_became_wrong_is_reported_by_the_doctor_and_can_be_saved(
    place: Place, js: JetStreamContext, namespace: str, server: EmbeddedServer
) -> None:
    worker = await place.worker("w1")
    await worker.send_message(Add(5), agent("k"))
    stream = f"KV_{namespace}_natsrt_agents"
    config = (await js.stream_info(stream)).config
    await js.update_stream(config.evolve(discard=api.DiscardPolicy.OLD))
    (found,) = await findings(server, namespace, "agents' bucket")
    assert found["level"] == "problem" and "discard is old and must be new" in found["text"]
    assert found["advice"] == f"run `nats stream edit {stream} --discard=new`"
    where = ("--server", server.url, "--namespace", namespace)
    assert (await cli.natsrt("state", "get", "counting/k", *where)).stdout == '{"value":5}\n'
    assert '{"value":5}' in (await cli.natsrt("state", "export", *where)).stdout.replace(" ", "")
    refused = await cli.natsrt("state", "rm", "counting/k", "--force", *where)
    assert refused.code != 0 and "discard is old and must be new" in refused.stderr
    stream = f"KV_{namespace}_natsrt_registry"
    await js.update_stream((await js.stream_info(stream)).config.evolve(allow_direct=False))
    (found,) = await findings(server, namespace, "registry bucket")
    assert found["advice"] == f"run `nats stream edit {stream} --allow-direct`"


def documented(heading: str) -> list[str]:
    """The commands of a section of docs/operations.md."""
    section = OPERATIONS.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    return [one for one in block.replace("\\\n", " ").splitlines() if one]


async def test_the_documented_commands_make_buckets_that_natsrt_uses(tmp_path: Path, nats_cli: Path) -> None:
    config = tmp_path / "nats.conf"
    config.write_text(
        "accounts { A { jetstream: { max_bytes_required: true, max_file: 1GB, max_mem: 1MB }, "
        "users: [{ user: a, password: a }] } }\n"
        f"no_auth_user: a\njetstream {{ store_dir: '{tmp_path / 'js'}' }}\n"
    )
    async with EmbeddedServer(config=config, port=-1) as server:
        runtime = NatsAgentRuntime(server.url)
        with pytest.raises(natsrt.JetStreamFull, match=r"docs/operations\.md \(Buckets\)"):
            await runtime.start()
        for command in documented("Buckets"):
            program, *arguments = shlex.split(command)
            assert program == "nats"
            made = await asyncio.create_subprocess_exec(
                nats_cli, "-s", server.url, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
            )
            _, said = await made.communicate()
            assert made.returncode == 0, said.decode()
        async with asyncio.timeout(20):
            await use(server)


async def use(server: EmbeddedServer) -> None:
    async with AsyncExitStack() as stack:
        worker = await Place(server.url, "", stack).worker("w1")
        assert (await worker.send_message(Add(5), agent("k"))).value == 5
    removed = await cli.natsrt("state", "rm", "counting/k", "--server", server.url)
    assert removed.code == 0, removed.stderr
