"""Waits until an agent type, or one agent, is served.

Rules:

1. The registry says which workers host a type. Its changes are events, so while no worker hosts the type, nothing is
   asked for. Only plain NATS responders must be looked for, because NATS does not announce them.
2. An entry in the registry is not enough. A worker declares a type before its subscriptions are in effect, and a dead
   worker stays in the registry for some seconds. So the workers are asked, and one has to confirm.
3. A worker that has begun to drain, or to unregister the type, may still confirm. So the view is looked at again, with
   everything that was committed meanwhile, and the server is asked for a subscriber. In a cluster, that also shows
   that the server of this runtime knows the worker's subscription.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence

from autogen_core import AgentId

from natsrt.background import BackgroundTasks, end_tasks
from natsrt.errors import AgentNotServed, NatsrtError, PermissionDenied, RegistryUnavailable, ServerUnreachable
from natsrt.jetstream.registry.registry import Registry, RegistryListener
from natsrt.options import Options
from natsrt.sending.limits import Limit
from natsrt.transport.connection import Connection, Refusal
from natsrt.transport.peers import Peers
from natsrt.transport.probe import Probe
from natsrt.transport.readiness import Readiness
from natsrt.wire.subjects import Subjects

logger: logging.Logger = logging.getLogger("natsrt.calls")

_ANSWER_WITHIN = 1.0
"""Maximum time for a worker to confirm that it serves a type, in seconds, beside the round trip to the server. A worker
that starts confirms later. The time is doubled whenever no worker has confirmed, because they may be far away."""
_ANSWER_AT_LAST = 4.0
"""Maximum of that time, in seconds."""
_ASKED_AT_ONCE = 8
"""Maximum number of workers that are asked at the same time: one that serves the type is enough."""
_FIRST_PAUSE = 0.05
"""Seconds between the first two attempts, if the registry does not change meanwhile."""
_LONGEST_PAUSE = 1.0
"""Maximum pause between two attempts, in seconds."""
_LIST_AT_MOST = 20
"""Names that an error lists at most."""


class _Watch:
    """One agent type or agent that is waited for, in one task for all who wait."""

    __slots__ = ("agent", "outcome", "patience", "task", "waiting")

    def __init__(self, agent: str | AgentId) -> None:
        self.agent = agent
        self.outcome: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.task: asyncio.Task[None] | None = None
        self.waiting = 0
        """Number of callers that wait."""
        self.patience = _ANSWER_WITHIN
        """Seconds for which the next answer of a worker is waited for."""

    @property
    def agent_type(self) -> str:
        return self.agent if isinstance(self.agent, str) else self.agent.type

    def fail(self, error: Exception) -> None:
        if not self.outcome.done():
            self.outcome.set_exception(error)
            self.outcome.exception()  # so that asyncio does not log it if nothing waits any more


class Arrivals(RegistryListener):
    """The waits of one runtime."""

    def __init__(
        self,
        *,
        connection: Connection,
        subjects: Subjects,
        options: Options,
        registry: Registry,
        readiness: Readiness,
        peers: Peers,
        probe: Probe,
    ) -> None:
        self._connection = connection
        self._subjects = subjects
        self._options = options
        self._registry = registry
        self._readiness = readiness
        self._peers = peers
        self._probe = probe
        self._watches: dict[str | AgentId, _Watch] = {}
        self._denied: dict[str, PermissionDenied] = {}
        """The subjects that this user may not publish to, by what the server refused while there were waits."""
        self._change = asyncio.Event()
        """Set at a change of the registry's view, and then replaced by a new event."""
        self._tasks = BackgroundTasks(logger, "waiting for an agent type failed")
        self._stopped = False
        registry.add_listener(self)
        connection.on_denied(self._on_denied)

    async def wait_for(self, agent: str | AgentId, timeout: float | None) -> None:
        """Do what `NatsAgentRuntime.wait_for` describes. ``agent`` is a valid agent type or an agent id."""
        if timeout is not None:
            timeout = Limit.of_argument(timeout).seconds
        if self._stopped:
            raise _stopped()
        watch = self._watches.get(agent) or self._begin(agent)
        watch.waiting += 1
        try:
            await asyncio.wait({watch.outcome}, timeout=timeout)
            if not watch.outcome.done():
                assert timeout is not None
                raise AgentNotServed(str(agent), timeout, self._missing(watch))
            watch.outcome.result()
        finally:
            watch.waiting -= 1
            if not watch.waiting and watch.task is not None:
                self._forget(watch)
                watch.task.cancel()

    async def stop(self) -> None:
        """End every wait with `RegistryUnavailable`, those that begin later too."""
        self._stopped = True
        for watch in self._watches.values():
            watch.fail(_stopped())
        await self._tasks.cancel()

    def view_changed(self) -> None:
        if self._watches:
            self._change.set()
            self._change = asyncio.Event()

    def _on_denied(self, denied: Refusal) -> None:
        if self._watches and isinstance(denied, PermissionDenied):
            self._denied[denied.subject.lower()] = denied  # the client reports subjects in lower case

    # -- one watch -----------------------------------------------------------------------------------------------

    def _begin(self, agent: str | AgentId) -> _Watch:
        watch = self._watches[agent] = _Watch(agent)
        watch.task = self._tasks.spawn(self._follow(watch), name=f"natsrt wait for {agent}")
        return watch

    def _forget(self, watch: _Watch) -> None:
        if self._watches.get(watch.agent) is watch:
            del self._watches[watch.agent]
        if not self._watches:
            self._denied.clear()

    async def _follow(self, watch: _Watch) -> None:
        try:
            await self._until_served(watch)
        except Exception as error:
            watch.fail(error)
        else:
            if not watch.outcome.done():
                watch.outcome.set_result(None)
        finally:
            self._forget(watch)

    async def _until_served(self, watch: _Watch) -> None:
        """Return when a worker serves what the watch waits for, or when nothing waits any more."""
        await self._readiness.wait_started()
        pause = _FIRST_PAUSE
        while watch.waiting:
            await self._connection.wait_connected(self._options.offline_timeout)
            takers = self._takers(watch)
            try:
                if await self._is_served(watch, takers):
                    return
            except (ServerUnreachable, RegistryUnavailable) as error:  # the connection or JetStream comes back
                logger.debug("waiting for %s: %s", watch.agent, error)
            changed = await self._takers_change(watch, takers, pause)
            pause = _FIRST_PAUSE if changed else min(pause * 2, _LONGEST_PAUSE)

    async def _takers_change(self, watch: _Watch, takers: Sequence[str], within: float) -> bool:
        """Wait until the view has other takers. Returns False after ``within`` seconds."""
        try:
            async with asyncio.timeout(within):
                while self._takers(watch) == takers:
                    await self._change.wait()
        except TimeoutError:
            return False
        return True

    def _takers(self, watch: _Watch) -> list[str]:
        """The workers that take new messages for the agent, by the present view."""
        view = self._registry.view
        return view.workers_hosting(watch.agent) if isinstance(watch.agent, str) else view.takers_of(watch.agent)

    # -- one attempt ---------------------------------------------------------------------------------------------

    async def _is_served(self, watch: _Watch, takers: Sequence[str]) -> bool:
        if not takers:
            return await self._listens(self._subjects.agent(watch.agent_type), plain=True) is True
        worker_id = await self._first_to_confirm(watch, takers)
        if worker_id is None:
            watch.patience = min(2 * watch.patience, _ANSWER_AT_LAST)
            return False
        await self._registry.catch_up()
        if worker_id not in self._takers(watch):
            return False
        subject = self._subject(watch, worker_id)
        return subject is not None and await self._listens(subject) is not False

    async def _listens(self, subject: str, *, plain: bool = False) -> bool | None:
        """Do what `Probe.responder_exists` does. Raises `PermissionDenied` if this user may not publish there."""
        answer = await self._probe.responder_exists(subject, plain=plain)
        self._refuse_denied(subject)
        return answer

    def _refuse_denied(self, subject: str) -> None:
        if (denied := self._denied.get(subject.lower())) is not None:
            raise denied

    async def _first_to_confirm(self, watch: _Watch, takers: Sequence[str]) -> str | None:
        """The first worker to confirm that it serves the type; None if none does."""
        asked = takers if len(takers) <= _ASKED_AT_ONCE else random.sample(takers, _ASKED_AT_ONCE)
        questions = [
            asyncio.ensure_future(self._confirmed(worker_id, watch.agent_type, watch.patience)) for worker_id in asked
        ]
        try:
            for answer in asyncio.as_completed(questions):
                confirmed = await answer
                if confirmed is not None:
                    return confirmed
        finally:
            await end_tasks(*questions)
        return None

    async def _confirmed(self, worker_id: str, agent_type: str, within: float) -> str | None:
        """``worker_id`` if that worker confirms within ``within`` seconds that it serves the type, else None."""
        subject = self._subjects.worker(worker_id)  # callers may ask there
        if await self._peers.serves(subject, agent_type, self._registry.view.applied, within):
            return worker_id
        self._refuse_denied(subject)
        if self._registry.lists(worker_id) and not await self._peers.listens(worker_id):
            self._registry.suspect(worker_id)
        return None

    def _subject(self, watch: _Watch, worker_id: str) -> str | None:
        """The subject of a call that the worker takes; None if its instances have gone meanwhile."""
        if isinstance(watch.agent, AgentId):
            return self._registry.subject_of(watch.agent)
        view = self._registry.view
        if not view.hosts[watch.agent][worker_id].instances:
            return self._subjects.agent(watch.agent)
        keys = (key for key, holders in view.instances.get(watch.agent, {}).items() if worker_id in holders)
        return next((self._subjects.instance(watch.agent, key) for key in keys), None)

    # -- why not -------------------------------------------------------------------------------------------------

    def _missing(self, watch: _Watch) -> str:
        """Why the agent is not served, by the present view."""
        if not self._readiness.started:
            return "this runtime has not started yet"
        if not self._connection.connected:
            return f"there is no connection to {', '.join(self._options.safe_servers)}"
        if takers := self._takers(watch):
            return f"{_workers(takers)} hosts it, but did not confirm that it serves it"
        view, agent_type = self._registry.view, watch.agent_type
        if view.workers_hosting(agent_type):
            keys = sorted(view.instances.get(agent_type, ()))[:_LIST_AT_MOST]
            return f"its type has registered instances only ({', '.join(f'{agent_type}/{key}' for key in keys)})"
        if draining := view.live(view.hosts.get(agent_type, ())):
            return f"{_workers(draining)} hosts it, but is stopping"
        others = sorted(other for other in view.hosts if view.workers_hosting(other))[:_LIST_AT_MOST]
        return f"no worker hosts it; live workers host {', '.join(others) or 'nothing'}"


def _workers(worker_ids: Sequence[str]) -> str:
    return f"worker {', '.join(sorted(worker_ids)[:_LIST_AT_MOST])}"


def _stopped() -> NatsrtError:
    return RegistryUnavailable("follow", "this runtime was stopped")
