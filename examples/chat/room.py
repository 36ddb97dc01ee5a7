"""One open room at the web server: what people say, the runs of the team, and its questions.

What people say while the team answers waits, and is then its next task, all of it together.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing
from dataclasses import replace

from autogen_agentchat.messages import BaseAgentEvent, BaseChatMessage, ModelClientStreamingChunkEvent, TextMessage
from autogen_core import AgentId

from examples.chat.board import Board
from examples.chat.failures import AlreadyDecided, TooManyWaiting, for_log, readable
from examples.chat.messages import Approval, Keep, Kept, Line, Recall, Verdict
from examples.chat.team import AGENTS, TEAM, TRANSCRIPT
from natsrt import NatsAgentRuntime
from natsrt.agentchat import RemoteTeam

logger = logging.getLogger("examples.chat")

MOST_WAITING = 20
"""Messages that may wait for the team."""
WORKERS_WITHIN = 30.0
"""Seconds that a run waits for workers, such as one that is started again."""
RETRY_SECONDS = 1.0
"""Seconds between two attempts to read or to store the transcript."""

_INTERRUPTED = {"waiting": "unheard", "asked": "unheard", "writing": "broken", "open": "withdrawn"}
"""The states of lines that depend on a run, and what they become if it is interrupted."""


class Room:
    """One room. ``close`` it when nobody uses it any more."""

    def __init__(self, name: str, runtime: NatsAgentRuntime) -> None:
        self.board = Board()
        self._name = name
        self._runtime = runtime
        self._waiting: list[str] = []
        """The ids of the lines that are the next task of the team."""
        self._said = asyncio.Event()
        self._answering = False
        self._writing: dict[str, str] = {}
        """The id of the line that an agent is writing, by the agent's name."""
        self._questions: dict[str, asyncio.Future[Verdict]] = {}
        """The questions that are open, by the ids of their lines."""
        self._running = asyncio.create_task(self._run(), name=f"room {name}")

    @property
    def idle(self) -> bool:
        """Whether nobody watches, and nothing is left to do."""
        return not (self.board.watched or self._waiting or self._answering or self.board.changed.is_set())

    async def close(self) -> None:
        """Leave the room. A run of the team is cancelled."""
        self._running.cancel()
        await asyncio.gather(self._running, return_exceptions=True)

    def say(self, person: str, text: str) -> None:
        """Let a person say something. Raises TooManyWaiting."""
        if len(self._waiting) >= MOST_WAITING:
            raise TooManyWaiting
        self._waiting.append(self.board.add("person", person, text, "waiting"))
        self._said.set()

    def decide(self, question: str, verdict: Verdict) -> None:
        """Answer a question. The first answer counts. Raises AlreadyDecided."""
        answer = self._questions.pop(question, None)
        if answer is None:
            raise AlreadyDecided
        answer.set_result(verdict)
        self.board.change(question, state="approved" if verdict.approved else "refused", by=verdict.by)

    # -- the transcript ------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        await self._recall()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._talk())
            group.create_task(self._keep())

    async def _recall(self) -> None:
        """Get what was said before this process had the room open."""
        while True:
            try:
                await self._runtime.wait_for(TRANSCRIPT)
                kept: Kept = await self._runtime.send_message(Recall(), AgentId(TRANSCRIPT, self._name))
                break
            except Exception as error:
                logger.warning("the transcript of %s cannot be read yet: %s", self._name, for_log(error))
                await asyncio.sleep(RETRY_SECONDS)
        lines = [replace(line, state=_INTERRUPTED.get(line.state, line.state)) for line in kept.lines]
        self.board.begin_with(lines)
        if lines != kept.lines:
            self.board.add("error", "", "The web server was restarted in the middle. Please send your message again.")

    async def _keep(self) -> None:
        """Have every change stored."""
        while True:
            await self.board.changed.wait()
            self.board.changed.clear()
            try:
                await self._runtime.send_message(Keep(self.board.lines), AgentId(TRANSCRIPT, self._name))
            except Exception as error:
                logger.warning("the transcript of %s cannot be stored yet: %s", self._name, for_log(error))
                self.board.changed.set()
                await asyncio.sleep(RETRY_SECONDS)

    # -- the team ------------------------------------------------------------------------------------------------

    async def _talk(self) -> None:
        """Let the team answer, one task after the other."""
        while True:
            await self._said.wait()
            self._said.clear()
            task, self._waiting = self._waiting, []
            self._answering = True
            self.board.move_to_end(task)  # so that the answer follows what was asked
            for id in task:
                self.board.change(id, state="asked")
            failure = ""
            try:
                await self._answer([line for line in self.board.lines if line.id in task])
            except Exception as error:
                logger.warning("the team could not answer in %s: %s", self._name, for_log(error))
                failure = readable(error)
            for id in task:
                self.board.change(id, state="unheard" if failure else "")
            for id in self._writing.values():
                self.board.change(id, state="broken")
            self._writing.clear()
            if failure:
                self.board.add("error", "", failure)
            self._answering = False

    async def _answer(self, said: list[Line]) -> None:
        for agent_type in AGENTS:
            await self._runtime.wait_for(agent_type, timeout=WORKERS_WITHIN)
        team = await RemoteTeam.connect(
            TEAM, self._runtime, timeout=WORKERS_WITHIN, session=self._name, on_question=self._ask
        )
        task = [TextMessage(content=f"{line.name}: {line.text}", source="user") for line in said]
        async with aclosing(team.run_stream(task=task, output_task_messages=False)) as items:
            async for item in items:
                if isinstance(item, BaseAgentEvent | BaseChatMessage):
                    self._hear(item)

    def _hear(self, item: BaseAgentEvent | BaseChatMessage) -> None:
        name = item.source
        if isinstance(item, ModelClientStreamingChunkEvent):
            if name not in self._writing:
                self._writing[name] = self.board.add("agent", name, "", "writing")
            self.board.extend(self._writing[name], item.content)
        elif isinstance(item, BaseChatMessage):
            id = self._writing.pop(name, None) or self.board.add("agent", name, "")
            self.board.change(id, text=item.to_text(), state="")

    async def _ask(self, question: Approval) -> Verdict:
        """Ask the people in the room."""
        id = self.board.add("question", "publisher", question.text, "open")
        answer: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()
        self._questions[id] = answer
        try:
            return await answer
        finally:
            if self._questions.pop(id, None) is not None:  # nobody has answered: the run has ended
                self.board.change(id, state="withdrawn")
