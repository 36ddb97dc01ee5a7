"""``natsrt send --stream``: items as they come, the questions of the handler, and what ends both."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import pty
import signal
import subprocess
import termios
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nats
import pytest
from autogen_core import MessageContext, RoutedAgent, rpc
from nats.aio.msg import Msg
from natsrt_cli.questions import read_answer

import natsrt
from natsrt import NatsAgentRuntime
from natsrt.embedded import EmbeddedServer
from natsrt.wire.subjects import Subjects
from tests.support.cli import NATSRT, Ended
from tests.support.cli import natsrt as run_natsrt
from tests.support.forks import start
from tests.support.processes import Processes, eventually

Run = Callable[..., Awaitable[Ended]]


@dataclass
class Write:
    words: str
    then: str = ""
    size: int = 0


@dataclass
class Word:
    text: str


@dataclass
class Approve:
    what: str


@dataclass
class Verdict:
    yes: bool


class Writer(RoutedAgent):
    """Sends words, and then does what it is asked to do."""

    ended: list[str] = []
    answers: list[Any] = []
    gate: asyncio.Event

    def __init__(self) -> None:
        super().__init__("writes")

    @natsrt.streaming
    async def write(self, message: Write, ctx: MessageContext) -> AsyncGenerator[Word | str | bytes, None]:
        try:
            for word in message.words.split():
                yield Word(word + "." * message.size)
            match message.then:
                case "wait":
                    await self.gate.wait()
                    yield "done"
                case "fail":
                    raise ValueError("no more words")
                case "bytes":
                    yield b"\xff\x00"
                case "approve":
                    self.answers.append(await natsrt.ask(Approve("all\x1b[2J"), reply_type=Verdict))
                case "title":
                    self.answers.append(await natsrt.ask("which title?", reply_type=str))
                case "both":
                    self.answers.append(await natsrt.ask(Approve("it"), reply_type=Verdict))
                    self.answers.append(await natsrt.ask("which title?", reply_type=str))
                case "impatient":
                    try:
                        async with asyncio.timeout(0.5):
                            await natsrt.ask(Approve("quickly"), reply_type=Verdict)
                    except TimeoutError:
                        yield "too late"
                    await self.gate.wait()
                    self.answers.append(await natsrt.ask(Approve("slowly"), reply_type=Verdict))
        except BaseException as error:
            self.ended.append(type(error).__name__)
            raise
        self.ended.append("")

    @rpc
    async def count(self, message: int, ctx: MessageContext) -> int | None:
        for number in range(message):
            await natsrt.emit(number)
        return message if message else None


@pytest.fixture
async def worker(server: EmbeddedServer, namespace: str) -> AsyncIterator[NatsAgentRuntime]:
    """A worker with the agent type ``writer``."""
    Writer.ended, Writer.answers, Writer.gate = [], [], asyncio.Event()
    async with NatsAgentRuntime(
        server.url, namespace=namespace, name="office", drain_timeout=0.5, stream_idle_timeout=1.5
    ) as runtime:
        await natsrt.register(runtime, Writer, "writer", Writer)
        yield runtime


@pytest.fixture
def where(server: EmbeddedServer, namespace: str, worker: NatsAgentRuntime) -> tuple[str, ...]:
    return "--server", server.url, "--namespace", namespace


@pytest.fixture
def run(where: tuple[str, ...]) -> Run:
    """Stream from an agent with the command, to its end."""

    async def run(agent: str, *arguments: str, **how: Any) -> Ended:
        return await run_natsrt("send", "--stream", agent, *arguments, *where, **how)

    return run


def body(words: str, then: str = "", size: int = 0) -> str:
    return json.dumps({"words": words, "then": then, "size": size})


# -- items -----------------------------------------------------------------------------------------------------------


async def test_items_are_printed_while_the_handler_runs(where: tuple[str, ...], processes: Processes) -> None:
    command = processes.natsrt("send", "--stream", "writer/ada", body("to be", "wait"), *where)
    await command.wait_for_line('{"text":"to"}')
    await command.wait_for_line('{"text":"be"}')
    assert Writer.ended == []
    Writer.gate.set()
    assert await command.wait() == 0
    assert command.stdout == '{"text":"to"}\n{"text":"be"}\n"done"\n'
    assert command.stderr == ""


async def test_with_json_each_item_has_its_type(run: Run) -> None:
    ended = await run("writer", body("to be", "bytes"), "--json")
    assert [json.loads(line) for line in ended.stdout.splitlines()] == [
        {"message_type": "Word", "data": {"text": "to"}},
        {"message_type": "Word", "data": {"text": "be"}},
        {"message_type": "bytes", "data_base64": "/wA="},
    ]
    assert (ended.code, ended.stderr, Writer.ended) == (0, "", [""])


async def test_what_an_ordinary_handler_returns_is_the_last_line(run: Run) -> None:
    assert (await run("writer", "3")).stdout == "0\n1\n2\n3\n"
    assert (await run("writer", "0")).stdout == "null\n"
    assert (await run("writer", body(""))).stdout == ""


async def test_items_and_bodies_of_any_size_and_type_names(run: Run) -> None:
    large = "x" * 1_500_000
    ended = await run("writer", stdin=body(f"{large} end", size=3))
    assert ended.stdout == f'{{"text":"{large}..."}}\n{{"text":"end..."}}\n'
    for name in ("Write", f"{Write.__module__}.Write"):
        assert (await run("writer", "--type-name", name, "-", stdin=body("a"))).stdout == '{"text":"a"}\n'


async def test_what_a_plain_responder_answers_is_the_only_line(
    run: Run, server: EmbeddedServer, namespace: str
) -> None:
    async def shout(message: Msg) -> None:
        await message.respond(b'{"loud": 1}')

    async with await nats.connect(server.url) as client:
        await client.subscribe(Subjects(namespace).agent("shout"), cb=shout)
        await client.flush()
        assert (await run("shout", "{}")).stdout == '{"loud": 1}\n'
        assert (await run("shout", "{}", "--json")).stdout == '{"message_type":null,"data":{"loud":1}}\n'


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("nobody", "{}"), 4, "agent type 'nobody' is unknown; registered types: writer"),
        (("writer", body("a", "fail")), 6, "natsrt: ValueError: no more words (answered by writer/default on worker"),
        (
            ("writer", '{"wrods": "a"}'),
            6,
            "'wrods' is not a field of it, did you mean 'words'?; name the type with --ty",
        ),
        (("writer", body("a"), "--type-name", "Wriet"), 6, "did you mean 'Write'?"),
        (("writer", '{"words"', "--type-name", "Write"), 2, "the body is not JSON"),
        (("writer", '{"words"'), 6, "it begins like JSON, but is not"),
        (("writer", body("a", "wait"), "--timeout", "1s"), 5, "no reply from writer/default within --timeout = 1 s"),
        (("a b/c", "{}"), 2, "'a b/c' is not an agent"),
    ],
    ids=["unknown", "raises", "misspelt field", "misspelt type", "typed no JSON", "no JSON", "timeout", "no agent"],
)
async def test_failures_have_the_exit_codes_of_send(run: Run, arguments: tuple[str, ...], code: int, text: str) -> None:
    ended = await run(*arguments)
    assert (ended.code, text in ended.stderr, len(ended.stderr.splitlines())) == (code, True, 1), ended
    assert ended.stdout in ("", '{"text":"a"}\n')
    await eventually(lambda: Writer.ended in ([], ["ValueError"], ["GeneratorExit"], ["CancelledError"]))


async def test_json_is_for_streams(where: tuple[str, ...]) -> None:
    ended = await run_natsrt("send", "writer", body("a"), "--json", *where)
    assert (ended.code, "--json needs --stream" in ended.stderr) == (2, True)


# -- what ends it ----------------------------------------------------------------------------------------------------


async def test_ctrl_c_stops_the_handler(where: tuple[str, ...], worker: NatsAgentRuntime, processes: Processes) -> None:
    command = processes.natsrt("send", "--stream", "writer", body("to be", "wait"), *where)
    await command.wait_for_line('"be"')
    command.interrupt()
    assert await command.wait() == 130
    assert command.stderr.strip() == ""
    await eventually(lambda: Writer.ended == ["CancelledError"], timeout=1.0)
    await eventually(lambda: not worker.running.incoming.streams._streams)


@contextmanager
def started(*arguments: str) -> Iterator[tuple[int, int, Any]]:
    """A command, and the ends of its standard input and output."""
    answers, answer = os.pipe()
    reading, writing = os.pipe()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    command: list[str | Path] = [NATSRT, "send", "--stream", "writer", *arguments]
    process = start(command, stdin=answers, stdout=writing, stderr=nowhere, env=dict(os.environ))
    for descriptor in (answers, writing, nowhere):
        os.close(descriptor)
    try:
        yield answer, reading, process
    finally:
        process.kill()
        process.wait()
        os.close(answer)


async def test_a_reader_that_closes_the_output_stops_the_handler(where: tuple[str, ...]) -> None:
    with started(body("word " * 20_000, "wait"), *where) as (_, reading, process):
        assert await asyncio.to_thread(os.read, reading, 100)
        os.close(reading)
        assert await asyncio.to_thread(process.wait) == 0
        await eventually(lambda: Writer.ended in (["GeneratorExit"], ["CancelledError"]), timeout=1.0)


@pytest.mark.slow  # it waits for longer than stream_idle_timeout
async def test_a_reader_that_pauses_loses_nothing(where: tuple[str, ...]) -> None:
    with started(body("word " * 3_000, size=1_000), *where) as (_, reading, process):
        read = await asyncio.to_thread(os.read, reading, 1)
        await asyncio.sleep(4.0)
        assert Writer.ended == []
        while data := await asyncio.to_thread(os.read, reading, 1 << 16):
            read += data
        os.close(reading)
        assert await asyncio.to_thread(process.wait) == 0
    assert (len(read.splitlines()), Writer.ended) == (3_000, [""])


# -- questions without a terminal ------------------------------------------------------------------------------------


async def test_lines_of_standard_input_answer_the_questions(run: Run) -> None:
    ended = await run("writer", body("a", "both"), stdin='{"yes": true}\nOn being\nnever read\n')
    assert (ended.code, ended.stdout, Writer.answers) == (0, '{"text":"a"}\n', [Verdict(True), "On being"])
    assert ended.stderr == 'question Approve: {"what":"it"}\nquestion str: "which title?"\n'


async def test_a_line_that_cannot_be_an_answer_is_followed_by_another_try(run: Run) -> None:
    ended = await run("writer", body("a", "approve"), stdin='{"yes": tru\n\n[NaN]\n{"yes": true}')
    assert (ended.code, Writer.answers) == (0, [Verdict(True)])
    said = ended.stderr.splitlines()
    assert said[0] == 'question Approve: {"what":"all\\u001b[2J"}'
    assert said[1].startswith("this cannot be an answer: it begins like JSON, but is not: ")
    assert said[2] == 'this cannot be an answer: the line is empty; write "" for an empty text'
    assert said[3] == "this cannot be an answer: JSON has no NaN"
    assert len(said) == 4


async def test_an_answer_comes_through_a_pipe_when_it_is_written(where: tuple[str, ...]) -> None:
    with started(body("a", "approve"), *where) as (answer, reading, process):
        assert await asyncio.to_thread(os.read, reading, 100) == b'{"text":"a"}\n'
        os.close(reading)
        for part in (b'{"yes":', b" false}\n"):
            assert Writer.answers == []
            os.write(answer, part)
            await asyncio.sleep(0.3)  # so that it is read in two pieces
        assert await asyncio.to_thread(process.wait) == 0
        assert Writer.answers == [Verdict(False)]


@pytest.mark.parametrize("arguments", [(body("a", "title"),), ("-",), ()], ids=["no input", "read", "piped"])
async def test_without_an_answer_the_handler_has_nobody_to_ask(run: Run, arguments: tuple[str, ...]) -> None:
    ended = await run(
        "writer", *arguments, stdin="" if len(arguments[0:1]) and arguments[0] != "-" else body("a", "title")
    )
    assert (ended.code, ended.stdout, Writer.ended) == (6, '{"text":"a"}\n', ["NobodyToAsk"])
    assert "the question is not answered: standard input has no more lines" in ended.stderr
    assert "nobody answers the questions of writer/default" in ended.stderr


async def test_an_answer_of_another_type_is_the_handlers_error(run: Run) -> None:
    ended = await run("writer", body("a", "approve"), stdin='{"yse": true}\n')
    assert (ended.code, Writer.ended, Writer.answers) == (6, ["CannotDecode"], [])
    assert "yse" in ended.stderr or "Verdict" in ended.stderr


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("yes\r", "yes"),
        ("true", True),
        ("5", 5),
        ('"5"', "5"),
        ('""', ""),
        (' {"a": [1, null]} ', {"a": [1, None]}),
        ("To be, or {not}", "To be, or {not}"),
        ("123456789012345678901", 123456789012345678901),
    ],
)
def test_a_line_is_json_or_a_text(line: str, value: Any) -> None:
    assert read_answer(line.encode()) == value


@pytest.mark.parametrize(
    "line",
    [b"", b"  \t", b'{"a"', b"[1,]", b'"open', b"NaN", b'{"a": Infinity}', b"\xff", b"[" * 100_000],
    ids=["empty", "blank", "object", "array", "text", "NaN", "Infinity", "bytes", "deep"],
)
def test_a_line_that_is_nothing_of_both_is_refused(line: bytes) -> None:
    with pytest.raises(ValueError, match=r"empty|not: |JSON has no|UTF-8|deeply"):
        read_answer(line)


# -- questions at a terminal -----------------------------------------------------------------------------------------


class Screen:
    """A terminal in which a command runs. It is the command's only input and output."""

    def __init__(self, *arguments: str | Path) -> None:
        self._master, terminal = pty.openpty()
        self._process = subprocess.Popen(
            arguments,
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(terminal)
        self.text = ""
        asyncio.get_running_loop().add_reader(self._master, self._read)

    def _read(self) -> None:
        try:
            self.text += os.read(self._master, 1 << 16).decode()
        except OSError:  # nobody has the terminal open any more
            asyncio.get_running_loop().remove_reader(self._master)

    async def shows(self, text: str) -> None:
        await eventually(lambda: text in self.text, timeout=20.0)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    async def ended(self) -> int:
        return await asyncio.to_thread(self._process.wait, 20.0)

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._master)
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
        os.close(self._master)


@pytest.fixture
async def screen(where: tuple[str, ...]) -> AsyncIterator[Callable[[str], Screen]]:
    """Streams from the agent in a terminal, with this body."""
    screens: list[Screen] = []

    def show(text: str) -> Screen:
        screens.append(Screen(NATSRT, "send", "--stream", "writer", text, *where))
        return screens[-1]

    yield show
    for one in screens:
        one.close()


async def test_a_person_answers_at_the_terminal(screen: Callable[[str], Screen]) -> None:
    shown = screen(body("a", "both"))
    await shown.shows('{"text":"a"}\r\nquestion Approve: {"what":"it"}\r\nanswer: ')
    shown.type('{"yes": maybe}\n')
    await shown.shows("this cannot be an answer: it begins like JSON, but is not")
    await shown.shows("at character 9\r\nanswer: ")
    shown.type('{"yes": true}\n')
    await shown.shows('question str: "which title?"\r\nanswer: ')
    shown.type("On being\n")
    assert await shown.ended() == 0
    assert Writer.answers == [Verdict(True), "On being"]


async def test_what_is_typed_before_a_question_answers_nothing(screen: Callable[[str], Screen]) -> None:
    shown = screen(body("a", "impatient"))
    await shown.shows('{"what":"quickly"}\r\nanswer: ')
    await shown.shows("nobody waits for the answer any more\r\n")
    shown.type('{"yes": true}\n')  # too late
    await shown.shows('"too late"')
    await eventually(lambda: shown.text.count('{"yes": true}') == 1)  # the terminal shows what is typed
    Writer.gate.set()
    await shown.shows('{"what":"slowly"}\r\nanswer: ')
    assert Writer.answers == []
    shown.type('{"yes": false}\n')
    assert await shown.ended() == 0
    assert Writer.answers == [Verdict(False)]


async def test_ctrl_c_at_a_question_stops_the_handler(screen: Callable[[str], Screen]) -> None:
    shown = screen(body("a", "approve"))
    await shown.shows("answer: ")
    shown.type("\x03")
    assert await shown.ended() == 130
    assert "Traceback" not in shown.text
    await eventually(lambda: bool(Writer.ended), timeout=1.0)


async def test_ctrl_d_at_a_question_refuses_it(screen: Callable[[str], Screen]) -> None:
    shown = screen(body("a", "approve"))
    await shown.shows("answer: ")
    shown.type("\x04")
    assert await shown.ended() == 6
    assert Writer.ended == ["NobodyToAsk"]


async def test_a_terminal_shows_no_control_characters_of_a_question(screen: Callable[[str], Screen]) -> None:
    shown = screen(body("a", "approve"))
    await shown.shows("answer: ")
    assert "\x1b" not in shown.text
