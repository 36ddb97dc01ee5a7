"""The web chat of the examples, started by its one command, in real browsers. Screenshots go to the tests' folders."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("autogen_agentchat", reason="autogen-agentchat is not installed: pip install 'natsrt[dev]'")
pytest.importorskip("autogen_ext", reason="autogen-ext is not installed: pip install 'natsrt[dev]'")
pytest.importorskip("fastapi", reason="fastapi is not installed: pip install 'natsrt[dev]'")
pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install 'natsrt[dev]'")
pytest.importorskip("playwright", reason="playwright is not installed: pip install 'natsrt[dev]'")

from autogen_core import AgentId
from autogen_core.models import ModelInfo
from autogen_ext.models.replay import ReplayChatCompletionClient
from playwright.async_api import Browser, Locator, Page, async_playwright, expect

from examples.chat.board import MOST_EVENTS, MOST_LINES, Board
from examples.chat.failures import for_log, readable
from examples.chat.messages import Kept, Recall
from natsrt import NatsAgentRuntime, WorkerLost
from natsrt.agentchat import RemoteChatAgent
from natsrt.embedded import EmbeddedServer
from tests.support.processes import REPOSITORY, Process, Processes, eventually

SECONDS = 1000.0
"""Playwright counts in milliseconds."""
expect.set_options(timeout=25 * SECONDS)

Open = Callable[..., Awaitable[Page]]


class Chat:
    """The running example."""

    def __init__(self, processes: Processes, *arguments: str | Path, env: Mapping[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "examples.chat", "--port", "0", *arguments]
        environment = {"NATS_URL": "", **(env or {})}
        self.process: Process = processes.start(command, name="chat", env=environment, cwd=REPOSITORY)

    async def url(self) -> str:
        return (await self.process.wait_for_line("is the page", timeout=30)).split()[0]

    @property
    def nats_url(self) -> str:
        return re.findall(r"nats://[\d.:]+", self.process.stdout)[0]

    def pid(self, name: str) -> int:
        """The id of the process with this name, which may have been started again."""
        return int(re.findall(rf"^{name}: process (\d+)", self.process.stdout, re.MULTILINE)[-1])

    def signal(self, name: str, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid(name), number)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chat]:
    """One running example for all tests: each has a room of its own."""
    processes = Processes(tmp_path_factory.mktemp("chat"))
    try:
        yield Chat(processes)
    finally:
        processes.close()


@pytest.fixture(scope="session")
def chromium() -> str:
    """A Chromium. Without one a test is skipped, but fails where CI is set."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    reason = "no Chromium is installed: bash .ci/install_chromium installs it on Debian"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture
async def browser(chromium: str) -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []  # root has no sandbox
        launched = await playwright.chromium.launch(executable_path=chromium, args=arguments)
        try:
            yield launched
        finally:
            await launched.close()


@pytest.fixture
async def visit(browser: Browser, tmp_path: Path) -> AsyncIterator[Open]:
    """Opens a room for a person in a browser of their own. Scripts of the page must raise nothing."""
    pages: dict[str, Page] = {}
    raised: list[str] = []

    async def opened(url: str, person: str = "") -> Page:
        context = await browser.new_context(viewport={"width": 920, "height": 760})
        page = pages[person] = await context.new_page()
        page.set_default_timeout(25 * SECONDS)
        page.on("pageerror", lambda error: raised.append(str(error)))
        await page.goto(url)
        if person:
            await page.get_by_label("Your name").fill(person)
            await page.get_by_role("button", name="Join").click()
        return page

    yield opened
    for person, page in pages.items():
        await page.screenshot(path=tmp_path / f"{person or 'nobody'}.png")
    assert raised == []


@pytest.fixture
async def room(chat: Chat, namespace: str) -> str:
    """The URL of a room that no other test uses."""
    return f"{await chat.url()}rooms/{namespace}"


async def say(page: Page, text: str) -> None:
    await page.locator("#text").fill(text)
    await page.get_by_role("button", name="Send").click()


def line(page: Page, kind: str, text: str) -> Locator:
    """The last line of a kind with a text."""
    return page.locator(f".{kind}", has_text=text).last


async def writing(page: Page, name: str = "writer") -> Locator:
    """The line that an agent writes at this moment, with its first words."""
    found = page.locator(".agent.writing", has_text=name)
    await expect(found.locator(".text")).not_to_be_empty()
    return found


async def answered(page: Page, choice: str, outcome: str) -> None:
    await page.get_by_role("button", name=choice).click()
    await expect(line(page, "agent", outcome)).to_be_visible()


# ---------------------------------------------------------------------------------------------------------------------
# People


async def test_two_people_see_the_answer_grow_and_the_second_one_approves(
    room: str, visit: Open, tmp_path: Path
) -> None:
    ada, ben = await visit(room, "Ada"), await visit(room, "Ben")
    for page in (ada, ben):
        await expect(page.locator("#people")).to_have_text("Here: Ada, Ben")
    await expect(ada.locator("#agents li:not(.away)")).to_have_text(["writer", "editor", "publisher"])

    await say(ada, "The old lighthouse opens on Friday")
    growing = (await writing(ben)).locator(".text")
    early = await growing.inner_text()
    await ben.screenshot(path=tmp_path / "growing.png")
    await expect(growing).not_to_have_text(early)
    for page in (ada, ben):
        whole = line(page, "agent", "there will be cake.”").first
        await expect(whole).to_be_visible()
    first = await ben.locator(".agent .text").first.inner_text()
    assert first.startswith(early.rstrip()) and len(first) > 2 * len(early)

    for page in (ada, ben):
        await expect(page.get_by_role("button", name="Refuse")).to_be_visible()
    await ada.screenshot(path=tmp_path / "question.png")
    await answered(ben, "Approve", "Published. Ben approved.")
    for page in (ada, ben):
        await expect(line(page, "question", "The old lighthouse opens")).to_contain_text("Ben approved")
        await expect(page.get_by_role("button", name="Approve")).to_have_count(0)
    assert await ada.locator(".mine").count() == 1 and await ben.locator(".mine").count() == 0


async def test_a_refusal_counts_once_and_who_has_not_joined_only_reads(room: str, visit: Open) -> None:
    ada, ben, guest = await visit(room, "Ada"), await visit(room, "Ben"), await visit(room)
    text = "<b>Free</b> ferries & <img src=x onerror=alert(1)>"
    await say(ada, text)
    await expect(line(guest, "question", "Join to answer.")).to_be_visible()
    assert await guest.get_by_role("button", name="Refuse").count() == 0
    await answered(ben, "Refuse", "Not published. Ben refused.")

    question = await ada.locator(".question").get_attribute("data-id")
    late = await ada.request.post(f"{room}/questions/{question}", data={"name": "Ada", "approved": True})
    assert (late.status, await late.json()) == (409, {"detail": "This question is not open any more."})
    for page in (ada, guest):
        await expect(page.locator(".question")).to_contain_text("Ben refused")
        await expect(page.locator(".person .text")).to_have_text(text)
        assert await page.locator(".lines b, .lines img").count() == 0


async def test_what_is_said_meanwhile_is_the_next_task_unless_it_is_too_much(room: str, visit: Open) -> None:
    ada, ben = await visit(room, "Ada"), await visit(room, "Ben")
    await say(ada, "first")
    await writing(ada)
    for number in range(19):
        said = await ada.request.post(f"{room}/messages", data={"name": "Ada", "text": f"number {number}"})
        assert said.status == 204
    await say(ben, "last")
    await expect(line(ada, "person", "last")).to_contain_text("waits until the team has answered")
    await say(ada, "one too many")
    await expect(ada.get_by_role("button", name="Approve")).to_be_visible()  # the line stays while words come
    await expect(ada.get_by_role("status")).to_have_text("Too many messages wait for the team. Please wait a moment.")
    await expect(ada.locator("#text")).to_have_value("one too many")
    await answered(ada, "Approve", "Ada approved")
    await expect(ada.get_by_role("status")).to_be_hidden()
    await expect(line(ada, "agent", "Here is a first draft, Ben. “last.")).to_be_visible()
    await expect(line(ada, "person", "last")).not_to_contain_text("waits")
    await answered(ben, "Refuse", "Ben refused")
    await expect(ada.locator(".person.asked, .person.waiting")).to_have_count(0)  # it was one task
    kinds = await ada.locator(".line").evaluate_all("lines => lines.map(line => line.classList[1])")
    answer = ["agent", "agent", "question", "agent"]
    assert kinds == ["person", *answer, *["person"] * 20, *answer]


async def test_a_reload_keeps_the_transcript_and_another_room_has_its_own(room: str, visit: Open) -> None:
    ada = await visit(room, "Ada")
    await say(ada, "The harbour is closed")
    await writing(ada)
    await ada.reload()  # in the middle of the answer
    await expect(ada.locator("#as")).to_have_text("Ada")
    await answered(ada, "Approve", "Published. Ada approved.")
    before = await ada.locator(".lines").inner_text()
    await ada.reload()
    await expect(line(ada, "agent", "Published.")).to_be_visible()
    assert await ada.locator(".lines").inner_text() == before
    elsewhere = await visit(f"{room}-2", "Cem")
    await expect(elsewhere.get_by_text("Nobody has said anything here yet.")).to_be_visible()
    assert await elsewhere.locator(".line").count() == 0


async def test_requests_that_make_no_sense_are_refused(room: str, visit: Open) -> None:
    ada = await visit(room, "Ada")
    for path, data in {
        "messages": {"name": "Ada", "text": "  "},
        "messages?": {"name": "", "text": "hello"},
        "messages??": {"name": "Ada", "text": "x" * 4001},
        "questions/1": {"name": "Ada"},
    }.items():
        assert (await ada.request.post(f"{room}/{path}", data=data)).status == 422, path
    nowhere = room.rsplit("/", 1)[0]
    assert (await ada.request.get(f"{nowhere}/two%20words")).status == 422
    assert (await ada.request.post(f"{room}/questions/1", data={"name": "Ada", "approved": True})).status == 409
    assert await ada.locator(".line").count() == 0


# ---------------------------------------------------------------------------------------------------------------------
# Failures

AGAIN = "Nothing of this answer counts. Please send your message again."


@pytest.mark.slow
async def test_a_worker_that_is_killed_in_mid_answer_shows_a_line_and_the_next_message_works(
    chat: Chat, room: str, visit: Open
) -> None:
    ada = await visit(room, "Ada")
    await say(ada, "before")
    await writing(ada)
    chat.signal("worker writer")
    await expect(line(ada, "error", "")).to_have_text(f"A worker process ended while it was answering. {AGAIN}")
    await expect(line(ada, "person", "before")).to_contain_text("not answered")
    await expect(ada.locator(".agent")).to_contain_text("did not get to the end")
    await say(ada, "after")
    await answered(ada, "Approve", "Published. Ada approved.")
    await expect(line(ada, "question", "after.")).to_be_visible()
    await expect(ada.locator("#agents li.away")).to_have_count(0)


@pytest.mark.slow
async def test_a_question_is_withdrawn_when_the_worker_that_asks_is_killed(chat: Chat, room: str, visit: Open) -> None:
    ada = await visit(room, "Ada")
    await say(ada, "before")
    await expect(ada.get_by_role("button", name="Approve")).to_be_visible()
    chat.signal("worker publisher")
    await expect(ada.locator(".question")).to_contain_text("The question was withdrawn.")
    await expect(line(ada, "error", "")).to_contain_text(AGAIN)
    await say(ada, "after")
    await answered(ada, "Approve", "Published. Ada approved.")


@pytest.mark.slow
@pytest.mark.timeout(120)  # it starts many processes
async def test_agents_remember_what_was_said_before_all_workers_were_killed(
    chat: Chat, room: str, namespace: str, visit: Open
) -> None:
    ada = await visit(room, "Ada")
    await say(ada, "the first thing")
    await answered(ada, "Approve", "Ada approved")
    for name in ("writer", "editor", "publisher"):
        chat.signal(f"worker {name}")
    await say(ada, "the second thing")
    await answered(ada, "Refuse", "Ada refused")
    async with NatsAgentRuntime(chat.nats_url) as runtime:
        agent = await RemoteChatAgent.connect("writer", runtime, timeout=20, session=namespace)
        context = json.dumps(await agent.save_state())
    assert context.count('"Ada: the first thing"') == context.count('"Ada: the second thing"') == 1


@pytest.mark.slow
@pytest.mark.timeout(120)  # it starts many processes
async def test_a_web_server_that_is_killed_comes_back_with_the_transcript(
    chat: Chat, room: str, namespace: str, visit: Open
) -> None:
    async def are(states: list[str]) -> bool:
        """Whether these are the states of the lines that are stored."""
        kept: Kept = await runtime.send_message(Recall(), AgentId("transcript", namespace))
        return [line.state for line in kept.lines] == states

    ada = await visit(room, "Ada")
    async with NatsAgentRuntime(chat.nats_url) as runtime:
        await say(ada, "before")
        await answered(ada, "Approve", "Published. Ada approved.")
        answer = ["", "", "", "approved", ""]
        await eventually(lambda: are(answer), timeout=20)
        before = await ada.locator(".lines").inner_text()
        chat.signal("web server")
        await expect(ada.get_by_role("status")).to_contain_text("The connection to the web server is lost.")
        await expect(ada.get_by_role("status")).to_be_hidden()
        await expect(line(ada, "agent", "Published. Ada approved.")).to_be_visible()
        assert await ada.locator(".lines").inner_text() == before

        await say(ada, "in the middle")
        await expect(ada.get_by_role("button", name="Approve")).to_be_visible()
        await eventually(lambda: are([*answer, "asked", "", "", "open"]), timeout=20)
        chat.signal("web server")
        await expect(line(ada, "error", "")).to_contain_text("The web server was restarted in the middle.")
        await expect(line(ada, "question", "in the middle")).to_contain_text("The question was withdrawn.")
        await expect(line(ada, "person", "in the middle")).to_contain_text("not answered")
    await say(ada, "after")
    await answered(ada, "Approve", "Published. Ada approved.")
    await expect(line(ada, "question", "after.")).to_contain_text("Ada approved")


@pytest.mark.slow
async def test_an_answer_goes_on_when_the_nats_server_was_killed(chat: Chat, room: str, visit: Open) -> None:
    ada = await visit(room, "Ada")
    await say(ada, "before")
    await writing(ada)
    chat.signal("nats-server")
    await answered(ada, "Approve", "Published. Ada approved.")
    assert await ada.locator(".error").count() == 0
    assert (await ada.locator(".agent .text").first.inner_text()).count("We have thought about this") == 1


@pytest.mark.slow
async def test_a_nats_server_that_does_not_answer_is_a_line_on_the_page(chat: Chat, room: str, visit: Open) -> None:
    ada = await visit(room, "Ada")
    await say(ada, "before")
    await answered(ada, "Approve", "Published. Ada approved.")
    chat.signal("nats-server", signal.SIGSTOP)
    try:
        await expect(ada.get_by_role("status")).to_contain_text("The NATS server does not answer.")
    finally:
        chat.signal("nats-server", signal.SIGCONT)
    await expect(ada.get_by_role("status")).to_be_hidden()
    await say(ada, "after")
    await answered(ada, "Refuse", "Not published. Ada refused.")


# ---------------------------------------------------------------------------------------------------------------------
# The command


@pytest.mark.slow
@pytest.mark.timeout(120)  # it starts many processes
async def test_ctrl_c_ends_everything_and_a_data_directory_keeps_the_conversation(
    processes: Processes, visit: Open, tmp_path: Path
) -> None:
    """With a model of its own, too: each agent has the same one."""
    info = ModelInfo(vision=False, function_calling=True, json_output=False, structured_output=False, family="unknown")
    client = ReplayChatCompletionClient(["I am a real model."], model_info=info)
    (tmp_path / "model.json").write_text(client.dump_component().model_dump_json(), "utf-8")
    arguments = ("--data-dir", tmp_path / "data", "--model", tmp_path / "model.json")
    chat = Chat(processes, *arguments)
    ada = await visit(f"{await chat.url()}rooms/kept", "Ada")
    await say(ada, "Who are you?")
    await expect(ada.locator(".agent:not(.writing) .text")).to_have_text(["I am a real model."] * 3)
    await expect(ada.locator(".person.asked")).to_have_count(0)
    pids = [chat.pid(name) for name in ("nats-server", "web server", "worker writer", "worker editor")]
    chat.process.interrupt()
    assert await chat.process.wait(timeout=15) == 0, chat.process.describe()
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert "Traceback" not in chat.process.stderr and "ERROR" not in chat.process.stderr

    again = Chat(processes, *arguments)
    ben = await visit(f"{await again.url()}rooms/kept", "Ben")
    await expect(ben.locator(".text")).to_have_text(["Who are you?", *["I am a real model."] * 3])
    again.process.terminate()
    assert await again.process.wait(timeout=15) == 0, again.process.describe()


@pytest.mark.slow
async def test_the_server_of_nats_url_is_used(server: EmbeddedServer, namespace: str, processes: Processes) -> None:
    chat = Chat(processes, env={"NATS_URL": server.url, "NATSRT_NAMESPACE": namespace})
    async with NatsAgentRuntime(server.url, namespace=namespace) as runtime:
        for agent_type in ("writer", "editor", "publisher", "newsroom"):
            await runtime.wait_for(agent_type, timeout=40)
    assert "nats-server" not in chat.process.stdout


async def test_arguments_that_cannot_be_used_are_refused_in_a_line(
    chat: Chat, processes: Processes, tmp_path: Path
) -> None:
    (tmp_path / "bad.json").write_text("{", "utf-8")
    port = (await chat.url()).rstrip("/").rpartition(":")[2]
    for arguments, said in {
        ("--port", port): "--port 0 takes a free one",
        ("--port", "65536"): "--port 65536",
        ("--model", str(tmp_path / "bad.json")): "bad.json: JSONDecodeError",
        ("--model", str(tmp_path / "no.json")): "no.json: FileNotFoundError",
        ("--port", "0", "--data-dir", str(tmp_path / "bad.json")): "bad.json",
    }.items():
        program = "import runpy; runpy.run_module('examples.chat', run_name='__main__', alter_sys=True)"
        process = processes.python(program, *arguments)
        assert await process.wait(20) in (1, 2), process.describe()
        assert said in process.stderr and "Traceback" not in process.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Parts


async def test_a_browser_that_is_too_slow_is_disconnected_and_the_others_are_not() -> None:
    board = Board()
    slow, quick = board.watch("slow", {}), board.watch("quick", {})
    for watching in (slow, quick):
        await anext(watching)
    seen: list[Any] = []
    for number in range(MOST_EVENTS + 10):
        board.add("agent", "writer", str(number))
        seen.append(await anext(quick))
    assert [event async for event in slow] == []
    assert [event["line"]["text"] for event in seen if event["event"] == "line"][:3] == ["0", "1", "2"]
    assert len(board.lines) == MOST_LINES and board.lines[-1].text == str(MOST_EVENTS + 9)
    await quick.aclose()
    assert not board.watched


def test_errors_are_one_line_for_people_and_name_no_worker() -> None:
    lost = WorkerLost("writer/tea", "writer-x", "it is gone")
    of_team = RuntimeError(f"WorkerLost: {lost}\nTraceback:\n  much of it")
    other = RuntimeError("ValueError: the model is asleep\nTraceback:\n  much of it")
    assert readable(lost) == readable(of_team) == f"A worker process ended while it was answering. {AGAIN}"
    assert "\n" not in for_log(of_team)
    assert readable(other) == f"The team failed with an error of the kind ValueError. {AGAIN}"
    assert "much of it" in for_log(other)
