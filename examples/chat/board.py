"""What a room shows: its lines, and who watches them."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any, TypeAlias

from examples.chat.messages import Line

MOST_LINES = 200
"""Lines that are shown and kept; older ones are dropped."""
MOST_EVENTS = 1000
"""Events that may wait for one browser. One that is slower is disconnected; it connects again, and gets all lines."""

Event: TypeAlias = Mapping[str, Any]
"""What the page gets: its ``event`` says what it is."""


class Watcher:
    """One browser that shows the room."""

    def __init__(self, person: str) -> None:
        self.person = person
        self._events: asyncio.Queue[Event | None] = asyncio.Queue(MOST_EVENTS)

    def tell(self, event: Event) -> None:
        """Send an event. Ends the watching if too many wait."""
        try:
            self._events.put_nowait(event)
        except asyncio.QueueFull:
            self.end()

    def end(self) -> None:
        """End the watching, without the events that wait."""
        while not self._events.empty():
            self._events.get_nowait()
        self._events.put_nowait(None)

    async def next(self) -> Event | None:
        """The next event; None at the end."""
        return await self._events.get()


class Board:
    """The lines of a room, in order, and the browsers that show them."""

    def __init__(self) -> None:
        self.changed = asyncio.Event()
        """Set when a line has changed; who stores the lines clears it."""
        self._lines: dict[str, Line] = {}
        self._watchers: set[Watcher] = set()

    @property
    def lines(self) -> list[Line]:
        """All lines, the oldest first."""
        return list(self._lines.values())

    @property
    def watched(self) -> bool:
        """Whether anybody watches."""
        return bool(self._watchers)

    def add(self, kind: str, name: str, text: str, state: str = "") -> str:
        """Add a line at the end, and return its id."""
        line = Line(uuid.uuid4().hex, kind, name, text, state)
        self._show(line)
        while len(self._lines) > MOST_LINES:
            del self._lines[next(iter(self._lines))]
        return line.id

    def change(self, id: str, **changes: str) -> None:
        """Change a line, unless it was dropped."""
        if (line := self._lines.get(id)) is not None:
            self._show(replace(line, **changes))

    def extend(self, id: str, text: str) -> None:
        """Add text to a line, which is stored when it is changed."""
        if (line := self._lines.get(id)) is not None:
            line.text += text
            self.tell({"event": "text", "id": id, "text": text})

    def move_to_end(self, ids: Iterable[str]) -> None:
        """Move lines to the end, in this order, as far as they were not dropped."""
        for id in ids:
            if (line := self._lines.pop(id, None)) is not None:
                self._lines[id] = line
        self.tell(self._all())
        self.changed.set()

    def begin_with(self, lines: Iterable[Line]) -> None:
        """Put lines that were stored before those that are here."""
        self._lines = {line.id: line for line in lines} | self._lines
        self.tell(self._all())

    async def watch(self, person: str, status: Event) -> AsyncGenerator[Event, None]:
        """The status and all lines, and then every event. ``person`` is empty for one who has not given a name."""
        watcher = Watcher(person)
        watcher.tell(status)
        watcher.tell(self._all())
        self._watchers.add(watcher)
        self._tell_people()
        try:
            while (event := await watcher.next()) is not None:
                yield event
        finally:
            self._watchers.discard(watcher)
            self._tell_people()

    def end_watching(self) -> None:
        """End the watching of all."""
        for watcher in self._watchers:
            watcher.end()

    def tell(self, event: Event) -> None:
        """Send an event to all who watch."""
        for watcher in self._watchers:
            watcher.tell(event)

    def _show(self, line: Line) -> None:
        self._lines[line.id] = line
        self.tell({"event": "line", "line": asdict(line)})
        self.changed.set()

    def _all(self) -> Event:
        return {"event": "all", "lines": [asdict(line) for line in self._lines.values()]}

    def _tell_people(self) -> None:
        self.tell({"event": "people", "people": sorted({one.person for one in self._watchers if one.person})})
