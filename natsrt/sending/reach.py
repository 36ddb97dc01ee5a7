"""Whether this user may send events on a topic, and to the keyed agents that take them.

The server does not tell a publisher that it refused a message: it tells the connection, later. So before the first
event on a topic type, and before the first one for a keyed type, `Reach` publishes to the subjects that such events
use, and waits until the server knows. The server traces these messages (``Nats-Trace-Only``), and delivers them to
nobody. Later events of the type cost nothing.

A user that may not publish to where the server would report is not told about such a message. The first event on each
topic type is then confirmed itself, by one round trip after it.

What is known ends with the connection, and for a type as soon as the server refuses something that was sent to one of
its subjects: permissions can be changed, and can be for some sources or keys only. From then on each subject of the
type is tried. A refused one is tried again after some seconds, since an operator may mend it; until then events on it
are refused here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import NamedTuple

from autogen_core import TopicId
from nats.nuid import NUID

from natsrt.errors import PermissionDenied, ServerUnreachable
from natsrt.sending.send_queue import SendQueue
from natsrt.transport.connection import Connection, Refusal
from natsrt.transport.probe import TRACE_DEST, TRACE_ONLY
from natsrt.transport.refusals import REFUSED_AGAIN
from natsrt.wire.subjects import Subjects

_REMEMBERED = 10_000
"""Types and subjects of which it is remembered whether they can be reached; some megabytes."""
_PUBLISH = "publish to"


class _Way(NamedTuple):
    """What one event takes to the subscribers of a topic type, or to the agents of a keyed type."""

    open: set[str]
    """The names, of topic types or of keyed types, to which events may be sent. One of them may be ``name``."""
    name: str
    prefix: str
    """The subjects of this type are this one, and those that have one more token."""
    subjects: tuple[str, ...]


class Reach:
    """The topic types and keyed types to which one runtime may send events."""

    def __init__(self, connection: Connection, subjects: Subjects, queue: SendQueue) -> None:
        self._connection = connection
        self._subjects = subjects
        self._queue = queue
        self.topics: set[str] = set()
        """The topic types on which events may be sent without `check`."""
        self._keyed: set[str] = set()
        """The keyed types to whose agents events may be sent without `check`."""
        self._open: dict[str, tuple[set[str], str]] = {}
        """Where a type is one of these, by the prefix of its subjects."""
        self._partly: dict[str, set[str]] = {}
        """The subjects that may be used, by the prefix, of types of which the server has refused a subject."""
        self._refused: dict[str, float] = {}
        """When the server refused a subject, by the event loop's clock."""
        self._size = 0
        """Number of types and subjects that were remembered."""
        self._untold = False
        """True if the server does not say what it refuses of the messages that it traces."""
        self._confirming: set[str] = set()
        """The subjects of events that are confirmed themselves."""
        self._checking = asyncio.Lock()
        self._tried: set[str] = set()
        """The subjects that are tried at the moment."""
        self._denied: set[str] = set()
        """Those of them that the server has refused."""
        connection.on_denied(self._on_denied)
        connection.add_listener(self)

    def includes(self, agent_types: Collection[str]) -> bool:
        """True if events for these keyed types may be sent without `check`."""
        return self._keyed.issuperset(agent_types)

    async def check(self, topic: TopicId, subject: str, agent_types: Collection[str]) -> bool:
        """Find out whether an event on ``topic`` may be sent to ``subject``, and to its agents of these keyed types.

        Messages that are sent meanwhile wait in the queue. Raises `PermissionDenied`, which names the subject. Returns
        False if that cannot be found out for the topic: then `confirm` the event when it is sent.
        """
        way = self._topic(topic, subject)
        ways = [way]
        for agent_type in agent_types:
            prefix = self._subjects.agent(agent_type)
            agent = self._subjects.instance(agent_type, topic.source)
            ways.append(_Way(self._keyed, agent_type, prefix, (prefix, agent)))
        if self._unknown(ways) and not self._untold:
            if self._queue.waiting:  # the present message has the turn
                await self._check(ways)
            else:
                async with self._queue.turn(None):
                    await self._check(ways)
        if not self._untold or not (unknown := self._unknown(ways)):
            return True
        for found in unknown:
            if found is not way:
                self._found_open(found)
        if way not in unknown:
            return True
        self._confirming.add(subject)
        return False

    async def confirm(self, topic: TopicId, subject: str) -> None:
        """Wait until the server knows an event that was sent. Raises `PermissionDenied` if it has refused it."""
        try:
            await self._connection.barrier()
        except ServerUnreachable:
            return  # the event waits as others do
        finally:
            self._confirming.discard(subject)
        way = self._topic(topic, subject)
        if self._unknown((way,)):
            self._found_open(way)

    def _topic(self, topic: TopicId, subject: str) -> _Way:
        return _Way(self.topics, topic.type, subject.rpartition(".")[0], (subject,))

    def _unknown(self, ways: Collection[_Way]) -> list[_Way]:
        """Those that must be tried. Raises `PermissionDenied` if one of them was refused a short time ago."""
        if self._refused:
            since = asyncio.get_running_loop().time() - REFUSED_AGAIN
            for way in ways:
                for subject in way.subjects:
                    if self._refused.get(subject, since) > since:
                        raise PermissionDenied(_PUBLISH, subject)
        return [
            way
            for way in ways
            if way.name not in way.open and not self._partly.get(way.prefix, set()) >= {*way.subjects}
        ]

    async def _check(self, ways: Collection[_Way]) -> None:
        async with self._checking:
            # While it is not connected, the event waits in the client's buffer.
            if (unknown := self._unknown(ways)) and self._connection.connected:
                await self._try(unknown)

    async def _try(self, ways: Collection[_Way]) -> None:
        # The server reports to where nobody listens. If it refuses that, it does not say what else it refuses.
        report = self._subjects.worker(f"nobody-{NUID().next().decode()}")
        subjects = [subject for way in ways for subject in way.subjects]
        self._tried, self._denied = {report, *subjects}, set()
        try:
            for subject in subjects:
                await self._connection.publish(subject, b"", headers={TRACE_DEST: report, TRACE_ONLY: "true"})
            await self._connection.barrier()
        except ServerUnreachable:  # the connection was lost meanwhile: it is not known
            return
        finally:
            self._tried = set()
        if report in self._denied:
            self._untold = True
            return
        for way in ways:
            if self._denied.isdisjoint(way.subjects):
                self._found_open(way)
            else:
                for subject in self._denied.intersection(way.subjects):
                    self._found_refused(way.prefix, subject)
        if denied := next((subject for subject in subjects if subject in self._denied), None):
            raise PermissionDenied(_PUBLISH, denied)

    # -- what is known -------------------------------------------------------------------------------------------

    def _found_open(self, way: _Way) -> None:
        self._make_room()
        if (accepted := self._partly.get(way.prefix)) is not None:
            accepted.update(way.subjects)
        else:
            way.open.add(way.name)
            self._open[way.prefix] = way.open, way.name

    def _found_refused(self, prefix: str, subject: str) -> None:
        self._make_room()
        if (place := self._open.pop(prefix, None)) is not None:
            names, name = place
            names.discard(name)
        self._partly.setdefault(prefix, set()).discard(subject)
        self._refused[subject] = asyncio.get_running_loop().time()

    def _make_room(self) -> None:
        if self._size >= _REMEMBERED:
            self.forget()
        self._size += 1

    def forget(self) -> None:
        """Find out everything again."""
        for known in (self.topics, self._keyed, self._open, self._partly, self._refused):
            known.clear()
        self._size = 0
        self._untold = False

    def connection_lost(self) -> None:
        """Part of `Listener`."""

    def connection_made(self) -> None:
        """Part of `Listener`. The user's permissions may be others now."""
        self.forget()

    def _on_denied(self, denied: Refusal) -> bool:
        subject = denied.subject
        if denied.operation != _PUBLISH:
            return False
        if subject in self._tried:
            self._denied.add(subject)
            return True
        confirming, above = subject in self._confirming, subject.rpartition(".")[0]
        for prefix in (subject, above):
            if prefix in self._open or prefix in self._partly or (confirming and prefix == above):
                self._found_refused(prefix, subject)
        return confirming
