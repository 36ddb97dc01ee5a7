"""The rooms that are open at the web server, and what they all show: who is there of the team."""

from __future__ import annotations

import asyncio
from types import TracebackType

from examples.chat.board import Event
from examples.chat.failures import TooManyRooms
from examples.chat.room import Room
from examples.chat.team import AGENTS
from natsrt import NatsAgentRuntime

MOST_ROOMS = 1000
"""Rooms that may be open at once."""
STATUS_SECONDS = 0.5
"""Seconds between two looks at the status. A look costs nothing: it sends nothing."""


class Rooms:
    """The rooms that are in use. Use it in ``async with``."""

    def __init__(self, runtime: NatsAgentRuntime) -> None:
        self.status: Event = {}
        """What the pages show of the team."""
        self._runtime = runtime
        self._rooms: dict[str, Room] = {}

    async def __aenter__(self) -> Rooms:
        self.status = self._look()
        self._looking = asyncio.create_task(self._watch_status())
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._looking.cancel()
        await asyncio.gather(self._looking, *(room.close() for room in self._rooms.values()), return_exceptions=True)

    def open(self, name: str) -> Room:
        """The room of this name. Raises TooManyRooms."""
        room = self._rooms.get(name)
        if room is None:
            if len(self._rooms) >= MOST_ROOMS:
                raise TooManyRooms
            room = self._rooms[name] = Room(name, self._runtime)
        return room

    def end_watching(self) -> None:
        """Disconnect all browsers."""
        for room in self._rooms.values():
            room.board.end_watching()

    def _look(self) -> Event:
        return {
            "event": "status",
            "server": self._runtime.health().connected,
            "agents": {name: self._runtime.type_details(name) is not None for name in AGENTS},
        }

    async def _watch_status(self) -> None:
        """Tell the pages what changes, and leave the rooms that nobody uses any more."""
        while True:
            await asyncio.sleep(STATUS_SECONDS)
            if (found := self._look()) != self.status:
                self.status = found
                for room in self._rooms.values():
                    room.board.tell(found)
            for name, room in list(self._rooms.items()):
                if room.idle:
                    del self._rooms[name]
                    await room.close()
