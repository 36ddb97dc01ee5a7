"""The command line against a real server: each command, its JSON, its failures and their exit codes."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from autogen_core import AgentId, MessageContext, RoutedAgent, TopicId, event, rpc, type_subscription
from natsrt_cli.check_connection import judge_server_version
from natsrt_cli.demo_agents import Headline, Upper

from natsrt import NatsAgentRuntime, register
from natsrt.embedded import EmbeddedServer
from tests.support.cli import NATSRT, Ended, natsrt
from tests.support.processes import Processes, eventually

Run = Callable[..., Awaitable[Ended]]


@dataclass
class Ask:
    question: str


@dataclass
class Add:
    left: int
    right: int


@dataclass
class News:
    headline: str


@type_subscription("news.tech")
class Clerk(RoutedAgent):
    """Answers, fails, or takes its time."""

    news: list[str] = []

    def __init__(self) -> None:
        super().__init__("A clerk")

    @rpc
    async def ask(self, message: Ask, ctx: MessageContext) -> str:
        if message.question == "fail":
            raise ValueError("the clerk is out")
        if message.question.startswith("wait"):
            await asyncio.sleep(float(message.question.split()[1]))
        return f"{self.id.key}: {message.question}"

    @rpc
    async def add(self, message: Add, ctx: MessageContext) -> int:
        return message.left + message.right

    @event
    async def read(self, message: News, ctx: MessageContext) -> None:
        Clerk.news.append(message.headline)


@pytest.fixture
def run(server: EmbeddedServer, namespace: str) -> Run:
    """Run a command against the shared server, in this test's namespace."""

    async def run(*arguments: str, **how: object) -> Ended:
        return await natsrt(*arguments, "--server", server.url, "--namespace", namespace, **how)  # type: ignore[arg-type]

    return run


@pytest.fixture
async def runtime(server: EmbeddedServer, namespace: str) -> AsyncIterator[NatsAgentRuntime]:
    """A worker with the agent type ``clerk``."""
    Clerk.news.clear()
    async with NatsAgentRuntime(server.url, namespace=namespace, name="office", drain_timeout=0.5) as runtime:
        await register(runtime, Clerk, "clerk", Clerk)
        yield runtime


# -- as a whole --------------------------------------------------------------------------------------------------


async def test_the_help_names_every_command_and_every_exit_code() -> None:
    shown = await natsrt("--help")
    assert shown.code == 0
    for word in ("worker", "server", "agents", "send", "publish", "tail", "doctor", "demo", "unknown_agent", "130"):
        assert word in shown.stdout


async def test_a_wrong_option_is_exit_code_2() -> None:
    assert (await natsrt("agents", "ls", "--sevrer", "x")).code == 2


async def test_no_server_is_one_line_and_exit_code_3() -> None:
    ended = await natsrt("agents", "ls", "--server", "nats://127.0.0.1:1", "--timeout", "500ms")
    assert ended.code == 3
    assert ended.stdout == ""
    assert ended.stderr.startswith("natsrt: no NATS server answered at nats://127.0.0.1:1")
    assert len(ended.stderr.splitlines()) == 1


async def test_debug_shows_the_traceback() -> None:
    ended = await natsrt("agents", "ls", "--server", "nats://127.0.0.1:1", "--timeout", "500ms", "--debug")
    assert ended.code == 3
    assert "Traceback" in ended.stderr


async def test_a_wrong_setting_is_called_by_its_flag() -> None:
    ended = await natsrt("agents", "ls", "--creds", "/no/such/file")
    assert ended.code == 2
    assert "natsrt: --creds: there is no file /no/such/file" in ended.stderr


async def test_the_variables_of_the_nats_cli_and_settings_files_count(
    server: EmbeddedServer, namespace: str, runtime: NatsAgentRuntime, tmp_path: Path
) -> None:
    settings = tmp_path / "settings.toml"
    settings.write_text(f'namespace = "{namespace}"\n')
    ended = await natsrt("agents", "ls", "--json", "--config", str(settings), env={"NATS_URL": server.url})
    assert [row["type"] for row in ended.json] == ["clerk"]


async def test_a_misspelt_setting_in_a_file_names_the_nearest(tmp_path: Path) -> None:
    settings = tmp_path / "settings.toml"
    settings.write_text('namespac = "x"\n')
    ended = await natsrt("agents", "ls", "--config", str(settings))
    assert ended.code == 2
    assert "namespace" in ended.stderr


# -- agents ------------------------------------------------------------------------------------------------------


async def test_ls_shows_live_types_and_those_that_are_known_only(run: Run, runtime: NatsAgentRuntime) -> None:
    await register(runtime, Upper, "gone", Upper)
    await runtime.unregister("gone")
    rows = {row["type"]: row for row in (await run("agents", "ls", "--json")).json}
    assert rows["clerk"]["live"]
    assert rows["clerk"]["workers"] == [runtime.worker_id]
    assert rows["clerk"]["handles"] == ["Add", "Ask", "News"]
    assert rows["clerk"]["subscriptions"] == 2
    assert not rows["gone"]["live"]
    assert rows["gone"]["handles"] == ["Headline", "Text"]
    table = (await run("agents", "ls")).stdout
    assert "no worker" in next(line for line in table.splitlines() if "gone" in line)
    assert "live" in next(line for line in table.splitlines() if "clerk" in line)


async def test_ls_of_nothing_is_an_empty_list(run: Run) -> None:
    ended = await run("agents", "ls", "--json")
    assert (ended.code, ended.json) == (0, [])
    assert "no agent type is registered" in (await run("agents", "ls")).stderr


async def test_info_of_a_type_shows_workers_messages_and_subscriptions(run: Run, runtime: NatsAgentRuntime) -> None:
    shown = (await run("agents", "info", "clerk", "--json")).json
    assert [worker["worker_id"] for worker in shown["workers"]] == [runtime.worker_id]
    assert shown["workers"][0]["pid"] == os.getpid()
    assert {(s["kind"], s["pattern"]) for s in shown["subscriptions"]} == {("type", "news.tech"), ("prefix", "clerk:")}
    text = (await run("agents", "info", "clerk")).stdout
    assert "news.tech" in text
    assert "Ask" in text


async def test_info_of_one_agent_shows_its_metadata(run: Run, runtime: NatsAgentRuntime) -> None:
    shown = (await run("agents", "info", "clerk/anna", "--json")).json
    assert shown == {"type": "clerk", "key": "anna", "description": "A clerk"}
    assert "A clerk" in (await run("agents", "info", "clerk/anna")).stdout


@pytest.mark.parametrize("command", ["info", "ping", "stats"])
async def test_an_unknown_type_is_exit_code_4_and_names_the_known_ones(
    run: Run, runtime: NatsAgentRuntime, command: str
) -> None:
    ended = await run("agents", command, "nobody")
    assert ended.code == 4
    assert "agent type 'nobody' is unknown; registered types: clerk" in ended.stderr


async def test_ping_measures_the_workers(run: Run, runtime: NatsAgentRuntime) -> None:
    for arguments in ((), ("clerk",)):
        ended = await run("agents", "ping", "--json", *arguments)
        assert ended.code == 0
        (row,) = ended.json
        assert row["worker_id"] == runtime.worker_id
        assert row["answered"]
        assert row["round_trip_ms"] > 0


async def test_ping_without_any_worker_is_exit_code_4(run: Run) -> None:
    assert (await run("agents", "ping")).code == 4


@pytest.mark.slow
async def test_ping_names_a_frozen_worker(
    run: Run, server: EmbeddedServer, namespace: str, processes: Processes
) -> None:
    target = ("natsrt_cli.demo_agents:Upper", "--type", "upper")
    worker = processes.natsrt("worker", *target, "--server", server.url, "--namespace", namespace)
    await worker.wait_for_line("ready")
    worker.pause()
    ended = await run("agents", "ping", "--json")
    assert ended.code == 5
    assert [row["answered"] for row in ended.json] == [False]


async def test_stats_count_messages_and_errors(run: Run, runtime: NatsAgentRuntime) -> None:
    await runtime.send_message(Ask("why"), AgentId("clerk", "anna"))
    with pytest.raises(ValueError):
        await runtime.send_message(Ask("fail"), AgentId("clerk", "anna"))
    (row,) = (await run("agents", "stats", "--json")).json
    assert row["type"] == "clerk"
    assert row["worker_id"] == runtime.worker_id
    assert (row["requests"], row["errors"], row["last_error"]) == (2, 1, "ValueError")
    assert row["processing_time_ns"] > 0
    assert "ValueError" in (await run("agents", "stats", "clerk")).stdout


async def test_wait_ends_when_workers_serve_every_type(
    run: Run, runtime: NatsAgentRuntime, processes: Processes, server: EmbeddedServer, namespace: str
) -> None:
    where = ("--server", server.url, "--namespace", namespace)
    wait = processes.natsrt("agents", "wait", "clerk", "upper", "single/one", *where)
    await wait.wait_for_line("clerk is served")
    await register(runtime, Upper, "upper", Upper)
    await wait.wait_for_line("upper is served")
    assert wait.running
    await runtime.register_agent_instance(Clerk(), AgentId("single", "one"))
    assert await wait.wait() == 0
    assert wait.stdout.splitlines() == ["clerk is served", "upper is served", "single/one is served"]
    assert (await run("send", "upper", '{"text": "hi"}')).code == 0


async def test_wait_names_the_types_that_are_missing_when_the_time_is_up(run: Run, runtime: NatsAgentRuntime) -> None:
    ended = await run("agents", "wait", "wirter", "clerk", "editor", "--timeout", "1500ms")
    assert ended.code == 5
    assert ended.stdout == "clerk is served\n"
    missing = "no worker hosts it; live workers host clerk"
    assert ended.stderr == f"natsrt: not served within 1.5 s: wirter ({missing}); editor ({missing})\n"


@pytest.mark.parametrize("wrong", ["two words", "", "/key"])
async def test_wait_for_what_is_no_type_is_exit_code_2(run: Run, wrong: str) -> None:
    ended = await run("agents", "wait", "clerk", wrong)
    assert ended.code == 2
    assert f"natsrt: {wrong!r} is not an agent" in ended.stderr


async def test_wait_for_nothing_is_exit_code_2(run: Run) -> None:
    assert (await run("agents", "wait")).code == 2


async def test_the_timeout_of_wait_includes_a_server_that_is_not_there_yet(processes: Processes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"nats://127.0.0.1:{port}"
    assert (await natsrt("agents", "wait", "clerk", "--server", url, "--timeout", "500ms")).code == 3
    wait = processes.natsrt("agents", "wait", "clerk", "--server", url, "--timeout", "60", "--log-level", "debug")
    await wait.wait_for_line(f"connecting to {url}")
    async with EmbeddedServer(port=port), NatsAgentRuntime(url) as late:
        await register(late, Clerk, "clerk", Clerk)
        assert await wait.wait(30) == 0


async def test_ctrl_c_ends_a_wait_with_exit_code_130(processes: Processes, server: EmbeddedServer) -> None:
    wait = processes.natsrt("agents", "wait", "nobody", "--server", server.url, "--log-level", "info")
    await wait.wait_for_line("connected to")
    wait.interrupt()
    assert await wait.wait() == 130


# -- send --------------------------------------------------------------------------------------------------------


async def test_send_prints_the_reply_as_json(run: Run, runtime: NatsAgentRuntime) -> None:
    ended = await run("send", "clerk/anna", '{"question": "why"}')
    assert (ended.code, ended.json, ended.stderr) == (0, "anna: why", "")
    assert (await run("send", "clerk", '{"left": 1, "right": 2}')).json == 3


async def test_send_reads_its_body_from_standard_input(run: Run, runtime: NatsAgentRuntime) -> None:
    for arguments in ((), ("-",)):
        ended = await run("send", "clerk", *arguments, stdin='{"question": "piped"}')
        assert ended.json == "default: piped"


async def test_send_takes_any_key(run: Run, runtime: NatsAgentRuntime) -> None:
    for key in ("a b.c*", "ünï/cödé"):
        assert (await run("send", f"clerk/{key}", '{"question": "q"}')).json == f"{key}: q"


async def test_send_with_a_type_name(run: Run, runtime: NatsAgentRuntime) -> None:
    assert (await run("send", "clerk/k", '{"question": "q"}', "--type-name", "Ask")).json == "k: q"
    ended = await run("send", "clerk/k", '{"question": "q"}', "--type-name", "Nonsense")
    assert ended.code == 6
    assert "Nonsense" in ended.stderr


async def test_what_a_handler_raises_is_one_line_and_exit_code_6(run: Run, runtime: NatsAgentRuntime) -> None:
    ended = await run("send", "clerk/anna", '{"question": "fail"}')
    assert ended.code == 6
    assert ended.stdout == ""
    assert ended.stderr == "natsrt: ValueError: the clerk is out (answered by clerk/anna)\n"


async def test_a_body_that_fits_no_type_names_the_candidates(run: Run, runtime: NatsAgentRuntime) -> None:
    ended = await run("send", "clerk/anna", '{"unheard": 1}')
    assert ended.code == 6
    assert "Add" in ended.stderr
    assert "Ask" in ended.stderr


@pytest.mark.parametrize(
    ("body", "hint"),
    [
        ('{"qeustion": "why"}', "the nearest is Ask: 'qeustion' is not a field of it, did you mean 'question'?"),
        ('{"left": 1, "rigth": 2}', "the nearest is Add: 'rigth' is not a field of it, did you mean 'right'?"),
        ('{"left": 1, "right": "secret"}', "the nearest is Add: right: expected"),
        ('{"left": 1}', "the nearest is Add: right: the field is missing"),
    ],
)
async def test_a_misspelt_field_is_named_and_the_option_is_that_of_the_command(
    run: Run, runtime: NatsAgentRuntime, body: str, hint: str
) -> None:
    ended = await run("send", "clerk/anna", body)
    assert ended.code == 6
    assert hint in ended.stderr
    assert "name the type with --type-name (answered by clerk/anna)" in ended.stderr
    assert "Natsrt-Type" not in ended.stderr
    assert "secret" not in ended.stderr


async def test_a_body_that_is_like_several_types_names_none(run: Run, runtime: NatsAgentRuntime) -> None:
    for body in ('{"unheard": 1}', "[1]", '"text"', "{}"):
        ended = await run("send", "clerk/anna", body)
        assert (ended.code, "nearest" in ended.stderr, "--type-name" in ended.stderr) == (6, False, True)
        assert "; not Add: " in ended.stderr and "; not Ask: " in ended.stderr


@pytest.mark.parametrize(
    ("body", "reason"),
    [("{}", "text: the field is missing"), ('"hello"', "expected an object"), ("[1]", "expected an object")],
)
async def test_a_body_that_does_not_fit_the_only_type_says_why(
    run: Run, runtime: NatsAgentRuntime, body: str, reason: str
) -> None:
    await register(runtime, Upper, "upper", Upper)
    ended = await run("send", "upper", body)
    assert (ended.code, f": {reason}; name the type" in ended.stderr) == (6, True), ended.stderr


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ('{"question": "x"', "it begins like JSON, but is not: "),
        ('["secret", }', "at character 12"),
        ("", "it is empty"),
    ],
)
async def test_a_body_that_is_empty_or_broken_json_is_called_that(
    run: Run, runtime: NatsAgentRuntime, body: str, text: str
) -> None:
    ended = await run("send", "clerk/anna", body)
    assert (ended.code, "--type-name" in ended.stderr, "secret" in ended.stderr) == (6, False, False)
    assert text in ended.stderr


async def test_a_misspelt_type_name_names_the_nearest(run: Run, runtime: NatsAgentRuntime) -> None:
    ended = await run("send", "clerk/x", '{"question": "why"}', "--type-name", "Aks")
    assert (ended.code, "did you mean 'Ask'?" in ended.stderr) == (6, True), ended


async def test_a_misspelt_agent_type_names_the_nearest(run: Run, runtime: NatsAgentRuntime) -> None:
    ended = await run("send", "clrek/x", "{}")
    assert ended.code == 4
    assert "agent type 'clrek' is unknown; did you mean 'clerk'? Registered types: clerk" in ended.stderr


async def test_send_to_an_unknown_type_is_exit_code_4(run: Run, runtime: NatsAgentRuntime) -> None:
    ended = await run("send", "nobody/x", "{}")
    assert ended.code == 4
    assert "agent type 'nobody' is unknown; registered types: clerk" in ended.stderr


async def test_send_to_a_type_without_a_live_worker_is_exit_code_4(run: Run, runtime: NatsAgentRuntime) -> None:
    await runtime.unregister("clerk")
    ended = await run("send", "clerk/x", "{}")
    assert ended.code == 4
    assert "no worker that hosts it is alive" in ended.stderr


async def test_send_ends_after_its_timeout(run: Run, runtime: NatsAgentRuntime) -> None:
    ended = await run("send", "clerk/x", '{"question": "wait 30"}', "--timeout", "1.5s")
    assert ended.code == 5
    assert "no reply from clerk/x within --timeout = 1.5 s" in ended.stderr


@pytest.mark.slow
async def test_send_waits_as_long_as_the_handler_works(run: Run, runtime: NatsAgentRuntime) -> None:
    assert (await run("send", "clerk/x", '{"question": "wait 7"}')).json == "x: wait 7"


@pytest.mark.slow
async def test_a_worker_killed_in_mid_call_fails_the_send(
    run: Run, server: EmbeddedServer, namespace: str, processes: Processes, tmp_path: Path
) -> None:
    (tmp_path / "sleepy.py").write_text(
        "import asyncio\n"
        "from autogen_core import MessageContext, RoutedAgent, rpc\n"
        "class Sleepy(RoutedAgent):\n"
        "    def __init__(self): super().__init__('Sleeps')\n"
        "    @rpc\n"
        "    async def sleep(self, message: int, ctx: MessageContext) -> int:\n"
        "        print('asleep', flush=True)\n"
        "        await asyncio.sleep(60)\n"
        "        return message\n"
    )
    where = ("--server", server.url, "--namespace", namespace)
    worker = processes.natsrt("worker", "sleepy:Sleepy", "--type", "sleepy", *where, cwd=tmp_path)
    await worker.wait_for_line("ready")
    sending = asyncio.create_task(run("send", "sleepy/x", "1"))
    await worker.wait_for_line("asleep")
    worker.kill()
    ended = await asyncio.wait_for(sending, 15)
    assert ended.code in (1, 4)  # lost in mid-call; or found dead
    assert "worker" in ended.stderr


@pytest.mark.parametrize("agent", ["", "two words/x", "a*b"])
async def test_send_refuses_what_is_no_agent(run: Run, agent: str) -> None:
    assert (await run("send", agent, "{}")).code == 2


# -- publish -----------------------------------------------------------------------------------------------------


async def test_publish_reaches_the_subscribed_agents_and_says_so(run: Run, runtime: NatsAgentRuntime) -> None:
    ended = await run("publish", "news.tech/server", '{"headline": "42"}')
    assert ended.code == 0
    assert "for agent types: clerk" in ended.stderr
    await run("publish", "news.tech/server", "-", "--type-name", "News", stdin='{"headline": "43"}')
    await eventually(lambda: Clerk.news == ["42", "43"], message="both events")


async def test_publish_says_when_nobody_takes_the_topic(run: Run, runtime: NatsAgentRuntime) -> None:
    assert "no live agent type subscribes to that topic" in (await run("publish", "sport/x", "{}")).stderr


async def test_publish_to_a_subject_names_the_topic_type_that_may_be_meant(run: Run, runtime: NatsAgentRuntime) -> None:
    assert "did you mean 'news'?" in (await run("publish", "topic.news", "1")).stderr
    assert "did you mean" not in (await run("publish", "topics.news", "1")).stderr


async def test_publish_refuses_what_is_no_topic(run: Run) -> None:
    assert (await run("publish", "news tech/x", "{}")).code == 2
    assert (await run("publish", "a." * 600 + "a/x", "{}")).code == 2


# -- tail --------------------------------------------------------------------------------------------------------


async def test_tail_shows_events_of_its_prefix_as_json(
    run: Run, runtime: NatsAgentRuntime, server: EmbeddedServer, namespace: str, processes: Processes
) -> None:
    tail = processes.natsrt(
        "tail", "news.", "--json", "--count", "2", "--server", server.url, "--namespace", namespace, name="tail"
    )
    await tail.wait_for_line("listening on")
    await runtime.publish_message(News("elsewhere"), TopicId("weather", "s"))
    await runtime.publish_message(News("same start"), TopicId("news", "s"))
    await runtime.publish_message(News("ours"), TopicId("news.tech", "a b"), sender=AgentId("clerk", "k"))
    await run("publish", "news.sport/s", "plain text")
    assert await tail.wait() == 0
    ours, plain = (json.loads(line) for line in tail.stdout.splitlines())
    assert (ours["topic_type"], ours["topic_source"], ours["message_type"]) == ("news.tech", "a b", "News")
    assert (ours["plain"], ours["sender"], ours["data"]) == (False, "clerk/k", {"headline": "ours"})
    assert (plain["topic_type"], plain["plain"]) == ("news.sport", True)
    assert plain["data_base64"] == "cGxhaW4gdGV4dA=="


async def test_tail_filters_a_prefix_that_ends_within_a_word(
    runtime: NatsAgentRuntime, server: EmbeddedServer, namespace: str, processes: Processes
) -> None:
    tail = processes.natsrt("tail", "ne", "--count", "1", "--server", server.url, "--namespace", namespace)
    await tail.wait_for_line("listening on")
    await runtime.publish_message(News("other"), TopicId("old", "s"))
    await runtime.publish_message(News("\x1b[2Jours"), TopicId("news", "s"))
    assert await tail.wait() == 0
    (line,) = tail.stdout.splitlines()
    assert "news/s  News" in line
    assert "\x1b" not in line


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
async def test_tail_of_everything_ends_well_at_a_signal(
    server: EmbeddedServer, namespace: str, processes: Processes, signum: int
) -> None:
    tail = processes.natsrt("tail", "--server", server.url, "--namespace", namespace)
    await tail.wait_for_line("listening on")
    tail.send_signal(signum)
    assert await tail.wait() == 0
    assert len(tail.stderr.splitlines()) == 1


async def test_tail_into_a_closed_pipe_ends_quietly(
    runtime: NatsAgentRuntime, server: EmbeddedServer, namespace: str
) -> None:
    process = await asyncio.create_subprocess_exec(
        *(NATSRT, "tail", "--json", "--server", server.url, "--namespace", namespace),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None and process.stderr is not None
        assert b"listening" in await asyncio.wait_for(process.stderr.readline(), 20)
        await runtime.publish_message(News("first"), TopicId("news.tech", "s"))
        assert b"first" in await asyncio.wait_for(process.stdout.readline(), 20)
        process.stdout._transport.close()  # type: ignore[attr-defined]  # as `head` does

        async def ended() -> bool:
            await runtime.publish_message(News("again"), TopicId("news.tech", "s"))
            return process.returncode is not None

        await eventually(ended, 20, "the end of tail")
        assert (process.returncode, await process.stderr.read()) == (0, b"")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_tail_refuses_a_prefix_that_no_topic_can_have(run: Run) -> None:
    ended = await run("tail", "news.>")
    assert ended.code == 2
    assert "'news.'" in ended.stderr


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("topic.news", ["news/a", "news.tech/b", "news.tech.ai/c"]),
        ("topic.news.", ["news/a", "news.tech/b", "news.tech.ai/c"]),
        ("topic.news.tech", ["news.tech/b", "news.tech.ai/c"]),
        ("topic.news.*.*", ["news.tech/b"]),
        ("topic.news.>", ["news/a", "news.tech/b", "news.tech.ai/c"]),
        ("topic.", ["news/a", "news.tech/b", "news.tech.ai/c", "newsletter/d", "topic.news/e"]),
        ("topic", ["news/a", "news.tech/b", "news.tech.ai/c", "newsletter/d", "topic.news/e"]),
        ("topic.topic.news", ["topic.news/e"]),
        ("NAMESPACE.topic.news.tech", ["news.tech/b", "news.tech.ai/c"]),
        ("news.tech/b", ["news.tech/b"]),
        ("news", ["news/a", "news.tech/b", "news.tech.ai/c", "newsletter/d"]),
    ],
)
async def test_tail_understands_subjects_and_topics(
    runtime: NatsAgentRuntime,
    server: EmbeddedServer,
    namespace: str,
    processes: Processes,
    given: str,
    shown: list[str],
) -> None:
    given = given.replace("NAMESPACE", namespace)
    tail = processes.natsrt("tail", given, "--json", "--server", server.url, "--namespace", namespace)
    await tail.wait_for_line("listening on")
    for topic in ("news/a", "news.tech/b", "news.tech.ai/c", "newsletter/d", "topic.news/e", *shown[-1:]):
        await runtime.publish_message(News("n"), TopicId(*topic.split("/")))
    await eventually(lambda: len(tail.stdout.splitlines()) > len(shown), 20)
    tail.terminate()
    assert await tail.wait() == 0
    events = [json.loads(line) for line in tail.stdout.splitlines()]
    assert [f"{event['topic_type']}/{event['topic_source']}" for event in events] == [*shown, shown[-1]]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("agent.upper", "'topic.agent.upper.>'"),
        ("agent", "'topic.agent.>'"),
        ("natsrt.cancel", "shows events"),
        ("topic.news.>.x", "'>' is no token"),
        ("topic.ne*", "'ne*' is no token"),
        ("topic..x", "'' is no token"),
        (">", "''"),
    ],
)
async def test_tail_refuses_what_has_no_events_and_says_what_would_be_right(given: str, meant: str) -> None:
    ended = await natsrt("tail", given)
    assert (ended.code, ended.stdout) == (2, "")
    assert meant in ended.stderr


# -- doctor ------------------------------------------------------------------------------------------------------


def levels(ended: Ended) -> dict[str, str]:
    return {finding["check"]: finding["level"] for finding in ended.json}


async def test_doctor_finds_nothing_wrong_with_a_healthy_server(
    run: Run, runtime: NatsAgentRuntime, server: EmbeddedServer
) -> None:
    ended = await run("doctor", "--json", "--monitor-url", server.monitor_url or "")
    assert ended.code == 0
    found = levels(ended)
    assert {check for check, level in found.items() if level != "ok"} <= {"server settings"}  # its data are temporary
    assert {"connection", "server version", "clock", "permission to call", "JetStream", "registry", "workers"} <= {
        *found
    }
    assert "no problems" in (await run("doctor")).stdout


@pytest.mark.slow
async def test_doctor_changes_nothing(run: Run, server: EmbeddedServer, namespace: str) -> None:
    first = await run("doctor", "--json")
    again = await run("doctor", "--json")
    for ended in (first, again):
        assert "does not exist yet" in next(f["text"] for f in ended.json if f["check"] == "registry")


@pytest.mark.slow
async def test_doctor_disturbs_no_agent(run: Run, runtime: NatsAgentRuntime, caplog: pytest.LogCaptureFixture) -> None:
    from autogen_core import TypePrefixSubscription

    await runtime.add_subscription(TypePrefixSubscription("", "clerk"))
    assert (await run("doctor")).code == 0
    await runtime.publish_message(News("after"), TopicId("news.tech", "s"))
    await eventually(lambda: Clerk.news == ["after"])
    (row,) = (await run("agents", "stats", "--json")).json
    assert (row["requests"], row["errors"]) == (1, 0)
    assert not caplog.records


async def test_doctor_says_how_to_enable_jetstream(tmp_path: Path) -> None:
    config = tmp_path / "nats.conf"
    config.write_text("max_payload: 64KB\n")
    async with EmbeddedServer(config=config, port=-1) as bare:
        ended = await natsrt("doctor", "--json", "--server", bare.url)
        assert ended.code == 7
        assert levels(ended)["JetStream"] == "problem"
        assert levels(ended)["max_payload"] == "warning"
        assert "jetstream" in next(f["advice"] for f in ended.json if f["check"] == "JetStream")
        assert "runs without JetStream" in next(f["text"] for f in ended.json if f["check"] == "JetStream")
        other = await natsrt("agents", "ls", "--server", bare.url)
        assert other.code == 3
        assert "runs without JetStream" in other.stderr


@pytest.mark.slow
async def test_doctor_tells_what_is_not_permitted(tmp_path: Path) -> None:
    config = tmp_path / "nats.conf"
    config.write_text(
        'jetstream { store_dir: "%s" }\n'
        "authorization { users: [\n"
        "  { user: all, password: all }, { user: some, password: some, permissions: {\n"
        '    publish: ["agent.>", "$JS.API.>"], subscribe: ["_INBOX.>", "natsrt.>"] } }\n'
        "] }\n" % (tmp_path / "data")
    )
    async with EmbeddedServer(config=config, port=-1) as guarded:
        login = ("--server", guarded.url, "--user", "some", "--password")
        ended = await natsrt("doctor", "--json", *login, "some")
        assert ended.code == 7
        text = next(f["text"] for f in ended.json if f["check"] == "permission to call")
        for refused in ("publish to natsrt.worker.", "publish to topic.", "publish to natsrt.cancel"):
            assert refused in text
        assert "publish to agent." not in text
        hosting = next(f for f in ended.json if f["check"] == "permission to host")
        assert hosting["level"] == "warning"
        for refused in ("publish to $KV.", "subscribe to agent.", "subscribe to topic.", "subscribe to $SRV.PING"):
            assert refused in hosting["text"]
        everything = await natsrt("doctor", "--json", "--server", guarded.url, "--user", "all", "--password", "all")
        assert (everything.code, levels(everything)["permission to host"]) == (0, "ok")
        wrong = await natsrt("doctor", "--json", *login, "wrong")
        assert (wrong.code, levels(wrong)) == (7, {"connection": "problem"})
        assert (await natsrt("agents", "ls", *login, "wrong")).code == 3


async def test_doctor_without_a_server_names_the_problem() -> None:
    ended = await natsrt("doctor", "--json", "--server", "nats://127.0.0.1:1", "--timeout", "500ms")
    assert (ended.code, levels(ended)) == (7, {"connection": "problem"})


@pytest.mark.slow
async def test_doctor_names_a_worker_that_does_not_answer(
    run: Run, server: EmbeddedServer, namespace: str, processes: Processes
) -> None:
    target = ("natsrt_cli.demo_agents:Upper", "--type", "upper", "--name", "frozen")
    worker = processes.natsrt("worker", *target, "--server", server.url, "--namespace", namespace)
    await worker.wait_for_line("ready")
    worker.pause()
    ended = await run("doctor", "--json")
    assert ended.code == 0
    finding = next(f for f in ended.json if f["check"] == "worker")
    assert finding["level"] == "warning"
    assert finding["text"].startswith("frozen-")
    assert f"process {worker.pid}" in finding["text"]


# -- server and demo ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
async def test_the_server_is_ready_when_it_says_so_and_ends_at_a_signal(processes: Processes, signum: int) -> None:
    server = processes.natsrt("server", "--port", "-1", "--http-port", "-1")
    url = (await server.wait_for_line("server ready: ")).split()[2].rstrip(",")
    assert "monitoring: http://127.0.0.1:" in await server.wait_for_line("monitoring: ")
    assert (await natsrt("agents", "ls", "--server", url)).code == 0
    server.send_signal(signum)
    assert await server.wait() == 0
    assert (await natsrt("agents", "ls", "--server", url, "--timeout", "500ms")).code == 3


@pytest.mark.slow
async def test_the_server_keeps_its_data_where_it_is_told(processes: Processes, tmp_path: Path) -> None:
    for _ in range(2):
        server = processes.natsrt("server", "--port", "-1", "--data-dir", str(tmp_path / "data"))
        url = (await server.wait_for_line("server ready: ")).split()[2].rstrip(",")
        async with NatsAgentRuntime(url) as runtime:
            if not await runtime.running.registry.is_known("upper"):
                await register(runtime, Upper, "upper", Upper)
        server.terminate()
        assert await server.wait() == 0
    server = processes.natsrt("server", "--port", "-1", "--data-dir", str(tmp_path / "data"))
    url = (await server.wait_for_line("server ready: ")).split()[2].rstrip(",")
    (row,) = (await natsrt("agents", "ls", "--json", "--server", url)).json
    assert (row["type"], row["live"]) == ("upper", False)


async def test_the_server_takes_the_development_configuration(processes: Processes, tmp_path: Path) -> None:
    config = Path(__file__).resolve().parents[1] / "nats.conf"
    server = processes.natsrt("server", "--config", str(config), "--port", "-1", "--http-port", "-1", cwd=tmp_path)
    await server.wait_for_line("server ready: ")
    server.terminate()
    assert await server.wait() == 0


@pytest.mark.parametrize(("jetstream", "told"), [("", True), ('jetstream { store_dir: "DIR" }\n', False)])
async def test_a_configuration_without_jetstream_is_named(
    processes: Processes, tmp_path: Path, jetstream: str, told: bool
) -> None:
    config = tmp_path / "server.conf"
    config.write_text(jetstream.replace("DIR", str(tmp_path / "data")))
    server = processes.natsrt("server", "--config", str(config), "--port", "-1")
    await server.wait_for_line("server ready: ")
    if told:
        await server.wait_for_line("the configuration enables no JetStream, which natsrt needs")
    server.terminate()
    assert await server.wait() == 0
    assert ("no JetStream" in server.stderr) is told


async def test_the_server_says_one_line_and_its_warnings_and_with_verbose_everything(
    processes: Processes, tmp_path: Path
) -> None:
    quiet = processes.natsrt("server", "--port", "-1", name="quiet")
    await quiet.wait_for_line("server ready: ")
    config = tmp_path / "warned.conf"
    config.write_text("jetstream {}\nauthorization { users: [{ user: a, password: b }] }\n")
    where = ("--config", str(config), "--port", "-1", "--data-dir", str(tmp_path / "data"))
    warned = processes.natsrt("server", *where, name="warned")
    await warned.wait_for_line("Plaintext passwords detected")
    verbose = processes.natsrt("server", "--port", "-1", "--verbose", name="verbose")
    await verbose.wait_for_line("Server is ready")
    for server in (quiet, warned, verbose):
        server.terminate()
        assert await server.wait() == 0
    assert re.fullmatch(
        r"server ready: nats://127\.0\.0\.1:\d+ \(temporary data; use --data-dir to keep it\)\n", quiet.stdout
    )
    assert quiet.stderr == ""
    assert f"(data in {tmp_path / 'data'})" in warned.stdout
    assert [line for line in warned.stderr.splitlines() if "[WRN]" not in line] == []
    assert "Initiating Shutdown" in verbose.stderr


@pytest.mark.parametrize("option", ["--port", "--http-port"])
async def test_a_port_in_use_says_what_answers_there(server: EmbeddedServer, option: str) -> None:
    other = ("--port", "-1") if option == "--http-port" else ()
    taken = server.url.rpartition(":")[2]
    ended = await natsrt("server", option, taken, *other)
    assert (ended.code, ended.stdout) == (1, "")
    assert ended.stderr == f"natsrt: port {taken} is in use, and a NATS server answers there\n"


async def test_a_port_in_use_by_something_else_says_so(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other, socket.socket() as silent:
        port = other.getsockname()[1]
        ended = await natsrt("server", "--port", str(port))
        assert ended.stderr == f"natsrt: port {port} is in use, and a program that is no NATS server answers there\n"
        config = tmp_path / "nats.conf"
        config.write_text(f"listen: 127.0.0.1:{port}\n")
        configured = await natsrt("server", "--config", str(config))
        assert configured.stderr == ended.stderr
        silent.bind(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        ended = await natsrt("server", "--port", str(port))
        assert f"port {port} is in use, and nothing answers there" in ended.stderr


@pytest.mark.parametrize("port", ["99999", "65536", "-2", "0", "http", "4222x", ""])
@pytest.mark.parametrize(
    "command", [["server", "--port"], ["server", "--http-port"], ["worker", "x:y", "--health-port"]]
)
async def test_what_is_no_port_is_a_range_error(command: list[str], port: str) -> None:
    ended = await natsrt(*command, port)
    assert (ended.code, ended.stdout) == (2, "")
    assert f"{port!r} is not a port: give a number from 1 to 65535, or -1 for a free port" in ended.stderr


async def test_a_missing_file_is_a_readable_error() -> None:
    missing = await natsrt("server", "--config", "/no/such.conf")
    assert missing.code == 2
    assert "/no/such.conf" in missing.stderr


async def test_the_demo_runs_from_start_to_end_and_leaves_nothing(tmp_path: Path) -> None:
    ended = await natsrt("demo", env={"NATS_URL": "nats://127.0.0.1:1", "TMPDIR": str(tmp_path)}, cwd=tmp_path)
    assert ended.code == 0, ended.stderr
    for expected in (
        "$ natsrt worker natsrt_cli.demo_agents:Reverse --type reverse",
        "$ natsrt send upper/demo",
        '{"text": "AGENTS OVER NATS"}',
        '{"text": "STAN revo stnega"}',
        "reverse reads: STAN revo stnega",
        "upper reads: AGENTS OVER NATS",
        "$ natsrt agents ls",
        "done",
    ):
        assert expected in ended.stdout
    assert ended.stderr == ""
    assert list(tmp_path.iterdir()) == []


async def test_the_commands_of_the_demo_work_by_hand(run: Run, runtime: NatsAgentRuntime) -> None:
    await register(runtime, Upper, "upper", Upper)
    ended = await run("send", "upper/demo", '{"text": "agents over NATS"}')
    assert ended.json == {"text": "AGENTS OVER NATS"}
    ended = await run("publish", "demo.news/demo", json.dumps({"headline": Headline("agents").headline}))
    assert "for agent types: upper" in ended.stderr


@pytest.mark.parametrize(
    ("server", "level", "told"),
    [
        ((2, 10, 29), "problem", "needs 2.11 or later"),
        ((2, 11, 0), "warning", "before 2.12.6"),
        ((2, 12, 5), "warning", "Nats-Trace-Dest"),
        ((2, 12, 6), "ok", ""),
        ((3, 0, 0), "ok", ""),
    ],
)
def test_doctor_judges_the_version_of_the_server(server: tuple[int, int, int], level: str, told: str) -> None:
    judged, advice = judge_server_version(server)
    assert judged == level
    assert told in advice if told else not advice
